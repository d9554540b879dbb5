"""A plugin of botocore: workers repeat failed requests almost at once.

botocore loads it where BOTOCORE_EXPERIMENTAL__PLUGINS names it. Clients of the test process itself
are left alone: a test can change those, and must put them back.
"""

from __future__ import annotations

import sys
from typing import Any

from botocore.retries.standard import ExponentialBackoff

PAUSE = 0.02  # seconds; with jitter of its own, botocore waits half a second, one, two


def initialize_client_plugin(client: Any) -> None:
    """Shorten the pauses; botocore calls it for every client."""
    if sys.argv[1:2] == ["worker"]:
        ExponentialBackoff.delay_amount = pause  # type: ignore[assignment,method-assign]


def pause(backoff: ExponentialBackoff, context: Any) -> float:
    return PAUSE

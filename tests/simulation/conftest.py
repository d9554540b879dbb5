from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

# Read at import: no test sees such variables later.
SEED = os.environ.get("STARBURST_SEED")


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Formatting the warnings of thousands of failures takes longer than the failures do."""
    logger = logging.getLogger("starburst_executor")
    level = logger.level
    logger.setLevel(logging.NOTSET if SEED else logging.CRITICAL)
    yield
    logger.setLevel(level)

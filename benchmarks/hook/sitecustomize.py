"""On workers' PYTHONPATH during a benchmark: records at exit how many requests were sent.

The counts are botocore's own `before-send` events, counted by the package in every process.
"""

import atexit
import json
import os
import sys
from pathlib import Path


def _write_counts() -> None:
    clients = sys.modules.get("starburst_executor.aws.clients")
    if clients is not None:
        target = Path(os.environ["STARBURST_BENCHMARK_COUNTS"], f"{os.getpid()}.json")
        target.write_text(json.dumps(dict(clients.requests)))


if "STARBURST_BENCHMARK_COUNTS" in os.environ:
    atexit.register(_write_counts)

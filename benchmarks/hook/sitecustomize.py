"""On workers' PYTHONPATH during a benchmark: records at exit how many requests were sent.

The counts are botocore's own `before-send` events, counted by the package in every process.
"""

import atexit
import json
import os
import sys
from pathlib import Path


def _write_counts() -> None:
    aws = sys.modules.get("starburst_executor.aws")
    if aws is not None:
        target = Path(os.environ["STARBURST_BENCHMARK_COUNTS"], f"{os.getpid()}.json")
        target.write_text(json.dumps(dict(aws.requests)))


if "STARBURST_BENCHMARK_COUNTS" in os.environ:
    atexit.register(_write_counts)

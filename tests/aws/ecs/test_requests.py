"""How fast ECS is asked."""

from __future__ import annotations

import pytest

from starburst_executor.aws.ecs.requests import TokenBucket
from tests.support.ecs_script import VirtualRuntime


def test_a_pace_gives_a_burst_and_then_a_rate() -> None:
    runtime = VirtualRuntime()
    pace = TokenBucket(runtime, 100, 20)
    pace.take(100)
    assert runtime.now == 1000
    pace.take(20)
    assert runtime.now == 1001
    runtime.now += 3600  # fills it up, and no more
    pace.take(110)
    assert runtime.now == pytest.approx(4601.5)

"""Many tasks over a bad connection, with an outage in the middle: nothing is lost or done twice."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import as_completed
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from msgspec.structs import replace

from starburst_executor import StarburstExecutor
from tests.support.fault_proxy import Fault, Share, everything
from tests.support.scene import Scene, Tally, scene_at, told_or_done
from tests.support.sessions import QUICK
from tests.support.tasks import DEADLINE, until

TASKS = 200
BAD = 0.05  # of all replies
SEED = 20261125
LARGE = 2 << 20  # bytes; not in the record, but in an object of its own
INTERVALS = replace(QUICK, lease=240)  # nobody is lost, however slow the machine


def work(tally: Tally, number: int, data: bytes) -> tuple[str, bytes]:
    tally.begin(number)
    return f"{number} {hashlib.sha256(data).hexdigest()}", data[:: number or 1]


@pytest.fixture(params=["ministack", "seaweedfs"])
def scene(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with scene_at(request.getfixturevalue(request.param), monkeypatch) as set_up:
        yield set_up


@pytest.mark.slow
@pytest.mark.parametrize(
    "seconds",
    [pytest.param(2, id="moment"), pytest.param(60, id="minute", marks=pytest.mark.soak)],
)
def test_all_results_come_once_over_a_bad_connection_with_an_outage(
    scene: Scene, seconds: float, tmp_path: Path
) -> None:
    tally = Tally(tmp_path / "tally")
    large = os.urandom(LARGE)
    executor = StarburstExecutor(2, store=scene.url, intervals=INTERVALS)
    scene.plan(partial(Share, BAD, [*Fault], SEED))
    try:
        given = [large if number % 50 == 0 else b"%d" % number for number in range(TASKS)]
        futures = [executor.submit(work, tally, *both) for both in enumerate(given)]
        list(islice(as_completed(futures, DEADLINE), TASKS // 4))
        scene.plan(lambda: everything(Fault.UNAVAILABLE))
        threading.Event().wait(seconds)
        scene.plan(partial(Share, BAD, [*Fault], SEED + 1))
        for number, future in enumerate(futures):
            assert future.result(5 * DEADLINE) == (
                f"{number} {hashlib.sha256(given[number]).hexdigest()}",
                given[number][:: number or 1],
            )
    finally:
        until(lambda: told_or_done(partial(executor.cleanup, force=True)), "cleaned up")
    assert tally.counts() == {str(number): 1 for number in range(TASKS)}
    assert scene.stored() == []

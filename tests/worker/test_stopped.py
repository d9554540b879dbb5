"""Workers that are stopped, as by SIGSTOP or a hang: they hold up nobody, and may go on later."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from starburst_executor import SessionNotFound, StarburstExecutor
from tests.support.sessions import QUICK, live_workers, worker_pids
from tests.support.tasks import Gate, double, hold_the_first, until

Make = Callable[..., StarburstExecutor]


@pytest.fixture
def make(directory_url: str) -> Iterator[Make]:
    made: list[StarburstExecutor] = []

    def make_one(max_workers: int = 1, **options: Any) -> StarburstExecutor:
        made.append(StarburstExecutor(max_workers, store=directory_url, intervals=QUICK, **options))
        return made[-1]

    yield make_one
    for one in made:
        with contextlib.suppress(SessionNotFound):
            one.cleanup(force=True)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


def test_a_stopped_worker_keeps_neither_its_seat_nor_its_tasks(make: Make, gate: Gate) -> None:
    one = make(max_workers=1)
    held = one.submit(hold_the_first, gate)
    gate.await_arrivals()
    [(stopped, pid)] = worker_pids(one).items()
    os.kill(pid, signal.SIGSTOP)
    waiting = one.submit(double, 4)
    assert (held.result(60), waiting.result(60)) == (2, 8)
    assert stopped in live_workers(one), "its process lives"
    outcomes = one.collect()
    assert stopped not in {outcome.worker for outcome in outcomes}
    assert [outcome.attempt for outcome in outcomes] == [2, 1]


def first_waits(gate: Gate) -> int:
    """The first attempt ends once the gate is open, all others at once."""
    before = gate.arrive()
    if not before:
        until(gate.is_open)
    return before + 1


def test_a_worker_that_goes_on_after_it_was_replaced_changes_nothing(
    make: Make, gate: Gate
) -> None:
    one = make(max_workers=1)
    held = one.submit(first_waits, gate)
    gate.await_arrivals()
    [pid] = worker_pids(one).values()
    os.kill(pid, signal.SIGSTOP)
    assert held.result(60) == 2
    [before] = one.collect()
    gate.open()  # its child ends the task while the worker is stopped
    os.kill(pid, signal.SIGCONT)
    until(lambda: len(live_workers(one)) == 1, "one of the two leaves")
    assert one.submit(double, 4).result(60) == 8
    assert one.collect()[held.index] == before

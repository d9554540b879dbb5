"""Errors that nobody expects: no thread dies of one, and what it held ends or goes elsewhere."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from starburst_executor import ExecutorBroken, StarburstExecutor
from starburst_executor.client import creation
from starburst_executor.launchers.local import LocalLauncher
from starburst_executor.protocol.manifest import Heartbeat, WorkerState
from starburst_executor.protocol.session import Session
from starburst_executor.runtime import SystemRuntime
from starburst_executor.worker.pool import SlotsBroken
from tests.support.sessions import QUICK
from tests.support.shop import PATIENCE, Shop, raises, task_of
from tests.support.tasks import Gate, double

# --- the client -------------------------------------------------------------------


def test_an_accident_while_tasks_are_stored_ends_them_and_whoever_waits(
    lone: StarburstExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(Session, "put_batch", fail)
    futures = [lone.submit(double, 1)]
    with suppress(ExecutorBroken):
        futures += [lone.submit(double, i) for i in range(1000)]
    with pytest.raises(ExecutorBroken, match="none left"):
        lone.flush()
    for future in futures:
        with pytest.raises(ExecutorBroken, match="none left"):
            future.result(PATIENCE)
    lone.shutdown()


def test_a_submit_thread_that_dies_ends_what_it_held_and_whoever_waits(
    lone: StarburstExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("starburst_executor.client.submitter.Submitter._batch_size", fail)
    future = lone.submit(double, 1)
    with pytest.raises(ExecutorBroken, match="can't start new thread"):
        future.result(PATIENCE)
    with pytest.raises(ExecutorBroken, match="can't start new thread"):
        lone.flush()
    lone.shutdown()


def test_calls_that_are_under_way_end_before_gather_says_that_no_thread_can_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = SystemRuntime(width=2)
    ended = threading.Event()
    entered = threading.Event()
    submit = ThreadPoolExecutor.submit
    calls: list[object] = []

    def refuse_the_second(pool: ThreadPoolExecutor, call: Any) -> Any:
        calls.append(call)
        if len(calls) == 2:
            entered.set()
            raise RuntimeError("can't start new thread")
        return submit(pool, call)

    def slow() -> None:
        assert entered.wait(PATIENCE)
        ended.set()

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse_the_second)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        runtime.gather([slow, slow])
    assert ended.is_set()
    runtime.close()


def exit_in_a_callback(_: object) -> None:
    raise SystemExit("in a callback")


def test_a_callback_that_exits_keeps_no_other_future_from_ending(
    directory_url: str,
) -> None:
    with StarburstExecutor(1, store=directory_url, intervals=QUICK) as one:
        first = one.submit(double, 1)
        first.add_done_callback(exit_in_a_callback)
        others = [one.submit(double, i) for i in range(20)]
        assert [other.result(PATIENCE) for other in others] == [*range(0, 40, 2)]


# --- the worker -------------------------------------------------------------------


def test_a_worker_whose_children_cannot_begin_hands_back_and_leaves(
    lone: StarburstExecutor, shop: Shop, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    running = lone.submit(gate.hold, 1)
    shop.open()
    gate.await_arrivals()
    monkey = shop.slots
    monkey._fatal = SlotsBroken("no process can be started")
    monkey.signal.set()
    with monkey._lock:
        monkey._wake()
    beat = shop.left()
    assert (beat.state, beat.reason) == (
        WorkerState.BROKEN,
        "no tasks can be run here any more: no process can be started",
    )
    assert task_of(lone, running).past[-1].how == "handed back"


def test_a_worker_hands_back_before_it_ends_by_an_accident(
    lone: StarburstExecutor, shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    running = lone.submit(gate.hold, 1)
    shop.open()
    gate.await_arrivals()
    monkeypatch.setattr(shop.worker._check, "check", raises(RuntimeError("odd")))
    shop.slots.signal.set()
    assert shop.left().state is WorkerState.BROKEN
    assert shop.reason == "raised odd"
    assert task_of(lone, running).past[-1].how == "handed back"


def test_a_heart_beats_on_after_an_accident(
    lone: StarburstExecutor, shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    held = lone.submit(gate.hold, 1)
    shop.open()
    gate.await_arrivals()
    failed = threading.Event()
    describe = shop.worker.heartbeats._content

    def fail_once() -> Heartbeat:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("dictionary changed size during iteration")
        return describe()

    monkeypatch.setattr(shop.worker.heartbeats, "_content", fail_once)
    assert failed.wait(PATIENCE)
    last = shop.worker.heartbeats.last
    until = threading.Event()
    while shop.worker.heartbeats.last == last:
        until.wait(0.05)
    gate.open()
    assert held.result(PATIENCE) == 1
    wait([held])


_CHILDLESS = """
import sys
sys.executable = "/bin/false"
sys.argv[1:1] = ["worker"]
from starburst_executor.cli.main import main
main()
"""


def test_workers_that_cannot_run_anything_are_not_started_for_ever(
    directory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_childless(*_: object) -> LocalLauncher:
        return LocalLauncher(command=[sys.executable, "-P", "-c", _CHILDLESS])

    monkeypatch.setattr(creation, "open_launcher", open_childless)
    lone = StarburstExecutor(1, store=directory_url, intervals=QUICK)
    future = lone.submit(double, 1)
    with pytest.raises(ExecutorBroken, match=r"3 workers of .* child processes in a row"):
        future.result(PATIENCE)
    lone.cleanup(force=True)

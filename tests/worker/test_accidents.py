"""Errors that nobody expects: no thread dies of one, and what it held ends or goes elsewhere."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starburst_executor import ExecutorBroken, StarburstExecutor, TaskFuture
from starburst_executor.client import creation
from starburst_executor.launchers.local import LocalLauncher
from starburst_executor.protocol import records
from starburst_executor.protocol.manifest import Heartbeat, WorkerState
from starburst_executor.protocol.session import Session
from starburst_executor.runtime import SystemRuntime
from starburst_executor.worker import loop, transfers
from starburst_executor.worker.cache import DiskCache
from starburst_executor.worker.loop import Worker
from starburst_executor.worker.pool import ProcessPool, SlotsBroken
from tests.support.sessions import QUICK
from tests.support.tasks import Gate, double

PATIENCE = 60.0


@pytest.fixture
def lone(directory_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An executor that starts no workers."""
    monkeypatch.setattr(
        "starburst_executor.coordination.autoscaler.Autoscaler.need", lambda *_: None
    )
    one = StarburstExecutor(1, store=directory_url, intervals=QUICK)
    yield one
    one.cleanup(force=True)


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


class Shop:
    """A worker in this process, with all that it takes."""

    def __init__(self, lone: StarburstExecutor, folder: Path) -> None:
        self.runtime = SystemRuntime(width=4)
        self.session = Session(lone._engine.session.store, lone.session_id, self.runtime)
        manifest = self.session.load()
        self.library = DiskCache(self.session, folder / "library")
        self.slots = ProcessPool(
            1,
            folder=folder / "slots",
            runtime=self.runtime,
            signal=self.runtime.signal(),
        )
        self.aside = ThreadPoolExecutor(2)
        self.worker = Worker(
            self.session,
            "w-here",
            self.slots,
            self.library,
            self.aside.submit,
            manifest,
            Heartbeat(worker="w-here"),
        )
        self.reason = ""
        self._threads = [
            threading.Thread(target=self.worker.heartbeats.run, daemon=True),
            threading.Thread(target=self._run, daemon=True),
        ]

    def _run(self) -> None:
        try:
            self.reason = self.worker.run()
        except RuntimeError as error:
            self.reason = f"raised {error}"

    def open(self) -> None:
        self.worker.heartbeats.beat()
        for thread in self._threads:
            thread.start()

    def left(self) -> Heartbeat:
        """The last heartbeat, once the worker has left."""
        self._threads[1].join(PATIENCE)
        assert self.reason
        beat = self.session.heartbeat("w-here", "ended")
        assert beat is not None
        return beat

    def close(self) -> None:
        self.worker.stop("the test is over")
        self._threads[1].join(PATIENCE)
        self.worker.heartbeats.close()
        self.slots.close()
        self.aside.shutdown()


@pytest.fixture
def shop(
    lone: StarburstExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shop]:
    monkeypatch.setattr(loop, "ENDURANCE", 2)
    monkeypatch.setattr(transfers, "ENDURANCE", 2)
    shop = Shop(lone, tmp_path / "shop")
    yield shop
    shop.close()


def task_of(lone: StarburstExecutor, future: TaskFuture[Any]) -> records.Task:
    assert future.batch is not None
    known = lone._engine.results.record(future.batch)
    return known.tasks[future.number - future.batch.number]


def raises(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_array(length: int) -> np.ndarray[Any, Any]:
    return np.ones(length)


def test_a_result_that_cannot_be_stored_for_an_error_of_the_machine_is_said(
    lone: StarburstExecutor, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shop.session, "put_blob", raises(full()))
    future = lone.submit(make_array, 100_000)
    shop.open()
    with pytest.raises(Exception, match="No space left"):
        future.result(PATIENCE)
    assert lone.submit(double, 2).result(PATIENCE) == 4


def test_a_result_whose_file_is_gone_is_said(
    lone: StarburstExecutor, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shop.session, "put_blob", raises(FileNotFoundError("the blob")))
    future = lone.submit(make_array, 100_000)
    shop.open()
    with pytest.raises(Exception, match="the blob"):
        future.result(PATIENCE)


def test_a_worker_whose_disk_is_full_hands_back_and_leaves(
    lone: StarburstExecutor, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shop.library, "fetch", raises(full()))
    future = lone.submit(np.sum, np.ones(100_000))
    shop.open()
    beat = shop.left()
    assert beat.state is WorkerState.BROKEN
    assert "No space left" in beat.reason
    task = task_of(lone, future)
    assert (task.state, task.losses, task.past[-1].how) == (
        records.State.PENDING,
        0,
        "handed back",
    )


def test_a_worker_that_cannot_keep_callables_hands_back_and_leaves(
    lone: StarburstExecutor, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shop.library, "function", raises(full()))
    lone.submit(double, 1)
    shop.open()
    beat = shop.left()
    assert (beat.state, "No space left" in beat.reason) == (WorkerState.BROKEN, True)


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

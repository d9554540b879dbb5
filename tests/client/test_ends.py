"""However a client ends, no future is left waiting and no task left alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from starburst_executor import (
    SessionDetached,
    SessionNotFound,
    SessionTerminated,
    StarburstExecutor,
    StoreUnavailable,
    TaskFuture,
)
from starburst_executor.client import creation
from starburst_executor.storage.base import Bytes, Store
from starburst_executor.storage.url import open_store
from tests.support.sessions import QUICK, CountingStore, live_workers
from tests.support.tasks import Gate, double, until

Make = Callable[..., StarburstExecutor]


@pytest.fixture
def opened() -> Iterator[list[StarburstExecutor]]:
    executors: list[StarburstExecutor] = []
    yield executors
    for one in executors:
        with contextlib.suppress(SessionNotFound):
            one.cleanup(force=True)


@pytest.fixture
def make(directory_url: str, opened: list[StarburstExecutor]) -> Make:
    def make_one(max_workers: int = 1, **options: Any) -> StarburstExecutor:
        options.setdefault("store", directory_url)
        options.setdefault("intervals", QUICK)
        opened.append(StarburstExecutor(max_workers, **options))
        return opened[-1]

    return make_one


class Hooked(CountingStore):
    """A store that calls something before each write; it may block or raise."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.before_write: Callable[[str], None] = lambda key: None

    def create(self, key: str, data: Bytes) -> str:
        self.before_write(key)
        return super().create(key, data)

    def replace(self, key: str, data: Bytes, version: str) -> str:
        self.before_write(key)
        return super().replace(key, data, version)


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> list[Hooked]:
    """The stores that executors open from now on."""
    stores: list[Hooked] = []

    def open_hooked(url: str | Path) -> Store:
        stores.append(Hooked(open_store(url)))
        return stores[-1]

    monkeypatch.setattr(creation, "open_store", open_hooked)
    return stores


def started(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def error_of(future: TaskFuture[Any]) -> BaseException | None:
    return future.exception(timeout=60)


# --- cleanup ------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
def test_cleanup_right_after_submit_ends_every_future(make: Make, force: bool) -> None:
    for _ in range(3):
        one = make()
        futures = [one.submit(double, i) for i in range(300)]
        one.cleanup(force=force)
        assert not wait(futures, timeout=60).not_done


def test_cleanup_ends_the_future_of_a_task_that_is_just_being_stored(
    make: Make, hooked: list[Hooked]
) -> None:
    storing, let_go = threading.Event(), threading.Event()

    def hold(key: str) -> None:
        if key.endswith("/tasks"):
            storing.set()
            let_go.wait(120)

    one = make()
    hooked[-1].before_write = hold
    future = one.submit(double, 1)
    assert storing.wait(60)
    cleaning = started(one.cleanup)
    try:
        assert isinstance(error_of(future), SessionTerminated)
    finally:
        let_go.set()
    cleaning.join(60)
    assert not cleaning.is_alive()


# --- settling -----------------------------------------------------------------------


class Overtaken(TaskFuture[int]):
    """A future that another thread is about to end as well, in the middle of its end."""

    def set_result(self, result: int) -> None:
        for other in (
            lambda: self.settle((False, ValueError())),
            self.settle_cancelled,
        ):
            started(other).join(60)
        self.note_running()
        super().set_result(result)


def test_a_future_that_two_threads_end_at_once_is_ended_by_the_first() -> None:
    future = Overtaken("s", 0, 0, 0, lambda future: False)
    future.settle((True, 1))
    assert future.result(0) == 1


def test_a_future_that_many_threads_end_at_once_ends() -> None:
    failed: list[BaseException] = []
    futures = [TaskFuture[int]("s", 0, i, i, lambda future: False) for i in range(3000)]
    meet = threading.Barrier(3)

    def end(how: Callable[[TaskFuture[int]], None]) -> None:
        for future in futures:
            meet.wait()
            try:
                how(future)
            except BaseException as error:
                failed.append(error)

    ways: list[Callable[[TaskFuture[int]], None]] = [
        lambda future: future.settle((True, 1)),
        lambda future: future.settle((False, ValueError())),
        lambda future: future.settle_cancelled(),
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [started(lambda way=way: end(way)) for way in ways]  # type: ignore[misc]
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    assert not wait(futures, timeout=60).not_done


def test_callbacks_of_a_future_are_called_without_its_lock() -> None:
    future = TaskFuture[int]("s", 0, 0, 0, lambda future: False)
    seen: list[bool] = []

    def look_elsewhere(done: Any) -> None:
        looker = started(lambda: seen.append(done.done()))
        looker.join(60)

    future.add_done_callback(look_elsewhere)
    future.settle((True, 1))
    assert seen == [True]


# --- detach -------------------------------------------------------------------------


def test_a_detach_that_was_interrupted_stores_everything_when_called_again(
    make: Make, hooked: list[Hooked], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    one = make()

    def hold(key: str) -> None:
        if key.endswith("/tasks"):
            let_go.wait(120)

    hooked[-1].before_write = hold
    future = one.submit(double, 21)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one._engine.submitter, "flush", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.detach()
    assert not future.done()
    let_go.set()
    session_id = one.detach()
    assert isinstance(error_of(future), SessionDetached)
    again = StarburstExecutor.attach(session_id, store=one.store)
    try:
        assert [f.result(60) for f in again.futures] == [42]
    finally:
        again.cleanup(force=True)


@pytest.mark.parametrize("what", ["workers cannot be counted", "lane cannot be given"])
def test_a_detach_that_failed_may_be_called_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    one = make()
    future = one.submit(double, 21)
    place: Any = one._engine.autoscaler if "workers" in what else one._engine
    name = "need" if "workers" in what else "give_back_lane"

    def fail(*_: object) -> None:
        raise StoreUnavailable("503")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            with pytest.raises(StoreUnavailable):
                one.detach()
    session_id = one.detach()
    assert one.detach() == session_id
    assert future.done()
    again = StarburstExecutor.attach(session_id, store=one.store)
    try:
        assert not any(lane.taken for lane in again._engine.session.load().lanes)
        assert [f.result(60) for f in again.futures] == [42]
    finally:
        again.cleanup(force=True)


def test_a_detach_never_returns_while_a_task_could_not_be_stored(
    make: Make, hooked: list[Hooked]
) -> None:
    one = make(keep=True)

    def fail(key: str) -> None:
        if key.endswith("/tasks"):
            raise OSError(28, "No space left on device")

    hooked[-1].before_write = fail
    future = one.submit(double, 1)
    for _ in range(3):
        with pytest.raises(Exception, match="No space left"):
            one.detach()
    assert isinstance(error_of(future), Exception)


# --- an idle worker that leaves -----------------------------------------------------


def test_a_worker_that_is_just_leaving_keeps_nobody_from_starting_another(
    make: Make, tmp_path: Path
) -> None:
    one = make(idle_timeout=0.2)
    assert one.submit(double, 1).result(60) == 2
    (worker,) = live_workers(one)
    until(lambda: not live_workers(one), "the worker left")
    # What it looks like while its process ends: no heartbeat, and its lock held.
    launcher: Any = one._engine.launcher
    lock = os.open(launcher._session_folder(one._engine.session.url) / worker, os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert live_workers(one) == {worker}
        gate = Gate(tmp_path / "gate")
        one.submit(gate.arrive)
        session_id = one.detach()
        gate.await_arrivals(1)
    finally:
        os.close(lock)
    StarburstExecutor.attach(session_id, store=one.store).cleanup(force=True)

"""Workers as real processes, really killed: what becomes of the tasks they ran."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starburst_executor import (
    DamagedObject,
    ExecutorBroken,
    InitializerFailed,
    Intervals,
    NewerSchema,
    SerializationError,
    SessionNotFound,
    StarburstExecutor,
    TaskCrashed,
    TaskFuture,
    TaskTimeout,
    WorkerLost,
)
from starburst_executor.client import creation
from starburst_executor.launchers.local import LocalLauncher
from starburst_executor.protocol.tasks_object import read_header
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.storage.url import open_store
from tests.support.servers import S3Server
from tests.support.sessions import QUICK, is_alive, keys, live_workers, worker_pids
from tests.support.tasks import (
    CrashesAtPickle,
    CrashesAtUnpickle,
    FailsToPickle,
    FailsToUnpickle,
    Gate,
    abort,
    crash_to_start,
    double,
    exit_at_once,
    hold_the_first,
    kill_self,
    pair_with,
    parent_once,
    say,
    segfault,
    start_and_leave,
    until,
)

# --- fixtures -----------------------------------------------------------------------

Make = Callable[..., StarburstExecutor]


@pytest.fixture
def make(directory_url: str) -> Iterator[Make]:
    made: list[StarburstExecutor] = []

    def make_one(max_workers: int = 1, **options: Any) -> StarburstExecutor:
        options.setdefault("store", directory_url)
        options.setdefault("intervals", QUICK)
        made.append(StarburstExecutor(max_workers, **options))
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


class Blind(LocalLauncher):
    """A launcher that cannot tell which workers have ended, as one on other machines might."""

    def ended(self, session_url: str) -> set[str]:
        super().ended(session_url)  # collects the dead, so that they are no zombies
        return set()


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_blind(spec: WorkerSpec, *others: Any) -> LocalLauncher:
        return Blind()

    monkeypatch.setattr(creation, "open_launcher", open_blind)


# --- workers that die ---------------------------------------------------------------


def test_a_task_whose_worker_is_killed_is_run_by_another(make: Make, gate: Gate) -> None:
    one = make()
    future = one.submit(parent_once, gate, 1)
    others = [one.submit(double, i) for i in range(5)]
    assert future.result(60) == 2
    assert [other.result(60) for other in others] == [2 * i for i in range(5)]
    outcome = one.collect()[future.index]
    assert outcome.attempt == 2
    assert outcome.worker in live_workers(one)


def test_a_task_that_takes_its_worker_down_each_time_ends_with_worker_lost(
    make: Make, gate: Gate
) -> None:
    one = make(max_attempts=3)
    future = one.submit(parent_once, gate, 99)
    innocent = [one.submit(double, i) for i in range(10)]
    with pytest.raises(WorkerLost, match=r"attempt 1 on w-.*attempt 2 on w-.*attempt 3 on w-"):
        future.result(60)
    assert len(gate.arrivals()) == 3
    assert [f.result(60) for f in innocent] == [2 * i for i in range(10)]


@pytest.mark.usefixtures("blind")
def test_a_lost_worker_is_found_by_its_lease_where_no_launcher_can_tell(
    make: Make, gate: Gate
) -> None:
    one = make(2)
    future = one.submit(parent_once, gate, 1)
    assert future.result(60) == 2
    assert one.collect()[0].attempt == 2


def test_a_lost_worker_is_found_by_its_lease_on_s3(
    make: Make,
    gate: Gate,
    ministack: S3Server,
    s3_env: Callable[[S3Server], None],
    blind: None,
) -> None:
    s3_env(ministack)
    # S3's clock counts whole seconds.
    lease = Intervals(lease=4, heartbeat=0.5, poll_first=0.1, poll_last=0.5, look_last=0.2)
    one = make(2, store=ministack.fresh_url(), intervals=lease)
    assert one.submit(parent_once, gate, 1).result(60) == 2


def test_a_worker_that_is_told_to_end_hands_back_within_two_seconds(make: Make, gate: Gate) -> None:
    one = make(max_attempts=1)
    future = one.submit(hold_the_first, gate)
    gate.await_arrivals()
    [pid] = worker_pids(one).values()
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    until(lambda: not is_alive(pid), "the worker has ended")
    assert time.monotonic() - began < 2
    assert future.result(60) == 2
    [outcome] = one.collect()
    assert outcome.attempt == 2  # and yet only one was allowed: a hand-back does not count


def test_a_worker_that_is_told_to_end_stops_its_children(make: Make, gate: Gate) -> None:
    one = make()
    one.submit(gate.hold)
    [child] = gate.await_arrivals()
    [worker] = worker_pids(one).values()
    one.shutdown(wait=False, cancel_futures=True)
    os.kill(worker, signal.SIGTERM)
    until(lambda: not is_alive(worker) and not is_alive(child), "both have ended")
    gate.open()
    one.shutdown()


def test_children_end_with_a_worker_that_was_killed(make: Make, gate: Gate) -> None:
    one = make()
    future = one.submit(hold_the_first, gate)
    [child] = gate.await_arrivals()
    [worker] = worker_pids(one).values()
    os.kill(worker, signal.SIGKILL)
    until(lambda: not is_alive(child), "the child has ended")
    assert future.result(60) == 2


# --- tasks that die -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "how", "said"),
    [
        (kill_self, "SIGKILL.*memory", "about to be killed"),
        (exit_at_once, "exited with code 7", "about to exit"),
        (segfault, "SIGSEGV", "about to crash"),
        (abort, "SIGABRT", "about to abort"),
    ],
)
def test_a_task_whose_process_dies_fails_alone_and_says_how(
    make: Make, function: Callable[[], None], how: str, said: str
) -> None:
    one = make()
    before = one.submit(double, 1)
    crashed = one.submit(function)
    after = one.submit(double, 2)
    with pytest.raises(TaskCrashed, match=f"(?s)task {crashed.task_id}.*{how}.*{said}"):
        crashed.result(60)
    assert (before.result(60), after.result(60)) == (2, 4)
    assert one.collect()[crashed.index].attempt == 1
    assert len(worker_pids(one)) == 1  # the worker itself lives on


def test_a_task_over_its_time_is_stopped_and_fails_alone(make: Make, gate: Gate) -> None:
    one = make(task_timeout=2)
    slow = one.submit(gate.hold)
    quick = one.submit(double, 2)
    with pytest.raises(TaskTimeout, match="over its limit of 2 s"):
        slow.result(60)
    assert quick.result(60) == 4


def test_processes_that_a_stopped_task_started_are_stopped_too(
    make: Make, tmp_path: Path, gate: Gate
) -> None:
    def start_and_hold(path: Path) -> None:
        start_and_leave(path)
        gate.hold()

    one = make(task_timeout=5)
    future = one.submit(start_and_hold, tmp_path / "pid")
    assert isinstance(future.exception(60), TaskTimeout)
    pid = int((tmp_path / "pid").read_text())
    until(lambda: not is_alive(pid), "the grandchild has ended")


@pytest.mark.parametrize(
    ("submit", "kind", "text"),
    [
        (
            lambda ex: ex.submit(double, FailsToUnpickle()),
            SerializationError,
            "LookupError: not here",
        ),
        (
            lambda ex: ex.submit(double, CrashesAtUnpickle()),
            TaskCrashed,
            "exited with code 9",
        ),
        (lambda ex: ex.submit(FailsToPickle), SerializationError, "never pickled"),
        (lambda ex: ex.submit(CrashesAtPickle), TaskCrashed, "exited with code 11"),
    ],
)
def test_what_breaks_at_pickling_fails_its_own_task_and_no_worker(
    make: Make,
    submit: Callable[[StarburstExecutor], TaskFuture[Any]],
    kind: type[Exception],
    text: str,
) -> None:
    one = make()
    before = one.submit(double, 1)
    broken = submit(one)
    after = one.submit(double, 2)
    with pytest.raises(kind, match=text):
        broken.result(60)
    assert (before.result(60), after.result(60)) == (2, 4)
    assert len(worker_pids(one)) == 1


def test_a_result_that_cannot_be_unpickled_here_fails_its_future_alone(
    make: Make,
) -> None:
    def build() -> Any:
        class Odd:
            def __reduce__(self) -> tuple[Any, ...]:
                return int, ("no number",)

        return Odd()

    one = make()
    with pytest.raises(SerializationError, match=r"cannot unpickle the result.*no number"):
        one.submit(build).result(60)
    assert one.submit(double, 1).result(60) == 2


# --- workers that cannot start ------------------------------------------------------


def test_workers_that_cannot_be_started_break_the_executor_soon(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    one = make()
    future = one.submit(double, 1)
    with pytest.raises(ExecutorBroken, match=r"cannot be started.*/no/such/python"):
        future.result(60)
    with pytest.raises(ExecutorBroken, match="/no/such/python"):
        one.submit(double, 2)


def test_workers_that_end_before_they_begin_break_the_executor_with_what_they_printed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "click.py").write_text("raise ImportError('this click is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    one = make(2)
    future = one.submit(double, 1)
    with pytest.raises(ExecutorBroken, match=r"(?s)in a row ended.*this click is broken"):
        future.result(60)
    with pytest.raises(ExecutorBroken):
        one.submit(double, 2)
    one.shutdown()
    assert not live_workers(one)


def test_an_initializer_that_crashes_breaks_the_executor(make: Make) -> None:
    one = make(initializer=crash_to_start)
    futures = [one.submit(double, i) for i in range(5)]
    for future in futures:
        with pytest.raises(InitializerFailed, match="exited with code 5"):
            future.result(60)
    with pytest.raises(InitializerFailed):
        one.submit(double, 1)


# --- how many there are -------------------------------------------------------------


def test_an_idle_worker_leaves_and_new_work_brings_another(make: Make) -> None:
    one = make(idle_timeout=0.3)
    assert one.submit(double, 1).result(60) == 2
    [first] = live_workers(one)
    until(lambda: not live_workers(one), "the idle worker leaves")
    assert one.submit(double, 2).result(60) == 4
    assert live_workers(one) != {first}


def test_there_are_never_more_workers_than_allowed(make: Make, gate: Gate) -> None:
    one = make(2)
    futures = [one.submit(gate.hold, i) for i in range(30)]
    gate.await_arrivals(2)
    more = [one.submit(gate.hold, i) for i in range(30, 60)]
    one.flush()
    assert len(live_workers(one)) == 2
    gate.open()
    wait([*futures, *more])
    assert len({outcome.worker for outcome in one.collect()}) == 2


def test_no_more_workers_are_started_than_there_are_tasks(make: Make) -> None:
    one = make(8)
    assert one.submit(double, 1).result(60) == 2
    assert one.submit(double, 2).result(60) == 4
    assert len(live_workers(one)) == 1


def test_a_worker_with_slots_runs_so_many_tasks_at_once(make: Make, gate: Gate) -> None:
    one = make(1, slots=2)
    futures = [one.submit(gate.hold, i) for i in range(4)]
    children = gate.await_arrivals(2)
    assert len(set(children)) == 2
    assert len(live_workers(one)) == 1
    gate.open()
    assert [f.result(60) for f in futures] == list(range(4))
    assert len({outcome.worker for outcome in one.collect()}) == 1


# --- what tasks print and return ----------------------------------------------------


def test_what_a_task_prints_is_its_own(make: Make) -> None:
    def speak(i: int) -> None:
        sys.stdout.write(f"out {i}\n")
        say(f"err {i}")
        subprocess.run(["echo", f"sub {i}"], check=True)

    one = make()
    futures = [one.submit(speak, i) for i in range(3)]
    wait(futures)
    for i, future in enumerate(futures):
        assert sorted(one.logs(future).split("\n")) == [
            "",
            f"err {i}",
            f"out {i}",
            f"sub {i}",
        ]


def test_results_too_large_for_the_record_go_to_packs(make: Make, directory_url: str) -> None:
    one = make()
    texts = list(one.map(lambda i: f"{i}" * 20_000, range(10)))
    assert texts == [f"{i}" * 20_000 for i in range(10)]
    folder = f"sessions/{one.session_id}"
    assert keys(directory_url, f"{folder}/results/")
    store = open_store(directory_url)
    for key in keys(directory_url, f"{folder}/queue/"):
        assert (got := store.get(key)) is not None
        assert got.size < 100_000
    store.close()


def test_an_array_given_to_many_tasks_is_stored_once(make: Make, directory_url: str) -> None:
    one = make()
    array = np.arange(200_000.0)
    sums = list(one.map(lambda a, i: a.sum() + i, [array] * 8, range(8)))
    assert sums == [array.sum() + i for i in range(8)]
    assert len(keys(directory_url, f"sessions/{one.session_id}/blobs/")) == 1


# --- damaged objects ----------------------------------------------------------------


def damage(store_url: str, key: str, cut: int | None, data: bytes = b"") -> None:
    """Cut an object short, or put something else in its place."""
    store = open_store(store_url)
    got = store.get(key)
    assert got is not None
    store.put(key, got.data[:cut] if cut is not None else data)
    store.close()


def prepared(
    make: Make, gate: Gate, **options: Any
) -> tuple[StarburstExecutor, list[TaskFuture[Any]]]:
    """A session with one worker that is kept busy, and batches that nobody has looked at."""
    one = make(1, **options)
    blocking = one.submit(gate.hold, "first")
    gate.await_arrivals()
    futures = [blocking]
    for i in range(3):
        futures.append(one.submit(pair_with(i), np.full(20_000, float(i))))
        one.flush()
    return one, futures


def object_keys(one: StarburstExecutor, store_url: str, part: str, name: str) -> list[str]:
    found = keys(store_url, f"sessions/{one.session_id}/{part}/")
    return [key for key in found if key.endswith(name)]


def arguments_end(store_url: str, key: str) -> int:
    """Where the arguments in a tasks object end; the names of the tasks follow."""
    store = open_store(store_url)
    got = store.get(key)
    store.close()
    assert got is not None
    found = read_header(bytes(got.data), key)
    assert isinstance(found, tuple)
    header, start = found
    return start + header.arguments_size


@pytest.mark.parametrize("cut", [0, 3, 60, -20])
def test_tasks_that_are_truncated_fail_and_the_rest_goes_on(
    make: Make, gate: Gate, directory_url: str, cut: int
) -> None:
    one, futures = prepared(make, gate)
    key = object_keys(one, directory_url, "queue", "/tasks")[2]
    damage(directory_url, key, cut if cut >= 0 else arguments_end(directory_url, key) + cut)
    gate.open()
    with pytest.raises(DamagedObject, match=r"0000-00000002\.1/tasks"):
        futures[2].result(60)
    assert [futures[i].result(60) is not None for i in (0, 1, 3)] == [True] * 3


@pytest.mark.parametrize("part", ["functions", "blobs"])
def test_a_damaged_function_or_blob_fails_the_tasks_that_need_it(
    make: Make, gate: Gate, directory_url: str, part: str
) -> None:
    one, futures = prepared(make, gate)
    name = _named_by(futures[2], one, part, directory_url)
    damage(directory_url, name, 10)
    gate.open()
    with pytest.raises(DamagedObject, match=r"damaged|cargo|truncated"):
        futures[2].result(60)
    assert [futures[i].result(60) is not None for i in (0, 1, 3)] == [True] * 3


def _named_by(future: TaskFuture[Any], one: StarburstExecutor, part: str, url: str) -> str:
    from starburst_executor.protocol.payload import references

    batch = future.batch
    assert batch is not None
    tasks = one._engine.session.tasks(batch)
    if part == "functions":
        return f"sessions/{one.session_id}/functions/{tasks.header.functions[0]}"
    [(digest, _)] = references(one._engine.session.arguments(batch, tasks, 0))
    return f"sessions/{one.session_id}/blobs/{digest}"


@pytest.mark.parametrize("data", [b"", b"{", b'{"tasks": []}', b"\xff\xfe"])
def test_a_damaged_record_fails_its_tasks_and_the_rest_goes_on(
    make: Make, gate: Gate, directory_url: str, data: bytes
) -> None:
    one, futures = prepared(make, gate)
    store = open_store(directory_url)
    store.put(f"sessions/{one.session_id}/queue/0000-00000002.1/record", data)
    store.put(f"sessions/{one.session_id}/queue/0000-00000002.1/requeued.1", b"")
    store.close()
    gate.open()
    with pytest.raises(DamagedObject, match=r"0000-00000002\.1/record"):
        futures[2].result(60)
    assert [futures[i].result(60) is not None for i in (0, 1, 3)] == [True] * 3


def test_a_record_of_a_newer_version_is_refused_and_left_alone(
    make: Make, gate: Gate, directory_url: str
) -> None:
    one, futures = prepared(make, gate)
    key = f"sessions/{one.session_id}/queue/0000-00000002.1/record"
    newer = b'{"schema": 99, "tasks": [{"state": "levitating"}]}'
    store = open_store(directory_url)
    store.put(key, newer)
    store.close()
    gate.open()
    with pytest.raises(NewerSchema, match=r"schema 99.*upgrade"):
        futures[2].result(60)
    store = open_store(directory_url)
    got = store.get(key)
    store.close()
    assert got is not None
    assert got.data == newer


def test_a_damaged_pack_of_results_fails_the_tasks_in_it(make: Make, directory_url: str) -> None:
    one = make(keep=True)
    with one:
        futures = [one.submit(lambda i: f"{i}" * 30_000, i) for i in range(6)]
        wait(futures)
    for key in object_keys(one, directory_url, "results", ""):
        damage(directory_url, key, 100)
    again = StarburstExecutor.attach(one.session_id, store=directory_url)
    outcomes = again.collect()
    damaged = [o for o in outcomes if not o.ok]
    assert damaged
    assert all(isinstance(o.error, DamagedObject) for o in damaged)
    assert all("truncated" in o.message for o in damaged)
    with pytest.raises(DamagedObject, match="results/"):
        again.futures[damaged[0].index].result()
    again.cleanup(force=True)


@pytest.mark.parametrize("data", [b"", b"{", b'{"schema": 1}'])
def test_a_damaged_manifest_is_named(make: Make, directory_url: str, data: bytes) -> None:
    one = make()
    session_id = one.detach()
    key = f"sessions/{session_id}/session.json"
    store = open_store(directory_url)
    got = store.get(key)
    assert got is not None
    store.put(key, data)
    with pytest.raises(DamagedObject, match=r"session\.json cannot be read"):
        StarburstExecutor.attach(session_id, store=directory_url)
    store.put(key, got.data)
    store.close()


def test_a_manifest_of_a_newer_version_is_refused(make: Make, directory_url: str) -> None:
    one = make()
    session_id = one.detach()
    key = f"sessions/{session_id}/session.json"
    store = open_store(directory_url)
    got = store.get(key)
    assert got is not None
    store.put(
        key,
        got.data.replace(b'"schema":1', b'"schema":2').replace(b"{", b'{"schema":2,', 1),
    )
    with pytest.raises(NewerSchema, match=r"schema 2.*upgrade"):
        StarburstExecutor.attach(session_id, store=directory_url)
    store.put(key, got.data)
    store.close()

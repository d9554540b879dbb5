"""Objects that somebody else removes from the store end what needs them, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from starburst_executor import DamagedObject, StarburstExecutor, TaskFuture
from starburst_executor.client.resubmit import retry, unhealed
from starburst_executor.inspection.status import read_status
from starburst_executor.inspection.tasks import find_one, group_errors, history, views
from starburst_executor.protocol.manifest import Lane
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import Session
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.url import open_store
from tests.support.sessions import QUICK, Make, is_alive, keys, live_workers, worker_pids
from tests.support.tasks import Gate, double, until


def remove(store_url: str, session_id: str, part: str) -> None:
    """Remove the objects of a session whose keys contain `part`, as a lifecycle rule does."""
    gone = [key for key in keys(store_url, f"sessions/{session_id}/") if part in key]
    assert gone
    store = open_store(store_url)
    store.delete(gone)
    store.close()


def batch_of(future: TaskFuture[object]) -> str:
    until(lambda: future.batch is not None, "it is stored")
    return f"/queue/{future.batch}/"


# --- a client that submitted --------------------------------------------------------


@pytest.mark.parametrize("what", ["tasks", ""])
def test_tasks_that_are_gone_fail_and_all_others_go_on(make: Make, gate: Gate, what: str) -> None:
    one = make(1)
    held = one.submit(gate.hold, "held")
    gate.await_arrivals()
    lost, other = one.submit(double, 1), one.submit(double, 2)
    batch_of(other)
    remove(one.store, one.session_id, f"{batch_of(lost)}{what}")
    assert not lost.cancel()
    error = lost.exception(60)
    assert isinstance(error, DamagedObject)
    assert lost.task_id in str(error)
    assert "lifecycle rule" in str(error)
    gate.open()
    assert held.result(60) == "held"
    assert other.result(60) == 4
    assert one.submit(double, 3).result(60) == 6


def test_a_task_that_runs_settles_its_future_though_its_tasks_object_is_gone(
    make: Make, gate: Gate
) -> None:
    one = make(1)
    held = one.submit(gate.hold, "held")
    gate.await_arrivals()
    later = one.submit(double, 1)
    batch_of(later)
    remove(one.store, one.session_id, f"{batch_of(held)}tasks")
    watcher = one._engine.watcher
    until(watcher._settling.gone, "it is missed")
    gate.open()
    assert held.result(60) == "held"
    assert later.result(60) == 2


def test_a_task_whose_worker_is_lost_fails_if_its_tasks_object_is_gone(
    make: Make, gate: Gate
) -> None:
    one = make(1)
    held = one.submit(gate.hold, "held")
    gate.await_arrivals()
    remove(one.store, one.session_id, f"{batch_of(held)}tasks")
    until(one._engine.watcher._settling.gone, "it is missed")
    one._engine.launcher.stop(one._engine.session.url, grace=0)
    assert isinstance(held.exception(60), DamagedObject)


def test_a_removed_record_makes_workers_run_the_batch_again_and_breaks_nothing(
    make: Make, gate: Gate
) -> None:
    one = make(1)
    held = one.submit(gate.hold, "held")
    gate.await_arrivals()
    other = one.submit(double, 1)
    until(held.running, "its start is seen")
    remove(one.store, one.session_id, f"{batch_of(held)}record")
    gate.open()
    assert held.result(60) == "held"
    assert other.result(60) == 2


# --- sessions that were left --------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """A session with four finished tasks in batches of their own, and no worker."""

    session_id: str
    store: str
    batches: list[str]

    def remove(self, part: str) -> None:
        remove(self.store, self.session_id, part)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARBURST_HOME", str(folder))
        one = StarburstExecutor(1, store=folder / "store", keep=True, intervals=QUICK)
        with one:
            batches = []
            for i in range(4):
                future = one.submit(double, i)
                assert future.result(60) == 2 * i
                batches.append(batch_of(future))
    return Left(one.session_id, one.store, batches)


@pytest.fixture
def left(made: Left, tmp_path: Path) -> Left:
    """A copy that a test may damage."""
    copy = shutil.copytree(made.store, tmp_path / "copy")
    return Left(made.session_id, str(copy), made.batches)


@pytest.fixture
def attach(left: Left) -> Iterator[Callable[[], StarburstExecutor]]:
    opened: list[StarburstExecutor] = []

    def attach_one() -> StarburstExecutor:
        opened.append(StarburstExecutor.attach(left.session_id, store=left.store))
        return opened[-1]

    yield attach_one
    for executor in opened:
        executor.cleanup(force=True)


@pytest.mark.parametrize("which", [0, 2, 3])
def test_an_attached_client_counts_and_names_batches_of_which_nothing_is_left(
    left: Left, attach: Callable[[], StarburstExecutor], which: int
) -> None:
    left.remove(left.batches[which])
    again = attach()
    futures = again.futures
    assert len(futures) == 4
    for i, future in enumerate(futures):
        if i == which:
            assert isinstance(future.exception(60), DamagedObject)
        else:
            assert future.result(60) == 2 * i
    states = ["failed" if i == which else "completed" for i in range(4)]
    assert [outcome.state for outcome in again.collect()] == states
    assert not live_workers(again)


def test_a_session_of_which_all_tasks_are_gone_is_not_taken_for_an_empty_one(
    left: Left,
) -> None:
    left.remove("/queue/")
    store = open_store(left.store)
    runtime = SystemRuntime()
    session = Session(store, left.session_id, runtime)
    session.amend(lambda manifest: replace(manifest, lanes=tuple(map(unfinished, manifest.lanes))))
    status = read_status(session)
    assert (status.total, status.completed, status.failed) == (4, 0, 4)
    [group] = group_errors(views(session))
    assert group.task_ids == ["0-0", "0-1", "0-2", "0-3"]
    assert "lifecycle rule" in group.error.message
    assert retry(session, unhealed(session, [State.FAILED])) == {}
    runtime.close()
    store.close()


def test_a_task_of_which_only_the_record_is_left_is_shown(left: Left) -> None:
    left.remove(f"{left.batches[1]}tasks")
    store = open_store(left.store)
    session = Session(store, left.session_id, SystemRuntime())
    shown = history(session, find_one(session, "0-1"))
    assert (shown.task.state, shown.task.index, shown.function) == ("completed", 1, "")
    store.close()


def unfinished(lane: Lane) -> Lane:
    """As it is while no client has noted what it saw finished."""
    return replace(lane, finished=0, completed=0, failed=0, cancelled=0)


def test_results_whose_tasks_object_alone_is_gone_are_had(
    left: Left, attach: Callable[[], StarburstExecutor]
) -> None:
    left.remove(f"{left.batches[1]}tasks")
    again = attach()
    assert [future.result(60) for future in again.futures] == [0, 2, 4, 6]
    assert [outcome.value for outcome in again.collect()] == [0, 2, 4, 6]
    status = again.status()
    assert (status.total, status.completed, status.failed) == (4, 4, 0)


def test_a_finished_task_whose_record_is_gone_fails_alone(
    left: Left, attach: Callable[[], StarburstExecutor]
) -> None:
    again = attach()
    futures = again.futures
    left.remove(f"{left.batches[1]}record")
    assert isinstance(futures[1].exception(60), DamagedObject)
    assert [futures[i].result(60) for i in (0, 2, 3)] == [0, 4, 6]


# --- clean-up -----------------------------------------------------------------------


def test_cleanup_stops_the_workers_of_a_session_whose_manifest_is_gone(
    make: Make, gate: Gate
) -> None:
    one = make(1)
    held = one.submit(gate.hold, "held")
    gate.await_arrivals()
    [pid] = worker_pids(one).values()
    remove(one.store, one.session_id, "/session.json")
    one.cleanup(force=True)
    assert held.done()
    assert not is_alive(pid)
    assert keys(one.store, f"sessions/{one.session_id}/") == []

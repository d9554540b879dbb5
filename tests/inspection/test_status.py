"""Sessions as a whole: what lists and statuses say of them, and how they are named."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from starburst_executor import Intervals, SessionNotFound, StarburstExecutor, list_sessions
from starburst_executor.inspection.status import read_status
from starburst_executor.inspection.tasks import find, read_again
from starburst_executor.inspection.terminal import Gauge
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.liveness import live_workers
from starburst_executor.protocol.manifest import Heartbeat
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.tasks_object import Queued, encode_tasks
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.url import open_store

QUICK = Intervals(heartbeat=0.2, poll_first=0.02, poll_last=0.1, look_last=0.05, commit=0.05)


def test_the_list_counts_as_the_status_does(directory_url: str) -> None:
    with StarburstExecutor(
        1, store=directory_url, name="run", keep=True, intervals=QUICK
    ) as executor:
        executor.submit(pow, 2, 3).result()
        status, (one,) = executor.status(), list_sessions(directory_url)
    for name in (
        "name",
        "total",
        "pending",
        "claimed",
        "running",
        "completed",
        "failed",
        "cancelled",
        "state",
        "progress",
    ):
        assert getattr(one, name) == getattr(status, name), name
    assert one.workers == 1


def test_the_last_activity_never_goes_back_when_workers_leave(
    directory_url: str,
) -> None:
    with StarburstExecutor(1, store=directory_url, keep=True, intervals=QUICK) as executor:
        executor.submit(pow, 2, 3).result()
    session = Session(open_store(directory_url), executor.session_id, SystemRuntime())
    beat = Heartbeat(worker="w-late")
    session.beat(beat)
    before = read_status(session).last_activity
    session.bury(beat)
    assert read_status(session).last_activity >= before


def test_the_last_activity_never_goes_back_as_batches_are_finished(
    directory_url: str,
) -> None:
    with StarburstExecutor(1, store=directory_url, keep=True, intervals=QUICK) as executor:
        session = Session(open_store(directory_url), executor.session_id, SystemRuntime())
        gauge = Gauge(session)
        moments = [gauge.look().last_activity]
        for number in range(5):
            executor.submit(pow, 2, number).result()
            moments.append(gauge.look().last_activity)
    assert moments == sorted(moments)


def test_attach_takes_an_id_that_is_shortened(directory_url: str) -> None:
    with StarburstExecutor(1, store=directory_url, keep=True, intervals=QUICK) as executor:
        executor.submit(pow, 2, 3).result()
    whole = executor.session_id
    for short in (whole, whole[:15], whole[-6:], whole[-6:-3]):
        attached = StarburstExecutor.attach(short, store=directory_url)
        assert attached.detach() == whole
    with pytest.raises(SessionNotFound, match="zzz"):
        StarburstExecutor.attach("zzz", store=directory_url)


def test_a_short_id_of_several_sessions_is_refused(directory_url: str) -> None:
    store = open_store(directory_url)
    for last in ("aaaaaa", "aabbbb"):
        store.put(f"sessions/20250101-120000-{last}/session.json", b"{}")
    with pytest.raises(ValueError, match=r"20250101-120000-aaaaaa, .*aabbbb"):
        StarburstExecutor.attach("aa", store=directory_url)


def test_what_tasks_log_is_kept_once_logging_is_set_up_in_their_processes(
    directory_url: str,
) -> None:
    """The recipe of the documentation."""
    import functools

    def work() -> None:
        logging.getLogger("mine").info("a line from a task")

    set_up = functools.partial(logging.basicConfig, level=logging.INFO)
    with StarburstExecutor(1, store=directory_url, initializer=set_up, intervals=QUICK) as executor:
        future = executor.submit(work)
        future.result()
        assert "INFO:mine:a line from a task" in executor.logs(future)


# --- tasks that were cancelled before they were stored ------------------------------


@pytest.fixture
def withdrawn(directory_url: str) -> Iterator[Session]:
    """A session with one task to run and two that only the header of their batch calls cancelled.

    So it is after a client that died between storing a batch and its record.
    """
    with StarburstExecutor(1, store=directory_url, keep=True, intervals=QUICK) as executor:
        runtime = SystemRuntime()
        session = Session(open_store(directory_url), executor.session_id, runtime)
    function = session.put_content("functions", b"a callable")
    calls = [Queued(function, b"x"), Queued(function, None), Queued(function, None)]
    session.put_batch(Batch(0, 0, 3), encode_tasks(calls, {}))
    yield session
    runtime.close()


def test_the_status_counts_tasks_as_cancelled_though_their_record_is_missing(
    withdrawn: Session,
) -> None:
    status = read_status(withdrawn)
    assert (status.total, status.pending, status.cancelled) == (3, 1, 2)


def test_the_status_reads_a_batch_without_a_record_once(withdrawn: Session) -> None:
    gauge = Gauge(withdrawn)
    gauge.look()
    before = withdrawn.store.tally.reads
    assert gauge.look().cancelled == 2
    assert withdrawn.store.tally.reads - before <= 2


def test_the_list_of_tasks_shows_them_as_cancelled_though_their_record_is_missing(
    withdrawn: Session,
) -> None:
    found = list(find(withdrawn))
    assert [one.task.state for one in found] == [State.PENDING, State.CANCELLED, State.CANCELLED]
    assert read_again(withdrawn, found[1]).task.state is State.CANCELLED


def test_the_status_of_a_session_is_told_though_a_header_is_damaged(withdrawn: Session) -> None:
    withdrawn.put_batch(Batch(0, 3, 2), b"no tasks object")
    status = read_status(withdrawn)
    assert (status.total, status.pending, status.cancelled) == (5, 3, 2)


# --- who is live --------------------------------------------------------------------


def test_the_status_counts_a_worker_as_live_exactly_as_long_as_others_count_on_it(
    withdrawn: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    withdrawn.beat(Heartbeat(worker="w-one"))
    lease = withdrawn.load().intervals.lease
    beats = withdrawn.beats()
    for age, live in ((0.4 * lease, 1), (0.6 * lease, 0)):
        aged = beats._replace(now=beats.entries["w-one"].modified + age)
        monkeypatch.setattr(withdrawn, "beats", lambda aged=aged: aged)
        assert read_status(withdrawn).workers == live
        assert len(live_workers(aged, withdrawn.load().intervals)) == live

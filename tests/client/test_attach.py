"""Sessions that are left and picked up again, by this process or by others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from starburst_executor import (
    SessionDetached,
    SessionNotFound,
    SessionTerminated,
    StarburstExecutor,
    TaskCrashed,
    VersionMismatch,
    list_sessions,
)
from starburst_executor.client import creation
from starburst_executor.storage.base import Store
from starburst_executor.storage.url import open_store
from tests.support.servers import S3Server
from tests.support.sessions import QUICK, CountingStore, is_alive, keys, live_workers
from tests.support.tasks import (
    Gate,
    double,
    fail,
    shout,
    shout_and_crash,
    shout_and_hold,
    until,
)

# --- fixtures -----------------------------------------------------------------------

Make = Callable[..., StarburstExecutor]


@pytest.fixture(params=["directory", "ministack"])
def url(request: pytest.FixtureRequest, s3_env: Callable[..., None]) -> str:
    """An empty store in a directory, then one on S3."""
    if request.param == "directory":
        directory: str = request.getfixturevalue("directory_url")
        return directory
    server: S3Server = request.getfixturevalue("ministack")
    s3_env(server)
    return server.fresh_url()


@pytest.fixture
def opened() -> Iterator[list[StarburstExecutor]]:
    """Executors of a test, which are taken down whatever happens."""
    executors: list[StarburstExecutor] = []
    yield executors
    for one in executors:
        with contextlib.suppress(SessionNotFound):
            one.cleanup(force=True)


@pytest.fixture
def make(opened: list[StarburstExecutor]) -> Make:
    def make_one(store: str, max_workers: int = 1, **options: Any) -> StarburstExecutor:
        options.setdefault("intervals", QUICK)
        opened.append(StarburstExecutor(max_workers, store=store, **options))
        return opened[-1]

    return make_one


@pytest.fixture
def attach(opened: list[StarburstExecutor]) -> Make:
    def attach_one(session_id: str, store: str, **options: Any) -> StarburstExecutor:
        opened.append(StarburstExecutor.attach(session_id, store=store, **options))
        return opened[-1]

    return attach_one


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[CountingStore]:
    """The stores that executors open from now on, counting."""
    stores: list[CountingStore] = []

    def open_counting(url: str | Path) -> Store:
        stores.append(CountingStore(open_store(url)))
        return stores[-1]

    monkeypatch.setattr(creation, "open_store", open_counting)
    return stores


def start_client(tmp_path: Path, text: str, *arguments: str) -> subprocess.Popen[str]:
    """Run a client in a process of its own.

    It prints its session's id when it is where it should be.
    """
    script = tmp_path / "client.py"
    script.write_text(
        "import sys\n"
        "from starburst_executor import StarburstExecutor\n"
        "from tests.support.sessions import QUICK\n"
        "from tests.support.tasks import Gate\n" + textwrap.dedent(text)
    )
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def line_of(client: subprocess.Popen[str]) -> str:
    assert client.stdout is not None
    return client.stdout.readline().strip()


# --- futures ------------------------------------------------------------------------


def test_futures_come_back_in_order_with_results_failures_and_the_unfinished(
    make: Make, attach: Make, url: str, gate: Gate
) -> None:
    first = make(url, 2)
    done = [first.submit(double, i) for i in range(5)]
    failed = first.submit(fail, "mine")
    wait([*done, failed])
    held = first.submit(gate.hold, "held")
    gate.await_arrivals()
    session_id = first.detach()
    assert isinstance(held.exception(timeout=0), SessionDetached)

    second = attach(session_id, url)
    futures = second.futures
    assert [future.index for future in futures] == list(range(7))
    assert [future.task_id for future in futures] == [f"0-{i}" for i in range(7)]
    assert all(future.done() for future in futures[:6])
    assert [future.result() for future in futures[:5]] == [0, 2, 4, 6, 8]
    with pytest.raises(ValueError, match="mine"):
        futures[5].result()
    assert not futures[6].done()
    gate.open()
    assert futures[6].result(60) == "held"
    assert set(as_completed(futures, timeout=60)) == set(futures)
    assert second.futures == futures


def test_what_attaches_can_submit_more_and_indexes_stay(make: Make, attach: Make, url: str) -> None:
    first = make(url)
    first.submit(double, 1).result()
    session_id = first.detach()
    second = attach(session_id, url)
    before = second.futures
    assert before[0].result() == 2
    more = [second.submit(double, i) for i in (10, 20)]
    assert [future.result(60) for future in more] == [20, 40]
    assert [future.index for future in more] == [1, 2]
    assert second.futures == [*before, *more]
    third = attach(second.detach(), url)
    assert [future.result() for future in third.futures] == [2, 20, 40]


def test_results_are_fetched_only_when_they_are_asked_for(
    make: Make, attach: Make, directory_url: str, counted: list[CountingStore]
) -> None:
    first = make(directory_url)
    big = first.submit(bytes, 3_000_000)
    small = list(first.map(double, range(300)))
    assert len(big.result()) == 3_000_000
    assert small == [2 * i for i in range(300)]
    first.detach()
    del counted[:]
    second = attach(first.session_id, directory_url)
    futures = second.futures
    assert len(futures) == 301
    [store] = counted
    requests = store.counts
    assert all(future.done() for future in futures)
    assert requests["get blobs"] == requests["get results"] == 0
    assert requests["get queue"] == 0
    assert requests["get"] + requests["list"] <= 6
    assert len(futures[0].result()) == 3_000_000
    assert requests["get blobs"] == 1
    futures[0].result()
    assert requests["get blobs"] == 1


def test_a_future_that_was_cancelled_is_so_for_who_attaches(
    make: Make, attach: Make, directory_url: str, gate: Gate
) -> None:
    first = make(directory_url)
    first.submit(gate.hold)
    gate.await_arrivals()
    queued = [first.submit(double, i) for i in range(3)]
    first.flush()
    assert queued[1].cancel()
    gate.open()
    wait(queued)
    second = attach(first.detach(), directory_url)
    assert [future.cancelled() for future in second.futures] == [
        False,
        False,
        True,
        False,
    ]
    assert wait(second.futures, timeout=60).not_done == set()


def test_what_was_cancelled_before_it_was_stored_keeps_its_index(
    make: Make, directory_url: str, gate: Gate
) -> None:
    first = make(directory_url)
    futures = [first.submit(double, i) for i in range(200)]
    for future in futures[50:]:
        future.cancel()
    last = first.submit(double, 7)
    assert last.index == 200
    assert first.futures == [*futures, last]
    assert [f.index for f in first.futures] == list(range(201))
    assert last.result(60) == 14


# --- from other processes -----------------------------------------------------------


def test_a_session_goes_on_after_its_client_was_killed(
    attach: Make, url: str, tmp_path: Path, gate: Gate
) -> None:
    client = start_client(
        tmp_path,
        """
        from pathlib import Path
        ex = StarburstExecutor(2, store=sys.argv[1], intervals=QUICK)
        gate = Gate(Path(sys.argv[2]))
        futures = [ex.submit(gate.hold, i) for i in range(6)]
        gate.await_arrivals(2)
        ex.flush()
        print(ex.session_id, flush=True)
        futures[0].result()
        """,
        url,
        str(gate.folder),
    )
    session_id = line_of(client)
    client.kill()
    client.communicate()
    again = attach(session_id, url)
    futures = again.futures
    assert len(futures) == 6
    assert again.status().total == 6
    gate.open()
    assert [future.result(60) for future in futures] == list(range(6))
    more = again.submit(double, 4)
    assert more.result(60) == 8
    assert more.index == 6
    assert [o.attempt for o in again.collect()] == [1] * 7


def test_a_session_detached_in_one_process_is_collected_in_another(
    attach: Make, directory_url: str, tmp_path: Path
) -> None:
    client = start_client(
        tmp_path,
        """
        with StarburstExecutor(2, store=sys.argv[1], name="of another") as ex:
            futures = [ex.submit(pow, i, 2) for i in range(50)]
            print(ex.detach())
        """,
        directory_url,
    )
    out, _ = client.communicate(timeout=60)
    assert client.returncode == 0
    again = attach(out.strip(), directory_url)
    assert again.status().name == "of another"
    outcomes = again.collect(wait=True, timeout=60)
    assert [outcome.value for outcome in outcomes] == [i * i for i in range(50)]


def test_workers_are_started_again_if_work_is_pending_and_none_lives(
    make: Make, attach: Make, directory_url: str, gate: Gate
) -> None:
    first = make(directory_url)
    first.submit(gate.hold, 1)
    pids = gate.await_arrivals()
    first.detach()
    first._engine.launcher.stop(first._engine.session.url, grace=2)
    assert not live_workers(first)
    assert not is_alive(pids[0])
    second = attach(first.session_id, directory_url)
    gate.open()
    assert second.futures[0].result(60) == 1
    assert len(live_workers(second)) == 1


# --- two at once --------------------------------------------------------------------


def test_two_clients_at_once_may_both_submit(make: Make, attach: Make, url: str) -> None:
    first = make(url, 2)
    second = attach(first.session_id, url)
    ours = [first.submit(double, i) for i in range(40)]
    theirs = [second.submit(double, -i) for i in range(40)]
    assert [future.result(60) for future in ours] == [2 * i for i in range(40)]
    assert [future.result(60) for future in theirs] == [-2 * i for i in range(40)]
    assert len({future.task_id for future in [*ours, *theirs]}) == 80
    for one, own in ((first, ours), (second, theirs)):
        all_of_them = one.futures
        assert len(all_of_them) == 80
        assert [future.index for future in all_of_them] == list(range(80))
        assert set(own) <= set(all_of_them)
        assert one.status().completed == 80
        assert sorted(o.value for o in one.collect()) == sorted(
            2 * i for i in range(-39, 40) for _ in range(1 + (i == 0))
        )


def test_leaving_keeps_the_session_of_another_client(
    make: Make, attach: Make, directory_url: str, gate: Gate
) -> None:
    first = make(directory_url)
    first.submit(double, 1).result()
    second = attach(first.session_id, directory_url)
    held = second.submit(gate.hold, 2)
    gate.await_arrivals()
    first.shutdown()
    assert not held.done()
    gate.open()
    assert held.result(60) == 2
    assert [outcome.attempt for outcome in second.collect()] == [1, 1]
    assert second.submit(double, 4).result(60) == 8


def test_what_another_client_submits_is_seen_when_asked_for(
    make: Make, attach: Make, directory_url: str
) -> None:
    first = make(directory_url)
    second = attach(first.session_id, directory_url)
    assert second.futures == []
    first.submit(double, 1)
    first.flush()
    [future] = second.futures
    assert future.result(60) == 2


def test_a_session_terminated_by_another_client_ends_the_futures(
    make: Make, attach: Make, directory_url: str, gate: Gate
) -> None:
    first = make(directory_url)
    future = first.submit(gate.hold)
    gate.await_arrivals()
    attach(first.session_id, directory_url).cleanup()
    assert isinstance(future.exception(60), SessionTerminated)
    with pytest.raises(SessionTerminated, match=first.session_id):
        first.submit(double, 1)
    third = attach(first.session_id, directory_url)
    assert third.status().state == "terminated"
    with pytest.raises(SessionTerminated, match="terminated"):
        third.submit(double, 1)
    assert third.detach() == first.session_id


def test_a_client_that_has_not_submitted_yet_does_not_open_a_terminated_session_again(
    make: Make, attach: Make, directory_url: str
) -> None:
    first = make(directory_url)
    second = attach(first.session_id, directory_url)
    first.cleanup()
    for _ in range(2):
        with pytest.raises(SessionTerminated, match="need a new session"):
            second.submit(double, 1)
    assert second.status().state == "terminated"


# --- limits -------------------------------------------------------------------------


def test_past_the_deadline_results_are_readable_and_nothing_is_launched_until_it_is_extended(
    make: Make, attach: Make, directory_url: str, gate: Gate
) -> None:
    first = make(directory_url)
    assert first.submit(double, 1).result() == 2
    first.submit(gate.hold, 5)
    gate.await_arrivals()
    first.detach()
    past = first.status().last_activity.timestamp() - 1
    first._engine.session.amend(lambda manifest: replace(manifest, deadline=past))
    until(lambda: not live_workers(first), "the worker leaves at its limit")
    gate.open()
    second = attach(first.session_id, directory_url)
    assert second.futures[0].result() == 2
    more = second.submit(double, 2)
    second.flush()
    until(lambda: second._engine.watcher._warned, "it says that it is past its limit")
    assert not live_workers(second)
    assert (second.status().pending, second.status().completed) == (2, 1)
    second.extend(3600)
    assert second.futures[1].result(60) == 5
    assert more.result(60) == 4


def test_extend_only_lengthens(make: Make, directory_url: str) -> None:
    one = make(directory_url, absolute_timeout=1000)
    before = one.status().deadline
    one.extend(50)
    assert one.status().deadline == before + timedelta(seconds=50)
    for wrong in (0, -5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"positive.*can only be extended"):
            one.extend(wrong)
    with pytest.raises(TypeError, match="must be a number, not '60'"):
        one.extend("60")  # type: ignore[arg-type]
    assert one.status().deadline == before + timedelta(seconds=50)


def test_scale_starts_more_workers_and_lets_surplus_ones_leave(
    make: Make, directory_url: str, gate: Gate
) -> None:
    one = make(directory_url, 1)
    futures = [one.submit(gate.hold, i) for i in range(6)]
    gate.await_arrivals(1)
    assert len(live_workers(one)) == 1
    one.scale(3)
    gate.await_arrivals(3)
    assert len(live_workers(one)) == 3
    gate.open()
    wait(futures)
    one.scale(1)
    until(lambda: len(live_workers(one)) == 1, "two leave")


# --- status, collect, logs ----------------------------------------------------------


def test_status_counts_each_state_and_prints_like_a_form(make: Make, url: str, gate: Gate) -> None:
    one = make(url, 1, name="monte carlo")
    wait([one.submit(double, 1), one.submit(fail, "no")])
    one.submit(gate.hold)
    gate.await_arrivals()
    queued = [one.submit(double, i) for i in range(4)]
    one.flush()
    queued[3].cancel()
    until(lambda: one.status().running == 1, "running")
    status = one.status()
    assert (status.total, status.pending, status.claimed, status.running) == (
        7,
        3,
        0,
        1,
    )
    assert (status.completed, status.failed, status.cancelled) == (1, 1, 1)
    assert (status.workers, status.workers_wanted, status.finished) == (1, 1, 3)
    assert status.progress == pytest.approx(3 / 7)
    text = str(status)
    assert f"Session {one.session_id} (monte carlo)" in text
    for line in ("Progress:  42.9%", "Pending:   3", "Running:   1", "Failed:    1"):
        assert line in text


def test_collect_gives_what_is_finished_and_failures_with_all_that_helps(
    make: Make, url: str, gate: Gate
) -> None:
    one = make(url)
    good, bad = one.submit(double, 4), one.submit(fail, "no luck")
    wait([good, bad])
    held = one.submit(gate.hold, 9)
    gate.await_arrivals()
    outcomes = one.collect()
    assert [(o.index, o.state, o.ok) for o in outcomes] == [
        (0, "completed", True),
        (1, "failed", False),
    ]
    assert outcomes[0].value == 8
    failure = outcomes[1]
    assert isinstance(failure.error, ValueError)
    assert (failure.type, failure.message) == ("ValueError", "no luck")
    assert "in fail" in failure.traceback
    assert failure.task_id == bad.task_id
    assert failure.worker.startswith("w-")
    assert (failure.attempt, failure.seconds >= 0) == (1, True)
    assert one.collect(wait=True, timeout=0.01) == outcomes
    gate.open()
    assert [o.value for o in one.collect(wait=True, timeout=60)] == [8, None, 9]
    assert held.done()


def test_collect_downloads_each_result_once(
    make: Make, directory_url: str, counted: list[CountingStore]
) -> None:
    one = make(directory_url)
    list(one.map(double, range(300)))
    one.submit(bytes, 2_000_000).result()
    assert len(one.collect()) == 301
    [store] = counted
    store.counts.clear()
    again = one.collect()
    assert len(again) == 301
    assert store.counts["get"] <= 1  # the manifest
    assert store.counts["download"] == 0


def test_logs_show_what_finished_running_and_crashed_tasks_printed(
    make: Make, url: str, gate: Gate
) -> None:
    one = make(url, 2)
    done, crashed = one.submit(shout, "done"), one.submit(shout_and_crash, "crashed")
    assert done.result(60) is None
    assert isinstance(crashed.exception(60), TaskCrashed)
    running = one.submit(shout_and_hold, "running", gate)
    gate.await_arrivals()
    assert one.logs(done) == "done\nto stderr\n"
    assert one.logs(crashed.task_id) == "crashed\nto stderr\n"
    until(lambda: one.logs(running) == "running\nto stderr\n", "the live log")
    everything = one.logs()
    for future, text in ((done, "done"), (crashed, "crashed"), (running, "running")):
        assert f"--- task {future.task_id} " in everything
        assert text in everything
    gate.open()
    running.result(60)
    assert one.logs(running) == "running\nto stderr\n"


def test_logs_refuse_what_is_no_task_of_the_session(make: Make, directory_url: str) -> None:
    one, other = make(directory_url), make(directory_url)
    one.submit(double, 1)
    with pytest.raises(ValueError, match="'nonsense' is not a task id"):
        one.logs("nonsense")
    with pytest.raises(LookupError, match=f"session {one.session_id} has no task 0-99"):
        one.logs("0-99")
    foreign = other.submit(double, 1)
    for refused in (one.logs, one.cancel):
        with pytest.raises(ValueError, match=f"is of session {other.session_id}"):
            refused(foreign)
    with pytest.raises(TypeError, match="'0-0' is not a future of this session"):
        one.cancel(["0-0"])  # type: ignore[list-item]
    assert foreign.result(60) == 2


# --- the end ------------------------------------------------------------------------


def test_cleanup_stops_the_workers_and_results_stay_readable(
    make: Make, attach: Make, directory_url: str, gate: Gate
) -> None:
    one = make(directory_url, 2)
    done = one.submit(double, 3)
    assert done.result() == 6
    held = one.submit(gate.hold)
    gate.await_arrivals()
    one.cleanup()
    assert not live_workers(one)
    assert isinstance(held.exception(timeout=0), SessionTerminated)
    with pytest.raises(SessionTerminated, match=one.session_id):
        one.submit(double, 1)
    assert one.status().state == "terminated"
    again = attach(one.session_id, directory_url)
    assert again.futures[0].result() == 6
    assert again.collect()[0].value == 6
    assert not live_workers(again)


def test_forced_cleanup_leaves_no_object_of_the_session(make: Make, url: str, gate: Gate) -> None:
    other = make(url)
    other.submit(double, 1).result()
    others = keys(url)
    one = make(url, 2, initializer=double, initargs=(1,))
    one.submit(bytes, 2_000_000).result()
    list(one.map(double, range(600)))
    one.submit(shout_and_hold, "text", gate)
    gate.await_arrivals()
    until(lambda: keys(url, f"sessions/{one.session_id}/logs/"), "a live log")
    one.cleanup(force=True)
    assert not live_workers(one)
    assert keys(url, f"sessions/{one.session_id}/") == []
    assert [key for key in keys(url) if "/ended/" not in key] == others
    with pytest.raises(SessionNotFound, match=one.session_id):
        one.status()
    one.cleanup(force=True)


def test_a_with_block_may_end_in_cleanup(make: Make, directory_url: str) -> None:
    with make(directory_url) as one:
        one.submit(double, 1).result()
        one.cleanup(force=True)
    assert keys(directory_url) == []


def test_leaving_a_session_that_was_attached_to_keeps_it(
    make: Make, attach: Make, directory_url: str
) -> None:
    first = make(directory_url)
    first.submit(double, 1)
    with attach(first.detach(), directory_url) as second:
        second.submit(double, 2)
    assert not live_workers(second)
    third = attach(first.session_id, directory_url)
    assert third.status().state == "closed"
    assert [future.result() for future in third.futures] == [2, 4]


def test_sessions_are_listed_oldest_first_with_their_columns(
    make: Make, url: str, gate: Gate
) -> None:
    assert list_sessions(url) == []
    first = make(url)
    wait([first.submit(double, 1), first.submit(fail, "x")])
    first.submit(gate.hold)
    gate.await_arrivals()
    first.submit(double, 2)
    first.flush()
    second = make(url)
    until(lambda: list_sessions(url)[0].running == 1, "running")
    listed = {summary.session_id: summary for summary in list_sessions(url)}
    assert set(listed) == {first.session_id, second.session_id}
    moments = [summary.created_at for summary in listed.values()]
    assert moments == sorted(moments)
    one = listed[first.session_id]
    assert (one.total, one.pending, one.running, one.completed, one.failed) == (
        4,
        1,
        1,
        1,
        1,
    )
    assert one.state == "open"
    assert one.last_activity >= one.created_at
    assert listed[second.session_id].total == 0


def test_another_python_can_read_status_and_logs_but_no_pickles(
    make: Make, attach: Make, directory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(directory_url)
    first.submit(shout, "hello").result()
    wait([first.submit(fail, "hm")])
    first.detach()
    monkeypatch.setattr("starburst_executor.client.codec.python_version", lambda: "3.99")
    second = attach(first.session_id, directory_url)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert second.status().completed == 1
    assert "hello" in second.logs()
    with pytest.raises(VersionMismatch, match=f"Python {here} .*3.99"):
        second.submit(double, 1)
    with pytest.raises(VersionMismatch, match="Attach with Python"):
        second.futures[0].result()
    [_, failed] = second.collect()
    assert (failed.type, failed.message) == ("ValueError", "hm")
    assert second.detach() == first.session_id
    attach(first.session_id, directory_url).cleanup(force=True)
    assert keys(directory_url) == []


def test_a_client_that_is_killed_while_it_submits_leaves_a_whole_session(
    attach: Make, directory_url: str, tmp_path: Path
) -> None:
    client = start_client(
        tmp_path,
        """
        import itertools
        ex = StarburstExecutor(2, store=sys.argv[1], intervals=QUICK)
        print(ex.session_id, flush=True)
        for i in itertools.count():
            ex.submit(pow, i, 2)
        """,
        directory_url,
    )
    session_id = line_of(client)
    until(lambda: len(keys(directory_url, f"sessions/{session_id}/queue/")) > 20)
    client.send_signal(signal.SIGKILL)
    client.communicate()
    again = attach(session_id, directory_url)
    outcomes = again.collect(wait=True, timeout=60)
    # Batches are written side by side, so that one may be missing before others.
    numbers = [int(outcome.task_id.removeprefix("0-")) for outcome in outcomes]
    assert numbers == sorted(set(numbers))
    assert [outcome.value for outcome in outcomes] == [n * n for n in numbers]
    assert len(outcomes) == again.status().total == again.status().completed

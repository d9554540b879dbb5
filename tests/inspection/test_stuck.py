"""Why nothing moves in a session, said by `status`, the line of progress and the log."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from starburst_executor import StarburstExecutor
from starburst_executor.client import creation
from starburst_executor.coordination import administration
from starburst_executor.coordination.launch_lease import LaunchLease
from starburst_executor.inspection import status
from starburst_executor.inspection.terminal import Meter
from starburst_executor.launchers.local import LocalLauncher
from starburst_executor.protocol.launching import read_launching
from starburst_executor.protocol.manifest import Manifest
from starburst_executor.protocol.session import Session
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.url import open_store
from tests.support.sessions import QUICK, run_python, worker_pids
from tests.support.tasks import Gate, until

RARELY_READ = replace(QUICK, session_check=3600)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@pytest.fixture
def left(directory_url: str, gate: Gate) -> Iterator[Session]:
    """A session with one task that runs and one that waits, and nobody attached."""
    executor = StarburstExecutor(1, store=directory_url, intervals=QUICK)
    for i in range(2):
        executor.submit(gate.hold, i)
    gate.await_arrivals()
    until(lambda: worker_pids(executor), "its heartbeat")
    executor.detach()
    runtime = SystemRuntime()
    session = Session(open_store(directory_url), executor.session_id, runtime)
    yield session
    gate.open()
    administration.delete(session, LocalLauncher())
    runtime.close()
    session.store.close()


def _kill_workers(session: Session) -> None:
    beats = [session.heartbeat(worker) for worker in session.beats().entries]
    for beat in beats:
        assert beat is not None
        os.kill(beat.pid, signal.SIGKILL)
    killed = {beat.worker for beat in beats if beat is not None}
    # A process is a zombie before its last thread has let go of what it had open.
    until(lambda: killed <= LocalLauncher().ended(session.url), "seen to have ended")


def _edit(session: Session, **changes: object) -> None:
    def edit(manifest: Manifest) -> Manifest:
        return replace(manifest, **changes)

    session.amend(edit)


def _move_deadline(executor: StarburstExecutor, left: float) -> None:
    """Let a session have so many seconds left, as its client knows too."""
    engine = executor._engine
    deadline = engine.watcher.queue.now + left
    moved = engine.session.amend(lambda manifest: replace(manifest, deadline=deadline))
    engine.manifest = engine.autoscaler.manifest = engine.watcher.manifest = moved


def test_a_session_at_work_is_not_stuck(left: Session) -> None:
    assert status.read_status(left).stuck is None


def test_workers_that_were_killed_are_missed_before_their_lease_ends(
    left: Session,
) -> None:
    _edit(left, intervals=replace(QUICK, lease=3600))
    _kill_workers(left)
    now = status.read_status(left)
    assert now.workers == 0
    assert now.stuck is not None
    assert now.stuck.reason.startswith("its workers have died ")
    assert f"attach({left.id!r})" in now.stuck.advice
    assert f"Stuck:     {now.stuck}" in str(now)
    assert now.stuck.reason in str(Meter().take_in(now, 0.0))


def test_status_watch_notices_that_all_workers_were_killed(
    left: Session, directory_url: str
) -> None:
    _kill_workers(left)
    watch = ["-m", "starburst_executor", "status", left.id, "--store", directory_url]
    ran = run_python(*watch, "--watch", "--timeout", "2")
    assert "its workers have died" in ran.stdout
    assert f"collect --wait {left.id}" in ran.stderr


def test_workers_that_die_at_their_start_are_told_of_with_what_they_printed(
    left: Session,
) -> None:
    _kill_workers(left)
    broken = "print('no module named starburst_executor'); raise SystemExit(1)"
    launcher = LocalLauncher(command=[sys.executable, "-c", broken])
    [worker] = launcher.launch(left.url, 1)
    until(lambda: worker in launcher.ended(left.url), "ended")
    stuck = status.read_status(left).stuck
    assert stuck is not None
    assert stuck.reason == "its workers die on startup"
    assert "no module named starburst_executor" in stuck.advice
    assert f"logs {left.id} --workers" in stuck.advice


def test_a_session_that_was_left_without_workers_says_so(left: Session) -> None:
    LocalLauncher().stop(left.url, grace=10)
    assert status.read_status(left).stuck is None  # somebody may just be starting some
    for file in Path(left.store.url.removeprefix("file://")).rglob("*"):
        os.utime(file, (1, 1))  # long ago
    _edit(left, created=1.0)
    os.utime(Path(left.store.url.removeprefix("file://"), left.key("session.json")), (1, 1))
    stuck = status.read_status(left).stuck
    assert stuck is not None
    assert stuck.reason == "it has no workers"


def test_a_terminated_session_says_that_its_tasks_will_not_run(left: Session) -> None:
    administration.terminate(left, LocalLauncher())
    stuck = status.read_status(left).stuck
    assert stuck is not None
    assert str(stuck).startswith("terminated. Its unfinished tasks (2) will not run")


def test_the_limit_is_warned_of_before_and_when_it_is_reached(
    directory_url: str, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    executor = StarburstExecutor(
        1, store=directory_url, absolute_timeout=10_000, intervals=RARELY_READ
    )
    future = executor.submit(gate.hold, 5)
    gate.await_arrivals()
    assert "absolute time limit" not in caplog.text
    _move_deadline(executor, 900)
    until(lambda: "until its absolute time limit" in caplog.text, "said before")
    assert "past its limit" not in caplog.text
    _move_deadline(executor, -1)
    until(lambda: "past its limit since" in caplog.text, "said at the limit")
    assert "unfinished tasks: 1" in caplog.text
    assert f"starburst-executor extend {executor.session_id}" in caplog.text
    now = executor.status()
    assert now.stuck is not None
    assert now.stuck.reason.startswith("past its limit since ")
    line = str(Meter().take_in(now, 0.0))
    assert now.stuck.reason in line
    assert now.stuck.reason in repr(executor)
    assert " left" not in line
    gate.open()
    executor.extend(3600)
    assert future.result(60) == 5
    executor.shutdown()


def test_the_limit_of_a_session_that_another_client_extended_is_not_warned_of(
    directory_url: str, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    executor = StarburstExecutor(
        1, store=directory_url, absolute_timeout=10_000, intervals=RARELY_READ
    )
    executor.submit(gate.hold, 5)
    gate.await_arrivals()
    session = Session(open_store(directory_url), executor.session_id, SystemRuntime())
    extended = administration.extend(session, 3600)
    watcher = executor._engine.watcher
    watcher.manifest = replace(watcher.manifest, deadline=watcher.queue.now - 1)
    until(lambda: watcher.manifest == extended, "it looks whether its limit is still so")
    gate.open()
    executor.shutdown()
    assert "past its limit" not in caplog.text
    session.store.close()


def test_who_attaches_past_the_limit_is_told_at_once(
    directory_url: str, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    executor = StarburstExecutor(1, store=directory_url, absolute_timeout=1, intervals=RARELY_READ)
    executor.submit(gate.hold, 5)
    until(lambda: "past its limit" in caplog.text, "past it")
    executor.detach()
    caplog.clear()
    again = StarburstExecutor.attach(executor.session_id, store=directory_url)
    until(lambda: "past its limit" in caplog.text, "said again")
    again.cleanup(force=True)


class Full(LocalLauncher):
    """A place without room for another worker."""

    def launch(self, session_url: str, count: int) -> list[str]:
        return []

    def shortage(self, session_url: str) -> str:
        return "there is no room in eu-west-1; another region has some"


def test_what_a_launcher_lacks_is_told_to_everybody_who_asks(
    directory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(creation, "open_launcher", lambda *_: Full())
    with StarburstExecutor(1, store=directory_url, intervals=QUICK, keep=True) as executor:
        future = executor.submit(pow, 2, 3)
        until(lambda: executor.status().stuck is not None, "that there is no room")
        stuck = executor.status().stuck
        assert stuck is not None
        assert stuck.reason == "no capacity for workers"
        assert "there is no room in eu-west-1" in str(stuck)
        future.cancel()


def test_a_shortage_that_is_over_is_told_no_more(left: Session) -> None:
    lease = LaunchLease(left)
    lease.note_shortage("no room")
    stored = read_launching(left)
    assert stored is not None
    assert stored.value.shortage == "no room"
    LaunchLease(left).note_shortage("no room for another process")  # which does not hold the lease
    lease.note_shortage("")
    stored = read_launching(left)
    assert stored is not None
    assert stored.value.shortage == ""

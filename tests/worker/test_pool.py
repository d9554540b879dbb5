"""Real children, really killed."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from starburst_executor.serialization.exceptions import rebuild
from starburst_executor.worker import child_handle
from starburst_executor.worker.child_handle import Job
from starburst_executor.worker.ipc import frame
from starburst_executor.worker.scheduling import job_request
from tests.support.bench import (
    PATIENCE,
    AtPickle,
    Bench,
    Gate,
    big_array,
    exit_hard,
    failure_of,
    hang,
    is_alive,
    kill_nine,
    linux,
    raise_error,
    same,
    start_sleeper,
    stop_at,
    value_of,
    wait_until_gone,
)

pytestmark = pytest.mark.usefixtures("functions_travel_by_value")


# --- what x where ------------------------------------------------------------------


class AtUnpickle:
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return self.act, ()


def call(act: Callable[[], None]) -> None:
    act()


def make_trap(act: Callable[[], None]) -> object:
    return AtPickle(act)


WHAT = {"kill": kill_nine, "exit": exit_hard, "raise": raise_error, "hang": hang}


@pytest.mark.parametrize("where", ["unpickle", "run", "pickle"])
@pytest.mark.parametrize("what", WHAT)
def test_exactly_one_job_is_blamed_and_all_others_run(bench: Bench, what: str, where: str) -> None:
    bench.open()
    bench.warm_up()
    act = WHAT[what]
    limit = 0.3 if what == "hang" else PATIENCE
    for i in range(3):
        bench.start(same, i, key=("good", i))
    if where == "unpickle":
        bench.start(same, AtUnpickle(act), key="bad", timeout=limit)
    else:
        function = call if where == "run" else make_trap
        bench.start(function, act, key="bad", timeout=limit)
    for i in range(3, 9):
        bench.start(same, i, key=("good", i))

    ended = {e.key: e for e in bench.wait(10)}
    bad = ended.pop("bad")
    assert [value_of(ended["good", i]) for i in range(9)] == list(range(9))
    on_raise = "raised" if where == "run" else "unserializable"
    kinds = {"kill": "crashed", "exit": "crashed", "hang": "timeout", "raise": on_raise}
    assert (bad.kind, bad.ok, bad.blobs) == (kinds[what], False, ())
    assert failure_of(bad).kind == bad.kind
    assert bench.result(same, "next") == "next"


def test_crash_says_how_the_process_ended_and_what_it_last_said(bench: Bench) -> None:
    bench.open()
    exited = failure_of(bench.run(exit_hard))
    assert (exited.exit_code, exited.signal) == (7, None)
    assert exited.stderr == "last words\n"
    killed = failure_of(bench.run(kill_nine))
    assert (killed.exit_code, killed.signal) == (None, signal.SIGKILL)


def test_raised_exception_comes_back_with_the_traceback_of_the_task_alone(
    bench: Bench,
) -> None:
    bench.open()
    failure = failure_of(bench.run(raise_error))
    error = rebuild(failure, lambda digest, size: bytearray(), "task-1")
    assert isinstance(error, ZeroDivisionError)
    assert "raise_error" in failure.traceback
    assert "child.py" not in failure.traceback


def touch_nothing() -> None:
    ctypes.string_at(0)


def test_segmentation_fault_shows_where_it_happened(bench: Bench) -> None:
    bench.open()
    failure = failure_of(bench.run(touch_nothing))
    assert failure.signal == signal.SIGSEGV
    assert "touch_nothing" in failure.stderr


def out_of_memory_score(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


@linux
def test_child_goes_before_the_worker_when_memory_runs_out(bench: Bench) -> None:
    bench.open()
    worker = out_of_memory_score("self")
    assert bench.result(out_of_memory_score, "self") == min(1000, worker + 500)


def exit_softly() -> None:
    sys.exit(3)


def interrupt() -> None:
    raise KeyboardInterrupt


def exhaust_memory() -> int:
    return len(bytearray(1 << 62))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (exit_softly, "SystemExit"),
        (interrupt, "KeyboardInterrupt"),
        (exhaust_memory, "MemoryError"),
    ],
)
def test_what_ends_other_programs_is_an_exception_here(
    bench: Bench, function: Callable[[], object], name: str
) -> None:
    bench.open()
    before = bench.result(os.getpid)
    ended = bench.run(function)
    assert (ended.kind, failure_of(ended).type) == ("raised", name)
    assert bench.result(os.getpid) == before


def make_lock() -> object:
    return {"lock": threading.Lock()}


def test_unpicklable_result_is_named_and_the_child_lives_on(bench: Bench) -> None:
    bench.open()
    before = bench.result(os.getpid)
    ended = bench.run(make_lock)
    assert ended.kind == "unserializable"
    assert "lock" in failure_of(ended).message
    assert "result" in failure_of(ended).message
    assert bench.result(os.getpid) == before


def test_death_of_an_idle_child_is_nobodys_fault(bench: Bench) -> None:
    bench.open()
    pid = bench.result(os.getpid)
    os.kill(pid, signal.SIGKILL)
    wait_until_gone([pid])  # or it might still take the next job
    assert bench.result(os.getpid) != pid


def speak_out_of_turn() -> None:
    for descriptor in range(3, 64):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
        except OSError:
            continue
        if is_socket:
            os.write(descriptor, b"\xc1 nonsense")
    threading.Event().wait()


def test_task_that_writes_into_the_channel_ends_only_itself(bench: Bench) -> None:
    bench.open()
    assert bench.run(speak_out_of_turn).kind == "crashed"
    assert bench.result(same, 1) == 1


def test_children_that_cannot_start_are_reported_instead_of_tried_for_ever(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = shutil.which("false")
    assert program
    monkeypatch.setattr(sys, "executable", program)
    bench.open()
    bench.start(same, 1)
    assert bench.signal.wait(PATIENCE)
    with pytest.raises(RuntimeError, match="could not start"):
        bench.slots.take()


# --- order, withdrawal, killing ----------------------------------------------------


def test_ten_thousand_tiny_jobs_end_in_order_of_arrival(bench: Bench) -> None:
    bench.open(1)
    jobs = [bench.job(same, 0, key=i) for i in range(10)]
    for i in range(10_000):
        bench.slots.start(Job(**{**fields(jobs[i % 10]), "key": i}))
    ended = bench.wait(10_000)
    assert [e.key for e in ended] == list(range(10_000))
    assert all(e.ok for e in ended)


def fields(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in Job.__slots__}


def note(path: str, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


@pytest.mark.parametrize("seed", [1, 2])
def test_each_job_either_runs_once_or_is_withdrawn(bench: Bench, seed: int) -> None:
    bench.open(2)
    choose = random.Random(seed)
    ran = bench.folder / "ran"
    count, step = 2000, 40
    withdrawn: set[Hashable] = set()
    for first in range(0, count, step):
        bench.signal.clear()
        for key in range(first, first + step):
            bench.start(note, str(ran), key, key=key)
        assert bench.signal.wait(PATIENCE)
        while bench.slots.begun():  # one by one, while the children read as well
            wanted = {choose.randrange(first, first + step)}
            answer = bench.slots.withdraw(wanted)
            assert answer <= wanted
            assert not answer & withdrawn
            withdrawn |= answer
    ended = bench.wait(count - len(withdrawn))
    lines = [int(line) for line in ran.read_text().split()]
    assert all(e.ok for e in ended)
    assert len(lines) == len(ended)
    assert set(lines) == {e.key for e in ended}
    assert set(lines) == set(range(count)) - withdrawn


@pytest.mark.parametrize("seed", [1, 2])
def test_killing_a_job_among_tiny_ones_harms_no_other(bench: Bench, seed: int) -> None:
    bench.open(2)
    choose = random.Random(seed)
    ran = bench.folder / "ran"
    killed: set[Hashable] = set()
    for first in range(0, 600, 40):
        bench.signal.clear()
        for key in range(first, first + 40):
            bench.start(note, str(ran), key, key=key)
        assert bench.signal.wait(PATIENCE)
        for unwanted in list(bench.slots.begun())[: choose.randint(1, 2)]:
            bench.slots.kill(unwanted)
            killed.add(unwanted)
    ended = bench.wait(600 - len(killed))
    lines = [int(line) for line in ran.read_text().split()]
    assert all(e.ok for e in ended)
    assert {e.key for e in ended} == set(range(600)) - killed
    assert len(lines) == len(set(lines))


class Contested:
    """The receiving end of a socket, of whose messages the child reads every second."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def recv(self, size: int, flags: int) -> bytes:
        data = self._end.recv(size, flags)
        with suppress(BlockingIOError):
            self._end.recv(size, flags)
        return data


def test_recall_knows_what_the_child_read_in_between(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    child: Any = object.__new__(child_handle.ChildHandle)
    entries = [child_handle.QueuedJob(i, bench.job(same, i)) for i in range(6)]
    child.sent = deque(entries)
    ours, theirs = child_handle._socket_pair()
    with ours, theirs:
        for entry in entries:
            ours.send(frame(job_request(entry), tmp_path / "unused"))
        child._theirs = Contested(theirs)
        assert child.recall() == entries[::2]
    assert list(child.sent) == entries[1::2]


def test_long_job_holds_up_no_other_beside_a_free_child(bench: Bench) -> None:
    bench.open(2)
    bench.warm_up()
    gate = Gate(bench.folder)
    bench.start(stop_at, gate.paths, key="long")
    for i in range(50):
        bench.start(same, i, key=i)
    assert {e.key for e in bench.wait(50)} == set(range(50))
    assert set(bench.slots.begun()) == {"long"}
    gate.await_arrival()
    gate.let_through()
    assert bench.wait(1)[0].key == "long"
    assert bench.slots.begun() == {}


def test_job_that_runs_is_not_withdrawn_and_those_behind_it_are(bench: Bench) -> None:
    bench.open()
    bench.warm_up()
    gate = Gate(bench.folder)
    before = bench.runtime.time()
    bench.start(stop_at, gate.paths, key="running")
    gate.await_arrival()
    for i in range(5):
        bench.start(same, i, key=i)
    assert bench.slots.withdraw(["running", 1, 3, "unknown"]) == {1, 3}
    assert bench.slots.withdraw([1]) == set()
    assert before <= bench.slots.begun()["running"] <= bench.runtime.time()
    gate.let_through()
    assert [e.key for e in bench.wait(4)] == ["running", 0, 2, 4]


def sleep_in_subprocess(file: str, paths: tuple[str, str]) -> None:
    with start_sleeper(file):
        stop_at(paths)


@linux
def test_killed_job_ends_with_all_its_processes_and_is_not_reported(
    bench: Bench,
) -> None:
    bench.open()
    bench.warm_up()
    gate, file = Gate(bench.folder), bench.folder / "pid"
    bench.start(sleep_in_subprocess, str(file), gate.paths, key="unwanted")
    gate.await_arrival()
    bench.start(same, 1, key="behind")
    bench.slots.kill("unwanted")
    assert [e.key for e in bench.wait(1)] == ["behind"]
    wait_until_gone([int(file.read_text())])


def test_job_killed_before_it_began_or_after_it_ended_is_not_reported(
    bench: Bench,
) -> None:
    bench.open()
    gate = Gate(bench.folder)
    bench.start(big_array, 100_000, key="ended")
    bench.start(stop_at, gate.paths, key="running")
    bench.start(same, 1, key="queued")
    gate.await_arrival()  # so the first has ended
    bench.slots.kill("ended")
    bench.slots.kill("queued")
    bench.slots.kill("unknown")
    gate.let_through()
    assert [e.key for e in bench.wait(1)] == ["running"]
    assert bench.slots.withdraw(["queued"]) == set()
    assert {file.suffix for file in bench.spool.iterdir()} == {".stdout", ".stderr"}


# --- time limits -------------------------------------------------------------------


@linux
def test_time_limit_kills_the_whole_group(bench: Bench) -> None:
    bench.open()
    gate, file = Gate(bench.folder), bench.folder / "pid"
    ended = bench.run(sleep_in_subprocess, str(file), gate.paths, timeout=3.0)
    assert ended.kind == "timeout"
    assert ended.ended - ended.began >= 3.0
    assert "over its limit of 3 s" in failure_of(ended).message
    wait_until_gone([int(file.read_text())])


def test_time_behind_another_job_does_not_count(bench: Bench) -> None:
    bench.open()
    gate = Gate(bench.folder)
    bench.start(stop_at, gate.paths)
    bench.start(same, 1, timeout=2)
    gate.await_arrival()
    assert not bench.signal.wait(2.5)  # the second would be over its limit by now
    gate.let_through()
    assert all(e.ok for e in bench.wait(2))


# --- the end -----------------------------------------------------------------------


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@linux
def test_close_stops_everything_and_leaves_nothing(bench: Bench) -> None:
    before = open_descriptors()
    slots = bench.open(2)
    gate = Gate(bench.folder)
    bench.start(stop_at, gate.paths)
    pid = bench.result(os.getpid)
    gate.await_arrival()
    for _ in range(3):
        bench.start(same, 1)
    slots.close()
    slots.close()
    assert not is_alive(pid)
    assert open_descriptors() == before
    assert "starburst-slots" not in {t.name for t in threading.enumerate()}
    with pytest.raises(RuntimeError, match="closed"):
        bench.start(same, 1)


ORPHANS = """
import sys
from pathlib import Path
from starburst_executor.runtime import SystemRuntime
from starburst_executor.serialization.pickling import dumps, pack_call
from starburst_executor.worker.child_handle import Job
from starburst_executor.worker.pool import ProcessPool

def hang(path):
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(path, "wb").close()
    until = time.monotonic() + 90  # longer than anybody waits here
    while time.monotonic() < until:
        pass

if __name__ == "__main__":
    folder, gate = Path(sys.argv[1]), sys.argv[2]
    function = folder / "function"
    function.write_bytes(dumps(hang, None))
    runtime = SystemRuntime()
    slots = ProcessPool(
        2, folder=folder / "spool", runtime=runtime, signal=runtime.signal()
    )
    slots.start(Job(
        key=1, label="hang", function=function, function_digest="", path=(),
        call=pack_call((gate,), {}, None), blobs=folder, timeout=None,
    ))
    Path(gate).read_bytes()
    while not all(child.ready for child in slots._children):
        pass
    print(*(child._process.pid for child in slots._children), flush=True)
    sys.stdin.read()
"""


@linux
def test_no_child_outlives_a_worker_that_is_killed(tmp_path: Path) -> None:
    script, gate = tmp_path / "worker.py", tmp_path / "gate"
    script.write_text(ORPHANS)
    os.mkfifo(gate)
    command = [sys.executable, str(script), str(tmp_path), str(gate)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as worker:
        assert worker.stdout is not None
        pids = [int(pid) for pid in worker.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        worker.kill()
    wait_until_gone(pids)


def test_datagrams_serve_where_there_are_no_packets(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_handle, "_MESSAGES", socket.SOCK_DGRAM)
    bench.open(2)
    bench.warm_up()
    for i in range(200):
        bench.start(same, i, key=i)
    withdrawn = bench.slots.withdraw(range(100, 200))
    ended = bench.wait(200 - len(withdrawn))
    assert {e.key for e in ended} | withdrawn == set(range(200))
    assert bench.run(kill_nine).kind == "crashed"
    assert bench.result(same, 1) == 1

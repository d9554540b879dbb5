"""Real children, really killed."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import pytest

from starburst_executor.protocol.outcome import Failure, decode_outcome
from starburst_executor.protocol.payload import digest_of, references
from starburst_executor.runtime import SystemRuntime
from starburst_executor.serialization.exceptions import rebuild
from starburst_executor.serialization.pickling import dumps, loads, pack_call
from starburst_executor.worker import child_handle
from starburst_executor.worker.child_handle import Job
from starburst_executor.worker.ipc import frame
from starburst_executor.worker.pool import ChildPool, JobResult, ProcessPool, SlotsBroken
from starburst_executor.worker.scheduling import job_request

PATIENCE = 30.0  # seconds until a test that waits has failed
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Bench:
    """Slots with the files that a worker would have fetched, and ways to wait for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spool = folder / "spool"
        self.blobs = folder / "blobs"
        self.blobs.mkdir()
        self.runtime = SystemRuntime()
        self.signal = self.runtime.signal()
        self.slots: ChildPool
        self._jobs = 0

    def open(self, size: int = 1, initializer: Path | None = None) -> ChildPool:
        self.slots = ProcessPool(
            size,
            folder=self.spool,
            initializer=initializer,
            runtime=self.runtime,
            signal=self.signal,
        )
        return self.slots

    def keep(self, digest: str, data: memoryview) -> None:
        (self.blobs / digest).write_bytes(data)

    def cargo(self, obj: object) -> Path:
        cargo = dumps(obj, self.keep)
        path = self.folder / digest_of(cargo)
        if not path.exists():
            path.write_bytes(cargo)
        return path

    def job(
        self,
        function: Callable[..., object],
        *args: object,
        key: object = None,
        timeout: float | None = None,
        path: tuple[str, ...] = (),
    ) -> Job:
        self._jobs += 1
        cargo = self.cargo(function)
        return Job(
            key=self._jobs if key is None else key,
            label=f"task-{self._jobs}",
            function=cargo,
            function_digest=cargo.name,
            call=pack_call(args, {}, self.keep),
            blobs=self.blobs,
            path=path,
            timeout=timeout,
        )

    def start(self, function: Callable[..., object], *args: Any, **options: Any) -> Job:
        job = self.job(function, *args, **options)
        self.slots.start(job)
        return job

    def wait(self, count: int) -> list[JobResult]:
        """The next `count` jobs to end; fails if more do."""
        ended: list[JobResult] = []
        until = time.monotonic() + PATIENCE
        while len(ended) < count:
            left = until - time.monotonic()
            assert self.signal.wait(max(0.0, left)), f"{len(ended)} of {count} ended"
            self.signal.clear()
            ended += self.slots.take()
        assert len(ended) == count
        return ended

    def run(self, function: Callable[..., object], *args: Any, **options: Any) -> JobResult:
        self.start(function, *args, **options)
        return self.wait(1)[0]

    def result(self, function: Callable[..., object], *args: Any, **opts: Any) -> Any:
        return value_of(self.run(function, *args, **opts))

    def warm_up(self) -> None:
        """Let the slots learn that jobs are tiny, so that they send some ahead."""
        for _ in range(20):
            self.start(same, 0)
        self.wait(20)


def value_of(ended: JobResult) -> Any:
    files = {digest: file for digest, file, _ in ended.blobs}
    cargo = decode_outcome(ended.outcome).value
    assert cargo is not None, failure_of(ended)
    return loads(cargo, lambda digest, size: bytearray(files[digest].read_bytes()))


def failure_of(ended: JobResult) -> Failure:
    failure = decode_outcome(ended.outcome).failure
    assert failure is not None
    return failure


@pytest.fixture(autouse=True, scope="module")
def _functions_travel_by_value() -> Iterator[None]:
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.slots.close()
    assert not bench.spool.exists()


def same(x: object) -> object:
    return x


def wait_until_gone(pids: list[int]) -> None:
    """Wait until processes, children of others, have ended."""
    until = time.monotonic() + PATIENCE
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        readable = select.select([descriptor], [], [], until - time.monotonic())[0]
        os.close(descriptor)
        assert readable, f"process {pid} is still there"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- what x where -----------------------------------------------------------------


def kill_nine() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_hard() -> None:
    os.write(2, b"last words\n")
    os._exit(7)


def raise_error() -> None:
    raise ZeroDivisionError("on purpose")


def hang() -> None:
    threading.Event().wait()


class AtUnpickle:
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return self.act, ()


class AtPickle:
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def __reduce__(self) -> str:
        self.act()
        raise AssertionError("unreachable")


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
    for i in range(3):
        bench.start(same, i, key=("good", i))
    if where == "unpickle":
        bench.start(same, AtUnpickle(act), key="bad", timeout=0.3)
    else:
        function = call if where == "run" else make_trap
        bench.start(function, act, key="bad", timeout=0.3)
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


# --- order, withdrawal, killing ---------------------------------------------------


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


class Gate:
    """A place where a job stops until it is let through; both sides wait for each other."""

    def __init__(self, folder: Path) -> None:
        self.paths = (str(folder / "reached"), str(folder / "open"))
        for path in self.paths:
            os.mkfifo(path)

    def await_arrival(self) -> None:
        Path(self.paths[0]).read_bytes()

    def let_through(self) -> None:
        Path(self.paths[1]).write_bytes(b"")


def stop_at(paths: tuple[str, str], text: str = "") -> int:
    sys.stdout.write(text)
    Path(paths[0]).write_bytes(b"")  # blocks until somebody reads
    Path(paths[1]).read_bytes()
    return os.getpid()


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


def start_sleeper(file: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(["sleep", "90"])
    Path(file).write_text(str(process.pid))
    return process


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


# --- time limits ------------------------------------------------------------------


@linux
def test_time_limit_kills_the_whole_group(bench: Bench) -> None:
    bench.open()
    gate, file = Gate(bench.folder), bench.folder / "pid"
    ended = bench.run(sleep_in_subprocess, str(file), gate.paths, timeout=1.0)
    assert ended.kind == "timeout"
    assert ended.ended - ended.began >= 1.0
    assert "over its limit of 1 s" in failure_of(ended).message
    wait_until_gone([int(file.read_text())])


def test_time_behind_another_job_does_not_count(bench: Bench) -> None:
    bench.open()
    gate = Gate(bench.folder)
    bench.start(stop_at, gate.paths)
    bench.start(same, 1, timeout=0.2)
    gate.await_arrival()
    assert not bench.signal.wait(0.5)  # the second would be over its limit by now
    gate.let_through()
    assert all(e.ok for e in bench.wait(2))


# --- output -----------------------------------------------------------------------


def speak() -> None:
    print("print")  # noqa: T201
    os.write(1, b"write\n")
    subprocess.run(["sh", "-c", "echo shell; echo shell error >&2"], check=True)
    sys.stderr.write("snow \u2603\nerror")


def test_stdout_and_stderr_are_kept_apart_and_for_each_job(bench: Bench) -> None:
    bench.open()
    ended = bench.run(speak)
    assert ended.stdout == b"print\nwrite\nshell\n"
    assert ended.stderr.decode() == "shell error\nsnow \u2603\nerror"
    quiet = bench.run(same, 1)
    assert (quiet.stdout, quiet.stderr) == (b"", b"")


def speak_much(lines: int) -> None:
    for i in range(lines):
        os.write(1, b"%07d\n" % i)


def test_only_the_end_of_much_output_is_kept(bench: Bench) -> None:
    bench.open()
    lines = 140_000
    first, *rest = bench.run(speak_much, lines).stdout.splitlines()
    cut = 8 * lines - 1024 * 1024
    assert first == b"[starburst: the first %d bytes were cut]" % cut
    assert rest == [b"%07d" % i for i in range(cut // 8, lines)]


def test_output_of_a_running_job_can_be_read(bench: Bench) -> None:
    bench.open()
    gate = Gate(bench.folder)
    bench.start(stop_at, gate.paths, "so far\n", key="live")
    gate.await_arrival()
    assert bench.slots.live_output("live") == (b"so far\n", b"")
    assert bench.slots.live_output("unknown") == (b"", b"")
    gate.let_through()
    assert bench.wait(1)[0].stdout == b"so far\n"


def close_streams() -> None:
    sys.stdout.close()
    sys.stderr = None


def test_task_may_close_its_streams(bench: Bench) -> None:
    bench.open()
    assert bench.run(close_streams).ok
    assert bench.run(same, 1).ok


# --- large things -----------------------------------------------------------------


def big_array(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(count)


def use_lightly(array: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, int]:
    array[0] = 1.0
    status = Path("/proc/self/status").read_text()
    (rss,) = (x.split()[1] for x in status.splitlines() if x.startswith("RssAnon"))
    return float(array.sum()), int(rss) * 1024


@linux
def test_large_argument_is_mapped_writable_and_takes_no_memory(bench: Bench) -> None:
    bench.open()
    array = np.zeros(16_000_000)
    total, anonymous = bench.result(use_lightly, array)
    assert total == 1.0
    assert anonymous < array.nbytes / 2
    assert bench.result(use_lightly, array)[0] == 1.0  # the blob did not change


def test_large_result_waits_in_a_file_for_the_worker(bench: Bench) -> None:
    bench.open()
    ended = bench.run(big_array, 1_000_000)
    ((digest, file, size),) = ended.blobs
    assert size == file.stat().st_size == 8_000_000
    assert digest_of(file.read_bytes()) == digest
    assert np.array_equal(value_of(ended), np.arange(1_000_000))


def grow(text: str) -> list[str]:
    return [text, text]


def test_messages_too_large_for_the_socket_leave_no_files(bench: Bench) -> None:
    bench.open()
    bench.warm_up()
    for i in range(30):
        bench.start(grow, [str(i) * 200_000], key=i)
    for ended in bench.wait(30):
        assert value_of(ended) == [[str(ended.key) * 200_000]] * 2
    assert {file.suffix for file in bench.spool.iterdir()} == {".stdout", ".stderr"}


def test_messages_that_fill_the_socket_all_arrive(bench: Bench) -> None:
    bench.open()
    bench.warm_up()
    for i in range(100):
        bench.start(same, "x" * 60_000, key=i)
    assert [e.key for e in bench.wait(100)] == list(range(100))


def array_and_exit() -> object:
    return big_array(100_000), AtPickle(exit_hard)


def test_crash_leaves_no_files(bench: Bench) -> None:
    bench.open()
    assert bench.run(array_and_exit).kind == "crashed"
    assert bench.run(same, 1).ok
    assert {file.suffix for file in bench.spool.iterdir()} == {".stdout", ".stderr"}


def test_a_blob_that_is_gone_breaks_the_slots_and_fails_no_job(bench: Bench) -> None:
    bench.open()
    job = bench.job(use_lightly, np.zeros(100_000))
    for blob in bench.blobs.iterdir():
        blob.unlink()
    bench.slots.start(job)
    assert bench.signal.wait(PATIENCE)
    with pytest.raises(SlotsBroken, match=r"task-1: 3 processes.*No such file"):
        bench.slots.take()


def test_a_truncated_blob_fails_the_job_and_not_the_child(bench: Bench) -> None:
    bench.open()
    before = bench.result(os.getpid)
    job = bench.job(use_lightly, np.zeros(100_000))
    for digest, _ in references(job.call):
        (bench.blobs / digest).write_bytes(b"")
    bench.slots.start(job)
    failure = failure_of(bench.wait(1)[0])
    assert failure.type.endswith("DamagedObject")
    assert bench.result(os.getpid) == before


# --- initializer ------------------------------------------------------------------


def greet(name: str, array: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    sys.stdout.write(f"hello {name}\n")
    os.environ["GREETED"] = f"{name} {array.nbytes} {os.getpid()}"


def greeting() -> str:
    return os.environ["GREETED"]


def test_initializer_runs_once_in_each_child_before_its_first_job(bench: Bench) -> None:
    array = np.zeros(100_000)
    bench.open(initializer=bench.cargo((greet, ("bob", array))))
    first, second = bench.run(greeting), bench.run(greeting)
    pid = bench.result(os.getpid)
    assert value_of(first) == value_of(second) == f"bob 800000 {pid}"
    assert (first.stdout, second.stdout) == (b"hello bob\n", b"")
    bench.run(kill_nine)
    assert bench.result(greeting) != value_of(first)


def fail_once(file: str, act: Callable[[], None]) -> None:
    if not Path(file).exists():
        Path(file).touch()
        act()


@pytest.mark.parametrize("act", [raise_error, exit_hard])
def test_failing_initializer_fails_the_job_and_a_fresh_child_tries_anew(
    bench: Bench, act: Callable[[], None]
) -> None:
    arguments = (str(bench.folder / "failed"), act)
    bench.open(initializer=bench.cargo((fail_once, arguments)))
    ended = bench.run(same, 1)
    failure = failure_of(ended)
    assert ended.kind == failure.kind == "initializer"
    assert "ZeroDivisionError" in failure.traceback or failure.exit_code == 7
    assert bench.result(same, 2) == 2


def take_time(seconds: float) -> None:
    threading.Event().wait(seconds)


def test_time_of_the_initializer_is_not_the_jobs(bench: Bench) -> None:
    bench.open(initializer=bench.cargo((take_time, (0.6,))))
    ended = bench.run(same, 1, timeout=0.3)
    assert ended.ok
    assert ended.ended - ended.began < 0.3
    assert bench.run(hang, timeout=0.3).kind == "timeout"


# --- what user code finds in the child --------------------------------------------


def surroundings() -> dict[str, object]:
    return {
        "main": sorted(k for k in vars(sys.modules["__main__"]) if k[0] != "_"),
        "argv": sys.argv,
        "stdin": sys.stdin.read(),
        "thread": threading.current_thread() is threading.main_thread(),
        "boto3": "boto3" in sys.modules,
        "numpy": "numpy" in sys.modules,
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "inheritable": [d for d in range(3, 64) if inheritable(d)],
    }


def inheritable(descriptor: int) -> bool:
    try:
        return os.get_inheritable(descriptor)
    except OSError:
        return False


def test_task_finds_a_plain_interpreter(bench: Bench) -> None:
    bench.open()
    assert bench.result(surroundings) == {
        "main": [],
        "argv": [""],
        "stdin": "",
        "thread": True,
        "boto3": False,
        "numpy": False,
        "sigterm": True,
        "sigint": True,
        "inheritable": [],
    }


def count_calls(calls: list[int] = []) -> int:  # noqa: B006  state is the point
    calls.append(1)
    return len(calls)


def test_function_stays_warm(bench: Bench) -> None:
    bench.open()
    assert [bench.result(count_calls) for _ in range(3)] == [1, 2, 3]


class Loud:
    def __del__(self) -> None:
        os.write(1, b"gone ")


def keep_nothing(first: object, second: object) -> object:
    return second


def raise_with(loud: object) -> None:
    raise ValueError


def say_pickled() -> None:
    os.write(1, b"pickled ")


def trade(loud: object) -> object:
    return AtPickle(say_pickled)


def test_arguments_are_dropped_before_the_result_is_pickled(bench: Bench) -> None:
    bench.open()
    assert bench.run(trade, Loud()).stdout.startswith(b"gone pickled ")


def test_arguments_and_result_are_dropped_as_the_job_ends(bench: Bench) -> None:
    bench.open()
    assert bench.run(keep_nothing, Loud(), Loud()).stdout == b"gone gone "
    assert bench.run(raise_with, Loud()).stdout == b"gone "


def write_module(folder: Path, name: str, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    return str(folder)


def import_values(*names: str) -> tuple[int, ...]:
    import importlib

    return (os.getpid(), *(importlib.import_module(name).VALUE for name in names))


def test_child_is_replaced_if_its_modules_change_and_kept_if_they_only_grow(
    bench: Bench,
) -> None:
    bench.open()
    old = write_module(bench.folder / "old", "shipped_a", "VALUE = 1")
    new = write_module(bench.folder / "new", "shipped_a", "VALUE = 2")
    more = write_module(bench.folder / "more", "shipped_b", "VALUE = 3")
    pid, *values = bench.result(import_values, "shipped_a", path=(old,))
    assert values == [1]
    grown = bench.result(import_values, "shipped_a", "shipped_b", path=(old, more))
    assert grown == (pid, 1, 3)
    other = bench.result(import_values, "shipped_a", path=(new,))
    assert other[0] != pid
    assert other[1:] == (2,)


def test_jobs_with_different_modules_share_the_slots(bench: Bench) -> None:
    bench.open(2)
    paths = [write_module(bench.folder / str(i), "shipped", f"VALUE = {i}") for i in range(3)]
    for i in range(30):
        bench.start(import_values, "shipped", path=(paths[i // 3 % 3],), key=i)
    for ended in bench.wait(30):
        assert isinstance(ended.key, int)
        assert value_of(ended)[1] == ended.key // 3 % 3


def in_pool(method: str) -> bool:
    context: Any = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        return bool(pool.apply(os.getpid) != os.getpid())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_task_may_use_multiprocessing(bench: Bench, method: str) -> None:
    bench.open()
    ended = bench.run(in_pool, method)
    assert (value_of(ended), ended.stderr) == (True, b"")


def fork_and_return() -> int:
    return os.fork()


def test_fork_that_returns_from_the_task_is_not_heard(bench: Bench) -> None:
    bench.open()
    assert bench.result(fork_and_return) > 0
    assert bench.result(same, 1) == 1


def leave_thread() -> None:
    threading.Thread(target=hang).start()


def test_thread_that_a_task_leaves_delays_nothing(bench: Bench) -> None:
    bench.open()
    assert bench.run(leave_thread).ok
    assert bench.result(same, 1) == 1


def start_and_leave(file: str) -> int:
    process = start_sleeper(file)
    process.returncode = 0  # or Popen warns that it still runs
    return process.pid


@linux
def test_background_process_of_a_task_lives_as_long_as_the_child(bench: Bench) -> None:
    bench.open()
    pid = bench.result(start_and_leave, str(bench.folder / "pid"))
    assert bench.result(is_alive, pid)
    bench.slots.close()
    wait_until_gone([pid])


# --- the end ----------------------------------------------------------------------


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
from starburst_executor.worker.pool import ProcessPool as ProcessSlots

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
    slots = ProcessSlots(
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

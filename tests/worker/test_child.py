"""What tasks find in a child, and what comes of their output and of large values."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starburst_executor.protocol.payload import digest_of, references
from starburst_executor.worker.pool import SlotsBroken
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


# --- output ------------------------------------------------------------------------


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


# --- large things ------------------------------------------------------------------


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
    with pytest.raises(SlotsBroken, match=r"blobs/.* cannot be read.*No such file"):
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


# --- initializer -------------------------------------------------------------------


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
    bench.open(initializer=bench.cargo((take_time, (2.5,))))
    ended = bench.run(same, 1, timeout=2)
    assert ended.ok
    assert ended.ended - ended.began < 2
    assert bench.run(hang, timeout=0.3).kind == "timeout"


# --- what user code finds in the child ---------------------------------------------


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

"""A task that spoils its process harms no task after it."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from starburst_executor.worker.pool import ProcessPool, SlotsBroken
from tests.support import poisons
from tests.support.bench import PATIENCE, Bench, failure_of, value_of
from tests.support.poisons import ENDS_ITS_PROCESS, POISONS, innocent

FOLLOWERS = 20
ROOT = (str(Path(__file__).parents[2]),)  # where children find `tests`

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class PoisonBench(Bench):
    """Slots whose children are limited in what they may use."""

    def limited(self, jobs_max: int | None = None, memory_max: float = 150 << 20) -> None:
        self.slots = ProcessPool(
            1,
            folder=self.spool,
            runtime=self.runtime,
            signal=self.signal,
            jobs_max=jobs_max,
            memory_max=memory_max,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[PoisonBench]:
    bench = PoisonBench(tmp_path)
    yield bench
    bench.slots.close()
    assert not bench.spool.exists()


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: poison.__name__)
def test_tasks_after_a_poisonous_one_find_everything_as_it_was(
    bench: PoisonBench, poison: Callable[[], None]
) -> None:
    bench.limited()
    _, before = bench.result(innocent, -1, path=ROOT)
    bench.start(poison, key="poison", path=ROOT)
    for i in range(FOLLOWERS):
        bench.start(innocent, i, key=i, path=ROOT)
    ended = {one.key: one for one in bench.wait(FOLLOWERS + 1)}
    assert ended.pop("poison").ok is (poison not in ENDS_ITS_PROCESS)
    for key, one in ended.items():
        assert value_of(one) == (key, before)
        assert one.stdout == f"{key}\n".encode()


@linux
def test_a_task_that_calls_execv_is_said_to_have_done_so(bench: PoisonBench) -> None:
    bench.limited()
    failure = failure_of(bench.run(poisons.becomes_another_program, path=ROOT))
    assert "replaced by another program, sleep 60" in failure.message
    assert failure.signal is None


def test_a_task_that_closes_all_descriptors_is_said_to_have_done_so(
    bench: PoisonBench,
) -> None:
    bench.limited()
    failure = failure_of(bench.run(poisons.closes_everything, path=ROOT))
    assert "closed descriptors that it had not opened" in failure.message
    assert failure.signal is None


def pid(_: int = 0) -> int:
    return os.getpid()


def test_a_child_runs_so_many_tasks_and_no_more(bench: PoisonBench) -> None:
    bench.limited(jobs_max=3)
    for i in range(12):
        bench.start(pid, i, key=i)
    ended = sorted(bench.wait(12), key=lambda one: int(str(one.key)))
    pids = [value_of(one) for one in ended]
    assert [pids.count(one) for one in dict.fromkeys(pids)] == [3, 3, 3, 3]


def test_a_child_that_has_grown_too_large_is_replaced(bench: PoisonBench) -> None:
    bench.limited()
    before = bench.result(pid)
    assert bench.run(poisons.leaks_memory, path=ROOT).ok
    assert bench.result(pid) != before


_pool: list[ThreadPoolExecutor] = []


def uses_a_pool_that_stays() -> int:
    if not _pool:
        _pool.append(ThreadPoolExecutor(4))
    return _pool[0].submit(os.getpid).result()


def test_an_idle_pool_of_threads_is_no_reason_to_replace_a_child(
    bench: PoisonBench,
) -> None:
    bench.limited()
    pids = {bench.result(uses_a_pool_that_stays) for _ in range(3)}
    assert len(pids) == 1


def exhausts_descriptors_and_returns_much() -> bytes:
    poisons.leaks_descriptors()
    return b"x" * 200_000


def test_a_result_that_cannot_be_written_is_tried_elsewhere_and_then_said(
    bench: PoisonBench,
) -> None:
    bench.limited()
    bench.start(exhausts_descriptors_and_returns_much, key="bad", path=ROOT)
    bench.start(pid, key="good")
    ended = {one.key: one for one in bench.wait(2)}
    assert ended["good"].ok
    failure = failure_of(ended["bad"])
    assert failure.kind == "crashed"
    assert "3 processes, one after the other" in failure.message
    assert "Too many open files" in failure.message


def test_callables_that_cannot_be_read_break_the_slots_and_fail_no_task(
    bench: PoisonBench,
) -> None:
    bench.limited()
    job = bench.job(pid)
    job.function.unlink()
    bench.slots.start(job)
    assert bench.signal.wait(PATIENCE)
    with pytest.raises(SlotsBroken, match="cannot be read"):
        bench.slots.take()


# --- interrupts -------------------------------------------------------------------


def interrupts_its_main_thread() -> str:
    try:
        _thread.interrupt_main()
        threading.Event().wait(60)
    except KeyboardInterrupt:
        return "interrupted"
    return "not"


def interrupts_a_subprocess() -> int:
    code = "import time; print(flush=True); time.sleep(600)"
    program = [sys.executable, "-c", code]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        return process.wait(60)


def test_tasks_and_their_subprocesses_can_be_interrupted(bench: PoisonBench) -> None:
    bench.limited()
    assert bench.result(interrupts_its_main_thread) == "interrupted"
    assert bench.result(interrupts_a_subprocess) == -signal.SIGINT


# --- output -----------------------------------------------------------------------


def prints_much(megabytes: int, opened: str) -> None:
    for _ in range(megabytes):
        sys.stdout.write("x" * (1 << 20) + "\n")
        time.sleep(0.002)
    until = time.monotonic() + PATIENCE
    while not Path(opened).exists() and time.monotonic() < until:
        sys.stdout.write("the end\n")  # again, as what is written during a cut may be lost
        time.sleep(0.01)


def on_disk(folder: Path) -> int:
    return sum(512 * file.stat().st_blocks for file in folder.glob("*.stdout"))


@pytest.mark.parametrize("holes", [True, False], ids=["holes", "no-holes"])
def test_what_a_task_prints_is_bounded_on_disk_while_it_runs(
    bench: PoisonBench, monkeypatch: pytest.MonkeyPatch, holes: bool
) -> None:
    if not holes:
        monkeypatch.setattr("starburst_executor.worker.output._punch", lambda *_: False)
    bench.limited(memory_max=1e12)
    gate = bench.folder / "gate"
    job = bench.start(prints_much, 300, str(gate))
    most = 0
    until = time.monotonic() + PATIENCE
    while b"the end" not in bench.slots.live_output(job.key)[0][-20:]:
        most = max(most, on_disk(bench.spool))
        assert time.monotonic() < until
        time.sleep(0.002)
    while on_disk(bench.spool) > 6 << 20:
        assert time.monotonic() < until
    gate.touch()
    ended = bench.wait(1)[0]
    assert most < 150 << 20
    assert ended.stdout.endswith(b"the end\n")
    assert ended.stdout.startswith(b"[starburst: the first ")
    assert len(ended.stdout) <= 2 << 20
    assert bench.run(print, "next").stdout == b"next\n"

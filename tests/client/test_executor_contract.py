"""The standard library's contract: the same behaviours of its pools and of a `StarburstExecutor`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures import TimeoutError as FuturesTimeoutError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starburst_executor import (
    InitializerFailed,
    RemoteTraceback,
    SerializationError,
    SessionDetached,
    SessionNotFound,
    StarburstExecutor,
    TaskFuture,
)
from starburst_executor.launchers.local import LocalLauncher
from tests.support.sessions import QUICK, is_alive, keys, live_workers, run_python, worker_pids
from tests.support.tasks import (
    ExitsWhenUnpickled,
    Gate,
    Multiplier,
    add,
    answer,
    chained,
    double,
    exits,
    fail_to_start,
    hold_after_the_first,
    interrupts,
    new_lock,
    odd_fails,
    process_id,
    remember,
    remembered,
    returns_what_exits,
    until,
)

# Before any test, so that their processes are not taken for what a test left.
pytestmark = pytest.mark.usefixtures("threads", "processes", "warm")

# --- fixtures -----------------------------------------------------------------------

Make = Callable[..., StarburstExecutor]


@pytest.fixture
def make(directory_url: str) -> Iterator[Make]:
    """Makes executors on a directory; takes down what a failing test leaves."""
    made: list[StarburstExecutor] = []

    def make_one(max_workers: int = 2, **options: Any) -> StarburstExecutor:
        options.setdefault("store", directory_url)
        options.setdefault("intervals", QUICK)
        made.append(StarburstExecutor(max_workers, **options))
        return made[-1]

    yield make_one
    for executor in made:
        with contextlib.suppress(SessionNotFound):
            executor.cleanup(force=True)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StarburstExecutor]:
    """An executor with both of its two workers at work, shared by what does it no harm."""
    folder = tmp_path_factory.mktemp("warm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARBURST_HOME", str(folder))
        executor = StarburstExecutor(2, store=folder / "store", keep=True)
    with executor:
        gate = Gate(folder / "gate")
        futures = [executor.submit(gate.hold, i) for i in range(2)]
        gate.await_arrivals(2)
        gate.open()
        wait(futures)
        _start_all_threads(executor)
        yield executor


def _start_all_threads(executor: StarburstExecutor) -> None:
    """Or the first test with many requests at once would seem to leave some running."""
    width = 8
    together = threading.Barrier(width)
    executor._engine.session.runtime.gather([together.wait] * width)


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as executor:
        both = threading.Barrier(2)
        wait([executor.submit(both.wait) for _ in range(2)])
        yield executor


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        list(executor.map(process_id, range(8)))
        yield executor


@pytest.fixture(params=["threads", "processes", "starburst"])
def pool(request: pytest.FixtureRequest) -> Executor:
    """Each executor in turn: the standard library's show what the contract is."""
    name = "warm" if request.param == "starburst" else request.param
    executor: Executor = request.getfixturevalue(name)
    return executor


@pytest.fixture(params=["threads", "starburst"])
def fresh(request: pytest.FixtureRequest) -> Callable[[], Executor]:
    """Makes executors that a test may shut down."""
    if request.param == "threads":
        return lambda: ThreadPoolExecutor(2)
    maker: Make = request.getfixturevalue("make")
    return maker


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()  # for who still waits where a test has failed


# --- submit -------------------------------------------------------------------------


def test_submit_gives_a_future_with_the_result(pool: Executor) -> None:
    future = pool.submit(pow, 2, 5)
    assert isinstance(future, Future)
    assert future.result() == 32
    assert future.exception() is None
    assert future.done()
    assert not future.running()
    assert not future.cancelled()
    assert not future.cancel()


def test_submit_passes_keyword_arguments_whatever_their_names(pool: Executor) -> None:
    assert pool.submit(add, 1, fn=2, self=3, args=4, timeout=5).result() == 15


def test_submit_without_a_callable_is_a_type_error(pool: Executor) -> None:
    with pytest.raises(TypeError):
        pool.submit()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        pool.submit(fn=double)  # type: ignore[call-arg]


def test_a_thing_that_cannot_be_called_fails_its_future(pool: Executor) -> None:
    future = pool.submit(3, 4)  # type: ignore[arg-type,var-annotated]
    assert isinstance(future.exception(), TypeError)


def test_an_exception_comes_back_as_itself(pool: Executor) -> None:
    future = pool.submit(odd_fails, 3)
    with pytest.raises(ValueError, match=r"^3 is odd"):
        future.result()
    assert type(future.exception()) is ValueError


@pytest.mark.parametrize(
    ("function", "kind"), [(exits, SystemExit), (interrupts, KeyboardInterrupt)]
)
def test_what_is_no_exception_comes_back_too(
    pool: Executor, function: Callable[[], None], kind: type[BaseException]
) -> None:
    assert type(pool.submit(function).exception()) is kind
    assert pool.submit(double, 1).result() == 2


def test_result_times_out(pool: Executor, gate: Gate) -> None:
    future = pool.submit(gate.hold)
    for call in (future.result, future.exception):
        with pytest.raises(TimeoutError):
            call(0.01)
    with pytest.raises(FuturesTimeoutError):
        future.result(timeout=0)
    gate.open()
    assert future.result() is None


def test_running_becomes_true_while_the_task_runs(pool: Executor, gate: Gate) -> None:
    future = pool.submit(gate.hold)
    until(future.running, "running")
    assert not future.cancel()
    gate.open()
    future.result()
    assert not future.running()


@pytest.mark.parametrize(
    "function",
    [
        functools.partial(double, 4),
        functools.partial(Multiplier(2), x=4),
        functools.partial(Multiplier(2).times, 4),
        functools.partial(operator.methodcaller("times", 4), Multiplier(2)),
    ],
)
def test_partials_methods_and_callable_objects_can_be_called(
    pool: Executor, function: Callable[[], int]
) -> None:
    assert pool.submit(function).result() == 8


def test_callbacks_are_called_once_with_the_future(pool: Executor, gate: Gate) -> None:
    called: list[Future[Any]] = []
    future = pool.submit(gate.hold)
    future.add_done_callback(called.append)
    assert not called
    gate.open()
    future.result()
    until(lambda: called, "callback")
    future.add_done_callback(called.append)
    assert called == [future, future]


def test_a_callback_that_raises_is_logged_and_harms_nobody(
    pool: Executor, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[object] = []
    future = pool.submit(gate.hold)
    future.add_done_callback(lambda _: [][0])
    future.add_done_callback(called.append)
    gate.open()
    until(lambda: called, "the second callback")
    assert "IndexError" in caplog.text
    assert pool.submit(double, 1).result() == 2


def test_submit_from_a_callback(pool: Executor, gate: Gate) -> None:
    later: list[Future[int]] = []
    first = pool.submit(gate.hold, 4)
    first.add_done_callback(lambda f: later.append(pool.submit(double, f.result())))
    gate.open()
    until(lambda: later, "callback")
    assert later[0].result() == 8


def test_submit_from_many_threads(pool: Executor) -> None:
    results: list[int] = []

    def submit_some(start: int) -> None:
        futures = [pool.submit(double, i) for i in range(start, start + 50)]
        results.extend(f.result() for f in futures)

    submitting = [threading.Thread(target=submit_some, args=(i * 50,)) for i in range(8)]
    for thread in submitting:
        thread.start()
    for thread in submitting:
        thread.join()
    assert sorted(results) == [2 * i for i in range(400)]


def test_thousands_of_submits(pool: Executor) -> None:
    futures = [pool.submit(double, i) for i in range(3000)]
    assert [f.result() for f in futures] == [2 * i for i in range(3000)]


# --- map ----------------------------------------------------------------------------


def test_map_gives_results_in_order(pool: Executor) -> None:
    assert list(pool.map(double, range(300))) == [2 * i for i in range(300)]


def test_map_ends_with_the_shortest_iterable(pool: Executor) -> None:
    assert list(pool.map(pow, [2, 3, 4], itertools.count())) == [1, 3, 16]
    assert list(pool.map(double)) == []
    assert list(pool.map(double, [])) == []


def test_map_reads_its_iterables_at_once(pool: Executor) -> None:
    source = iter(range(5))
    results = pool.map(double, source)
    assert list(source) == []
    assert list(results) == [0, 2, 4, 6, 8]


def test_map_raises_what_an_iterable_raises_at_once(pool: Executor) -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise KeyError("source")

    with pytest.raises(KeyError, match="source"):
        pool.map(double, numbers())


def test_map_gives_what_comes_before_an_exception_then_raises_it(
    pool: Executor,
) -> None:
    results = pool.map(odd_fails, [0, 2, 3, 4])
    assert next(results) == 0
    assert next(results) == 2
    with pytest.raises(ValueError, match="3 is odd"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.parametrize("chunksize", [1, 3, 7, 100])
def test_map_in_chunks_gives_the_same(pool: Executor, chunksize: int) -> None:
    results = pool.map(pow, range(20), itertools.repeat(2), chunksize=chunksize)
    assert list(results) == [i * i for i in range(20)]


def test_map_times_out_counting_from_the_call(pool: Executor, gate: Gate) -> None:
    results = pool.map(gate.hold, [1, 2], timeout=0.05)
    with pytest.raises(TimeoutError):
        list(results)
    gate.open()


def test_closing_a_map_cancels_what_has_not_begun(pool: Executor, gate: Gate) -> None:
    results = pool.map(hold_after_the_first, [gate] * 200, range(200))
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    gate.open()
    pool.submit(double, 1).result()
    assert len(gate.arrivals()) < 200


@pytest.mark.parametrize(
    ("buffersize", "kind"),
    [(0, ValueError), (-1, ValueError), ("2", TypeError), (1.5, TypeError)],
)
def test_map_refuses_a_wrong_buffersize(
    warm: StarburstExecutor, buffersize: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=f"buffersize.*{buffersize}"):
        warm.map(double, [1], buffersize=buffersize)


@pytest.mark.parametrize(
    ("chunksize", "kind"), [(0, ValueError), (-3, ValueError), ("2", TypeError)]
)
def test_map_refuses_a_wrong_chunksize(
    warm: StarburstExecutor, chunksize: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=f"chunksize.*{chunksize}"):
        warm.map(double, [1], chunksize=chunksize)


def test_map_with_a_buffersize_reads_no_further_ahead(warm: StarburstExecutor) -> None:
    source = iter(range(10))
    results = warm.map(double, source, buffersize=3)
    assert operator.length_hint(source) == 7
    assert [next(results), next(results)] == [0, 2]
    assert operator.length_hint(source) == 6
    assert list(results) == [2 * i for i in range(2, 10)]


def test_map_with_a_buffersize_goes_through_an_endless_iterable(
    warm: StarburstExecutor,
) -> None:
    results = warm.map(pow, itertools.count(), itertools.repeat(2), buffersize=4)
    assert list(itertools.islice(results, 6)) == [0, 1, 4, 9, 16, 25]
    results.close()  # type: ignore[attr-defined]


def test_map_with_buffersize_and_chunksize(warm: StarburstExecutor) -> None:
    source = iter(range(100))
    results = warm.map(double, source, buffersize=2, chunksize=5)
    assert operator.length_hint(source) == 90
    assert list(results) == [2 * i for i in range(100)]


def test_map_keeps_no_result_that_was_taken(warm: StarburstExecutor) -> None:
    results = warm.map(np.full, [(10,)] * 3, [1.0, 2.0, 3.0])
    taken = weakref.ref(next(results))
    next(results)
    gc.collect()
    assert taken() is None


def test_a_map_in_chunks_pickles_its_function_once(make: Make, directory_url: str) -> None:
    big = list(range(10_000))
    with make() as executor:
        results = executor.map(lambda i: big[i], range(40), chunksize=4)
        assert list(results) == list(range(40))
        stored = keys(directory_url, f"sessions/{executor.session_id}/functions/")
        assert len(stored) == 1


# --- wait, as_completed, cancel -----------------------------------------------------


def test_as_completed_gives_each_future_once(pool: Executor, gate: Gate) -> None:
    slow = pool.submit(gate.hold, "slow")
    quick = [pool.submit(double, i) for i in range(5)]
    completed = as_completed([slow, *quick])
    first = [next(completed) for _ in range(5)]
    assert set(first) == set(quick)
    gate.open()
    assert list(completed) == [slow]


def test_as_completed_times_out(pool: Executor, gate: Gate) -> None:
    future = pool.submit(gate.hold)
    with pytest.raises(TimeoutError):
        list(as_completed([future], timeout=0.02))
    gate.open()
    future.result()


def test_wait_returns_at_the_first_that_completes(pool: Executor, gate: Gate) -> None:
    slow, quick = pool.submit(gate.hold), pool.submit(double, 1)
    done, left = wait([slow, quick], return_when=FIRST_COMPLETED)
    assert (done, left) == ({quick}, {slow})
    gate.open()
    assert wait([slow, quick]) == ({slow, quick}, set())


def test_wait_returns_at_the_first_exception(pool: Executor, gate: Gate) -> None:
    slow, fails = pool.submit(gate.hold), pool.submit(odd_fails, 1)
    done, left = wait([slow, fails], return_when=FIRST_EXCEPTION)
    assert (done, left) == ({fails}, {slow})
    done, left = wait([slow], timeout=0.01)
    assert (done, left) == (set(), {slow})
    gate.open()
    wait([slow])


def test_what_has_not_begun_can_be_cancelled(pool: Executor, gate: Gate) -> None:
    blocking = [pool.submit(gate.hold, i) for i in range(2)]
    gate.await_arrivals(2)
    queued = [pool.submit(gate.hold, i) for i in range(10, 20)]
    called: list[object] = []
    queued[-1].add_done_callback(called.append)
    assert queued[-1].cancel()
    assert queued[-1].cancel()
    assert queued[-1].cancelled()
    assert queued[-1].done()
    assert called == [queued[-1]]
    for call in (queued[-1].result, queued[-1].exception):
        with pytest.raises(CancelledError):
            call(timeout=5)
    gate.open()
    assert wait([*blocking, *queued], timeout=20).not_done == set()
    assert set(as_completed(queued, timeout=5)) == set(queued)
    assert not any(name.endswith("-19") for name in gate.arrivals())


def test_tasks_that_are_stored_can_be_cancelled(warm: StarburstExecutor, gate: Gate) -> None:
    blocking = [warm.submit(gate.hold, i) for i in range(2)]
    gate.await_arrivals(2)
    stored = [warm.submit(gate.hold, i) for i in range(10, 20)]
    warm.flush()
    assert stored[-1].cancel()
    assert wait(stored[-1:], timeout=5).done == set(stored[-1:])
    assert list(as_completed(stored[-1:], timeout=5)) == stored[-1:]
    assert warm.status().cancelled
    gate.open()
    wait([*blocking, *stored])
    assert stored[-1].cancelled()
    assert not any(name.endswith("-19") for name in gate.arrivals())


def test_cancel_many_at_once_stops_running_tasks_too(warm: StarburstExecutor, gate: Gate) -> None:
    futures = [warm.submit(gate.hold, i) for i in range(20)]
    gate.await_arrivals(2)
    assert warm.cancel(futures)
    assert all(future.cancelled() for future in futures)
    gate.open()
    assert warm.submit(double, 1).result() == 2


def test_cancel_can_leave_running_tasks_alone(warm: StarburstExecutor, gate: Gate) -> None:
    running = [warm.submit(gate.hold, i) for i in range(2)]
    until(lambda: all(future.running() for future in running), "both running")
    waiting = warm.submit(gate.hold, 2)
    assert not warm.cancel([*running, waiting], running=False)
    assert waiting.cancelled()
    gate.open()
    assert [future.result() for future in running] == [0, 1]


# --- asyncio ------------------------------------------------------------------------


def test_a_future_can_be_awaited(pool: Executor) -> None:
    async def run() -> tuple[int, ...]:
        loop = asyncio.get_running_loop()
        first = await asyncio.wrap_future(pool.submit(double, 1))
        second = await loop.run_in_executor(pool, double, 2)
        with pytest.raises(ValueError, match="3 is odd"):
            await loop.run_in_executor(pool, odd_fails, 3)
        third, fourth = await asyncio.gather(
            loop.run_in_executor(pool, double, 3), loop.run_in_executor(pool, double, 4)
        )
        return first, second, third, fourth

    assert asyncio.run(run()) == (2, 4, 6, 8)


def test_cancelling_who_awaits_cancels_what_has_not_begun(pool: Executor, gate: Gate) -> None:
    blocking = [pool.submit(gate.hold, i) for i in range(2)]
    gate.await_arrivals(2)
    queued = [pool.submit(gate.hold, i) for i in range(10, 20)]

    async def run() -> None:
        async def wait_for_it() -> None:
            await asyncio.wrap_future(queued[-1])

        waiting = asyncio.create_task(wait_for_it())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())
    assert queued[-1].cancelled()
    gate.open()
    wait([*blocking, *queued])


# --- shutdown -----------------------------------------------------------------------


def test_shutdown_waits_and_refuses_more(fresh: Callable[[], Executor]) -> None:
    executor = fresh()
    futures = [executor.submit(double, i) for i in range(10)]
    executor.shutdown()
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(double, 1)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(double, [1])
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)


def test_shutdown_without_waiting_lets_tasks_finish(
    fresh: Callable[[], Executor], gate: Gate
) -> None:
    executor = fresh()
    futures = [executor.submit(gate.hold, i) for i in range(5)]
    executor.shutdown(wait=False)
    assert not any(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(double, 1)
    gate.open()
    assert [future.result() for future in futures] == list(range(5))
    executor.shutdown(wait=True)


def test_shutdown_can_cancel_what_has_not_begun(fresh: Callable[[], Executor], gate: Gate) -> None:
    executor = fresh()
    futures = [executor.submit(gate.hold, i) for i in range(12)]
    gate.await_arrivals(2)
    executor.shutdown(wait=False, cancel_futures=True)
    until(lambda: futures[-1].cancelled(), "the last one cancelled")
    gate.open()
    executor.shutdown(wait=True)
    done = [future.result() for future in futures if not future.cancelled()]
    assert 2 <= len(done) < 12
    assert all(future.done() for future in futures)


def test_leaving_the_with_block_waits(fresh: Callable[[], Executor], gate: Gate) -> None:
    opening = threading.Timer(0.2, gate.open)
    with fresh() as executor:
        future = executor.submit(gate.hold, 7)
        opening.start()
    opening.join()
    assert future.done()
    assert future.result() == 7


def test_shutdown_from_a_callback_does_not_hang(make: Make, gate: Gate) -> None:
    executor = make(1)
    ended = threading.Event()
    future = executor.submit(gate.hold)
    future.add_done_callback(lambda _: executor.shutdown())
    future.add_done_callback(lambda _: ended.set())
    gate.open()
    assert ended.wait(20)
    executor.shutdown()


def _open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_after_shutdown_nothing_is_left(make: Make, directory_url: str, gate: Gate) -> None:
    before = set(threading.enumerate())
    descriptors = _open_files()
    with make() as executor:
        futures = [executor.submit(gate.hold, i) for i in range(2)]
        gate.await_arrivals(2)
        until(lambda: len(worker_pids(executor)) == 2, "both heartbeats")
        pids = worker_pids(executor).values()
        gate.open()
    assert all(future.done() for future in futures)
    assert keys(directory_url) == []
    assert not any(map(is_alive, pids))
    assert live_workers(executor) == set()
    assert not set(threading.enumerate()) - before
    assert _open_files() == descriptors


def test_what_was_kept_can_be_read_after_shutdown(make: Make) -> None:
    with make(keep=True) as executor:
        executor.submit(print, "hello").result()
        executor.submit(odd_fails, 1)
    assert executor.status().completed == 1
    assert [outcome.state for outcome in executor.collect()] == ["completed", "failed"]
    assert "hello" in executor.logs()


def test_what_was_removed_cannot_be_read_after_shutdown(make: Make) -> None:
    with make() as executor:
        future = executor.submit(double, 1)
    assert future.result() == 2
    for read in (executor.status, executor.collect):
        with pytest.raises(SessionNotFound, match=executor.session_id):
            read()


def test_an_executor_that_is_never_used_starts_no_worker(make: Make, directory_url: str) -> None:
    with make() as executor:
        assert executor.futures == []
        assert executor.status().total == 0
        assert live_workers(executor) == set()
    assert keys(directory_url) == []


def test_two_executors_at_once_do_not_disturb_each_other(make: Make) -> None:
    with make(1) as one, make(1) as other:
        firsts = [one.submit(double, i) for i in range(20)]
        seconds = [other.submit(double, -i) for i in range(20)]
        assert [f.result() for f in firsts] == [2 * i for i in range(20)]
        assert [f.result() for f in seconds] == [-2 * i for i in range(20)]
        assert one.session_id != other.session_id


def test_max_workers_can_be_read_as_on_the_pools(make: Make) -> None:
    executor = make(3)
    assert executor._max_workers == 3
    executor.scale(5)
    assert executor._max_workers == 5
    assert executor.status().workers_wanted == 5
    executor.shutdown()


# --- leaving early ------------------------------------------------------------------


def test_an_exception_leaves_the_block_when_tasks_are_done_and_keeps_the_session(
    make: Make, directory_url: str, gate: Gate
) -> None:
    executor = make()
    future = executor.submit(gate.hold, 5)
    gate.await_arrivals()
    gate.open()
    with pytest.raises(LookupError, match="mine") as caught, executor:
        raise LookupError("mine")
    assert future.done()
    assert future.result() == 5
    [note] = caught.value.__notes__
    assert executor.session_id in note
    assert directory_url in note
    assert "cleanup" in note
    assert "attach" in note
    assert executor.collect()[0].value == 5
    assert live_workers(executor) == set()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_block_and_stops_the_workers_at_once(
    make: Make,
    gate: Gate,
    kind: type[BaseException],
    caplog: pytest.LogCaptureFixture,
) -> None:
    executor = make()
    futures = [executor.submit(gate.hold, i) for i in range(5)]
    gate.await_arrivals(2)
    with pytest.raises(kind) as caught, executor:
        raise kind
    assert live_workers(executor) == set()
    assert executor.session_id in caught.value.__notes__[0]
    assert f"cleanup --force {executor.session_id}" in caplog.text
    for future in futures:
        assert isinstance(future.exception(timeout=1), SessionDetached)
    status = executor.status()
    assert (status.pending, status.running, status.workers) == (5, 0, 0)


def test_an_interrupt_while_the_block_waits_stops_the_workers_at_once(
    tmp_path: Path, directory_url: str, gate: Gate
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path
            from starburst_executor import StarburstExecutor

            def wait_for_ever(folder):
                import threading
                Path(folder).mkdir()
                threading.Event().wait()

            with StarburstExecutor(1, store=sys.argv[1]) as ex:
                ex.submit(wait_for_ever, sys.argv[2])
                print(ex.session_id, flush=True)
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script), directory_url, str(gate.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    session_id = process.stdout.readline().strip()
    until(gate.folder.exists, "the task running")
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in printed
    assert f"cleanup --force {session_id}" in printed
    assert LocalLauncher().live(f"{directory_url}/sessions/{session_id}") == set()
    executor = StarburstExecutor.attach(session_id, store=directory_url)
    executor.cleanup(force=True)
    assert keys(directory_url) == []


def test_detach_makes_leaving_the_block_immediate(make: Make, gate: Gate) -> None:
    with make() as executor:
        done = executor.submit(double, 2)
        assert done.result() == 4
        futures = [executor.submit(gate.hold, i) for i in range(3)]
        session_id = executor.detach()
        assert session_id == executor.session_id == executor.detach()
    assert done.result() == 4
    for future in futures:
        with pytest.raises(SessionDetached, match=session_id):
            future.result(timeout=0)
    with pytest.raises(SessionDetached, match=session_id):
        executor.submit(double, 1)
    executor.shutdown()
    assert live_workers(executor)
    assert executor.status().total == 4
    gate.open()
    until(lambda: executor.status().completed == 4, "the workers carry on")


def test_a_callback_may_submit_while_the_executor_is_detached(make: Make, gate: Gate) -> None:
    executor = make()
    tried = threading.Event()

    def again(_: object) -> None:
        with contextlib.suppress(SessionDetached):
            executor.submit(double, 1)
        tried.set()

    for i in range(20):
        executor.submit(double, i).add_done_callback(again)
    assert executor.detach()
    assert tried.wait(10)


# --- initializer --------------------------------------------------------------------


def test_the_initializer_runs_once_in_each_process_before_its_tasks(make: Make) -> None:
    with make(1, initializer=remember, initargs=("a", 2)) as executor:
        assert executor.submit(remembered).result() == ["a", 2]
        assert executor.submit(remembered).result() == ["a", 2]


def test_a_failing_initializer_breaks_the_executor(make: Make) -> None:
    executor = make(initializer=fail_to_start)
    futures = [executor.submit(double, i) for i in range(30)]
    for future in futures:
        assert isinstance(future.exception(timeout=20), BrokenExecutor)
    with pytest.raises(InitializerFailed, match="no licence here"):
        futures[0].result()
    for _ in range(2):
        with pytest.raises(BrokenExecutor, match="initializer"):
            executor.submit(double, 1)
    executor.shutdown()
    assert live_workers(executor) == set()


# --- pickling -----------------------------------------------------------------------


def test_lambdas_closures_and_local_classes_travel_by_value(
    warm: StarburstExecutor,
) -> None:
    offset = 10

    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

        def moved(self) -> Point:
            return Point(self.x + offset)

    assert warm.submit(lambda x: x + offset, 1).result() == 11
    assert warm.submit(Point.moved, Point(1)).result().x == 11
    assert list(warm.map(lambda x, y: x * y, [1, 2], [3, 4])) == [3, 8]


def test_later_changes_of_a_function_or_argument_are_not_seen(
    warm: StarburstExecutor, gate: Gate
) -> None:
    box = {"n": 1}
    array = np.zeros(50_000)
    futures: list[Future[Any]] = [
        warm.submit(lambda: box["n"]),
        warm.submit(lambda values: values["n"], box),
        warm.submit(np.sum, array),
    ]
    box["n"] = 2
    array[:] = 1
    assert [future.result() for future in futures] == [1, 1, 0]
    assert warm.submit(lambda: box["n"]).result() == 2
    assert warm.submit(np.sum, array).result() == 50_000


def test_large_arrays_go_and_come(warm: StarburstExecutor) -> None:
    array = np.arange(1_000_000.0)
    assert warm.submit(np.sum, array).result() == array.sum()
    result = warm.submit(np.multiply, array, 2).result()
    assert np.array_equal(result, 2 * array)
    result[0] = 5  # it is the caller's own
    assert all(
        np.array_equal(one, array + i)
        for i, one in enumerate(warm.map(np.add, [array] * 3, range(3)))
    )


def test_a_result_of_many_megabytes_of_objects_comes_back(
    warm: StarburstExecutor,
) -> None:
    text = warm.submit(lambda: ["x" * 100] * 10 + list(range(500_000))).result()
    assert len(text) == 500_010


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda ex: ex.submit(double, threading.Lock()), "argument 0.*lock"),
        (
            lambda ex: ex.submit(add, 1, b=[threading.Lock()]),
            r"argument 'b' \[0\].*lock",
        ),
        (lambda ex: ex.submit(sum, (i for i in [1])), "argument 0.*generator"),
        (lambda ex: ex.submit(threading.Lock().acquire), "callable.*lock"),
        (lambda ex: ex.submit(new_lock), "result.*lock"),
        (lambda ex: ex.submit(answer), "result.*coroutine"),
        (lambda ex: ex.submit(double, ex), "argument 0"),
        (lambda ex: ex.submit(double, ex.submit(double, 1)), "argument 0"),
    ],
)
def test_what_cannot_be_pickled_fails_its_own_future_and_is_named(
    warm: StarburstExecutor, call: Callable[[Executor], Future[Any]], named: str
) -> None:
    before = warm.submit(double, 1)
    future = call(warm)
    after = warm.submit(double, 2)
    with pytest.raises(SerializationError, match=named):
        future.result()
    assert (before.result(), after.result()) == (2, 4)
    assert isinstance(future, TaskFuture)
    [outcome] = [o for o in warm.collect(wait=True) if o.task_id == future.task_id]
    assert outcome.state == "failed"
    assert isinstance(outcome.error, SerializationError)
    assert outcome.message in str(future.exception())


def test_what_cannot_be_pickled_fails_its_own_call_of_a_map(
    warm: StarburstExecutor,
) -> None:
    results = warm.map(double, [1, threading.Lock(), 3])
    assert next(results) == 2
    with pytest.raises(SerializationError, match="argument 0"):
        next(results)
    with pytest.raises(SerializationError, match="callable"):
        warm.map(threading.Lock().acquire, [True])


def test_an_exception_that_cannot_be_pickled_comes_back_without_what_cannot(
    warm: StarburstExecutor,
) -> None:
    def fail() -> None:
        error = ValueError("with a lock")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    error = warm.submit(fail).exception()
    assert isinstance(error, ValueError)
    assert str(error) == "with a lock"
    assert "attribute 'lock' stayed behind" in error.__notes__[0]
    assert warm.submit(double, 1).result() == 2


def test_an_exception_shows_the_remote_traceback_and_where_it_was(
    warm: StarburstExecutor,
) -> None:
    future = warm.submit(chained)
    error = future.exception()
    assert isinstance(error, RuntimeError)
    cause = error.__cause__
    assert isinstance(cause, RemoteTraceback)
    assert "in chained" in str(cause)
    assert "KeyError: 'absent'" in str(cause)
    assert isinstance(cause.__cause__, KeyError)
    assert future.task_id in error.__notes__[0]
    assert "worker w-" in error.__notes__[0]
    assert "in chained" in "".join(traceback.format_exception(error))


def test_futures_know_task_index_and_session(warm: StarburstExecutor) -> None:
    first, second = warm.submit(double, 1), warm.submit(double, 2)
    assert (first.session_id, second.session_id) == (warm.session_id,) * 2
    assert second.index == first.index + 1
    assert first.task_id != second.task_id
    assert warm.futures[first.index] is first


# --- processes and interpreters -----------------------------------------------------


def test_a_forked_child_is_refused_and_its_end_does_nothing(make: Make, tmp_path: Path) -> None:
    said = tmp_path / "said"
    with make() as executor:
        assert executor.submit(double, 1).result() == 2
        pid = _forked(executor, said)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert said.read_text().splitlines() == ["RuntimeError"] * 7
        assert executor.submit(double, 2).result() == 4


def _forked(executor: StarburstExecutor, said: Path) -> int:
    """A forked child in which each method is tried, and whose leaving must do nothing."""
    with _no_fork_warning(), executor._engine.lifecycle.admission:  # as another thread may hold it
        pid = os.fork()
    if pid:
        return pid
    try:
        lines = []
        calls: list[Callable[[], object]] = [
            lambda: executor.submit(double, 1),
            lambda: executor.map(double, [1]),
            executor.flush,
            executor.status,
            executor.detach,
            executor.cleanup,
            lambda: executor.futures,
        ]
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                lines.append(type(error).__name__ if "fork" in str(error) else str(error))
        said.write_text("\n".join(lines))
        executor.shutdown()
        executor.__exit__(None, None, None)
        executor._ending.leave_at_exit()
        os._exit(0)
    finally:
        os._exit(1)


@contextlib.contextmanager
def _no_fork_warning() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on
        yield


def _script(tmp_path: Path, text: str) -> Path:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(text))
    return script


def test_a_script_without_main_guard_runs_once(tmp_path: Path, directory_url: str) -> None:
    script = _script(
        tmp_path,
        """
        import sys
        from dataclasses import dataclass
        from starburst_executor import StarburstExecutor

        print("script")

        @dataclass
        class Point:
            x: int

        def move(point, by=OFFSET if "OFFSET" in globals() else 1):
            return Point(point.x + by)

        with StarburstExecutor(2, store=sys.argv[1]) as ex:
            points = list(ex.map(move, [Point(1), Point(2)]))
            assert points == [Point(2), Point(3)], points
            assert isinstance(points[0], Point)
        print("done")
        """,
    )
    ran = run_python(script, directory_url)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("script\ndone\n", "", 0)
    assert keys(directory_url) == []


def test_an_exit_while_a_result_unpickles_fails_its_future_alone(
    warm: StarburstExecutor,
) -> None:
    failing = warm.submit(returns_what_exits)
    with pytest.raises(SerializationError, match="SystemExit: while unpickling"):
        failing.result(60)
    with pytest.raises(SerializationError, match="SystemExit: while unpickling"):
        warm.submit(double, ExitsWhenUnpickled()).result(60)

    assert warm.submit(double, 21).result(60) == 42


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_callback_that_ends_its_thread_harms_no_other_future(
    warm: StarburstExecutor, end: type[BaseException], tmp_path: Path
) -> None:
    def ends(_: Future[Any]) -> None:
        raise end

    called: list[object] = []
    gate = Gate(tmp_path / "gate")
    future = warm.submit(gate.hold, 1)
    future.add_done_callback(ends)
    future.add_done_callback(called.append)
    gate.open()
    future.result(60)

    assert warm.submit(double, 21).result(60) == 42
    assert called == [future]


def test_local_modules_travel_with_the_session(tmp_path: Path, directory_url: str) -> None:
    code = tmp_path / "code"
    (code / "shapes").mkdir(parents=True)
    (code / "shapes" / "__init__.py").write_text("from shapes.circle import area\n")
    (code / "shapes" / "circle.py").write_text(
        "import lengths\ndef area(r):\n    return 3 * lengths.square(r)\n"
    )
    (code / "lengths.py").write_text("def square(x):\n    return x * x\n")
    script = _script(
        code,
        """
        import os, sys
        import shapes
        from starburst_executor import StarburstExecutor
        os.chdir("/")
        sys.path[0] = "/nowhere"
        with StarburstExecutor(1, store=sys.argv[1]) as ex:
            print(ex.submit(shapes.area, 2).result())
            where = ex.submit(lambda: sys.modules["shapes"].__spec__.origin if "shapes" in sys.modules else "").result()
            assert not where.startswith(sys.argv[2]), where
        """,
    )
    ran = run_python("-P", script, directory_url, code, PYTHONPATH=str(code))
    assert ran.stdout == "12\n", ran.stderr


def test_an_interpreter_that_ends_with_all_done_leaves_nothing(
    tmp_path: Path, directory_url: str
) -> None:
    script = _script(
        tmp_path,
        """
        import sys
        from starburst_executor import StarburstExecutor
        ex = StarburstExecutor(2, store=sys.argv[1])
        unused = StarburstExecutor(2, store=sys.argv[1])
        print(ex.submit(pow, 2, 5).result())
        """,
    )
    ran = run_python(script, directory_url)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("32\n", "", 0)
    assert keys(directory_url) == []


def test_a_shutdown_that_comes_while_the_interpreter_ends_is_done_by_its_end(
    tmp_path: Path, directory_url: str
) -> None:
    """As when joblib lets go of its backend last: Python 3.12 starts no threads then."""
    script = _script(
        tmp_path,
        """
        import sys, threading
        from starburst_executor import StarburstExecutor
        ex = StarburstExecutor(1, store=sys.argv[1])
        print(ex.submit(pow, 2, 5).result())
        threading._register_atexit(ex.shutdown)  # called before what was registered earlier
        """,
    )
    ran = run_python(script, directory_url)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("32\n", "", 0)
    assert keys(directory_url) == []


def test_an_interpreter_that_ends_early_leaves_the_session_running_and_says_so(
    tmp_path: Path, directory_url: str, gate: Gate
) -> None:
    script = _script(
        tmp_path,
        """
        import sys, os
        from starburst_executor import StarburstExecutor

        def hold(path):
            import os, threading
            while not os.path.exists(path):
                threading.Event().wait(0.01)
            return "held"

        ex = StarburstExecutor(1, store=sys.argv[1])
        futures = [ex.submit(hold, sys.argv[2]) for _ in range(3)]
        print(ex.session_id)
        """,
    )
    opened = gate.folder.with_suffix(".open")
    ran = run_python(script, directory_url, opened)
    session_id = ran.stdout.strip()
    assert ran.returncode == 0
    assert session_id in ran.stderr
    assert "attach" in ran.stderr
    executor = StarburstExecutor.attach(session_id, store=directory_url)
    if sys.version_info[:2] != (3, 12):  # which starts no process while it ends
        assert len(live_workers(executor)) == 1
    gate.open()
    assert [future.result(20) for future in executor.futures] == ["held"] * 3
    executor.cleanup(force=True)
    assert keys(directory_url) == []

"""The standard library's contract: its pools and a `StarburstExecutor` behave the same."""

from __future__ import annotations

import asyncio
import functools
import operator
import threading
from collections.abc import Callable
from concurrent.futures import (
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    as_completed,
    wait,
)
from concurrent.futures import TimeoutError as FuturesTimeoutError
from typing import Any

import pytest

from starburst_executor import InitializerFailed, StarburstExecutor
from tests.support.sessions import Make, live_workers
from tests.support.tasks import (
    Gate,
    Multiplier,
    add,
    double,
    exits,
    fail_to_start,
    interrupts,
    odd_fails,
    remember,
    remembered,
    until,
)

# Before any test, so that their processes are not taken for what a test left.
pytestmark = pytest.mark.usefixtures("threads", "processes", "warm")


# --- submit ------------------------------------------------------------------------


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


# --- wait, as_completed, cancel ----------------------------------------------------


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
    assert wait([*blocking, *queued], timeout=60).not_done == set()
    assert set(as_completed(queued, timeout=60)) == set(queued)
    assert not any(name.endswith("-19") for name in gate.arrivals())


def test_tasks_that_are_stored_can_be_cancelled(warm: StarburstExecutor, gate: Gate) -> None:
    blocking = [warm.submit(gate.hold, i) for i in range(2)]
    gate.await_arrivals(2)
    stored = [warm.submit(gate.hold, i) for i in range(10, 20)]
    warm.flush()
    assert stored[-1].cancel()
    assert wait(stored[-1:], timeout=60).done == set(stored[-1:])
    assert list(as_completed(stored[-1:], timeout=60)) == stored[-1:]
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


# --- asyncio -----------------------------------------------------------------------


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


# --- initializer -------------------------------------------------------------------


def test_the_initializer_runs_once_in_each_process_before_its_tasks(make: Make) -> None:
    with make(1, initializer=remember, initargs=("a", 2)) as executor:
        assert executor.submit(remembered).result() == ["a", 2]
        assert executor.submit(remembered).result() == ["a", 2]


def test_a_failing_initializer_breaks_the_executor(make: Make) -> None:
    executor = make(initializer=fail_to_start)
    futures = [executor.submit(double, i) for i in range(30)]
    for future in futures:
        assert isinstance(future.exception(timeout=60), BrokenExecutor)
    with pytest.raises(InitializerFailed, match="no licence here"):
        futures[0].result()
    for _ in range(2):
        with pytest.raises(BrokenExecutor, match="initializer"):
            executor.submit(double, 1)
    executor.shutdown()
    assert live_workers(executor) == set()

"""What is sent and comes back by value, and what cannot be pickled."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pytest

from starburst_executor import RemoteTraceback, SerializationError, StarburstExecutor, TaskFuture
from tests.support.tasks import Gate, add, answer, chained, double, new_lock

# Before any test, so that their processes are not taken for what a test left.
pytestmark = pytest.mark.usefixtures("threads", "processes", "warm")


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
    assert "attribute 'lock' was left out" in error.__notes__[0]
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
    assert f"task {future.task_id} chained()" in error.__notes__[0]
    assert "worker w-" in error.__notes__[0]
    assert "in chained" in "".join(traceback.format_exception(error))


def test_futures_know_task_index_and_session(warm: StarburstExecutor) -> None:
    first, second = warm.submit(double, 1), warm.submit(double, 2)
    assert (first.session_id, second.session_id) == (warm.session_id,) * 2
    assert second.index == first.index + 1
    assert first.task_id != second.task_id
    assert warm.futures[first.index] is first

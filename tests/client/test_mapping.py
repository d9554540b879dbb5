"""`map`: as on the standard library's pools, and in chunks."""

from __future__ import annotations

import gc
import itertools
import operator
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import numpy as np
import pytest

from starburst_executor import StarburstExecutor
from tests.support.sessions import Make, keys
from tests.support.tasks import Gate, double, hold_after_the_first, odd_fails

# Before any test, so that their processes are not taken for what a test left.
pytestmark = pytest.mark.usefixtures("threads", "processes", "warm")


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

"""`map` on any executor that can submit many calls at once."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar

from starburst_executor.protocol.task_names import function_name
from starburst_executor.runtime import Runtime
from starburst_executor.serialization.remote import call_each

__all__ = ["Submits", "map_on"]

T = TypeVar("T")


class Submits(Protocol):
    """What `map_on` needs from an executor."""

    def submit_all(
        self, fn: Callable[..., Any], calls: list[tuple[Any, ...]], function: str
    ) -> Sequence[Future[Any]]:
        """Submit calls of one callable, shown to users under the name `function`."""

    def cancel_all(self, futures: Iterable[Future[Any]]) -> None:
        """Cancel those that have not started."""


def map_on(
    executor: Submits,
    runtime: Runtime,
    fn: Callable[..., T],
    iterables: Sequence[Iterable[Any]],
    *,
    timeout: float | None,
    chunksize: int,
    buffersize: int | None,
) -> Iterator[T]:
    """Implements `StarburstExecutor.map`."""
    _check("chunksize", chunksize)
    if buffersize is not None:
        _check("buffersize", buffersize)
    end = None if timeout is None else runtime.monotonic() + timeout
    calls: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
    name = function_name(fn)
    if chunksize > 1:
        chunks = iter(lambda: tuple(itertools.islice(calls, chunksize)), ())
        # Bound to `call_each`, the callable is pickled once, not with each chunk.
        each = partial(call_each, fn)
        tasks = ((chunk,) for chunk in chunks)
        name = f"map {name}"
        parts = _Results(executor, runtime, each, name, tasks, end, buffersize)
        return _flattened(parts.run())
    return _Results(executor, runtime, fn, name, calls, end, buffersize).run()


def _flattened(chunks: Generator[list[T], None, None]) -> Iterator[T]:
    """The results of all chunks; drops each once taken, and closes `chunks` when closed."""
    try:
        for chunk in chunks:
            chunk.reverse()
            while chunk:
                yield chunk.pop()
    finally:
        chunks.close()


def _check(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, not {value}")


class _Results:
    """The results of one map, in order; cancels tasks that are no longer needed."""

    def __init__(
        self,
        executor: Submits,
        runtime: Runtime,
        fn: Callable[..., Any],
        name: str,
        calls: Iterator[tuple[Any, ...]],
        end: float | None,
        buffersize: int | None,
    ) -> None:
        self._executor = executor
        self._runtime = runtime
        self._fn = fn
        self._name = name
        self._calls = calls
        self._end = end
        self._buffered = buffersize is not None
        first = list(itertools.islice(calls, buffersize))
        self._futures = deque(executor.submit_all(fn, first, name) if first else ())

    def run(self) -> Generator[Any, None, None]:
        """Yield the results."""
        try:
            while self._futures:
                yield self._take()
                self._submit_next()
        finally:
            self._executor.cancel_all(self._futures)

    def _take(self) -> Any:
        future = self._futures.popleft()
        try:
            if self._end is None:
                return future.result()
            return future.result(self._end - self._runtime.monotonic())
        finally:
            self._executor.cancel_all([future])  # if it took too long
            del future  # else it and its exception's traceback would form a cycle

    def _submit_next(self) -> None:
        if self._buffered:
            following = list(itertools.islice(self._calls, 1))
            if following:
                self._futures.extend(self._executor.submit_all(self._fn, following, self._name))

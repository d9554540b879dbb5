"""Submitting with options, so that `submit` can pass every keyword on to the callable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, ParamSpec, Protocol, TypeVar

from starburst_executor.client import mapping
from starburst_executor.client.future import TaskFuture
from starburst_executor.runtime import Runtime

__all__ = ["SubmitOptions", "Submits"]

T = TypeVar("T")
P = ParamSpec("P")


class Submits(Protocol):
    """What `SubmitOptions` needs from an executor."""

    def submit_call(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        label: str = "",
    ) -> TaskFuture[T]:
        """Submit one call."""

    def submit_all(
        self,
        fn: Callable[..., Any],
        calls: list[tuple[Any, ...]],
        function: str,
        label: str = "",
    ) -> Sequence[Future[Any]]:
        """Submit calls of one callable."""

    def cancel_all(self, futures: Iterable[Future[Any]]) -> None:
        """Cancel those that have not started."""


class SubmitOptions:
    """`submit` and `map` with options; made by `StarburstExecutor.options`.

    Args:
        executor: The executor to submit to.
        runtime: The executor's clock.
        label: Label of the tasks.
    """

    def __init__(self, executor: Submits, runtime: Runtime, label: str) -> None:
        self._executor = executor
        self._runtime = runtime
        self._label = label

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[T]:
        """Like the executor's `submit`."""
        return self._executor.submit_call(fn, args, kwargs, self._label)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Like the executor's `map`."""
        return mapping.map_on(
            self,
            self._runtime,
            fn,
            iterables,
            timeout=timeout,
            chunksize=chunksize,
            buffersize=buffersize,
        )

    def submit_all(
        self, fn: Callable[..., Any], calls: list[tuple[Any, ...]], function: str
    ) -> Sequence[Future[Any]]:
        """Submit calls of one callable, with these options."""
        return self._executor.submit_all(fn, calls, function, self._label)

    def cancel_all(self, futures: Iterable[Future[Any]]) -> None:
        """Cancel those that have not started."""
        self._executor.cancel_all(futures)

    def __repr__(self) -> str:
        return f"<SubmitOptions label={self._label!r} of {self._executor!r}>"

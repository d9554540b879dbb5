"""From a call to a queued task: pickled now, numbered, and handed to the submitter.

All of it happens on the caller's thread, under the lock that also guards whether calls are still
accepted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from starburst_executor.client.engine import Engine
from starburst_executor.client.future import TaskFuture
from starburst_executor.client.submitter import QueuedTask
from starburst_executor.errors import SerializationError
from starburst_executor.protocol import lanes
from starburst_executor.protocol.task_names import Name, function_name, name_of
from starburst_executor.serialization.remote import refuse

__all__ = ["Submission"]

T = TypeVar("T")


class Submission:
    """Accepts one client's calls.

    Args:
        engine: The client.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._codec = engine.codec
        self._submitter = engine.submitter
        self._numbers: Iterator[int] | None = None  # of the tasks in this client's lane

    def begin(self, lane: int, number: int) -> None:
        """Submit into this lane, starting at this number."""
        self._submitter.begin(lane, number)
        self._numbers = itertools.count(number)

    def submit(
        self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any], label: str
    ) -> TaskFuture[T]:
        """Submit one call."""
        self._engine.check_process()
        name = name_of(function_name(fn), args, kwargs, label)
        with self._engine.lifecycle.admission:
            self._engine.check_admission()
            try:
                digest = self._pickle_function(fn)
            except SerializationError as error:
                return self._refuse(error, name)
            return self._submit(digest, args, kwargs, name)

    def submit_all(
        self, fn: Callable[..., Any], calls: list[tuple[Any, ...]], function: str, label: str
    ) -> list[TaskFuture[Any]]:
        """Submit many calls of one callable; batch size depends on their number."""
        self._engine.check_process()
        with self._engine.lifecycle.admission:
            self._engine.check_admission()
            digest = self._pickle_function(fn)
            self._submitter.announce(len(calls))
            futures: list[TaskFuture[Any]] = []
            try:
                for args in calls:
                    name = name_of(function, args, {}, label)
                    futures.append(self._submit(digest, args, {}, name, announced=True))
            finally:
                self._submitter.announce(len(futures) - len(calls))
            return futures

    def _pickle_function(self, fn: Callable[..., Any]) -> str:
        digest, cargo = self._codec.function(fn)
        self._submitter.add_function(digest, cargo)
        return digest

    def _submit(
        self,
        digest: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: Name,
        *,
        announced: bool = False,
    ) -> TaskFuture[Any]:
        try:
            call, light = self._codec.call(args, kwargs)
        except SerializationError as error:
            return self._refuse(error, name, announced=announced)
        modules = self._codec.modules()
        number = self._next_number()
        future = self._engine.registry.new(self._submitter.lane, number, name)
        item = QueuedTask(future, digest, call, light, modules, name)
        self._submitter.add(item, announced=announced)
        return future

    def _refuse(
        self, error: SerializationError, name: Name, *, announced: bool = False
    ) -> TaskFuture[Any]:
        """A task that fails with this error: here at once, and for clients that attach later."""
        digest = self._pickle_function(refuse)
        future = self._submit(digest, (error,), {}, name, announced=announced)
        future.settle((False, error))
        return future

    def _next_number(self) -> int:
        if self._numbers is None:
            manifest, lane = lanes.take(self._engine.session)
            self._engine.manifest = manifest
            self.begin(lane, manifest.lanes[lane].number)
        assert self._numbers is not None
        return next(self._numbers)

"""Executors that nobody holds any more: noticed, and ended from a thread that may take locks.

The threads of an executor know it through a `Link`, weakly, or it would never be collected. When it is, it
is held once more, by its own link, and put into a queue: a finalizer may run anywhere, with any lock held,
and so must neither take one nor start a thread.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Concatenate, Generic, ParamSpec, TypeVar

__all__ = ["Dropped", "Link"]

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


class Link(Generic[T]):
    """Knows an object weakly, or, once it was told to hold it, strongly.

    Args:
        target: The object.
    """

    def __init__(self, target: T) -> None:
        self._target: Callable[[], T | None] = weakref.ref(target)

    def hold(self, target: T) -> None:
        """Keep the object from being collected."""
        # Given once more, for a collector of cycles clears references before it calls finalizers.
        self._target = lambda: target

    def release(self) -> None:
        """Let it be collected again."""
        target = self._target()
        if target is not None:
            self._target = weakref.ref(target)

    def call(self, method: Callable[Concatenate[T, P], R]) -> Callable[P, R | None]:
        """A function that calls this method of the object while there is one."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R | None:
            target = self._target()
            return None if target is None else method(target, *args, **kwargs)

        return call


class Dropped(Generic[T]):
    """Has objects that were dropped dealt with on a thread of its own.

    Args:
        outlive: Called with each of them.
    """

    def __init__(self, outlive: Callable[[T], None]) -> None:
        self._outlive = outlive
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()  # `put` is reentrant
        self._pid = 0
        self._lock = threading.Lock()

    def watch(self) -> None:
        """Have a thread in this process; a fork copies none."""
        with self._lock:
            if self._pid == os.getpid():
                return
            self._pid = os.getpid()
            self._queue = queue.SimpleQueue()
            threading.Thread(target=self._run, name="starburst-dropped", daemon=True).start()

    def put(self, target: T) -> None:
        """Deal with an object; may be called by a finalizer."""
        self._queue.put(target)

    def take_out(self) -> list[T]:
        """What the thread has not come to, and now will not: the interpreter ends."""
        found: list[T] = []
        while True:
            try:
                found.append(self._queue.get_nowait())
            except queue.Empty:
                return found

    def _run(self) -> None:
        while True:
            target = self._queue.get()
            try:
                self._outlive(target)
            except Exception:
                log.exception("an executor that was dropped could not be ended")
            del target

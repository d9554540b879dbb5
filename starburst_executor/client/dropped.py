"""Executors that nobody holds any more: noticed, and ended from a thread that may take locks.

A finalizer may run anywhere, with any lock held, and so must neither take one nor start a thread.
It puts what has to be ended into a queue, and a thread that waits there does the rest.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Dropped"]

log = logging.getLogger(__name__)

T = TypeVar("T")


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

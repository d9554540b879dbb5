"""Executors that were garbage-collected, ended from a thread that may take locks.

A finalizer may run anywhere, with any lock held, and so must neither take one nor start a thread.
It only puts its object into a queue; a thread waiting there does the rest.
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
    """Handles dropped objects on its own thread.

    Args:
        outlive: Called with each of them.
    """

    def __init__(self, outlive: Callable[[T], None]) -> None:
        self._outlive = outlive
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()  # `put` is reentrant
        self._pid = 0
        self._lock = threading.Lock()

    def watch(self) -> None:
        """Start the thread unless this process has it; a fork does not copy it."""
        with self._lock:
            if self._pid == os.getpid():
                return
            self._pid = os.getpid()
            self._queue = queue.SimpleQueue()
            threading.Thread(target=self._run, name="starburst-dropped", daemon=True).start()

    def put(self, target: T) -> None:
        """Queue an object; safe to call from a finalizer."""
        self._queue.put(target)

    def take_out(self) -> list[T]:
        """The objects still queued, which at interpreter exit the thread will not reach."""
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
                log.exception("a dropped executor could not be ended")
            del target

"""Time, waiting, randomness and concurrency, as an injected dependency.

Every part of the protocol takes a `Runtime`. `SystemRuntime` is the machine's own;
the test suite's simulator has another, in which time is virtual, waiting switches
to the next actor and every choice comes from one seed. Nothing else in the package
reads the wall clock.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

__all__ = ["Runtime", "Signal", "SystemRuntime"]

T = TypeVar("T")

_ID_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"  # no l, o, 0, 1: ids are read aloud


class Signal(Protocol):
    """What a loop waits on: the subset of `threading.Event` in use."""

    def set(self) -> None:
        """Wake all waiters, now and until `clear`."""

    def clear(self) -> None:
        """Make later waits block again."""

    def is_set(self) -> bool:
        """Whether `set` was called since the last `clear`."""

    def wait(self, timeout: float | None = None) -> bool:
        """Block until set, or for `timeout` seconds; return `is_set()`."""


class Runtime(Protocol):
    """What the protocol may use of the machine it runs on."""

    random: random.Random

    def time(self) -> float:
        """UTC seconds since the epoch by this machine's clock; for people, never for leases."""

    def monotonic(self) -> float:
        """Seconds on a clock of this process that never goes backwards."""

    def thread_time(self) -> float:
        """Seconds of CPU that the calling thread has used."""

    def signal(self) -> Signal:
        """A new, unset signal."""

    def gather(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Make the calls concurrently; results in order, or the first error once all have ended."""

    def new_id(self, length: int) -> str:
        """`length` random letters and digits, about 5 bits each."""


class SystemRuntime:
    """The machine's own clock, threads and randomness.

    Args:
        width: How many calls of one `gather` run at once.
    """

    def __init__(self, width: int = 8) -> None:
        self.random: random.Random = random.SystemRandom()
        self._width = width
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._alone = False
        self._here = threading.local()  # `inside` on the threads of the pool

    def time(self) -> float:
        """UTC seconds since the epoch."""
        return time.time()  # noqa: TID251  the one place that may

    def monotonic(self) -> float:
        """Seconds on the process's monotonic clock."""
        return time.monotonic()

    def thread_time(self) -> float:
        """CPU seconds of the calling thread."""
        return time.thread_time()

    def signal(self) -> Signal:
        """A `threading.Event`."""
        return threading.Event()

    def gather(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Make the calls on this runtime's small thread pool; within such a call, one by one.

        A pool whose threads all wait for calls that need a thread would deadlock.
        """
        if len(calls) <= 1 or self._alone or getattr(self._here, "inside", False):
            return [call() for call in calls]
        pool = self._threads()
        futures: list[Future[T]] = []
        try:
            # If a thread cannot be started midway, the calls already submitted are awaited.
            futures.extend(pool.submit(call) for call in calls)
        finally:
            wait(futures)
        errors = [e for future in futures if (e := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    def new_id(self, length: int) -> str:
        """Random letters and digits from the system's entropy."""
        return "".join(self.random.choices(_ID_ALPHABET, k=length))

    def start_no_threads(self) -> None:
        """From now on `gather` makes its calls one by one: the interpreter is shutting down."""
        self._alone = True

    def close(self) -> None:
        """End the threads of `gather`."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(
                    self._width, "starburst-io", initializer=self._mark_inside
                )
            return self._pool

    def _mark_inside(self) -> None:
        self._here.inside = True

"""Work that an interrupt cannot stop halfway, though it can end the wait for it.

Ctrl-C often arrives twice within milliseconds, from the terminal and from a `timeout` or shell in
between. So the cleanup runs on its own thread, where `KeyboardInterrupt` is never raised.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Uninterrupted"]

_SAME_INTERRUPT = 1.0  # seconds: interrupts this close together count as one


class Uninterrupted:
    """Work that runs once, to completion, however often its waiters are interrupted.

    Args:
        name: Name of its thread.
        work: The work; must not raise.
    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._name = name
        self._work = work
        self._claim = threading.Lock()
        self._begun = threading.Event()
        self._done = threading.Event()

    @property
    def begun(self) -> bool:
        """Whether the work has started."""
        return self._begun.is_set()

    def run(self) -> None:
        """Start the work unless it has started, and return when it is done.

        Raises:
            BaseException: an interrupt after the first second; the work continues.
        """
        since = time.monotonic()
        while not self._done.is_set():
            try:
                self._begin()
                self._done.wait()
            except BaseException:
                if time.monotonic() - since > _SAME_INTERRUPT:
                    raise

    def _begin(self) -> None:
        # An interrupted start may or may not have started a thread: a second one finds it claimed.
        if self._begun.is_set():
            return
        thread = threading.Thread(target=self._do, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be started, most likely at exit
            self._do()

    def _do(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        self._begun.set()
        try:
            self._work()
        finally:
            self._done.set()

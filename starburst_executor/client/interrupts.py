"""Work that an interrupt cannot cut in half, though it may end the waiting for it.

Ctrl-C often comes twice within milliseconds, from the terminal and from a `timeout` or a shell in between;
so what it sets off is done on a thread of its own, where no `KeyboardInterrupt` is ever raised.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Uninterrupted"]

_ONE_WISH = 1.0  # seconds: interrupts so close to each other are one


class Uninterrupted:
    """Something that is done once, wholly, however often whoever waits for it is interrupted.

    Args:
        name: Of its thread.
        work: What is done; must not raise.
    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._name = name
        self._work = work
        self._claim = threading.Lock()
        self._begun = threading.Event()
        self._done = threading.Event()

    @property
    def begun(self) -> bool:
        """Whether it was begun."""
        return self._begun.is_set()

    def run(self) -> None:
        """Begin it, unless it was begun, and return when it is done.

        Raises:
            BaseException: what interrupts after the first second; the work goes on.
        """
        since = time.monotonic()
        while not self._done.is_set():
            try:
                self._begin()
                self._done.wait()
            except BaseException:
                if time.monotonic() - since > _ONE_WISH:
                    raise

    def _begin(self) -> None:
        # A start that is interrupted may have begun a thread or not: a second one finds it claimed.
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

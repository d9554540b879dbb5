"""SIGTERM and SIGINT, heard on a thread of their own.

A Python signal handler runs on the main thread, between any two of its bytecodes: a lock that it
takes may be held by the very code that it interrupted, and then the process hangs. So the handlers
here do nothing. The interpreter writes the signal's number to a pipe from C, and a thread reads
it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["stopped_by_signals"]


@contextmanager
def stopped_by_signals(stop: Callable[[str], None]) -> Iterator[None]:
    """Call `stop` with a reason, on another thread, at each SIGTERM and SIGINT.

    Both are ignored from then on, also after the block: the process is leaving already. To be used
    on the main thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    listening = threading.Thread(
        target=_listen, args=(reader, stop), name="starburst-signals", daemon=True
    )
    listening.start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _noted)
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writer)
        listening.join()


def _noted(number: int, frame: FrameType | None) -> None:
    """Nothing: the number is in the pipe already."""


def _listen(reader: int, stop: Callable[[str], None]) -> None:
    with open(reader, "rb", buffering=0) as numbers:
        while received := numbers.read(1):
            if received[0] in (signal.SIGTERM, signal.SIGINT):
                stop(f"it got {signal.Signals(received[0]).name}")

r"""How far a session is, on a terminal or in a file that somebody reads as it grows.

    Gauge   reads the status of the session         one LIST each time, and what changed
    Meter   tasks per second and time left          from the last minute's readings
    Display shows it:
      LiveDisplay    the bottom two lines of a terminal
      PlainDisplay   a line every ten seconds, if there is no terminal
    Ticker  a thread that does all this for an executor

The live display neither draws over what the program prints nor replaces `sys.stdout`: it takes the
bottom two lines out of the terminal's scrolling region. So whatever prints (`print`, tqdm, logging
to a stream opened long ago, C code, a child process) scrolls above it and cannot collide with it.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Protocol, TextIO

from starburst_executor.costs.bill import CostTracker
from starburst_executor.errors import SessionError, StoreError
from starburst_executor.formatting import duration, one_line
from starburst_executor.inspection.notebook import open_notebook_display
from starburst_executor.inspection.status import SessionStatus, read_status
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.session import Session, VersionedRecord
from starburst_executor.runtime import Runtime
from starburst_executor.tables import counted, percent

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "Display",
    "Gauge",
    "LiveDisplay",
    "Meter",
    "PlainDisplay",
    "Progress",
    "Ticker",
    "duration",
    "open_display",
]

log = logging.getLogger(__name__)

_WINDOW = 60.0  # seconds over which tasks per second are measured
_PLAIN_EVERY = 10.0  # seconds: an hours-long log stays readable
_ROWS = 2  # of the live display
_LEAST_ROWS = 6  # a smaller terminal has no lines to spare
_PAUSE_MIN = 1.0  # seconds between a Ticker's readings; people do not read faster

# What a line drops first when it runs out of room.
_LEAST_WANTED = (
    "rate", "cost", "claimed", "pending", "cancelled", "workers", "running", "left",
)  # fmt: skip

_SAVE, _RESTORE = "\x1b7", "\x1b8"
_INDEX, _UP = "\x1bD", "\x1b[{}A"  # down a line in the same column, scrolling; up
_REGION, _NO_REGION = "\x1b[1;{}r", "\x1b[r"
_AT, _CLEAR_LINE = "\x1b[{};1H", "\x1b[2K"

# Two displays would claim the same lines of the process's one terminal.
_terminal = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A status, and how fast it changes.

    Attributes:
        status: The counts.
        rate: Tasks finished per second recently; None while unknown.
        left: Seconds until all are finished at that rate; None while unknown.
    """

    status: SessionStatus
    rate: float | None
    left: float | None

    def counts(self, width: int | None = None, between: str = ", ") -> list[tuple[str, str]]:
        """The parts of the line: each a fixed name, and the text.

        Args:
            width: Drop the least wanted parts until the text fits into this many characters.
            between: The separator that will be put between parts.
        """
        parts = self._parts()
        for unwanted in _LEAST_WANTED:
            if width is None or len(between.join(text for _, text in parts)) <= width:
                break
            parts = [part for part in parts if part[0] != unwanted]
        return parts

    def _parts(self) -> list[tuple[str, str]]:
        status = self.status
        parts = [
            ("done", f"{status.finished} of {status.total} done"),
            ("running", f"{status.running} running"),
            *([("claimed", f"{status.claimed} claimed")] if status.claimed else []),
            ("pending", f"{status.pending} pending"),
            ("failed", f"{status.failed} failed"),
        ]
        if status.cancelled:
            parts.append(("cancelled", f"{status.cancelled} cancelled"))
        if status.stuck is not None:
            parts.append(("stuck", status.stuck.reason))
        elif self.left is not None:
            parts.append(("left", f"{duration(self.left)} left"))
        if status.cost is not None:
            alert = status.cost.alert
            words = f"{status.cost} spent" + (", over its alert" if alert else "")
            parts.append(("alert" if alert else "cost", words))
        if self.rate is not None:
            rate = f"{self.rate:.3g}" if self.rate < 100 else f"{self.rate:.0f}"
            parts.append(("rate", f"{rate} tasks/s"))
        wanted = f"{status.workers} of {counted(status.workers_wanted, 'worker')}"
        return [*parts, ("workers", wanted)]

    def line(self, width: int | None = None) -> str:
        """Everything on one line, of at most `width` characters if possible."""
        head = f"{one_line(self.status.session_id)}: {percent(self.status.progress)}, "
        room = None if width is None else width - len(head)
        return head + ", ".join(text for _, text in self.counts(room))

    def __str__(self) -> str:
        return self.line()


class Gauge:
    """Reads the status of a session repeatedly, each time only what has changed.

    Args:
        session: The session.
        client: Whether this process is one of its clients, so that its requests count as cost.

    Raises:
        SessionNotFound: there is no such session.
    """

    def __init__(self, session: Session, *, client: bool = False) -> None:
        self.session = session
        self._costs = CostTracker(session, client=client)
        self._queue = session.queue()
        self._queue.learn(session.load().lanes)
        self._known: dict[Batch, VersionedRecord] = {}
        self._last_activity: datetime | None = None

    def look(self) -> SessionStatus:
        """The status now."""
        status = read_status(self.session, self._queue, self._known, self._costs.look)
        # Finished batches are no longer listed, even if they were written last.
        latest = max(self._last_activity or status.last_activity, status.last_activity)
        self._last_activity = latest
        return replace(status, last_activity=latest)

    @property
    def now(self) -> float:
        """The store's clock at the last reading."""
        return self._queue.now


class Meter:
    """Measures how fast tasks finish."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int]] = deque()

    def take_in(self, status: SessionStatus, now: float) -> Progress:
        """Add a status read at `now` (any clock in seconds that does not jump)."""
        self._readings.append((now, status.finished))
        while len(self._readings) > 2 and self._readings[1][0] <= now - _WINDOW:
            self._readings.popleft()
        began, finished = self._readings[0]
        rate = (status.finished - finished) / (now - began) if now > began else None
        unfinished = status.total - status.finished
        left = unfinished / rate if rate and unfinished else None
        return Progress(status=status, rate=rate, left=left)


# --- displays ----------------------------------------------------------------------


class Display(Protocol):
    """Where progress is shown."""

    def show(self, progress: Progress) -> None:
        """Show this from now on."""

    def close(self) -> None:
        """Stop, and leave the last state as a line to look back at."""


def open_display(stream: TextIO, runtime: Runtime) -> Display:
    """A notebook's display or, on a terminal capable of it, the live one; else lines of text."""
    if notebook := open_notebook_display(stream):
        return notebook
    if _can_be_live(stream) and _terminal.acquire(blocking=False):
        return LiveDisplay(stream)
    return PlainDisplay(stream, runtime)


def _width(stream: TextIO) -> int | None:
    """Width of a terminal in characters; None for a file."""
    if not stream.isatty():
        return None
    return os.get_terminal_size(stream.fileno()).columns or None


def _can_be_live(stream: TextIO) -> bool:
    if not stream.isatty() or os.environ.get("TERM", "") in ("", "dumb"):
        return False
    return os.get_terminal_size(stream.fileno()).lines >= _LEAST_ROWS


class PlainDisplay:
    """A line immediately, one every ten seconds if something changed, and one at the end.

    Args:
        stream: Where to write.
        runtime: The clock.
    """

    def __init__(self, stream: TextIO, runtime: Runtime) -> None:
        self._stream = stream
        self._runtime = runtime
        self._next = runtime.monotonic()
        self._written = ""
        self._last: Progress | None = None

    def show(self, progress: Progress) -> None:
        """Write a line if one is due."""
        self._last = progress
        if self._runtime.monotonic() >= self._next:
            self._next = self._runtime.monotonic() + _PLAIN_EVERY
            self._write(progress)

    def close(self) -> None:
        """Write the last line, unless it is there already."""
        if self._last is not None:
            self._write(self._last)

    def _write(self, progress: Progress) -> None:
        line = progress.line(_width(self._stream))
        if line != self._written:
            self._written = line
            self._stream.write(f"{line}\n")
            self._stream.flush()


class LiveDisplay:
    """Two lines at the bottom of a terminal, below the scrolling region.

    Holds the process's one terminal until it is closed; created by `open_display`.

    Args:
        stream: The terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._stream = stream
        self._fd = stream.fileno()
        self._console = Console(file=stream, force_terminal=True, soft_wrap=False)
        self._size = os.terminal_size((0, 0))
        self._last: Progress | None = None
        self._lock = threading.Lock()
        self._closed = False
        # However the interpreter ends, the terminal must get its last lines back.
        atexit.register(self.close)

    def show(self, progress: Progress) -> None:
        """Draw it, unless this process is in the background of its terminal."""
        with self._lock:
            self._last = progress
            if not self._closed and _in_foreground(self._fd):
                self._draw(progress)

    def close(self) -> None:
        """Give the lines back, and print the last state where the cursor is."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        if self._size.lines and _in_foreground(self._fd):
            self._write(_SAVE + _NO_REGION + self._lines(["", ""]) + _RESTORE)
        if self._last is not None:
            self._write(f"{self._last.line(_width(self._stream))}\n")
        _terminal.release()

    def _draw(self, progress: Progress) -> None:
        size = os.get_terminal_size(self._fd)
        make_room = ""
        if size != self._size:
            whole = _SAVE + _NO_REGION + _RESTORE if self._size.lines else ""
            # The cursor must not be in the lines that are taken: down, scrolling, and up again.
            make_room = whole + _INDEX * _ROWS + _UP.format(_ROWS)
            self._size = size
        # Set the region every time: a program that ran meanwhile may have reset it.
        region = _REGION.format(size.lines - _ROWS)
        text = self._lines(self._render(progress))
        self._write(make_room + _SAVE + region + text + _RESTORE)

    def _lines(self, text: list[str]) -> str:
        first = self._size.lines - _ROWS + 1
        return "".join(
            _AT.format(first + row) + _CLEAR_LINE + line for row, line in enumerate(text)
        )

    def _render(self, progress: Progress) -> list[str]:
        self._console.width = self._size.columns
        with self._console.capture() as captured:
            self._console.print(_drawing(progress, self._console.width), end="")
        lines = captured.get().splitlines()
        return (lines + [""] * _ROWS)[:_ROWS]

    def _write(self, text: str) -> None:
        self._stream.flush()
        os.write(self._fd, text.encode(self._stream.encoding or "utf-8", "replace"))


_DOT = " · "
_STYLES = {
    "done": "green",
    "running": "cyan",
    "failed": "bold red",
    "rate": "magenta",
    "left": "bold",
    "workers": "blue",
    "alert": "bold red",
    "stuck": "bold red",
}


def _drawing(progress: Progress, width: int) -> RenderableType:
    """A bar beside the session's name, and the counts in colour; one line each."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    status = progress.status
    head = Table.grid(padding=(0, 1), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=max(1, status.total), completed=status.finished)
    name = Text(one_line(status.name or status.session_id))
    name.truncate(max(1, width // 2), overflow="ellipsis")
    head.add_row(name, bar, percent(status.progress))
    counts = Text(_DOT, no_wrap=True, overflow="ellipsis").join(
        Text(words, style=_style(name, progress))
        for name, words in progress.counts(width - 1, _DOT)
    )
    counts.truncate(width - 1, overflow="ellipsis")
    return Group(head, counts)


def _style(name: str, progress: Progress) -> str:
    if name == "failed" and not progress.status.failed:
        return "dim"
    return _STYLES.get(name, "")


def _in_foreground(fd: int) -> bool:
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # a terminal, but not this process's controlling one
        return True


# --- for an executor ---------------------------------------------------------------


class Ticker:
    """Shows the progress of a session on its own thread until it is closed.

    Args:
        session: The session.
        stream: Where to show it.
    """

    def __init__(self, session: Session, stream: TextIO) -> None:
        self._gauge = Gauge(session, client=True)
        self._runtime = session.runtime
        self._display = open_display(stream, session.runtime)
        self._meter = Meter()
        self._end = session.runtime.signal()
        self._thread = threading.Thread(target=self._run, name="starburst-progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show how it ended, and restore the terminal; may be called again."""
        self._end.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        pause = 0.0
        try:
            while not self._end.wait(pause):
                began = self._runtime.monotonic()
                self._update()
                # Reading a large queue takes long: it may take a tenth of the time, no more.
                pause = max(_PAUSE_MIN, 9 * (self._runtime.monotonic() - began))
            self._update()
        except SessionError as error:
            log.info("progress is no longer shown: %s", error)
        except Exception:
            log.exception("progress is no longer shown")
        finally:
            self._display.close()

    def _update(self) -> None:
        try:
            status = self._gauge.look()
        except StoreError as error:
            self._gauge.session.warn(error)
            return
        if status.total:
            self._display.show(self._meter.take_in(status, self._runtime.monotonic()))

r"""How far a session is, on a terminal or in a file that somebody reads as it grows.

    Gauge   looks at the session                    one LIST a look, and what changed
    Meter   tasks per second and time left          from the last minute's looks
    Display shows it:
      LiveDisplay    the two lowest lines of a terminal
      PlainDisplay   a line every ten seconds, where there is no terminal
    Ticker  a thread that does all this for an executor

The live display does not draw over what the program prints, nor replace `sys.stdout`: it takes the two
lowest lines out of the part of the terminal that scrolls. So whatever prints (`print`, tqdm, logging to
a stream opened long ago, C code, a child process) scrolls above it and cannot meet it.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

from starburst_executor import catalog
from starburst_executor.catalog import SessionStatus
from starburst_executor.errors import SessionError, StoreError
from starburst_executor.ledger import Ledger
from starburst_executor.records import Batch
from starburst_executor.runtime import Runtime
from starburst_executor.session import Known, Session
from starburst_executor.views import duration, open_notebook_display

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

_WINDOW = 60.0  # seconds over which tasks per second are taken
_PLAIN_EVERY = 10.0  # seconds: a log of hours stays readable
_ROWS = 2  # of the live display
_LEAST_ROWS = 6  # a lower terminal has no lines to spare
_LOOK_LEAST = 1.0  # seconds between looks of a Ticker; people do not read faster

_SAVE, _RESTORE = "\x1b7", "\x1b8"
_INDEX, _UP = "\x1bD", "\x1b[{}A"  # down a line in the same column, scrolling; up
_REGION, _NO_REGION = "\x1b[1;{}r", "\x1b[r"
_AT, _CLEAR_LINE = "\x1b[{};1H", "\x1b[2K"

# Two displays would take the same lines of the one terminal that a process has.
_terminal = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A status, and how fast it changes.

    Attributes:
        status: The counts.
        rate: Tasks finished per second of late; None while that cannot be told.
        left: Seconds until all are finished at that rate; None while that cannot be told.
    """

    status: SessionStatus
    rate: float | None
    left: float | None

    @property
    def running(self) -> int:
        """Tasks that a worker has."""
        return self.status.running + self.status.claimed

    def counts(self) -> list[tuple[str, str]]:
        """What there is to say, part by part: a name that does not change, and the words."""
        status = self.status
        parts = [
            ("done", f"{status.finished} of {status.total} done"),
            ("running", f"{self.running} running"),
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
            parts.append(("rate", f"{self.rate:.3g} tasks/s"))
        wanted = f"{status.workers} of {status.workers_wanted} workers"
        return [*parts, ("workers", wanted)]

    def __str__(self) -> str:
        words = ", ".join(text for _, text in self.counts())
        return f"{self.status.session_id}: {self.status.progress:.0%}, {words}"


class Gauge:
    """Looks at a session again and again, reading only what has changed.

    Args:
        session: Which.
        client: Whether this process is a client of it, so that its requests are part of the cost.

    Raises:
        SessionNotFound: there is no such session.
    """

    def __init__(self, session: Session, *, client: bool = False) -> None:
        self.session = session
        self._ledger = Ledger(session, client=client)
        self._queue = session.queue()
        self._queue.learn(session.load().lanes)
        self._known: dict[Batch, Known] = {}

    def look(self) -> SessionStatus:
        """The status now."""
        return catalog.status(self.session, self._queue, self._known, self._ledger.look)

    @property
    def now(self) -> float:
        """The store's clock at the last look."""
        return self._queue.now


class Meter:
    """Tells from looks how fast tasks finish."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int]] = deque()

    def take_in(self, status: SessionStatus, now: float) -> Progress:
        """Take in a status seen at `now` (any clock in seconds that does not jump)."""
        self._looks.append((now, status.finished))
        while len(self._looks) > 2 and self._looks[1][0] <= now - _WINDOW:
            self._looks.popleft()
        began, finished = self._looks[0]
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
        """Show no more, and leave the last of it as a line to look back at."""


def open_display(stream: TextIO, runtime: Runtime) -> Display:
    """The live display if the stream is a terminal that can have one, or a notebook's; else lines of text."""
    if notebook := open_notebook_display(stream):
        return notebook
    if _can_be_live(stream) and _terminal.acquire(blocking=False):
        return LiveDisplay(stream)
    return PlainDisplay(stream, runtime)


def _can_be_live(stream: TextIO) -> bool:
    if not stream.isatty() or os.environ.get("TERM", "") in ("", "dumb"):
        return False
    return os.get_terminal_size(stream.fileno()).lines >= _LEAST_ROWS


class PlainDisplay:
    """A line at once, one every ten seconds in which something changed, and one at the end.

    Args:
        stream: Where to.
        runtime: Whose clock.
    """

    def __init__(self, stream: TextIO, runtime: Runtime) -> None:
        self._stream = stream
        self._runtime = runtime
        self._next = runtime.monotonic()
        self._said = ""
        self._last: Progress | None = None

    def show(self, progress: Progress) -> None:
        """Write a line if one is due."""
        self._last = progress
        if self._runtime.monotonic() >= self._next:
            self._next = self._runtime.monotonic() + _PLAIN_EVERY
            self._write(str(progress))

    def close(self) -> None:
        """Write the last line, unless it stands there already."""
        if self._last is not None:
            self._write(str(self._last))

    def _write(self, line: str) -> None:
        if line != self._said:
            self._said = line
            self._stream.write(f"{line}\n")
            self._stream.flush()


class LiveDisplay:
    """Two lines at the foot of a terminal, below the part that scrolls.

    Holds the process's one terminal until it is closed; made by `open_display`.

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
        # Whatever ends the interpreter, the terminal must get its last lines back.
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
            self._write(f"{self._last}\n")
        _terminal.release()

    def _draw(self, progress: Progress) -> None:
        size = os.get_terminal_size(self._fd)
        make_room = ""
        if size != self._size:
            whole = _SAVE + _NO_REGION + _RESTORE if self._size.lines else ""
            # The cursor must not stand in the lines that are taken: down, scrolling, and up again.
            make_room = whole + _INDEX * _ROWS + _UP.format(_ROWS)
            self._size = size
        # The region anew each time: a program that ran meanwhile may have reset it.
        region = _REGION.format(size.lines - _ROWS)
        text = self._lines(self._render(progress))
        self._write(make_room + _SAVE + region + text + _RESTORE)

    def _lines(self, text: list[str]) -> str:
        first = self._size.lines - _ROWS + 1
        return "".join(
            _AT.format(first + row) + _CLEAR_LINE + line
            for row, line in enumerate(text)
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
    """A bar under the session's name, and the counts in colour; each one line."""
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
    head.add_row(status.name or status.session_id, bar, f"{status.progress:.0%}")
    counts = Text(" · ", no_wrap=True, overflow="ellipsis").join(
        Text(words, style=_style(name, progress)) for name, words in progress.counts()
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
    """Shows how far a session is until it is closed, on a thread of its own.

    Args:
        session: Which.
        stream: Where to show it.
    """

    def __init__(self, session: Session, stream: TextIO) -> None:
        self._gauge = Gauge(session, client=True)
        self._runtime = session.runtime
        self._display = open_display(stream, session.runtime)
        self._meter = Meter()
        self._end = session.runtime.signal()
        self._thread = threading.Thread(
            target=self._run, name="starburst-progress", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Show how it ended, and leave the terminal as it was; may be called again."""
        self._end.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        pause = 0.0
        try:
            while not self._end.wait(pause):
                began = self._runtime.monotonic()
                self._look()
                # A look at a large queue takes long: it may have a tenth of the time, no more.
                pause = max(_LOOK_LEAST, 9 * (self._runtime.monotonic() - began))
            self._look()
        except SessionError as error:
            log.info("progress is shown no longer: %s", error)
        finally:
            self._display.close()

    def _look(self) -> None:
        try:
            status = self._gauge.look()
        except StoreError as error:
            log.warning("how far the session is cannot be told just now: %s", error)
            return
        if status.total:
            self._display.show(self._meter.take_in(status, self._runtime.monotonic()))

"""How progress is shown: what is said, and that nothing else on the terminal is disturbed."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from starburst_executor import StarburstExecutor
from starburst_executor.costs.bill import WorkerLifetime, summarize
from starburst_executor.formatting import dollars
from starburst_executor.inspection.terminal import (
    Gauge,
    LiveDisplay,
    Meter,
    PlainDisplay,
    Progress,
    Ticker,
    duration,
    open_display,
)
from starburst_executor.protocol.manifest import Intervals, Limits, Manifest
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.session_prices import SessionPrices
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.url import open_store
from tests.support.progress import WHEN, at, status

QUICK = Intervals(poll_first=0.02, poll_last=0.1, look_last=0.05, commit=0.05)


class Clock(SystemRuntime):
    """A runtime whose clock stands still until it is moved."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


# --- rate and time left --------------------------------------------------------------


def test_rate_and_time_left_come_from_the_looks_of_the_last_minute() -> None:
    meter = Meter()
    meter.take_in(status(0, 1000), 0)
    assert meter.take_in(status(100, 1000), 10).rate == 10
    for second in range(20, 81, 10):
        shown = meter.take_in(status(100 + 2 * (second - 10), 1000), second)
    assert shown.rate == pytest.approx(2)  # the fast beginning is forgotten
    assert shown.left == pytest.approx((1000 - 240) / 2)


def test_what_had_finished_before_the_first_look_is_not_counted_as_speed() -> None:
    meter = Meter()
    first = meter.take_in(status(900, 1000), 5)
    assert (first.rate, first.left) == (None, None)
    assert meter.take_in(status(901, 1000), 6).rate == 1


def test_time_left_is_not_told_while_nothing_finishes_or_all_has() -> None:
    meter = Meter()
    meter.take_in(status(5), 0)
    assert meter.take_in(status(5), 10).left is None
    assert meter.take_in(status(10), 20).left is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"), (0.00003, "0.03 ms"), (0.332, "332 ms"), (0.9999, "1.0 s"), (12.44, "12.4 s"),
        (59.96, "1:00"), (185, "3:05"), (3599.7, "1:00:00"), (7385, "2:03:05"),
        (353000, "4 d 02:03:20"),
    ],
)  # fmt: skip
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_says_all_there_is_to_know() -> None:
    now = status(4, pending=3, running=1, claimed=1, completed=3, failed=1)
    line = str(Progress(status=now, rate=2.5, left=2.4))
    assert line == (
        "20250131-094500-k7mw3x: 40%, 4 of 10 done, 1 running, 1 claimed, 3 pending, 1 failed, "
        "2.4 s left, 2.5 tasks/s, 1 of 2 workers"
    )


@pytest.mark.parametrize("width", [64, 80, 120])
def test_a_line_leaves_out_what_has_no_room(width: int) -> None:
    now = status(40_000, 100_000, running=900, claimed=90, failed=12, cancelled=7)
    line = Progress(status=now, rate=1234.5, left=4e5).line(width)
    assert len(line) <= width
    assert "40019 of 100000 done" in line
    assert "12 failed" in line
    assert ("4 d 15:06:40 left" in line) is (width > 64)


def test_nothing_is_said_to_be_done_before_it_is() -> None:
    assert ": 99%, " in str(at(9_999, total=10_000))
    assert ": 100%, " in str(at(10_000, total=10_000))


def test_what_was_spent_is_said_and_stands_out_above_its_alert() -> None:
    rate = SessionPrices(worker_hour=1, source="a test", region="r", taken=WHEN.date())
    made = Manifest(
        session_id="s", python="3.11", package="0", created=0, deadline=0, workers=1,
        limits=Limits(), intervals=Intervals(), spec=WorkerSpec(launcher="ecs"), rate=rate,
        cost_alert=2.0,
    )  # fmt: skip
    cheap = at(4, cost=summarize(made, [WorkerLifetime(3600)]))
    assert ", $1.00 spent, 1 of 2 workers" in str(cheap)
    assert cheap.counts()[-2][0] == "cost"
    dear = at(4, cost=summarize(made, [WorkerLifetime(9000)]))
    assert "$2.50 spent, over its alert" in str(dear)
    assert dear.counts()[-2][0] == "alert"
    about = at(4, cost=summarize(made, [WorkerLifetime(3600)], unread=1))
    assert "about $2.00 spent, over its alert" in str(about)


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "$0"), (0.00000012, "$0.00000012"), (0.00012, "$0.00012"), (0.0314, "$0.031"),
        (0.996, "$1.00"), (12.4, "$12.40"), (1234.5, "$1,234.50"),
    ],
)  # fmt: skip
def test_dollars_are_written_as_people_say_them(amount: float, text: str) -> None:
    assert dollars(amount) == text


# --- where there is no terminal ------------------------------------------------------


def test_without_a_terminal_a_line_is_written_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    display = open_display(stream, clock)
    assert isinstance(display, PlainDisplay)
    for second in range(25):
        clock.now = 100.0 + second
        display.show(at(second, total=100))
    display.close()
    done = re.findall(r"(\d+) of 100 done", stream.getvalue())
    assert done == ["0", "10", "20", "24"]
    assert "\x1b" not in stream.getvalue()


def test_without_change_the_same_line_is_not_repeated() -> None:
    stream, clock = io.StringIO(), Clock()
    display = PlainDisplay(stream, clock)
    for second in range(60):
        clock.now = 100.0 + second
        display.show(at(3))
    display.close()
    assert stream.getvalue().count("\n") == 1


def test_a_display_that_was_never_used_writes_nothing() -> None:
    stream = io.StringIO()
    PlainDisplay(stream, Clock()).close()
    assert stream.getvalue() == ""


# --- on a terminal -------------------------------------------------------------------


@contextmanager
def terminal(rows: int = 24, columns: int = 100) -> Iterator[tuple[Any, int]]:
    """A terminal as a text stream, and the end from which can be read what it got."""
    reader, writer = pty.openpty()
    resize(writer, rows, columns)
    with os.fdopen(writer, "w") as stream:
        yield stream, reader
    os.close(reader)


def resize(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def read(fd: int, end: str = "\x1b8") -> str:
    """What a terminal got, up to the end of a drawing; it may come in pieces."""
    text = ""
    while not text.endswith(end):
        text += os.read(fd, 1 << 16).decode()
    return text


@pytest.fixture(autouse=True)
def colour_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


class Screen:
    """So much of a terminal as the display and what prints beside it use."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.lines = [""] * rows
        self.row = self.column = 0
        self.bottom = rows
        self.saved = (0, 0)

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\x1b.|\r|\n|[^\x1b\r\n]+", text):
            self._take(part)

    def _take(self, part: str) -> None:
        if part == "\x1b7":
            self.saved = (self.row, self.column)
        elif part == "\x1b8":
            self.row, self.column = self.saved
        elif part in ("\n", "\x1bD"):
            self._down()
        elif part == "\r":
            self.column = 0
        elif part.startswith("\x1b["):
            self._control(part[2:-1], part[-1])
        else:
            line = self.lines[self.row].ljust(self.column)
            after = line[self.column + len(part) :]
            self.lines[self.row] = line[: self.column] + part + after
            self.column += len(part)

    def _control(self, numbers: str, letter: str) -> None:
        given = [int(n) for n in numbers.split(";") if n]
        if letter == "r":
            self.bottom = given[1] if given else self.rows
            self.row = self.column = 0
        elif letter == "H":
            self.row, self.column = given[0] - 1, given[1] - 1
        elif letter == "A":
            self.row = max(0, self.row - given[0])
        elif letter == "K":
            self.lines[self.row] = ""
        else:
            assert letter == "m", letter

    def _down(self) -> None:
        if self.row + 1 == self.bottom:
            del self.lines[0]
            self.lines.insert(self.bottom - 1, "")
        elif self.row + 1 < self.rows:
            self.row += 1


def test_the_display_is_in_the_two_lowest_lines() -> None:
    with terminal(10, 80) as (stream, reader):
        display = open_display(stream, SystemRuntime())
        assert isinstance(display, LiveDisplay)
        display.show(at(5, failed=0))
        screen = Screen(10, 80)
        screen.write(read(reader))
        display.close()
    assert screen.lines[8].startswith("20250131-094500-k7mw3x ")
    assert screen.lines[8].rstrip().endswith("50%")
    assert screen.lines[9].startswith("5 of 10 done · 0 running · 5 pending")
    assert screen.lines[:8] == [""] * 8


def test_what_is_printed_meanwhile_scrolls_above_and_is_whole() -> None:
    screen = Screen(10, 80)
    with terminal(10, 80) as (stream, reader):
        display = open_display(stream, SystemRuntime())
        said = []
        for number in range(30):
            said.append(f"line {number} of somebody else")
            screen.write(f"{said[-1]}\r\n")  # goes past the display's own stream
            display.show(at(number, total=30))
            screen.write(read(reader))
        assert screen.lines[:7] == said[-7:]
        assert screen.lines[9].startswith("29 of 30 done")
        display.close()
        screen.write(read(reader, end="\r\n"))
    assert screen.bottom == 10
    assert screen.lines[:7] == said[-7:]
    assert screen.lines[7].startswith("20250131-094500-k7mw3x: 97%, 29 of 30 done")
    assert screen.lines[8:] == ["", ""]


def test_a_line_that_others_have_begun_goes_on_where_it_was() -> None:
    screen = Screen(10, 80)
    with terminal(10, 80) as (stream, reader):
        display = open_display(stream, SystemRuntime())
        for bar in ("|#  |", "|## |", "|###|"):  # as tqdm draws
            screen.write(f"\rbar {bar}")
            display.show(at(1))
            screen.write(read(reader))
        display.close()
    assert screen.lines[0] == "bar |###|"


def test_the_cursor_at_the_lowest_line_is_moved_out_of_the_way_first() -> None:
    screen = Screen(10, 80)
    screen.write("\r\n".join(f"earlier {n}" for n in range(10)))
    with terminal(10, 80) as (stream, reader):
        display = open_display(stream, SystemRuntime())
        display.show(at(1))
        screen.write(read(reader))
        display.close()
    assert screen.lines[:8] == [f"earlier {n}" for n in range(2, 10)]
    assert (screen.row, screen.column) == (7, len("earlier 9"))


def test_a_terminal_of_another_size_gets_the_display_at_its_foot() -> None:
    with terminal(24, 100) as (stream, reader):
        display = open_display(stream, SystemRuntime())
        display.show(at(1))
        read(reader)
        resize(stream.fileno(), 12, 60)
        display.show(at(2))
        text = read(reader)
        display.close()
    assert "\x1b[1;10r" in text
    screen = Screen(12, 60)
    screen.write(text)
    assert screen.lines[11].startswith("2 of 10 done")
    assert max(map(len, screen.lines)) <= 60


def test_a_narrow_terminal_gets_what_matters_in_two_whole_lines() -> None:
    with terminal(12, 40) as (stream, reader):
        display = open_display(stream, SystemRuntime())
        display.show(Progress(status=status(5, name="a rather long name"), rate=1.0, left=5.0))
        screen = Screen(12, 40)
        screen.write(read(reader))
        display.close()
    assert screen.lines[11].rstrip() == "5 of 10 done · 0 failed · 5.0 s left"
    assert all(len(line) <= 40 for line in screen.lines)


def test_a_second_display_on_the_terminal_writes_lines_instead() -> None:
    with terminal() as (stream, _):
        first = open_display(stream, SystemRuntime())
        second = open_display(stream, SystemRuntime())
        assert isinstance(first, LiveDisplay)
        assert isinstance(second, PlainDisplay)
        first.close()
        third = open_display(stream, SystemRuntime())
        assert isinstance(third, LiveDisplay)
        third.close()


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_can_do_nothing_gets_lines(
    term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    with terminal() as (stream, _):
        assert isinstance(open_display(stream, SystemRuntime()), PlainDisplay)


def test_a_terminal_of_few_lines_gets_lines_that_scroll() -> None:
    with terminal(rows=4) as (stream, _):
        assert isinstance(open_display(stream, SystemRuntime()), PlainDisplay)


_BACKGROUND = """
import sys
from starburst_executor.runtime import SystemRuntime
from starburst_executor.inspection.terminal import open_display
from tests.support.progress import at
display = open_display(sys.stderr, SystemRuntime())
display.show(at(1))
display.close()
print("type:", type(display).__name__)
"""

_SHELL = """
import fcntl, subprocess, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
subprocess.run([sys.executable, "-c", sys.argv[1]], process_group={group}, check=True)
"""


@pytest.mark.parametrize(("group", "draws"), [("0", False), ("None", True)])
def test_a_process_in_the_background_of_its_terminal_does_not_draw(group: str, draws: bool) -> None:
    text = on_a_terminal(_SHELL.format(group=group), _BACKGROUND)
    assert "type: LiveDisplay" in text
    assert "1 of 10 done" in text
    assert ("\x1b[1;22r" in text) is draws


def test_a_display_may_be_closed_twice() -> None:
    with terminal() as (stream, _):
        display = open_display(stream, SystemRuntime())
        display.close()
        display.close()


# --- of an executor ------------------------------------------------------------------


def finished_session(store: str) -> Session:
    with StarburstExecutor(1, store=store, keep=True, intervals=QUICK) as executor:
        executor.submit(abs, -1)
    return Session(open_store(store), executor.session_id, SystemRuntime())


def test_a_gauge_reads_no_record_that_has_not_changed(directory_url: str) -> None:
    session = finished_session(directory_url)
    gauge = Gauge(session)
    assert gauge.look().completed == 1
    record = next(Path(directory_url).rglob("record"))
    record.unlink()
    assert gauge.look().completed == 1


def test_a_ticker_tells_the_end_when_it_is_closed(directory_url: str) -> None:
    stream = io.StringIO()
    ticker = Ticker(finished_session(directory_url), stream)
    ticker.close()
    ticker.close()
    assert "100%, 1 of 1 done" in stream.getvalue()


def test_a_ticker_ends_quietly_with_its_session(
    directory_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    session = finished_session(directory_url)
    gone = Ticker(session, io.StringIO())
    session.store.delete([entry.key for entry in session.list_all(session.prefix)[0]])
    gone.close()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_progress_of_an_executor_is_written_to_stderr(
    directory_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with StarburstExecutor(1, store=directory_url, progress=True, intervals=QUICK) as executor:
        list(executor.map(abs, range(20)))
    printed = capsys.readouterr()
    assert "100%, 20 of 20 done" in printed.err
    assert printed.out == ""


def test_nothing_is_shown_unless_it_is_asked_for(
    directory_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with StarburstExecutor(1, store=directory_url, intervals=QUICK) as executor:
        executor.submit(abs, -1)
    assert capsys.readouterr() == ("", "")


_PROGRAM = """
import sys
from starburst_executor import Intervals, StarburstExecutor
quick = Intervals(poll_first=0.02, poll_last=0.1, look_last=0.05, commit=0.05)
with StarburstExecutor(1, store=sys.argv[1], progress=True, intervals=quick) as executor:
    for value in executor.map(abs, range(5)):
        print("value", value)
    {end}
"""


@pytest.mark.parametrize("end", ["pass", "raise KeyboardInterrupt", "sys.exit(3)"])
def test_the_terminal_is_given_back_however_the_program_ends(directory_url: str, end: str) -> None:
    text = on_a_terminal(_PROGRAM.format(end=end), directory_url)
    regions = re.findall(r"\x1b\[(?:1;\d+)?r", text)
    assert regions[-1:] in ([], ["\x1b[r"])
    screen = Screen(24, 80)
    screen.write(text)
    assert screen.bottom == 24
    assert "value 4" in screen.lines


_COMMAND = "from starburst_executor.cli.main import main; main()"


def test_the_command_line_watches_live_on_a_terminal_and_ends_with_the_status(
    directory_url: str,
) -> None:
    session = finished_session(directory_url)
    text = on_a_terminal(_COMMAND, "status", session.id, "--watch", "--store", directory_url)
    assert "\x1b[1;22r" in text
    screen = Screen(24, 80)
    screen.write(text)
    assert screen.bottom == 24
    assert "  Progress:  100.0% (1 of 1)" in screen.lines
    assert "\x1b[32m  Completed: 1" in text  # in green


def test_a_table_on_a_terminal_is_coloured_and_cut_at_its_edge(
    directory_url: str,
) -> None:
    with StarburstExecutor(1, store=directory_url, keep=True, intervals=QUICK) as executor:
        executor.submit(int, "no number " * 20)
    text = on_a_terminal(_COMMAND, "tasks", executor.session_id, "--store", directory_url)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(map(len, plain)) == 80
    assert plain[1].endswith("…")
    assert "\x1b[31mfailed\x1b[0m" in text


def on_a_terminal(program: str, *arguments: str) -> str:
    """All that a program writes to a terminal of its own."""
    reader, writer = pty.openpty()
    resize(writer, 24, 80)
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=writer,
        stdout=writer,
        stderr=writer,
        start_new_session=True,
    ) as process:
        os.close(writer)
        text = everything(reader)
        process.wait(60)
    os.close(reader)
    return text


def everything(fd: int) -> str:
    """All that is written to a terminal until its last writer has ended."""
    parts: list[bytes] = []
    while True:
        try:
            part = os.read(fd, 1 << 16)
        except OSError:  # Linux says so when nobody has the other end any more
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts).decode()

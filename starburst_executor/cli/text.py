"""How things are written: tables, colours, and JSON."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import click
import msgspec

__all__ = [
    "document",
    "echo_table",
    "local_moment",
    "local_time",
    "one_line",
    "status_text",
]

SCHEMA = (
    1  # of every JSON document; goes up when a field changes its meaning or goes away
)

_GAP = "  "
_COLOURS = {
    "completed": "green",
    "running": "cyan",
    "claimed": "cyan",
    "failed": "red",
    "cancelled": "yellow",
    "terminated": "yellow",
}


def document(name: str, content: Any) -> str:
    """One JSON document on one line: the schema's version, and the content under its name."""
    return msgspec.json.encode({"schema": SCHEMA, name: content}).decode()


def echo_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns as wide as they need to be; on a terminal the last is cut at its edge.

    Not rich's tables: those take 2 ms a row, so minutes for a session of 100,000 tasks.
    """
    table = [list(headings), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(headings))]
    edge = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for number, row in enumerate(table):
        click.echo(_row(row, widths, edge, heading=not number))


def _row(row: list[str], widths: list[int], edge: int | None, *, heading: bool) -> str:
    *cells, last = row
    line = "".join(
        cell.ljust(width) + _GAP for cell, width in zip(cells, widths, strict=False)
    )
    if edge is not None and len(line) + len(last) > edge:
        last = last[: max(0, edge - len(line) - 1)] + "…"
    line = f"{line}{last}".rstrip()
    if heading:
        return click.style(line, bold=True)
    for cell in row:
        if cell in _COLOURS:
            return line.replace(cell, click.style(cell, fg=_COLOURS[cell]), 1)
    return line


def one_line(text: str) -> str:
    """The first line of a text, for a table."""
    return text.strip().partition("\n")[0]


def local_time(moment: datetime) -> str:
    """A time as the reader's clock has it."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


def local_moment(moment: datetime) -> str:
    """A time of day as the reader's clock has it, to the millisecond."""
    return moment.astimezone().isoformat(" ", "milliseconds")[:23]


def status_text(text: str) -> str:
    """A status as it prints, with its counts in colour where they are not nought."""
    return "\n".join(_coloured(line) for line in text.splitlines())


def _coloured(line: str) -> str:
    label, _, value = line.strip().partition(":")
    if line.startswith("Session "):
        return click.style(line, bold=True)
    words = value.split()
    colour = _COLOURS.get(label.lower()) or (_COLOURS.get(words[0]) if words else None)
    if colour is None or words[0] == "0":
        return line
    return click.style(line, fg=colour)

"""Output: tables, colours and JSON."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import click
import msgspec

from starburst_executor.tables import Column, counted, fitted

__all__ = [
    "counted",
    "document",
    "echo_lines",
    "echo_table",
    "local_moment",
    "one_line",
    "status_text",
    "terminal_width",
]

SCHEMA = 1  # of every JSON document; incremented when a field changes its meaning or is removed

_COLOURS = {
    "completed": "green",
    "running": "cyan",
    "claimed": "cyan",
    "failed": "red",
    "cancelled": "yellow",
    "terminated": "yellow",
}


def document(name: str, content: Any) -> str:
    """A one-line JSON document: the schema version, and the content under its name."""
    return msgspec.json.encode({"schema": SCHEMA, name: content}).decode()


def echo_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns as wide as needed; on a terminal, cut the last at the edge."""
    *others, last = headings
    columns = [*(Column(one) for one in others), Column(last, least=len(last))]
    echo_lines(fitted(columns, rows, terminal_width()))


def terminal_width() -> int | None:
    """Width of the terminal in characters; None if the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def echo_lines(lines: Iterable[Sequence[str]]) -> None:
    """Print a table's lines, with states of tasks and sessions coloured."""
    for number, cells in enumerate(lines):
        line = "".join(cells if not number else map(_coloured_cell, cells)).rstrip()
        click.echo(line if number else click.style(line, bold=True))


def _coloured_cell(cell: str) -> str:
    word = cell.strip()
    if word not in _COLOURS:
        return cell
    return cell.replace(word, click.style(word, fg=_COLOURS[word]))


def one_line(text: str) -> str:
    """The first line of a text, for a table."""
    return text.strip().partition("\n")[0]


def local_moment(moment: datetime) -> str:
    """A moment in local time, to the millisecond."""
    return moment.astimezone().isoformat(" ", "milliseconds")[:23]


def status_text(text: str) -> str:
    """A printed status with its non-zero counts coloured."""
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

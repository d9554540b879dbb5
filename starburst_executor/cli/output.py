"""How things are written: tables, colours, and JSON."""

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

SCHEMA = 1  # of every JSON document; goes up when a field changes its meaning or goes away

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
    """Print columns as wide as they need to be; on a terminal the last is cut at its edge."""
    *others, last = headings
    columns = [*(Column(one) for one in others), Column(last, least=len(last))]
    echo_lines(fitted(columns, rows, terminal_width()))


def terminal_width() -> int | None:
    """Characters of a line of the terminal; None where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def echo_lines(lines: Iterable[Sequence[str]]) -> None:
    """Print the lines of a table, states of tasks and sessions in their colours."""
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

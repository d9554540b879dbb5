"""Output: tables, colours and JSON."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import click
import msgspec

from starburst_executor.formatting import UNPRINTABLE, printable
from starburst_executor.tables import Column, counted, fitted

__all__ = [
    "Styled",
    "counted",
    "document",
    "echo",
    "echo_lines",
    "echo_table",
    "local_moment",
    "one_line",
    "status_text",
    "styled",
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
    text = msgspec.json.encode({"schema": SCHEMA, name: content}).decode()
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class Styled(str):
    """Text with colours of ours, harmless on a terminal."""

    __slots__ = ()


def styled(text: str, **style: Any) -> Styled:
    """Text of anybody in a colour of ours; for `echo`."""
    return Styled(click.style(printable(text), **style))


def echo(*parts: str, nl: bool = True, err: bool = False) -> None:
    """Print; whatever could control the terminal is written out, unless it is `Styled`."""
    text = "".join(part if isinstance(part, Styled) else printable(part) for part in parts)
    click.echo(text, nl=nl, err=err)


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
        echo(Styled(line) if number else styled(line, bold=True))


def _coloured_cell(cell: str) -> str:
    word = cell.strip()
    if word not in _COLOURS:
        return cell
    return cell.replace(word, styled(word, fg=_COLOURS[word]))


def one_line(text: str) -> str:
    """The first line of a text, for a table."""
    return text.strip().partition("\n")[0]


def local_moment(moment: datetime) -> str:
    """A moment in local time, to the millisecond."""
    return moment.astimezone().isoformat(" ", "milliseconds")[:23]


def status_text(text: str) -> Styled:
    """A printed status with its non-zero counts coloured."""
    return Styled("\n".join(_coloured(line) for line in text.split("\n")))


def _coloured(line: str) -> str:
    label, _, value = line.strip().partition(":")
    if line.startswith("Session "):
        return styled(line, bold=True)
    words = value.split()
    colour = _COLOURS.get(label.lower()) or (_COLOURS.get(words[0]) if words else None)
    if colour is None or words[0] == "0":
        return printable(line)
    return styled(line, fg=colour)

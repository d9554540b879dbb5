"""Tables of text that fit the terminal they are read on, and counts in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from starburst_executor.formatting import one_line

__all__ = ["Column", "age", "counted", "fitted", "percent"]


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        heading: Its first line.
        right: Whether its cells are right-aligned, as numbers are.
        least: It may be cut to this many characters to save room; None: never cut.
        spare: To save room, columns with a higher number are dropped first; 0: never dropped.
    """

    heading: str
    right: bool = False
    least: int | None = None
    spare: int = 0


def fitted(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], width: int | None
) -> list[list[str]]:
    """The cells of each line, headings first, padded so that a line is its cells joined.

    Rich's tables take 2 ms per row, which is minutes for a session of 100,000 tasks.

    Args:
        columns: The columns.
        rows: Their cells.
        width: Characters per line; None: unlimited.
    """
    table = [[column.heading for column in columns]]
    table += [[one_line(cell) for cell in row] for row in rows]
    natural = [max(len(row[i]) for row in table) for i in range(len(columns))]
    kept = list(range(len(columns)))
    if width is not None:
        kept = _kept(columns, natural, width)
        natural = _shrunk(columns, natural, kept, width)
    return [[_cell(row, columns, natural, kept, i) for i in kept] for row in table]


def _room(columns: Sequence[Column], widths: Sequence[int], kept: Sequence[int]) -> int:
    return sum(len(_gap(columns, kept, i)) + widths[i] for i in kept)


def _gap(columns: Sequence[Column], kept: Sequence[int], i: int) -> str:
    """The space before a column; numbers mostly have room at their left already."""
    if i == kept[0]:
        return ""
    return " " if columns[i].right else "  "


def _kept(columns: Sequence[Column], natural: Sequence[int], width: int) -> list[int]:
    """Indices of the columns for which there is room."""
    least = [
        size if column.least is None else min(size, column.least)
        for column, size in zip(columns, natural, strict=True)
    ]
    kept = list(range(len(columns)))
    for i in sorted(kept, key=lambda i: -columns[i].spare):
        if not columns[i].spare or _room(columns, least, kept) <= width:
            return kept
        kept.remove(i)
    return kept


def _shrunk(
    columns: Sequence[Column], natural: Sequence[int], kept: Sequence[int], width: int
) -> list[int]:
    """The widths, with the widest cuttable columns shrunk until all fit."""
    widths = list(natural)
    for _ in range(_room(columns, widths, kept) - width):
        able = [i for i in kept if widths[i] > (columns[i].least or widths[i])]
        if not able:
            break
        widths[max(able, key=lambda i: widths[i])] -= 1
    return widths


def _cell(
    row: Sequence[str],
    columns: Sequence[Column],
    widths: Sequence[int],
    kept: Sequence[int],
    i: int,
) -> str:
    text, size = row[i], widths[i]
    if len(text) > size:
        text = f"{text[: size - 1]}…"
    gap = _gap(columns, kept, i)
    if columns[i].right:
        return gap + text.rjust(size)
    return gap + (text if i == kept[-1] else text.ljust(size))


def counted(count: int, noun: str) -> str:
    """A count with its noun, as in "1 task" and "2 tasks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """A share from 0 to 1 as a percentage; 100% only when it is all."""
    return "100%" if share >= 1 else f"{min(99, round(100 * share))}%"


def age(seconds: float) -> str:
    """How long ago, in at most four characters: `3s`, `12m`, `5h`, `21d`."""
    for unit, length, most in (("s", 1, 100), ("m", 60, 100), ("h", 3600, 48)):
        if seconds < length * most:
            return f"{max(0, int(seconds / length))}{unit}"
    return f"{int(seconds / 86400)}d"

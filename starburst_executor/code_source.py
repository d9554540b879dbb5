"""Code that arrives without its file, in tracebacks: the real file name, line and source.

    client                                     child
      a function travels by value     ----->     its code has the name of its file, and
      with the lines it was written in           `linecache` has these lines under it

So a traceback reads as on the client, of scripts, notebooks and modules alike, also
where the file is missing or was edited since.
"""

from __future__ import annotations

import linecache
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

__all__ = ["reduce_code", "renamed", "restore_code", "show_lines", "show_sources"]

# cloudpickle hides the file name, so that equal functions of two files are equal bytes.
_reduce = cloudpickle.Pickler.dispatch_table[types.CodeType]
_FILENAME = _reduce((lambda: 0).__code__)[1].index("<dynamic-code>")

# As they were when a function was first sent: its file may be edited later.
_lines: weakref.WeakKeyDictionary[types.CodeType, list[str]] = weakref.WeakKeyDictionary()
_showing = False


# --- on the client ----------------------------------------------------------------


def reduce_code(code: types.CodeType) -> tuple[Any, ...]:
    """What a code object is pickled as, for the dispatch table of a pickler."""
    make, parts = _reduce(code)
    parts = (*parts[:_FILENAME], code.co_filename, *parts[_FILENAME + 1 :])
    lines = _lines_of(code)
    return (restore_code, (parts, "".join(lines))) if lines else (make, parts)


def _lines_of(code: types.CodeType) -> list[str]:
    lines = _lines.get(code)
    if lines is None:
        last = max(_line_numbers(code), default=0)
        known = linecache.getlines(code.co_filename)
        lines = _lines[code] = known[code.co_firstlineno - 1 : last]
    return lines


def _line_numbers(code: types.CodeType) -> Iterator[int]:
    for first, last, _, _ in code.co_positions():
        if number := last or first:
            yield number
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _line_numbers(constant)


# --- in the child -----------------------------------------------------------------


def show_sources() -> None:
    """Let `linecache` know the lines of what is unpickled from now on.

    Not for a client, which knows the lines of its own code better.
    """
    global _showing
    _showing = True


def restore_code(parts: tuple[Any, ...], source: str) -> types.CodeType:
    """The code object that was pickled."""
    code = types.CodeType(*parts)
    if _showing:
        before = code.co_firstlineno - 1
        known = linecache.getlines(code.co_filename)[:before]
        known += ["\n"] * (before - len(known))
        lines = source.splitlines(keepends=True)
        after = linecache.getlines(code.co_filename)[before + len(lines) :]
        show_lines(code.co_filename, [*known, *lines, *after])
    return code


def show_lines(filename: str, lines: Sequence[str]) -> None:
    """Let `linecache` have these lines for a file, whatever is on disk."""
    size = sum(map(len, lines))
    # Without a time of modification, an entry is never compared with the disk.
    linecache.cache[filename] = (size, None, list(lines), filename)


def renamed(code: types.CodeType, filename: str) -> types.CodeType:
    """The same code, as if it were of another file."""
    constants = tuple(
        renamed(constant, filename) if isinstance(constant, types.CodeType) else constant
        for constant in code.co_consts
    )
    return code.replace(co_filename=filename, co_consts=constants)

"""Pickles code objects with their file and source lines, for tracebacks."""

from __future__ import annotations

import linecache
import types
import weakref
from collections.abc import Iterator
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from starburst_executor.serialization.remote import restore_code

__all__ = ["reduce_code"]


# cloudpickle omits the file name, so that equal functions of two files give equal bytes.
_reduce = cloudpickle.Pickler.dispatch_table[types.CodeType]

_FILENAME = _reduce((lambda: 0).__code__)[1].index("<dynamic-code>")

# As of when a function was first sent: its file may be edited later.
_lines: weakref.WeakKeyDictionary[types.CodeType, list[str]] = weakref.WeakKeyDictionary()


def reduce_code(code: types.CodeType) -> tuple[Any, ...]:
    """Reduce a code object, for a pickler's dispatch table."""
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

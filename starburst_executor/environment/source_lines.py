"""Source lines for `linecache` that take precedence over files on disk."""

from __future__ import annotations

import linecache
import types
from collections.abc import Sequence

__all__ = ["renamed", "show_lines"]


def show_lines(filename: str, lines: Sequence[str]) -> None:
    """Make `linecache` use these lines for a file, whatever is on disk."""
    size = sum(map(len, lines))
    # An entry without a modification time is never compared with the disk.
    linecache.cache[filename] = (size, None, list(lines), filename)


def renamed(code: types.CodeType, filename: str) -> types.CodeType:
    """The same code, attributed to another file."""
    constants = tuple(
        renamed(constant, filename) if isinstance(constant, types.CodeType) else constant
        for constant in code.co_consts
    )
    return code.replace(co_filename=filename, co_consts=constants)

"""Whether a function of a script has changed since it was last pickled."""

from __future__ import annotations

import types

from starburst_executor.serialization.content_ids import code_names
from starburst_executor.serialization.script_modules import is_named, space_name

__all__ = ["signature"]


def signature(function: object) -> object:
    """A comparable value of everything the pickle of a simple script function depends on.

    None for other functions: those that reference a module, a class, or data that would have to be
    pickled to be compared.
    """
    parts: list[object] = []
    seen: set[int] = set()
    todo = [function]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if type(one) is not types.FunctionType or not _is_simple(one):
            return None
        parts += (one.__code__, one.__name__, is_named(one), one.__doc__)
        values = [one.__globals__.get(n, signature) for n in code_names(one.__code__)]
        for value in (*values, *(one.__defaults__ or ())):
            if value is signature:  # absent
                parts.append(value)
            elif type(value) is types.FunctionType:
                todo.append(value)
                parts.append(id(value))
            elif (plain := _comparable(value)) is not None:
                parts.append(plain)
            else:
                return None
    return parts


def _is_simple(function: types.FunctionType) -> bool:
    has_more = (
        function.__closure__
        or function.__kwdefaults__
        or function.__dict__
        or function.__annotations__
    )
    return not has_more and space_name(function) is not None


def _comparable(value: object) -> object:
    kind = type(value)
    if kind is float:  # 0.0 equals -0.0
        return (kind, float.hex(value))  # type: ignore[arg-type]
    if value is None or kind in (int, bool):
        return (kind, value)
    short = kind in (str, bytes) and len(value) < 1000  # type: ignore[arg-type]
    return (kind, value) if short else None

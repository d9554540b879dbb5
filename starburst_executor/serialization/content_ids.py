"""Ids that distinguish versions of a class or of code, the same in every process.

An id is derived from what was written in the source: names, bytecode, bases, slots, members of an
enumeration. It ignores line numbers, file names and the values of class attributes, so an edit
further up in the script, or a counter in the class, does not change it. Attributes that Python
caches in a class count as data.
"""

from __future__ import annotations

import functools
import hashlib
import types
import weakref
from collections.abc import Iterator
from enum import Enum
from typing import Any

__all__ = ["class_content", "code_content", "code_names", "inner_functions", "is_code", "summary"]

_codes: weakref.WeakKeyDictionary[types.CodeType, str] = weakref.WeakKeyDictionary()

# Code that appears and disappears as annotations are accessed.
_VOLATILE = {"__annotate__", "__annotate_func__"}


def summary(*parts: object) -> str:
    """A short digest of strings, bytes, numbers and tuples of them."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def code_content(code: types.CodeType) -> str:
    """The id of bytecode, whatever its file and lines."""
    # Equal code objects differ at most in their lines.
    found = _codes.get(code)
    if found is None:
        found = _codes[code] = summary(
            code.co_name,
            code.co_code,
            tuple(map(_constant, code.co_consts)),
            code.co_names,
            code.co_varnames,
            code.co_freevars,
            code.co_cellvars,
            code.co_argcount,
            code.co_posonlyargcount,
            code.co_kwonlyargcount,
            code.co_flags,
        )
    return found


def _constant(value: Any) -> object:
    if isinstance(value, types.CodeType):
        return code_content(value)
    if isinstance(value, frozenset):  # its order varies between processes
        return ("frozenset", *sorted(repr(_constant(item)) for item in value))
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    return value


def class_content(cls: type) -> str:
    """The id of a class as written in its source, without the values of its data."""
    return _class_content(cls, frozenset())


def _class_content(cls: type, above: frozenset[type]) -> str:
    above |= {cls}
    bases = tuple((base.__module__, base.__qualname__) for base in cls.__bases__)
    members = tuple(
        (name, member)
        for name, value in sorted(vars(cls).items())
        if name not in _VOLATILE and (member := _member(value, above))
    )
    return summary(type(cls).__qualname__, bases, members, _enumerated(cls))


def _member(value: object, above: frozenset[type]) -> object:
    if isinstance(value, type):
        inner = value.__module__ == next(iter(above)).__module__ and value not in above
        return _class_content(value, above) if inner else value.__qualname__
    codes = tuple(code_content(f.__code__) for f in inner_functions(value))
    slot = isinstance(value, types.MemberDescriptorType)
    return (type(value).__name__, codes) if codes or slot else None


def _enumerated(cls: type) -> object:
    if not issubclass(cls, Enum):
        return ()
    return tuple((name, repr(m.value)) for name, m in cls.__members__.items())


def inner_functions(value: object) -> Iterator[types.FunctionType]:
    """The functions inside a class attribute."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, property):
        for part in (value.fget, value.fset, value.fdel):
            yield from inner_functions(part)
    elif isinstance(value, (staticmethod, classmethod)):
        yield from inner_functions(value.__func__)
    elif isinstance(value, (functools.cached_property, functools.singledispatchmethod)):
        yield from inner_functions(value.func)
    elif isinstance(value, functools._lru_cache_wrapper):  # noqa: SLF001  has no public name
        yield from inner_functions(value.__wrapped__)


def code_names(code: types.CodeType) -> Iterator[str]:
    """The names of globals and attributes that code may use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_names(constant)


def is_code(value: object) -> bool:
    """Whether a class attribute is code rather than data."""
    return isinstance(value, type) or any(True for _ in inner_functions(value))

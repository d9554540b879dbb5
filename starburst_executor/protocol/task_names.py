"""Names of tasks, for people: the function and its abbreviated arguments, or a label.

The client creates the name when a task is submitted. The tasks object of a batch ends with the
names of its tasks, after the arguments, where only what displays them looks. Workers do not, and
older versions, which know no names, read such an object as they always did.

Creating a name runs no user code. A `__repr__` may raise, print gigabytes or query a database, so
only values of Python's own types and some well-known libraries are shown, and of arrays and tables
only type and shape.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from inspect import getattr_static
from itertools import islice
from pathlib import PurePath
from typing import Any, NamedTuple, cast
from uuid import UUID

import msgspec

from starburst_executor.formatting import one_line
from starburst_executor.protocol.bounds import Count

__all__ = [
    "NO_NAME",
    "Name",
    "decode_names",
    "encode_names",
    "function_name",
    "label_of",
    "name_of",
]

_LONGEST = 80  # characters of a name, and of each of its parts
_ITEMS = 4  # shown of a collection
_DEPTH = 2  # of collections in collections
_TEXT = 40  # characters shown of a string
_BITS = 256  # largest integer shown in digits


class Name(NamedTuple):
    """The name of a task.

    Attributes:
        function: Qualified name of the callable; "" if unknown.
        arguments: What it is called with, abbreviated.
        label: The label that the caller chose; "" for none.
    """

    function: str = ""
    arguments: str = ""
    label: str = ""

    @property
    def call(self) -> str:
        """The call much as one would write it; "" if unknown."""
        return _cut(f"{self.function}({self.arguments})") if self.function else ""

    def __str__(self) -> str:
        return self.label or self.call


NO_NAME = Name()

# --- making ------------------------------------------------------------------------


def name_of(function: str, args: Sequence[Any], kwargs: Mapping[str, Any], label: str = "") -> Name:
    """The name of a call.

    Args:
        function: What `function_name` returned.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        label: A label to show instead.
    """
    parts: list[str] = []
    room = _LONGEST
    try:
        for part in _arguments(args, kwargs):
            parts.append(part)
            room -= len(part) + 2
            if room < 0:
                break
    except RuntimeError:  # another thread is changing an argument
        parts.append("...")
    return Name(function, _cut(one_line(", ".join(parts))), label)


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[str]:
    for value in args:
        yield _short(value, _DEPTH)
    for key, value in kwargs.items():
        yield f"{key}={_short(value, _DEPTH)}"


def function_name(function: Any) -> str:
    """Qualified name of a callable; for a callable object, the name of its class."""
    # By the type: asking a proxy for its class runs user code.
    kind = type(function)
    if issubclass(kind, partial):
        return _cut(f"partial({function_name(function.func)})")
    if issubclass(kind, _NAMED):
        return _cut(one_line(_inner(function.__qualname__)))
    # Where the standard library's decorators leave it on the objects they return.
    name = getattr_static(function, "__qualname__", None)
    if not isinstance(name, str):
        name = kind.__qualname__
    return _cut(one_line(_inner(name)))


def _inner(name: str) -> str:
    """A qualified name without the function it was defined in."""
    return name.rpartition("<locals>.")[2]


def label_of(text: str) -> str:
    """A label as it is stored: one line, not too long."""
    return _cut(one_line(text.strip()))


def _cut(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


# --- values ------------------------------------------------------------------------

_NAMED = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodDescriptorType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
)

_LIBRARIES = frozenset(
    {"cupy", "jax", "jaxlib", "numpy", "pandas", "polars", "pyarrow", "scipy", "torch"}
)


def _short(value: object, depth: int) -> str:
    kind = type(value)
    show = _EXACT.get(kind)
    if show is not None:
        return show(value)
    if issubclass(kind, Enum):
        return f"{_inner(kind.__qualname__)}.{cast(Enum, value)._name_}"
    for base, brackets in _BRACKETS.items():
        if issubclass(kind, base):
            return _collection(value, base, brackets, depth)
    for base, show in _BASES.items():
        if issubclass(kind, base):
            return show(value)
    if kind.__module__.partition(".")[0] in _LIBRARIES:
        return _of_library(value)
    return f"<{_cut(_inner(kind.__qualname__), _TEXT)}>"


def _integer(value: int) -> str:
    bits = int.bit_length(value)
    return int.__repr__(value) if bits <= _BITS else f"<int of {bits} bits>"


def _text(value: str) -> str:
    some = str.__getitem__(value, slice(_TEXT))
    return repr(some) if str.__len__(value) <= _TEXT else f"{some!r}..."


def _bytes(value: bytes) -> str:
    some = bytes.__getitem__(value, slice(_TEXT))
    return repr(some) if bytes.__len__(value) <= _TEXT else f"{some!r}..."


def _size(value: bytearray | memoryview) -> str:
    return f"<{type(value).__name__} of {len(value)} bytes>"


# Looked up first, by exact class.
_EXACT: dict[type, Callable[[Any], str]] = {
    **dict.fromkeys((bool, type(None), type(...), float, complex, range, UUID), repr),
    **dict.fromkeys((date, datetime, time, timedelta), repr),
    int: _integer,
    str: _text,
    bytes: _bytes,
    bytearray: _size,
    memoryview: _size,
    Decimal: lambda value: _cut(repr(value), _TEXT),
    Fraction: lambda value: _cut(repr(value), _TEXT),
}

# Then by base class, with the base's own methods: those of the derived class are user code.
_BASES: dict[Any, Callable[[Any], str]] = {
    int: _integer,
    float: float.__repr__,
    str: _text,
    bytes: _bytes,
    _NAMED: lambda value: _cut(_inner(value.__qualname__), _TEXT),
    PurePath: lambda value: f"{type(value).__qualname__}({_text(str(value))})",
}

_BRACKETS: dict[type, str] = {
    tuple: "()",
    list: "[]",
    dict: "{}",
    set: "{}",
    frozenset: "{}",
}


def _collection(value: Any, base: Any, brackets: str, depth: int) -> str:
    """Its first items; with the class name for a named tuple or any other derived class."""
    size = base.__len__(value)
    shown = ["..."] if size and not depth else list(_items(value, base, depth - 1))
    if depth and size > _ITEMS:
        shown.append("...")
    inside = ", ".join(shown)
    if type(value) is not base:
        return f"{_inner(type(value).__qualname__)}({inside})"
    if base is tuple and size == 1:
        inside += ","
    if base is frozenset or (base is set and not size):
        return f"{base.__name__}({inside and f'{{{inside}}}'})"
    return f"{brackets[0]}{inside}{brackets[1]}"


def _items(value: Any, base: Any, depth: int) -> Iterator[str]:
    if base is dict:
        for key, item in islice(dict.items(value), _ITEMS):
            yield f"{_short(key, depth)}: {_short(item, depth)}"
    else:
        for item in islice(base.__iter__(value), _ITEMS):
            yield _short(item, depth)


def _of_library(value: Any) -> str:
    """An array or a table by its shape, a number by its value."""
    kind = _inner(type(value).__qualname__)
    try:
        shape = value.shape
        if shape == () and kind != "ndarray" and type(value).__module__ == "numpy":
            return _cut(repr(value.item()), _TEXT)
        sizes = "x".join(str(int(size)) for size in shape)
        dtype = "" if kind == "DataFrame" else str(getattr(value, "dtype", ""))
    except Exception:  # a library's own code, on an arbitrary object
        return f"<{kind}>"
    return f"<{' '.join(part for part in (kind, sizes, _cut(dtype, 20)) if part)}>"


# --- storing -----------------------------------------------------------------------


class _Names(msgspec.Struct, frozen=True, omit_defaults=True):
    """The end of a tasks object. Unlike records it may gain fields: nobody rewrites it."""

    functions: tuple[str, ...]
    calls: tuple[tuple[Count, str], ...]  # index of the function, arguments
    labels: dict[int, str] = {}  # position -> label


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Names)


def encode_names(names: Iterable[Name]) -> bytes:
    """Encode the end of a tasks object; empty if no name is known."""
    functions: dict[str, int] = {}
    calls: list[tuple[int, str]] = []
    labels: dict[int, str] = {}
    for position, name in enumerate(names):
        index = functions.setdefault(name.function, len(functions))
        calls.append((index, name.arguments))
        if name.label:
            labels[position] = name.label
    if not labels and functions.keys() <= {""}:
        return b""
    return _encoder.encode(_Names(functions=tuple(functions), calls=tuple(calls), labels=labels))


def decode_names(data: bytes, size: int) -> list[Name]:
    """Decode the names of `size` tasks; empty ones for a batch from before names existed.

    Raises:
        ValueError: the data is something else.
    """
    if not data:
        return [NO_NAME] * size
    try:
        names = _decoder.decode(data)
        found = [
            Name(*(_cut(one_line(text)) for text in (names.functions[index], arguments, label)))
            for position, (index, arguments) in enumerate(names.calls)
            for label in [names.labels.get(position, "")]
        ]
    except (msgspec.DecodeError, IndexError) as error:
        raise ValueError(f"the names of its tasks cannot be read: {error}") from error
    if len(found) != size:
        raise ValueError(f"it names {len(found)} tasks, not {size}")
    return found

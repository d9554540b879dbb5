"""Which part of an object cannot be pickled, and what to do about it."""

from __future__ import annotations

import reprlib
import types
from collections.abc import Iterator
from typing import Any

from starburst_executor.errors import (
    SerializationError,
    StarburstError,
)
from starburst_executor.protocol.payload import BUFFER_MIN, Data
from starburst_executor.serialization.exception_state import is_interrupt, one_line, type_name
from starburst_executor.serialization.scripts import Pickler

__all__ = []


MESSAGE_MAX = 8 * 1024  # characters; the message is shown in listings

_SCALARS = frozenset({type(None), bool, int, float, complex})

_CONTAINERS = frozenset({tuple, list, dict})


def is_plain(obj: Any, depth: int = 5) -> bool:
    """Whether plain pickle certainly suffices: small exact builtins, few and shallow."""
    kind = type(obj)
    if kind in _SCALARS:
        return True
    if kind is str or kind is bytes:
        return len(obj) < BUFFER_MIN
    if kind not in _CONTAINERS or depth == 0 or len(obj) > 64:
        return False
    for item in (*obj, *obj.values()) if kind is dict else obj:
        if not is_plain(item, depth - 1):
            return False
    return True


def hint(error: BaseException) -> str:
    if isinstance(error, StarburstError):
        return ""  # its message already says what to do
    if isinstance(error, ModuleNotFoundError):
        top = (error.name or "").partition(".")[0]
        return (
            f"The module {error.name!r} is not installed here: if it is your own code, "
            f"pass modules=[{top!r}]; if it is a package, install it for the workers too"
        )
    if isinstance(error, (AttributeError, ImportError)):
        return (
            "The code here seems to differ from the version that pickled the object; "
            "modules=[...] ships your own code with the session"
        )
    if isinstance(error, MemoryError):
        return "There is not enough memory here; request larger workers with memory="
    return "Its class raised an error on unpickling: try pickle.loads(pickle.dumps(...)) on it"


def refusal(error: Exception, parts: list[tuple[str, Any]]) -> SerializationError:
    """An error that names the part of the object that cannot be pickled."""
    # In an object nested too deeply, one level is as good as any other: stop at the first.
    too_deep = isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError)
    where, offender = _Search().run(parts, 0 if too_deep else 16)
    advice = (
        "It is nested too deeply: flatten it"
        if too_deep
        else "Create it inside the function, or omit it in its owner's __getstate__"
    )
    return SerializationError(
        f"cannot pickle {where}, of type {type_name(type(offender))} ({one_line(error)}). {advice}"
    )


class _Exhausted(Exception):
    """The search has reached its pickling limit."""


class _Search:
    """Finds the object to blame: one that fails although nothing inside it does.

    How much it pickles is limited, since each level pickles everything below it again.
    """

    def __init__(self) -> None:
        self._bytes_left = 256 * 1024 * 1024
        self._tries_left = 5000
        self._failing: dict[int, object] = {}  # keeps them alive, or an id might be reused
        self._best: tuple[str, object] | None = None

    def run(self, parts: list[tuple[str, Any]], depth: int) -> tuple[str, object]:
        """Path and object to blame; if there is none, the parts as a whole."""
        names = " or ".join(name for name, _ in parts[:3]) or "the arguments"
        whole: Any = parts[0][1] if len(parts) == 1 else parts
        try:
            for name, obj in parts:
                if self._fails(obj):
                    return self._below(name, " ", obj, depth) or (name, obj)
        except (_Exhausted, RecursionError):
            pass  # what was found so far still holds
        return self._best or (names, whole)

    def write(self, data: Data) -> int:
        """Act as the pickler's file, discarding everything."""
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise _Exhausted
        return len(data)

    def _fails(self, obj: object) -> bool:
        self._tries_left -= 1
        if self._tries_left < 0:
            raise _Exhausted
        try:
            Pickler(self, lambda _: None).dump(obj)
        except _Exhausted:
            raise
        except BaseException as error:  # already reported by the first attempt
            if is_interrupt(error):
                raise
            return True
        return False

    def _below(self, path: str, joint: str, obj: object, depth: int) -> tuple[str, object] | None:
        self._failing[id(obj)] = obj
        self._best = (path, obj)
        guilty = True
        for step, part in _parts(obj) if depth else ():
            if id(part) in self._failing:
                guilty = False  # a cycle: the one above fails, perhaps for another part
            elif not is_plain(part) and self._fails(part):
                guilty = False
                step = joint + step.lstrip() if joint else step
                if found := self._below(path + step, "", part, depth - 1):
                    return found
        return (path, obj) if guilty else None


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    """What an object is pickled with, and the expression that leads to it."""
    kind = type(obj)
    if isinstance(obj, dict):
        yield from ((f"[{_short(key)}]", value) for key, value in obj.items())
        yield from ((f" key {_short(key)}", key) for key in obj)
    elif isinstance(obj, (list, tuple)):
        yield from ((f"[{i}]", item) for i, item in enumerate(obj))
    elif isinstance(obj, (set, frozenset)):
        yield from ((f" element {_short(item)}", item) for item in obj)
    elif isinstance(obj, types.FunctionType):
        yield from _function_parts(obj)
    elif isinstance(obj, (types.MethodType, staticmethod, classmethod)):
        yield ".__func__", obj.__func__
        yield ".__self__", getattr(obj, "__self__", None)
    elif isinstance(obj, type):
        yield from _class_parts(obj)
    if kind not in (dict, list, tuple, set, frozenset, types.FunctionType):
        yield from _reduced_parts(obj)


def _class_parts(cls: type) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(cls).items()):
        if name != "__annotate_func__":  # is not pickled
            yield f".{name}", value


def _function_parts(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        try:
            yield f" closure variable {name!r}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in sorted(_global_names(function.__code__)):
        if name in function.__globals__:
            yield f" global variable {name!r}", function.__globals__[name]
    for value in function.__defaults__ or ():
        yield f" default {_short(value)}", value
    for name, value in (function.__kwdefaults__ or {}).items():
        yield f" default of {name!r}", value
    for name, value in vars(function).items():
        yield f".{name}", value


def _global_names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*map(_global_names, inner))


def _reduced_parts(obj: Any) -> Iterator[tuple[str, Any]]:
    """Attributes and constructor arguments, as `__reduce_ex__` returns them."""
    try:
        reduced = obj.__reduce_ex__(5)
    except BaseException as error:  # then the object itself is to blame
        if is_interrupt(error):
            raise
        return
    if not isinstance(reduced, tuple) or len(reduced) < 2:
        return
    state = reduced[2] if len(reduced) > 2 else None
    # With __slots__ the state is a pair: the __dict__, or None, and the slots.
    for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
        if isinstance(part, dict):
            yield from ((f".{name}", value) for name, value in part.items())
        else:
            yield " state", part
    for value in reduced[1]:
        yield f" part {_short(value)}", value


def _short(obj: object) -> str:
    try:
        return reprlib.repr(obj)
    except BaseException as error:  # a user's __repr__
        if is_interrupt(error):
            raise
        return f"<{type(obj).__qualname__}>"

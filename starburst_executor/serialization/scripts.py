"""Pickles the code of scripts: functions, classes and globals, by value and with ids.

cloudpickle does most of the work, except for *scripts*: `__main__`, a module still being imported,
and one that cannot be imported by name (as created by `runpy.run_path`). `namespace` describes how
they are unpickled.

Functions and classes go to the worker by value, with the globals they use, each value with an id of
its content. References come back (module, qualified name, content, and the callable that brought
it), so that a result is as small as its data.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import hashlib
import io
import pickle
import re
import secrets
import sys
import threading
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from starburst_executor.serialization import known_code, namespace, remote
from starburst_executor.serialization.annotations import AnnotationPickler, annotations_of
from starburst_executor.serialization.class_parts import (
    BUILTIN_TYPES,
    class_arguments,
    class_attributes,
    enum_arguments,
)
from starburst_executor.serialization.code_source import reduce_code
from starburst_executor.serialization.content_ids import (
    class_content,
    code_content,
    code_names,
    summary,
)
from starburst_executor.serialization.known_code import Key
from starburst_executor.serialization.namespace import Value
from starburst_executor.serialization.script_modules import is_named, is_script, space_name

if sys.version_info >= (3, 14):
    import annotationlib

    from starburst_executor.serialization.annotations import reduce_forward_reference

__all__ = ["Pickler"]

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
_WORD = re.compile(r"[^\W\d]\w*")


class _Space:
    """Represents the namespace of a script; one per pickle."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        file = getattr(sys.modules.get(self.name), "__file__", None)
        return remote.open_space, (self.name, file)


class _Annotated:
    """A module that only an annotation references: optional on the worker."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return remote.optional_module, (self.name,)


# --- the pickler ------------------------------------------------------------------


_CLOUDPICKLE = cloudpickle.Pickler.dispatch_table

_OWN = frozenset(value for value in vars(remote).values() if isinstance(value, types.FunctionType))


class Pickler(AnnotationPickler):
    """Writes one pickle, for the worker or, inside `Home.reply`, for the client.

    Args:
        file: Where to write.
        buffer_callback: As for `pickle.Pickler`.
    """

    def __init__(
        self,
        file: Any,
        buffer_callback: Callable[[pickle.PickleBuffer], object] | None = None,
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        self._origins = namespace.origins()
        self._spaces: dict[str, _Space] = {}
        self._values: dict[tuple[str, str], Value] = {}

    dispatch_table: typing.ClassVar = collections.ChainMap(
        {types.CodeType: reduce_code}, _CLOUDPICKLE
    )

    def reducer_override(self, obj: Any) -> Any:
        """Reduce what belongs to a script; cloudpickle does the rest."""
        kind = type(obj)
        if kind is types.FunctionType:
            # First the functions that every pickle references: they are most of the objects.
            return NotImplemented if obj in _OWN else self._reduce_function(obj)
        if issubclass(kind, type):
            return self._reduce_class(obj)
        if kind is types.ModuleType:
            own = obj.__name__ != "__main__" and is_script(obj.__name__)
            return (remote.space_module, (self._space(obj.__name__),)) if own else NotImplemented
        if kind is types.MethodType and self._origins is not None:
            return getattr, (obj.__self__, obj.__func__.__name__)
        special = _SPECIAL.get(kind)
        if special is not None:
            return special(obj)
        if isinstance(obj, threading.local):
            return remote.make_local, (kind, dict(obj.__dict__))
        if is_script(kind.__module__) and _reduces_itself(kind):
            return self._reduce_named(obj, obj.__reduce_ex__(5))
        return NotImplemented

    def _space(self, name: str) -> _Space:
        return self._spaces.setdefault(name, _Space(name))

    def _reference(self, obj: Any) -> Any:
        """A reference to an object that came from the client; None if it did not."""
        if self._origins is None:
            return None
        key = known_code.key_of(obj)
        origin = self._origins.get(key) if key else None
        return (remote.find, (*key, origin)) if key and origin else None

    # --- functions

    def _reduce_function(self, function: types.FunctionType) -> Any:
        if _is_dispatcher(function):
            return _reduce_dispatcher(function)
        name = space_name(function)
        if name is None:
            return super().reducer_override(function)
        if found := self._reference(function):
            return found
        reduced = self._dynamic_function_reduce(function)
        code, _, _, _, closure = reduced[1]
        attributes, slots = reduced[2]
        slots = dict(slots)
        values = self._globals(name, slots.pop("__globals__"))
        values |= self._annotations(name, annotations_of(function))
        absent = [n for n in code_names(code) if n not in function.__globals__]
        key = self._function_key(function)
        space = self._space(name)
        state = (key, space, attributes, slots, values, absent)
        arguments = (key, code, space, closure)
        return (
            remote.make_function, arguments, state, None, None, remote.set_function,
        )  # fmt: skip

    def _function_key(self, function: types.FunctionType) -> Key | None:
        if "." in function.__qualname__ or not is_named(function):
            return None
        key = (function.__module__, function.__qualname__, function_content(function))
        known_code.remember(key, function)
        return key

    def _globals(self, script: str, values: dict[str, Any]) -> dict[str, Value]:
        return {name: self._value(script, name, obj) for name, obj in values.items()}

    def _value(self, script: str, name: str, obj: Any) -> Value:
        """A value with its content id, computed once per pickle."""
        if (script, name) not in self._values:
            content = "" if self._origins is not None else content_of(obj)
            self._values[script, name] = (content, obj)
        return self._values[script, name]

    def _annotations(self, script: str, annotations: Any) -> dict[str, Value]:
        """The globals that string annotations use, for `get_type_hints`."""
        found = vars(sys.modules[script])
        texts = [text for text in dict(annotations).values() if isinstance(text, str)]
        names = dict.fromkeys(word for text in texts for word in _WORD.findall(text))
        return {
            name: self._value(script, name, found[name])
            if not isinstance(found[name], types.ModuleType)
            else (f"module {name}", _Annotated(found[name].__name__))
            for name in names
            if name in found
        }

    # --- classes

    def _reduce_class(self, cls: Any) -> Any:
        script = cls.__module__ if isinstance(cls.__module__, str) else None
        local = not is_named(cls)
        if cls in BUILTIN_TYPES or not (is_script(script) or local):
            return super().reducer_override(cls)
        if found := self._reference(cls):
            return found
        key = class_key(cls, local=local)
        code, data = class_attributes(cls)
        space = self._space(script) if script and is_script(script) else None
        values: dict[str, Value] = {}
        if script and space:
            values = self._annotations(script, annotations_of(cls))
            values |= self._anchor(script, cls)
        content = content_of if self._origins is None else _no_content
        state = (
            key,
            space,
            code,
            {name: (content(value), value) for name, value in data.items()},
            values,
        )
        make, arguments = enum_arguments(cls, key) if issubclass(cls, Enum) else (
            remote.make_class, class_arguments(cls, key)
        )  # fmt: skip
        return make, arguments, state, None, None, remote.set_class

    def _anchor(self, script: str, cls: type) -> dict[str, Value]:
        """The global that leads to a nested class."""
        name, dot, _ = cls.__qualname__.partition(".")
        outer = vars(sys.modules[script]).get(name) if script in sys.modules else None
        if not dot or not is_named(cls) or outer is None:
            return {}
        return {name: self._value(script, name, outer)}

    # --- other things

    def _reduce_named(self, obj: Any, reduced: Any) -> Any:
        """Reduce an object that pickles as the name of a global of the script."""
        if not isinstance(reduced, str):
            return reduced
        script = getattr(obj, "__module__", None) or "__main__"
        if not is_script(script) or known_code.named(script, reduced) is not obj:
            return reduced
        arguments = obj.__getnewargs__() if hasattr(obj, "__getnewargs__") else ()
        made = (reduced, self._space(script), type(obj), arguments)
        state = obj.__getstate__() or {}
        return remote.make_named, made, state, None, None, remote.set_named


def _reduces_itself(kind: type) -> bool:
    return isinstance(kind.__reduce__, types.FunctionType) or isinstance(
        kind.__reduce_ex__, types.FunctionType
    )


# --- ids --------------------------------------------------------------------------


class _Identity(Pickler):
    """Pickles a value to compute its content id: code without its lines."""

    def _reduce_function(self, function: types.FunctionType) -> Any:
        if _is_dispatcher(function):
            return _reduce_dispatcher(function)
        if space_name(function) is None:
            return super()._reduce_function(function)
        cells = [_contents(cell) for cell in function.__closure__ or ()]
        parts = (
            function.__defaults__,
            function.__kwdefaults__,
            cells,
            function.__dict__,
        )
        code = code_content(function.__code__)
        # The parts are state: a function may contain itself.
        return types.SimpleNamespace, (), {"code": code, "parts": parts}

    def _reduce_class(self, cls: Any) -> Any:
        local = not is_named(cls)
        if cls in BUILTIN_TYPES or not (is_script(cls.__module__) or local):
            return super()._reduce_class(cls)
        return tuple, (class_key(cls, local=local),)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def content_of(value: Any) -> str:
    """A value's content id."""
    kind = type(value)
    if kind in _PLAIN:
        return summary(value)
    if kind is types.ModuleType:
        return f"module {value.__name__}"
    if kind is types.FunctionType and not value.__closure__ and space_name(value):
        return function_content(value)
    if isinstance(value, type) and is_script(value.__module__):
        return class_key(value, local=not is_named(value))[2]
    if kind is functools._lru_cache_wrapper:  # noqa: SLF001  has no public name
        return cached_content(value)
    return _pickled_content(value)


def cached_content(cached: Any) -> str:
    """The id of a cached function, without its cache."""
    parameters = tuple(cached.cache_parameters().items())
    return summary(content_of(cached.__wrapped__), parameters)


def _no_content(value: Any) -> str:
    return ""


def function_content(function: types.FunctionType) -> str:
    """The id of a function: its code and what it holds, not the globals it uses."""
    held = (function.__defaults__, function.__kwdefaults__, function.__closure__)
    if not any(held) and not function.__dict__:
        return code_content(function.__code__)
    return _pickled_content(function)


def _pickled_content(value: Any) -> str:
    buffers: list[str] = []

    def hashed(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < 4096:
            return True
        buffers.append(_digest(raw))
        return False

    stream = io.BytesIO()
    _Identity(stream, buffer_callback=hashed).dump(value)
    return summary(_digest(stream.getvalue()), tuple(buffers))


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def class_key(cls: type, *, local: bool) -> Key:
    """The key of a class; one that is not reachable by name keeps the key it was given."""
    key = known_code.key_of(cls)
    if key is not None and (local or known_code.made_here(cls)):
        return key
    content = f"?{secrets.token_hex(16)}" if local else class_content(cls)
    key = (cls.__module__, cls.__qualname__, content)
    known_code.remember(key, cls)
    return key


known_code.use_content(content_of)


# --- objects that pickle would look up by name --------------------------------------


def _reduce_cached(cached: Any) -> Any:
    if is_named(cached) and not is_script(cached.__module__):
        return NotImplemented
    name = (cached.__module__, cached.__qualname__) if is_named(cached) else None
    state = {k: v for k, v in cached.__dict__.items() if k != "__wrapped__"}
    parts = (
        cached.__wrapped__,
        cached.cache_parameters(),
        name,
        cached_content(cached),
    )
    return remote.make_cached, parts, state


def _reduce_cached_property(prop: Any) -> Any:
    return remote.make_cached_property, (prop.func, prop.attrname)


def _by_name(*options: str) -> Callable[[Any], Any]:
    def reduce(obj: Any) -> Any:
        name, module = obj.__name__, getattr(obj, "__module__", None)
        if not is_script(module) and known_code.named(str(module), name) is obj:
            return NotImplemented
        given = {o.strip("_"): getattr(obj, o) for o in options}
        if "supertype" in given:
            given = {"tp": given["supertype"]}
        return remote.make_by_name, (type(obj), name, module, given)

    return reduce


def _reduce_context_variable(variable: contextvars.ContextVar[Any]) -> Any:
    given = {}
    with contextlib.suppress(LookupError):
        given["default"] = contextvars.Context().run(variable.get)
    current = contextvars.copy_context()
    value = [current[variable]] if variable in current else []
    return remote.make_context_variable, (variable.name, given, value)


_SPECIAL: dict[type, Callable[[Any], Any]] = {
    functools._lru_cache_wrapper: _reduce_cached,  # noqa: SLF001  has no public name
    functools.cached_property: _reduce_cached_property,
    contextvars.ContextVar: _reduce_context_variable,
    typing.NewType: _by_name("__supertype__"),
    typing.ParamSpec: _by_name("__bound__", "__covariant__", "__contravariant__"),
    typing.TypeVarTuple: _by_name(),
}
if sys.version_info >= (3, 12):
    _SPECIAL[typing.TypeAliasType] = _by_name("__value__", "__type_params__")
if sys.version_info >= (3, 14):
    _SPECIAL[annotationlib.ForwardRef] = reduce_forward_reference


_DISPATCHER = vars(functools)["singledispatch"](len).__code__


def _is_dispatcher(function: types.FunctionType) -> bool:
    if function.__code__ is not _DISPATCHER:
        return False
    return not is_named(function) or is_script(function.__module__)


def _reduce_dispatcher(function: Any) -> Any:
    kept = {"register", "dispatch", "registry", "_clear_cache", "__wrapped__"}
    attributes = {k: v for k, v in vars(function).items() if k not in kept}
    registry = [(k, f) for k, f in function.registry.items() if k is not object]
    state = (attributes, registry)
    default = function.registry[object]
    return (
        remote.make_single_dispatch, (default,), state, None, None,
        remote.set_single_dispatch,
    )  # fmt: skip

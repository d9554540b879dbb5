"""Pickles the code of scripts: functions, classes and globals, by value and with ids.

cloudpickle does most of it. What differs is what belongs to a *script*: `__main__`, a
module that is still being imported, and one that nothing could import by its name (as
`runpy.run_path` makes it). `namespace` says what becomes of that where it arrives.

To the worker go functions and classes by value, with the globals that they name, each
value with an id of its content. Back come references (module, qualified name, content,
and the callable that brought it), so that a result is as small as its data.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import contextvars
import functools
import hashlib
import importlib.machinery
import io
import pickle
import re
import secrets
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable, Iterator
from enum import Enum, Flag
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from starburst_executor.serialization import namespace
from starburst_executor.serialization.annotations import AnnotationPickler, annotations_of
from starburst_executor.serialization.code_source import reduce_code
from starburst_executor.serialization.content_ids import (
    class_content,
    code_content,
    is_code,
    summary,
)
from starburst_executor.serialization.namespace import Key, Value

__all__ = ["Pickler", "signature"]

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
_WORD = re.compile(r"[^\W\d]\w*")


# --- what is a script's -----------------------------------------------------------


def _is_script(name: str | None) -> bool:
    """Whether what is defined in a module travels by value."""
    if name == "__main__" or name in namespace.scripts:
        return True
    module = sys.modules.get(name or "")
    if module is None or _importable.get(module.__name__) is module:
        return False
    if not _is_unimportable(module):
        _importable[module.__name__] = module
        return False
    namespace.scripts.add(module.__name__)
    return True


_importable: weakref.WeakValueDictionary[str, types.ModuleType]
_importable = weakref.WeakValueDictionary()  # what was found to be so, which stays so


def _is_unimportable(module: types.ModuleType) -> bool:
    attributes = getattr(module, "__dict__", {})  # no getattr: lazy modules import on it
    spec = attributes.get("__spec__")
    if spec is not None:
        return bool(getattr(spec, "_initializing", False))
    name = attributes.get("__name__", "")
    if "." in name or name in sys.builtin_module_names:
        return False
    return importlib.machinery.PathFinder.find_spec(name) is None


def _space_name(function: types.FunctionType) -> str | None:
    """The script whose globals a function has."""
    name = function.__globals__.get("__name__")
    module = sys.modules.get(name) if isinstance(name, str) else None
    if module is None or vars(module) is not function.__globals__:
        return None
    return name if _is_script(name) else None


def _is_named(obj: Any) -> bool:
    module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    return (
        isinstance(module, str) and isinstance(name, str) and namespace.named(module, name) is obj
    )


class _Space:
    """Stands for the namespace of a script; one in each pickle."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        file = getattr(sys.modules.get(self.name), "__file__", None)
        return namespace.open_space, (self.name, file)


class _Annotated:
    """A module that only an annotation names: the worker may do without it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return namespace.optional_module, (self.name,)


# --- the pickler ------------------------------------------------------------------


_CLOUDPICKLE = cloudpickle.Pickler.dispatch_table

_OWN = frozenset(
    value for value in vars(namespace).values() if isinstance(value, types.FunctionType)
)


class Pickler(AnnotationPickler):
    """Writes one pickle, for the worker or, inside of `Home.reply`, for the client.

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
            # The functions that every pickle names come first: they are most of it.
            return NotImplemented if obj in _OWN else self._reduce_function(obj)
        if issubclass(kind, type):
            return self._reduce_class(obj)
        if kind is types.ModuleType:
            own = obj.__name__ != "__main__" and _is_script(obj.__name__)
            return (namespace.space_module, (self._space(obj.__name__),)) if own else NotImplemented
        if kind is types.MethodType and self._origins is not None:
            return getattr, (obj.__self__, obj.__func__.__name__)
        special = _SPECIAL.get(kind)
        if special is not None:
            return special(obj)
        if isinstance(obj, threading.local):
            return namespace.make_local, (kind, dict(obj.__dict__))
        if _is_script(kind.__module__) and _reduces_itself(kind):
            return self._reduce_named(obj, obj.__reduce_ex__(5))
        return NotImplemented

    def _space(self, name: str) -> _Space:
        return self._spaces.setdefault(name, _Space(name))

    def _reference(self, obj: Any) -> Any:
        """How to find, on the client, what came from there; None if it did not."""
        if self._origins is None:
            return None
        key = namespace.key_of(obj)
        origin = self._origins.get(key) if key else None
        return (namespace.find, (*key, origin)) if key and origin else None

    # --- functions

    def _reduce_function(self, function: types.FunctionType) -> Any:
        if _is_dispatcher(function):
            return _reduce_dispatcher(function)
        name = _space_name(function)
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
            namespace.make_function, arguments, state, None, None, namespace.set_function,
        )  # fmt: skip

    def _function_key(self, function: types.FunctionType) -> Key | None:
        if "." in function.__qualname__ or not _is_named(function):
            return None
        key = (function.__module__, function.__qualname__, function_content(function))
        namespace.remember(key, function)
        return key

    def _globals(self, script: str, values: dict[str, Any]) -> dict[str, Value]:
        return {name: self._value(script, name, obj) for name, obj in values.items()}

    def _value(self, script: str, name: str, obj: Any) -> Value:
        """A value with the id of its content, which is found once for each pickle."""
        if (script, name) not in self._values:
            content = "" if self._origins is not None else content_of(obj)
            self._values[script, name] = (content, obj)
        return self._values[script, name]

    def _annotations(self, script: str, annotations: Any) -> dict[str, Value]:
        """What annotations in strings name, for `get_type_hints`."""
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
        local = not _is_named(cls)
        if cls in _BUILTIN_TYPES or not (_is_script(script) or local):
            return super().reducer_override(cls)
        if found := self._reference(cls):
            return found
        key = class_key(cls, local=local)
        code, data = _attributes(cls)
        space = self._space(script) if script and _is_script(script) else None
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
        make, arguments = _enum_arguments(cls, key) if issubclass(cls, Enum) else (
            namespace.make_class, _class_arguments(cls, key)
        )  # fmt: skip
        return make, arguments, state, None, None, namespace.set_class

    def _anchor(self, script: str, cls: type) -> dict[str, Value]:
        """The global that leads to a class inside of another."""
        name, dot, _ = cls.__qualname__.partition(".")
        outer = vars(sys.modules[script]).get(name) if script in sys.modules else None
        if not dot or not _is_named(cls) or outer is None:
            return {}
        return {name: self._value(script, name, outer)}

    # --- other things

    def _reduce_named(self, obj: Any, reduced: Any) -> Any:
        """An object that pickles as the name of a global of the script."""
        if not isinstance(reduced, str):
            return reduced
        script = getattr(obj, "__module__", None) or "__main__"
        if not _is_script(script) or namespace.named(script, reduced) is not obj:
            return reduced
        arguments = obj.__getnewargs__() if hasattr(obj, "__getnewargs__") else ()
        made = (reduced, self._space(script), type(obj), arguments)
        state = obj.__getstate__() or {}
        return namespace.make_named, made, state, None, None, namespace.set_named


def _reduces_itself(kind: type) -> bool:
    return isinstance(kind.__reduce__, types.FunctionType) or isinstance(
        kind.__reduce_ex__, types.FunctionType
    )


def code_names(code: types.CodeType) -> Iterator[str]:
    """The global names that code may mention, and attributes that it does."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_names(constant)


# --- ids --------------------------------------------------------------------------


class _Identity(Pickler):
    """Pickles a value in order to name its content: code counts without its lines."""

    def _reduce_function(self, function: types.FunctionType) -> Any:
        if _is_dispatcher(function):
            return _reduce_dispatcher(function)
        if _space_name(function) is None:
            return super()._reduce_function(function)
        cells = [_contents(cell) for cell in function.__closure__ or ()]
        parts = (
            function.__defaults__,
            function.__kwdefaults__,
            cells,
            function.__dict__,
        )
        code = code_content(function.__code__)
        # The parts are state: a function may hold itself.
        return types.SimpleNamespace, (), {"code": code, "parts": parts}

    def _reduce_class(self, cls: Any) -> Any:
        local = not _is_named(cls)
        if cls in _BUILTIN_TYPES or not (_is_script(cls.__module__) or local):
            return super()._reduce_class(cls)
        return tuple, (class_key(cls, local=local),)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def content_of(value: Any) -> str:
    """The id of a value's content."""
    kind = type(value)
    if kind in _PLAIN:
        return summary(value)
    if kind is types.ModuleType:
        return f"module {value.__name__}"
    if kind is types.FunctionType and not value.__closure__ and _space_name(value):
        return function_content(value)
    if isinstance(value, type) and _is_script(value.__module__):
        return class_key(value, local=not _is_named(value))[2]
    if kind is functools._lru_cache_wrapper:  # noqa: SLF001  has no public name
        return cached_content(value)
    return _pickled_content(value)


def cached_content(cached: Any) -> str:
    """The id of a cached function, without what it has cached."""
    parameters = tuple(cached.cache_parameters().items())
    return summary(content_of(cached.__wrapped__), parameters)


def _no_content(value: Any) -> str:
    return ""


def function_content(function: types.FunctionType) -> str:
    """The id of a function: its code and what it holds, not the globals that it names."""
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
    return summary(_digest(stream.getbuffer()), tuple(buffers))


def _digest(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def class_key(cls: type, *, local: bool) -> Key:
    """The key of a class; a class that no name leads to keeps the one it was given."""
    key = namespace.key_of(cls)
    if key is not None and (local or namespace.made_here(cls)):
        return key
    content = f"?{secrets.token_hex(16)}" if local else class_content(cls)
    key = (cls.__module__, cls.__qualname__, content)
    namespace.remember(key, cls)
    return key


namespace.use_content(content_of)


# --- whether a function has changed -------------------------------------------------


def signature(function: object) -> object:
    """What the pickle of a simple function of a script depends on, to be compared.

    None for all others: those that name a module, a class or any data that would have
    to be pickled to be compared.
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
        parts += (one.__code__, one.__name__, _is_named(one), one.__doc__)
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
    return not has_more and _space_name(function) is not None


def _comparable(value: object) -> object:
    kind = type(value)
    if kind is float:  # 0.0 equals -0.0
        return (kind, float.hex(value))  # type: ignore[arg-type]
    if value is None or kind in (int, bool):
        return (kind, value)
    short = kind in (str, bytes) and len(value) < 1000  # type: ignore[arg-type]
    return (kind, value) if short else None


# --- the parts of classes ---------------------------------------------------------

_BUILTIN_TYPES = {value for value in vars(types).values() if isinstance(value, type)} | {
    type(None),
    type(...),
    type(NotImplemented),
}

# Made anew with the class, or not to be had from outside.
_LEFT_OUT = {"__dict__", "__weakref__", "__annotate_func__", "__slotnames__"}
_ENUM_LEFT_OUT = {
    "_member_names_", "_member_map_", "_value2member_map_", "_hashable_values_", "_unhashable_values_",
    "_unhashable_values_map_", "_member_type_", "_sort_order_", "_flag_mask_", "_singles_mask_",
    "_all_bits_", "_inverted_", "_boundary_",
}  # fmt: skip


def _attributes(cls: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a class consists of: code, and data that a program may change."""
    left_out = set(_LEFT_OUT)
    if issubclass(cls, Enum):
        left_out |= _ENUM_LEFT_OUT | set(cls.__members__)
    code: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for name, value in list(vars(cls).items()):
        if name in left_out or isinstance(value, types.MemberDescriptorType):
            continue
        if name == "_abc_impl":
            code[name] = _abc_registry(cls)
        elif is_code(value) or (name.startswith("__") and name.endswith("__")):
            code[name] = value
        else:
            data[name] = value
    return code, data


def _abc_registry(cls: Any) -> list[Any]:
    registry, *_ = abc._get_dump(cls)  # type: ignore[attr-defined]  # noqa: SLF001
    return [kind for ref in registry if (kind := ref()) is not None]


def _class_arguments(cls: Any, key: Key) -> tuple[Any, ...]:
    own = vars(cls)
    attributes = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if "__slots__" in own:
        attributes["__slots__"] = own["__slots__"]
    if isinstance(own.get("__dict__"), property):
        attributes["__dict__"] = own["__dict__"]
    if "__orig_bases__" in own:  # `Generic` derives its parameters from it
        attributes["__orig_bases__"] = own["__orig_bases__"]
    return key, type(cls), cls.__name__, cls.__bases__, attributes


def _enum_arguments(cls: Any, key: Key) -> tuple[Any, tuple[Any, ...]]:
    own = {"_value_", "_name_", "__objclass__", "_sort_order_"}
    members = []
    for label, member in cls.__members__.items():
        state = {k: v for k, v in member.__dict__.items() if k not in own}
        of_its_type = getattr(cls._member_type_, "__getnewargs__", None)
        arguments = () if of_its_type is None else of_its_type(member)
        members.append((label, member.value, arguments, state))
    options = {"boundary": cls._boundary_} if issubclass(cls, Flag) else {}
    return namespace.make_enum, (key, cls.__bases__, cls.__name__, members, options)


# --- objects that pickle would look for by their names ------------------------------


def _reduce_cached(cached: Any) -> Any:
    if _is_named(cached) and not _is_script(cached.__module__):
        return NotImplemented
    name = (cached.__module__, cached.__qualname__) if _is_named(cached) else None
    state = {k: v for k, v in cached.__dict__.items() if k != "__wrapped__"}
    parts = (
        cached.__wrapped__,
        cached.cache_parameters(),
        name,
        cached_content(cached),
    )
    return namespace.make_cached, parts, state


def _reduce_cached_property(prop: Any) -> Any:
    return namespace.make_cached_property, (prop.func, prop.attrname)


def _by_name(*options: str) -> Callable[[Any], Any]:
    def reduce(obj: Any) -> Any:
        name, module = obj.__name__, getattr(obj, "__module__", None)
        if not _is_script(module) and namespace.named(str(module), name) is obj:
            return NotImplemented
        given = {o.strip("_"): getattr(obj, o) for o in options}
        if "supertype" in given:
            given = {"tp": given["supertype"]}
        return namespace.make_by_name, (type(obj), name, module, given)

    return reduce


def _reduce_context_variable(variable: contextvars.ContextVar[Any]) -> Any:
    given = {}
    with contextlib.suppress(LookupError):
        given["default"] = contextvars.Context().run(variable.get)
    current = contextvars.copy_context()
    value = [current[variable]] if variable in current else []
    return namespace.make_context_variable, (variable.name, given, value)


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


_DISPATCHER = vars(functools)["singledispatch"](len).__code__


def _is_dispatcher(function: types.FunctionType) -> bool:
    if function.__code__ is not _DISPATCHER:
        return False
    return not _is_named(function) or _is_script(function.__module__)


def _reduce_dispatcher(function: Any) -> Any:
    kept = {"register", "dispatch", "registry", "_clear_cache", "__wrapped__"}
    attributes = {k: v for k, v in vars(function).items() if k not in kept}
    registry = [(k, f) for k, f in function.registry.items() if k is not object]
    state = (attributes, registry)
    default = function.registry[object]
    return (
        namespace.make_single_dispatch, (default,), state, None, None,
        namespace.set_single_dispatch,
    )  # fmt: skip

"""What stored pickles reference. THE NAMES HERE NEVER CHANGE, nor does this module's.

A pickle references functions and classes of this package by module and name. Sessions live for
weeks in a store, and what one version of the package pickled, the next one reads: these names are
wire format, like keys and JSON fields. Nothing may be renamed, moved or removed, and parameters may
only be added with a default. Everything in this package that pickles of tasks and results reference
belongs here, except its exceptions in `errors`; tests enforce this.

Before this module existed its functions were in other modules, which are registered here under
their former names.
"""

from __future__ import annotations

import contextvars
import copyreg
import functools
import importlib
import linecache
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

from starburst_executor.environment.source_lines import show_lines
from starburst_executor.errors import SerializationError
from starburst_executor.serialization.known_code import (
    Key,
    has_content,
    known,
    made_here,
    named,
    note_made,
    present,
    remember,
)
from starburst_executor.serialization.namespace import Space, Unavailable, Value, loading

__all__ = [
    "Missing",
    "OtherException",
    "call_each",
    "find",
    "make_by_name",
    "make_cached",
    "make_cached_property",
    "make_class",
    "make_context_variable",
    "make_enum",
    "make_function",
    "make_local",
    "make_named",
    "make_single_dispatch",
    "open_space",
    "optional_module",
    "refuse",
    "restore_code",
    "set_class",
    "set_function",
    "set_named",
    "set_single_dispatch",
    "show_sources",
    "space_module",
]

T = TypeVar("T")

_FORMER_HOMES = ("code_source", "exception_state", "mapping", "namespace", "serialize")

# `pickle.loads` reads a large buffer in place, while an `Unpickler` with its own `find_class` would
# copy it. So the former modules exist in the import system instead.
for _home in _FORMER_HOMES:
    sys.modules.setdefault(f"starburst_executor.{_home}", sys.modules[__name__])


# --- tasks --------------------------------------------------------------------------


def refuse(error: SerializationError) -> NoReturn:
    """Take the place, on the worker, of a call that could not be pickled."""
    raise error


def call_each(fn: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> list[T]:
    """Make the calls of one task of `map(chunksize=...)`."""
    return [fn(*args) for args in calls]


# --- exceptions ---------------------------------------------------------------------


class OtherException:
    """Replaces, in an exception's argument or attribute, another exception of the same list."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[type[OtherException], tuple[int]]:
        return OtherException, (self.index,)


_Other = OtherException  # its former name


# --- namespaces ---------------------------------------------------------------------


class Missing(LookupError):
    """A class or function of a script is not here and cannot be created."""


def open_space(name: str, file: str | None) -> Space:
    """The namespace for a module's functions."""
    if loading.home is not None:
        return loading.home.space(name, file)
    spaces = loading.apart if loading.apart is not None else {}
    if name not in spaces:
        known = {"__name__": name, "__file__": file, "__builtins__": __builtins__}
        spaces[name] = Space(name, known)
    return spaces[name]


def space_module(space: Space) -> types.ModuleType:
    """The script's module itself, for functions that reference it."""
    module = sys.modules.get(space.name)
    if module is not None and vars(module) is space.globals:
        return module
    return _Apart(space)


class _Apart(types.ModuleType):
    """A script's module where the script is absent: a view of its namespace."""

    def __init__(self, space: Space) -> None:
        super().__init__(space.name)
        self._space = space

    def __getattr__(self, name: str) -> Any:
        try:
            return self._space.globals[name]
        except KeyError:
            raise AttributeError(name) from None


def find(module: str, qualname: str, content: str, origin: str) -> Any:
    """A class or function that came from the client; unpickles its callable if necessary."""
    key = (module, qualname, content)
    found = present(key)
    if found is None and loading.define is not None:
        holder = loading.define(origin)  # keeps the class alive
        found = known(key)
        del holder
    if found is None:
        raise Missing(
            f"{qualname} of {module} is not defined here, nor in the session's callable "
            f"{origin[:12]} that it came with"
        )
    return found


# --- functions --------------------------------------------------------------------


def make_function(
    key: Key | None,
    code: types.CodeType,
    space: Space,
    closure: tuple[types.CellType, ...] | None,
) -> Any:
    """A function with the script's globals; the existing one if it is known."""
    home = loading.home
    if key is not None:
        known = home._functions.get(key) if home else present(key)  # noqa: SLF001
        if known is not None:
            return known
    function = types.FunctionType(code, space.globals, None, None, closure)
    space.globals.setdefault("__builtins__", __builtins__)
    note_made(function)
    if key is not None:
        remember(key, function)
    return function


_set: weakref.WeakSet[Any] = weakref.WeakSet()  # created, with their state set


def set_function(function: types.FunctionType, state: Any) -> None:
    """Set a new function's attributes, and the script's globals that it uses."""
    key, space, attributes, slots, values, absent = state
    if made_here(function) and function not in _set:
        _set.add(function)
        function.__dict__.update(attributes)
        closure = slots.pop("__closure__", None)
        slots.pop("_cloudpickle_submodules", None)  # already imported by now
        for mine, cell in zip(function.__closure__ or (), closure or (), strict=True):
            _fill(mine, cell)
        for name, value in slots.items():
            setattr(function, name, value)
    home = loading.home
    if home is None:
        if made_here(function) and function.__globals__ is space.globals:
            _fill_apart(space, values)
        return
    home.note_absent(space, absent)
    for name, value in values.items():
        home.install(space.name, space.globals, name, value)
    if key is not None:
        home.arrived(key, function, space)


def _fill_apart(space: Space, values: Mapping[str, Value]) -> None:
    for name, (_, value) in values.items():
        if not isinstance(value, Unavailable):
            space.globals.setdefault(name, value)


def _fill(mine: types.CellType, cell: types.CellType) -> None:
    with suppress(ValueError):  # empty
        mine.cell_contents = cell.cell_contents


def make_cached(
    function: Any,
    parameters: Mapping[str, Any],
    name: tuple[str, str] | None,
    content: str,
) -> Any:
    """An empty `lru_cache` around a function; the existing one if it is known."""
    current = named(*name) if name is not None else None
    kind = functools._lru_cache_wrapper  # noqa: SLF001  has no public name
    if type(current) is kind and has_content(current, content):
        return current
    made = functools.lru_cache(**parameters)(function)
    if name is not None:
        _bind(*name, made)
    return made


def _bind(module: str, name: str, obj: Any) -> None:
    """In a child: set a global of the script unless it is set."""
    if loading.home is not None and "." not in name:
        loading.home.space(module, None).globals.setdefault(name, obj)


def make_cached_property(function: Any, name: str | None) -> Any:
    """A `cached_property`, with its own lock in Python versions that use one."""
    made: Any = functools.cached_property(function)
    made.attrname = name
    return made


def make_single_dispatch(function: Any) -> Any:
    """A `singledispatch` function without its registered implementations."""
    return functools.singledispatch(function)


def set_single_dispatch(function: Any, state: Any) -> None:
    """Register the implementations and set the function's attributes."""
    attributes, registry = state
    for kind, implementation in registry:
        function.register(kind, implementation)
    for name, value in attributes.items():
        setattr(function, name, value)


# --- classes ----------------------------------------------------------------------


def make_class(
    key: Key, meta: Any, name: str, bases: tuple[Any, ...], attributes: dict[str, Any]
) -> Any:
    """A class without its state; the existing one if it is known."""
    known = present(key)
    if known is not None:
        return known
    attributes = {sys.intern(name): value for name, value in attributes.items()}
    with _quiet(bases):
        # A metaclass of the script already ran at the class statement, and that of `TypedDict`
        # (of two modules) accepts only the bases as written in the source.
        if made_here(meta) or meta.__name__ == "_TypedDictMeta":
            maker = next(kind for kind in meta.__mro__ if not made_here(kind))
            maker = type if maker is meta else maker
            bases = types.resolve_bases(bases)
            made = maker.__new__(meta, name, bases, attributes)
        else:
            made = types.new_class(
                name, bases, {"metaclass": meta}, lambda space: space.update(attributes)
            )
    note_made(made)
    remember(key, made)
    return made


@contextmanager
def _quiet(bases: tuple[Any, ...]) -> Iterator[None]:
    """Keep `__init_subclass__` of the script's classes from running a second time.

    Its effects are sent as state of the classes, or of globals.
    """
    hook = "__init_subclass__"
    kinds = [kind for base in bases for kind in getattr(base, "__mro__", ())]
    owners = {kind: vars(kind)[hook] for kind in kinds if hook in vars(kind)}
    silenced = {kind: own for kind, own in owners.items() if made_here(kind)}
    for kind in silenced:
        type.__setattr__(kind, hook, classmethod(_nothing))
    try:
        yield
    finally:
        for kind, own in silenced.items():
            type.__setattr__(kind, hook, own)


def _nothing(cls: type, /, **options: object) -> None:
    pass


def make_enum(
    key: Key,
    bases: tuple[Any, ...],
    name: str,
    members: list[tuple[Any, ...]],
    options: dict[str, Any],
) -> Any:
    """An enumeration with its original members, without calling its `__new__`."""
    known = present(key)
    if known is not None:
        return known
    meta = type(bases[-1])
    space: Any = meta.__prepare__(name, bases)
    drafts: dict[int, tuple[tuple[Any, ...], Any]] = {}

    def new(cls: Any, number: Any) -> Any:
        arguments, value = drafts[number[0] if isinstance(number, tuple) else number]
        made = cls._member_type_.__new__(cls, *arguments)
        made._value_ = value
        return made

    def init(self: Any, *arguments: Any) -> None:
        pass

    space["__new__"], space["__init__"] = new, init
    for number, (label, value, arguments, _) in enumerate(members):
        drafts[number] = (arguments, value)
        space[label] = (number,)
    with _quiet(bases):
        maker: Any = next(kind for kind in meta.__mro__ if not made_here(kind))
        made = maker.__new__(meta, name, bases, space, **options)
    type.__delattr__(made, "__init__")
    for label, _, _, state in members:
        made._member_map_[label].__dict__.update(state)
    if "__new_member__" in vars(made):  # the original's, if any, is part of the state
        type.__delattr__(made, "__new_member__")
    note_made(made)
    remember(key, made)
    return made


def set_class(cls: type, state: Any) -> None:
    """Set a new class's attributes; on an existing one, update data that the client changed."""
    key, space, code, data, values = state
    home = loading.home
    owner = ".".join(key)
    if made_here(cls) and cls not in _set:
        _set.add(cls)
        if home is not None:
            home.was_set(owner, data)
        attributes = {**code, **{name: value for name, (_, value) in data.items()}}
        for name, value in attributes.items():
            _set_attribute(cls, name, value)
        if "__firstlineno__" in attributes:  # setting other attributes removed it
            type.__setattr__(cls, "__firstlineno__", attributes["__firstlineno__"])
    if home is None:
        if made_here(cls):
            _fill_apart(space, values)
        return
    for name, value in data.items():
        home.install(owner, cls, name, value)
    for name, value in values.items():
        home.install(space.name, space.globals, name, value)
    home.arrived(key, cls, space)


def _set_attribute(cls: Any, name: str, value: Any) -> None:
    if name == "_abc_impl":
        for subclass in value:
            cls.register(subclass)
    else:
        type.__setattr__(cls, name, value)


# --- other objects that pickle by name ----------------------------------------------


def make_named(name: str, space: Space, cls: Any, arguments: tuple[Any, ...]) -> Any:
    """An object that pickles as its global name; the existing one of that name, if any."""
    home = loading.home
    current = space.globals.get(name) if home else named(space.name, name)
    if type(current) is cls:
        return current
    made = copyreg.__newobj__(cls, *arguments)  # type: ignore[attr-defined]
    _bind(space.name, name, made)
    _fresh.append(made)
    return made


_fresh: list[Any] = []  # until their state is set, by the same pickle


def set_named(obj: Any, state: Any) -> None:
    """Set a new object's state."""
    for position, fresh in enumerate(_fresh):
        if fresh is obj:
            del _fresh[position]
            break
    else:
        return
    plain, slots = state if isinstance(state, tuple) else (state, None)
    for name, value in {**(plain or {}), **(slots or {})}.items():
        object.__setattr__(obj, name, value)


def make_by_name(kind: Any, name: str, module: str, options: dict[str, Any]) -> Any:
    """A `NewType` or type parameter, identified by name alone."""
    current = named(module, name)
    if type(current) is kind and _has_options(current, options):
        return current
    made = kind(name, **options)
    made.__module__ = module
    _bind(module, name, made)
    return made


def _has_options(current: Any, options: Mapping[str, Any]) -> bool:
    given = {("supertype" if k == "tp" else k): v for k, v in options.items()}
    return all(getattr(current, f"__{k}__") == v for k, v in given.items())


def make_context_variable(name: str, given: dict[str, Any], value: list[Any]) -> Any:
    """A `ContextVar` with its value in the submitting context."""
    made: contextvars.ContextVar[Any] = contextvars.ContextVar(name, **given)
    for current in value:
        made.set(current)
    return made


def make_local(kind: Any, values: dict[str, Any]) -> Any:
    """A `threading.local` with its values in the submitting thread."""
    made = kind.__new__(kind)
    made.__dict__.update(values)
    return made


def optional_module(name: str) -> Any:
    """A module referenced by an annotation."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return Unavailable()


# --- code ---------------------------------------------------------------------------

_showing = False


def show_sources() -> None:
    """Add the source lines of code unpickled from now on to `linecache`.

    Not for a client, which has the current source of its own code.
    """
    global _showing
    _showing = True


def restore_code(parts: tuple[Any, ...], source: str) -> types.CodeType:
    """Recreate a pickled code object."""
    code = types.CodeType(*parts)
    if _showing:
        before = code.co_firstlineno - 1
        known = linecache.getlines(code.co_filename)[:before]
        known += ["\n"] * (before - len(known))
        lines = source.splitlines(keepends=True)
        after = linecache.getlines(code.co_filename)[before + len(lines) :]
        show_lines(code.co_filename, [*known, *lines, *after])
    return code

"""Where the code of a script arrives: one namespace per script in each child.

A script is never run again. What a task needs of it (functions, classes and the
globals that they name) travels by value, as it was at `submit`, and is put into the
child's own `__main__`, which all functions of the script share. So an initializer can
set a global for the tasks, a class can be pickled by its name inside a task, and
`multiprocessing` finds the functions of the script.

* Each value carries an id made of its content. A name is set when it arrives for the
  first time, and again only when the client's value has become another one: what the
  tasks of a child put there themselves stays. A task of an older submit sees the values
  of its own submit: `Home.enter` sets those that differ.
* A class exists once per content. One that is here already is used as it is: nothing
  is set on it, and no `__init_subclass__` or metaclass runs again.
* On the client, nothing is put into `__main__`. A class or function that it has (by
  module, qualified name and content) is used; one that it lacks, as in another program
  that attached, is made in a namespace apart, from the callable that brought it to the
  worker.

The functions below are named in pickles; `scripts` writes them.
"""

from __future__ import annotations

import contextvars
import copyreg
import functools
import importlib
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

__all__ = [
    "ABSENT",
    "Capture",
    "Home",
    "Key",
    "Missing",
    "Space",
    "Value",
    "definitions",
    "find",
    "key_of",
    "made_here",
    "make_cached",
    "make_cached_property",
    "make_class",
    "make_enum",
    "make_function",
    "make_named",
    "make_single_dispatch",
    "named",
    "open_space",
    "optional_module",
    "origins",
    "remember",
    "scripts",
    "set_class",
    "set_function",
    "set_named",
    "space_module",
]

Key: TypeAlias = tuple[str, str, str]
"""Module, qualified name and content; a class that no name leads to has a random content."""

Value: TypeAlias = tuple[str, Any]
"""The id of a value's content, and the value."""

Capture: TypeAlias = dict[tuple[str, str], tuple[Any, str, str, Any]]
"""By owner and name: where a value belongs, its name there, the id of its content, and it."""

ABSENT = "absent"  # the id of a name that the client had no value for
_NOTHING = object()


class Missing(LookupError):
    """A class or function of a script that is not here, and cannot be made."""


scripts: set[str] = set()
"""Modules of which something travelled by value, from here or to here.

What is defined in them does so for good: a process that has part of a module would have
to run it a second time to import it.
"""


# --- what exists here -------------------------------------------------------------

_lock = threading.Lock()
_by_key: weakref.WeakValueDictionary[Key, Any] = weakref.WeakValueDictionary()
_keys: weakref.WeakKeyDictionary[Any, Key] = weakref.WeakKeyDictionary()
_made: weakref.WeakSet[Any] = weakref.WeakSet()  # by this module, from a pickle


def key_of(obj: object) -> Key | None:
    """The key under which a class or function arrived or was sent."""
    return _keys.get(obj)


def made_here(obj: object) -> bool:
    """Whether a class or function was made here from a pickle."""
    return obj in _made


def remember(key: Key, obj: Any) -> None:
    """Use `obj` from now on where something of that key arrives."""
    with _lock:
        _by_key[key] = obj
        _keys[obj] = key


def named(module: str, qualname: str) -> Any:
    """What a name in a module that is loaded here stands for, or None."""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        try:
            found = getattr(found, part)
        except Exception:  # a module's or metaclass's own __getattr__ may raise anything
            return None
    return found


Content: TypeAlias = Callable[[Any], str]
_content_of: list[Content] = []  # set by `scripts`, which is above


def use_content(content: Content) -> None:
    """Tell how the content of a class or function of this process is known."""
    _content_of[:] = [content]


def _present(key: Key) -> Any:
    """The class or function of that key, if this process has it."""
    here = _by_key.get(key)
    module, qualname, content = key
    current = named(module, qualname)
    if current is here or not isinstance(current, (type, types.FunctionType)):
        return here
    if current in _made or content[:1] == "?" or _content_of[0](current) != content:
        return here
    remember(key, current)
    return current


# --- what a thread pickles and unpickles for ---------------------------------------


class _Loading(threading.local):
    """What this thread is unpickling for."""

    home: Home | None = None
    capture: Capture = {}  # noqa: RUF012  replaced, never changed, outside `receive`
    origin: str | None = None
    apart: dict[str, Space] | None = None  # on the client: namespaces of this pickle
    define: Callable[[str], object] | None = None
    origins: Mapping[Key, str] | None = None


_loading = _Loading()


class _Turn:
    """Sets for a while what this thread pickles or unpickles for; it is on every task's way."""

    __slots__ = ("_after", "_before")

    def __init__(self, **after: Any) -> None:
        self._after = after

    def __enter__(self) -> Capture:
        state = _loading.__dict__
        self._before = {name: getattr(_loading, name) for name in self._after}
        state.update(self._after)
        return _loading.capture

    def __exit__(self, *exc: object) -> None:
        _loading.__dict__.update(self._before)


# --- the namespaces ---------------------------------------------------------------


class Space:
    """The globals that the functions of one script share."""

    def __init__(self, name: str, globals_: dict[str, Any]) -> None:
        self.name = name
        self.globals = globals_


class Home:
    """The namespaces of the scripts whose tasks a child runs."""

    def __init__(self) -> None:
        self.spaces: dict[str, Space] = {}
        self.origins: dict[Key, str] = {}
        self._ids: dict[tuple[str, str], str] = {}
        self._functions: weakref.WeakValueDictionary[Key, Any]
        self._functions = weakref.WeakValueDictionary()  # a name keeps its object

    def receive(self, origin: str | None = None) -> _Turn:
        """What is unpickled inside is put into the namespaces.

        Args:
            origin: Digest of the callable that is unpickled, if it is one.
        """
        return _Turn(home=self, capture={}, origin=origin)

    def reply(self) -> _Turn:
        """What is pickled inside goes back to the client, which has what it sent."""
        return _Turn(origins=self.origins)

    def enter(self, capture: Capture) -> None:
        """Set what the client's values were when this was submitted, where they differ."""
        for key, (target, name, content, value) in capture.items():
            if self._ids.get(key) != content:
                _assign(target, name, value)
                self._ids[key] = content

    def space(self, name: str, file: str | None) -> Space:
        """The namespace of a script, by the name of its module."""
        if name not in self.spaces:
            self.spaces[name] = Space(name, vars(_own_module(name)))
            scripts.add(name)
        space = self.spaces[name]
        if file is not None:
            space.globals["__file__"] = file
        return space

    def install(self, owner: str, target: Any, name: str, value: Value) -> None:
        """Set a value of the client's, unless it has this content since the last time."""
        content, obj = value
        key = (owner, name)
        if isinstance(obj, _Unavailable):
            return
        _loading.capture[key] = (target, name, content, obj)
        known = self._ids.get(key)
        if known is None and _has(target, name):
            self._ids[key] = content  # an initializer or a task was first
        elif known != content:
            _assign(target, name, obj)
            self._ids[key] = content

    def was_set(self, owner: str, values: Mapping[str, Value]) -> None:
        """These attributes of a new class are the client's."""
        for name, (content, _) in values.items():
            self._ids[owner, name] = content

    def note_absent(self, space: Space, names: Iterator[str]) -> None:
        """The client had no value for these names."""
        for name in names:
            if name not in space.globals:
                self._ids.setdefault((space.name, name), ABSENT)

    def arrived(self, key: Key, obj: Any, space: Space) -> None:
        """Keep a class or function, and bind its name."""
        if _loading.origin is not None:
            self.origins.setdefault(key, _loading.origin)
        if isinstance(obj, types.FunctionType):
            self._functions[key] = obj
        if "." not in key[1] and key[2][:1] != "?":
            self.install(space.name, space.globals, key[1], (key[2], obj))


def _own_module(name: str) -> types.ModuleType:
    module = sys.modules.get(name)
    if module is None:
        module = sys.modules[name] = types.ModuleType(name)
    return module


def _has(target: Any, name: str) -> bool:
    return name in (target if isinstance(target, dict) else vars(target))


def _assign(target: Any, name: str, value: Any) -> None:
    if isinstance(target, dict):
        target[name] = value
    else:
        type.__setattr__(target, name, value)


def definitions(define: Callable[[str], object]) -> _Turn:
    """Unpickle on the client: `define` unpickles the callable of a digest.

    It is called for classes and functions that are not here.
    """
    return _Turn(apart={}, define=define)


def origins() -> Mapping[Key, str] | None:
    """The callables that brought what is here, if it is the client who will unpickle."""
    return _loading.origins


def open_space(name: str, file: str | None) -> Space:
    """The namespace for functions of that module."""
    if _loading.home is not None:
        return _loading.home.space(name, file)
    spaces = _loading.apart if _loading.apart is not None else {}
    if name not in spaces:
        known = {"__name__": name, "__file__": file, "__builtins__": __builtins__}
        spaces[name] = Space(name, known)
    return spaces[name]


def space_module(space: Space) -> types.ModuleType:
    """The module that is the script itself, for functions that name it."""
    module = sys.modules.get(space.name)
    if module is not None and vars(module) is space.globals:
        return module
    return _Apart(space)


class _Apart(types.ModuleType):
    """A script's module where the script is not: what is in its namespace."""

    def __init__(self, space: Space) -> None:
        super().__init__(space.name)
        self._space = space

    def __getattr__(self, name: str) -> Any:
        try:
            return self._space.globals[name]
        except KeyError:
            raise AttributeError(name) from None


def find(module: str, qualname: str, content: str, origin: str) -> Any:
    """A class or function that came from this client, or what it was made of."""
    key = (module, qualname, content)
    found = _present(key)
    if found is None and _loading.define is not None:
        holder = _loading.define(origin)  # the class lives as long as it does
        found = _by_key.get(key)
        del holder
    if found is None:
        raise Missing(
            f"{qualname} of {module} is not defined here, and the session's callable "
            f"{origin[:12]} that it came with does not hold it"
        )
    return found


# --- functions --------------------------------------------------------------------


def make_function(
    key: Key | None,
    code: types.CodeType,
    space: Space,
    closure: tuple[types.CellType, ...] | None,
) -> Any:
    """A function whose globals are the script's; the one that is here if it is known."""
    home = _loading.home
    if key is not None:
        known = home._functions.get(key) if home else _present(key)  # noqa: SLF001
        if known is not None:
            return known
    function = types.FunctionType(code, space.globals, None, None, closure)
    space.globals.setdefault("__builtins__", __builtins__)
    _made.add(function)
    if key is not None:
        remember(key, function)
    return function


_set: weakref.WeakSet[Any] = weakref.WeakSet()  # made, and given their state


def set_function(function: types.FunctionType, state: Any) -> None:
    """Give a new function its attributes, and the script the globals that it names."""
    key, space, attributes, slots, values, absent = state
    if function in _made and function not in _set:
        _set.add(function)
        function.__dict__.update(attributes)
        closure = slots.pop("__closure__", None)
        slots.pop("_cloudpickle_submodules", None)  # they are imported by now
        for mine, cell in zip(function.__closure__ or (), closure or (), strict=True):
            _fill(mine, cell)
        for name, value in slots.items():
            setattr(function, name, value)
    home = _loading.home
    if home is None:
        if function in _made and function.__globals__ is space.globals:
            _fill_apart(space, values)
        return
    home.note_absent(space, absent)
    for name, value in values.items():
        home.install(space.name, space.globals, name, value)
    if key is not None:
        home.arrived(key, function, space)


def _fill_apart(space: Space, values: Mapping[str, Value]) -> None:
    for name, (_, value) in values.items():
        if not isinstance(value, _Unavailable):
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
    """An `lru_cache` around a function, which starts empty; the one that is here if it is known."""
    current = named(*name) if name is not None else None
    kind = functools._lru_cache_wrapper  # noqa: SLF001  has no public name
    if type(current) is kind and _content_of[0](current) == content:
        return current
    made = functools.lru_cache(**parameters)(function)
    if name is not None:
        _bind(*name, made)
    return made


def _bind(module: str, name: str, obj: Any) -> None:
    """In a child: give a global of the script its value if it has none."""
    if _loading.home is not None and "." not in name:
        _loading.home.space(module, None).globals.setdefault(name, obj)


def make_cached_property(function: Any, name: str | None) -> Any:
    """A `cached_property`, with a lock of its own where it has one."""
    made: Any = functools.cached_property(function)
    made.attrname = name
    return made


def make_single_dispatch(function: Any) -> Any:
    """A `singledispatch` function, without what is registered with it."""
    return functools.singledispatch(function)


def set_single_dispatch(function: Any, state: Any) -> None:
    """Register the implementations and give the function its attributes."""
    attributes, registry = state
    for kind, implementation in registry:
        function.register(kind, implementation)
    for name, value in attributes.items():
        setattr(function, name, value)


# --- classes ----------------------------------------------------------------------


def make_class(
    key: Key, meta: Any, name: str, bases: tuple[Any, ...], attributes: dict[str, Any]
) -> Any:
    """A class without its state; the one that is here if it is known."""
    known = _present(key)
    if known is not None:
        return known
    attributes = {sys.intern(name): value for name, value in attributes.items()}
    with _quiet(bases):
        # A metaclass of the script ran where the class statement was, and that of
        # `TypedDict` (of two modules) takes no bases but those that are written down.
        if meta in _made or meta.__name__ == "_TypedDictMeta":
            maker = next(kind for kind in meta.__mro__ if kind not in _made)
            maker = type if maker is meta else maker
            bases = types.resolve_bases(bases)
            made = maker.__new__(meta, name, bases, attributes)
        else:
            made = types.new_class(
                name, bases, {"metaclass": meta}, lambda space: space.update(attributes)
            )
    _made.add(made)
    remember(key, made)
    return made


@contextmanager
def _quiet(bases: tuple[Any, ...]) -> Iterator[None]:
    """Keep `__init_subclass__` of the script's classes from running a second time.

    What it did travels as state: of the classes, or of globals.
    """
    hook = "__init_subclass__"
    kinds = [kind for base in bases for kind in getattr(base, "__mro__", ())]
    owners = {kind: vars(kind)[hook] for kind in kinds if hook in vars(kind)}
    silenced = {kind: own for kind, own in owners.items() if kind in _made}
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
    """An enumeration with members as they were, whatever its `__new__` would do."""
    known = _present(key)
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
        maker: Any = next(kind for kind in meta.__mro__ if kind not in _made)
        made = maker.__new__(meta, name, bases, space, **options)
    type.__delattr__(made, "__init__")
    for label, _, _, state in members:
        made._member_map_[label].__dict__.update(state)
    if "__new_member__" in vars(made):  # the original's, if any, comes with the state
        type.__delattr__(made, "__new_member__")
    _made.add(made)
    remember(key, made)
    return made


def set_class(cls: type, state: Any) -> None:
    """Give a new class its attributes; on one that was here, follow the client's data."""
    key, space, code, data, values = state
    home = _loading.home
    owner = ".".join(key)
    if cls in _made and cls not in _set:
        _set.add(cls)
        if home is not None:
            home.was_set(owner, data)
        attributes = {**code, **{name: value for name, (_, value) in data.items()}}
        for name, value in attributes.items():
            _set_attribute(cls, name, value)
        if "__firstlineno__" in attributes:  # other assignments removed it
            type.__setattr__(cls, "__firstlineno__", attributes["__firstlineno__"])
    if home is None:
        if cls in _made:
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


# --- other things that only their name would lead to ------------------------------


def make_named(name: str, space: Space, cls: Any, arguments: tuple[Any, ...]) -> Any:
    """An object that pickles as its global name; the one of that name if it is here."""
    home = _loading.home
    current = space.globals.get(name) if home else named(space.name, name)
    if type(current) is cls:
        return current
    made = copyreg.__newobj__(cls, *arguments)  # type: ignore[attr-defined]
    _bind(space.name, name, made)
    _fresh.append(made)
    return made


_fresh: list[Any] = []  # until their state comes, which is in the same pickle


def set_named(obj: Any, state: Any) -> None:
    """Give a new object its state."""
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
    """A `NewType` or a type parameter: known by its name alone."""
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
    """A `ContextVar` with what the submitting context saw in it."""
    made: contextvars.ContextVar[Any] = contextvars.ContextVar(name, **given)
    for current in value:
        made.set(current)
    return made


def make_local(kind: Any, values: dict[str, Any]) -> Any:
    """A `threading.local` with what the submitting thread saw in it."""
    made = kind.__new__(kind)
    made.__dict__.update(values)
    return made


class _Unavailable:
    """Stands for a module that only an annotation names, and that is not here."""


def optional_module(name: str) -> Any:
    """A module that an annotation names."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return _Unavailable()

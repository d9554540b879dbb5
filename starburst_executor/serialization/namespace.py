"""Where a script's code is unpickled: one namespace per script in each child.

A script is never run again. What a task needs of it (functions, classes and the globals they use)
is sent by value, as of `submit`, and placed in the child's own `__main__`, which all functions of
the script share. So an initializer can set a global for the tasks, a class can be pickled by name
inside a task, and `multiprocessing` finds the script's functions.

* Each value has an id derived from its content. A name is set when it is first received, and again
  only if the client's value has changed: what tasks of the child assigned themselves stays. A task
  of an earlier submit sees the values of that submit: `Home.enter` sets those that differ.
* A class exists once per content. An existing one is used unchanged: nothing is set on it, and no
  `__init_subclass__` or metaclass runs again.
* On the client, nothing is placed in `__main__`. Classes and functions that it has (by module,
  qualified name and content) are used; one that it lacks, as after attaching from another program,
  is created in a separate namespace, from the callable that brought it to the worker.

`scripts` writes the pickles; the functions of `remote` that they reference fill these namespaces.
"""

from __future__ import annotations

import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from starburst_executor.serialization.known_code import Key, scripts

__all__ = [
    "ABSENT",
    "Capture",
    "Home",
    "Space",
    "Unavailable",
    "Value",
    "definitions",
    "loading",
    "origins",
]

Value: TypeAlias = tuple[str, Any]
"""A value's content id, and the value."""

Capture: TypeAlias = dict[tuple[str, str], tuple[Any, str, str, Any]]
"""By owner and name: a value's target object, its name there, its content id, and the value."""

ABSENT = "absent"  # the id of a name without a value on the client


# --- per-thread state of pickling and unpickling ------------------------------------


class _Loading(threading.local):
    """What this thread is unpickling for."""

    home: Home | None = None
    capture: Capture = {}  # noqa: RUF012  replaced, never changed, outside `receive`
    origin: str | None = None
    apart: dict[str, Space] | None = None  # on the client: namespaces for this pickle
    define: Callable[[str], object] | None = None
    origins: Mapping[Key, str] | None = None


loading = _Loading()


class _Turn:
    """Temporarily sets what this thread pickles or unpickles for; on every task's hot path."""

    __slots__ = ("_after", "_before")

    def __init__(self, **after: Any) -> None:
        self._after = after

    def __enter__(self) -> Capture:
        state = loading.__dict__
        self._before = state.copy()
        state.update(self._after)
        return loading.capture

    def __exit__(self, *exc: object) -> None:
        state = loading.__dict__
        state.clear()
        state.update(self._before)


# --- the namespaces ---------------------------------------------------------------


class Unavailable:
    """Replaces a module that only an annotation references and that is not installed here."""


class Space:
    """The globals shared by the functions of one script."""

    def __init__(self, name: str, globals_: dict[str, Any]) -> None:
        self.name = name
        self.globals = globals_


class Home:
    """The namespaces of all scripts whose tasks a child runs."""

    def __init__(self) -> None:
        self.spaces: dict[str, Space] = {}
        self.origins: dict[Key, str] = {}
        self._ids: dict[tuple[str, str], str] = {}
        self._functions: weakref.WeakValueDictionary[Key, Any]
        self._functions = weakref.WeakValueDictionary()  # held by the namespace

    def receive(self, origin: str | None = None) -> _Turn:
        """Place what is unpickled in this context into the namespaces.

        Args:
            origin: Digest of the callable being unpickled, if it is one.
        """
        return _Turn(home=self, capture={}, origin=origin)

    def reply(self) -> _Turn:
        """Pickle in this context for the client, which has what it sent."""
        return _Turn(origins=self.origins)

    def enter(self, capture: Capture) -> None:
        """Restore the client's values as of this submit, where they differ."""
        for key, (target, name, content, value) in capture.items():
            if self._ids.get(key) != content:
                _assign(target, name, value)
                self._ids[key] = content

    def space(self, name: str, file: str | None) -> Space:
        """The namespace of a script, by its module name."""
        if name not in self.spaces:
            self.spaces[name] = Space(name, vars(_own_module(name)))
            scripts.add(name)
        space = self.spaces[name]
        if file is not None:
            space.globals["__file__"] = file
        return space

    def install(self, owner: str, target: Any, name: str, value: Value) -> None:
        """Set a client's value, unless the last one set had the same content."""
        content, obj = value
        key = (owner, name)
        if isinstance(obj, Unavailable):
            return
        loading.capture[key] = (target, name, content, obj)
        known = self._ids.get(key)
        if known is None and _has(target, name):
            self._ids[key] = content  # an initializer or a task set it first
        elif known != content:
            _assign(target, name, obj)
            self._ids[key] = content

    def was_set(self, owner: str, values: Mapping[str, Value]) -> None:
        """Record that these attributes of a new class are the client's."""
        for name, (content, _) in values.items():
            self._ids[owner, name] = content

    def note_absent(self, space: Space, names: Iterator[str]) -> None:
        """Record that the client had no value for these names."""
        for name in names:
            if name not in space.globals:
                self._ids.setdefault((space.name, name), ABSENT)

    def arrived(self, key: Key, obj: Any, space: Space) -> None:
        """Register a class or function, and bind its name."""
        if loading.origin is not None:
            self.origins.setdefault(key, loading.origin)
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
    """Unpickle on the client: `define` unpickles the callable with a given digest.

    It is called for classes and functions that the client lacks.
    """
    return _Turn(apart={}, define=define)


def origins() -> Mapping[Key, str] | None:
    """The callables that brought each definition, if the client will unpickle."""
    return loading.origins

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

`scripts` writes the pickles, and the functions of `remote`, which they name, fill these namespaces.
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
"""The id of a value's content, and the value."""

Capture: TypeAlias = dict[tuple[str, str], tuple[Any, str, str, Any]]
"""By owner and name: where a value belongs, its name there, the id of its content, and it."""

ABSENT = "absent"  # the id of a name that the client had no value for


# --- what a thread pickles and unpickles for ---------------------------------------


class _Loading(threading.local):
    """What this thread is unpickling for."""

    home: Home | None = None
    capture: Capture = {}  # noqa: RUF012  replaced, never changed, outside `receive`
    origin: str | None = None
    apart: dict[str, Space] | None = None  # on the client: namespaces of this pickle
    define: Callable[[str], object] | None = None
    origins: Mapping[Key, str] | None = None


loading = _Loading()


class _Turn:
    """Sets for a while what this thread pickles or unpickles for; it is on every task's way."""

    __slots__ = ("_after", "_before")

    def __init__(self, **after: Any) -> None:
        self._after = after

    def __enter__(self) -> Capture:
        state = loading.__dict__
        self._before = {name: getattr(loading, name) for name in self._after}
        state.update(self._after)
        return loading.capture

    def __exit__(self, *exc: object) -> None:
        loading.__dict__.update(self._before)


# --- the namespaces ---------------------------------------------------------------


class Unavailable:
    """Stands for a module that only an annotation names, and that is not here."""


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
        if isinstance(obj, Unavailable):
            return
        loading.capture[key] = (target, name, content, obj)
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
    """Unpickle on the client: `define` unpickles the callable of a digest.

    It is called for classes and functions that are not here.
    """
    return _Turn(apart={}, define=define)


def origins() -> Mapping[Key, str] | None:
    """The callables that brought what is here, if it is the client who will unpickle."""
    return loading.origins

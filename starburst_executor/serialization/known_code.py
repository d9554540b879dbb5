"""Script classes and functions known to this process, by module, name and content."""

from __future__ import annotations

import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = [
    "Key",
    "has_content",
    "key_of",
    "known",
    "made_here",
    "named",
    "note_made",
    "present",
    "remember",
    "scripts",
    "use_content",
]

Key: TypeAlias = tuple[str, str, str]
"""Module, qualified name and content; a class not reachable by name has a random content."""

scripts: set[str] = set()
"""Modules with definitions that were sent or received by value.

Their definitions stay by value for good: a process that has part of a module would have to run it
a second time to import it.
"""

_lock = threading.Lock()
_by_key: weakref.WeakValueDictionary[Key, Any] = weakref.WeakValueDictionary()
_keys: weakref.WeakKeyDictionary[Any, Key] = weakref.WeakKeyDictionary()
_made: weakref.WeakSet[Any] = weakref.WeakSet()  # unpickled by `remote`


def key_of(obj: object) -> Key | None:
    """The key under which a class or function was received or sent."""
    return _keys.get(obj)


def made_here(obj: object) -> bool:
    """Whether a class or function was unpickled here."""
    return obj in _made


def note_made(obj: Any) -> None:
    """Record a class or function as unpickled here."""
    _made.add(obj)


def remember(key: Key, obj: Any) -> None:
    """Use `obj` from now on whenever its key is received."""
    with _lock:
        _by_key[key] = obj
        _keys[obj] = key


def named(module: str, qualname: str) -> Any:
    """The object of that name in a module loaded here, or None."""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        try:
            found = getattr(found, part)
        except Exception:  # a module's or metaclass's own __getattr__ may raise anything
            return None
    return found


Content: TypeAlias = Callable[[Any], str]
_content_of: list[Content] = []  # set by `scripts`, a higher layer


def use_content(content: Content) -> None:
    """Set how to compute the content id of a class or function of this process."""
    _content_of[:] = [content]


def has_content(obj: Any, content: str) -> bool:
    """Whether an object of this process has that content id."""
    return _content_of[0](obj) == content


def known(key: Key) -> Any:
    """The object received or sent under that key, if it still exists."""
    return _by_key.get(key)


def present(key: Key) -> Any:
    """The class or function with that key, if this process has it."""
    here = _by_key.get(key)
    module, qualname, content = key
    current = named(module, qualname)
    if current is here or not isinstance(current, (type, types.FunctionType)):
        return here
    if current in _made or content[:1] == "?" or not has_content(current, content):
        return here
    remember(key, current)
    return current

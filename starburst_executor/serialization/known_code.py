"""The classes and functions of scripts that this process has, by module, name and content."""

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
"""Module, qualified name and content; a class that no name leads to has a random content."""

scripts: set[str] = set()
"""Modules of which something travelled by value, from here or to here.

What is defined in them does so for good: a process that has part of a module would have
to run it a second time to import it.
"""

_lock = threading.Lock()
_by_key: weakref.WeakValueDictionary[Key, Any] = weakref.WeakValueDictionary()
_keys: weakref.WeakKeyDictionary[Any, Key] = weakref.WeakKeyDictionary()
_made: weakref.WeakSet[Any] = weakref.WeakSet()  # by `remote`, from a pickle


def key_of(obj: object) -> Key | None:
    """The key under which a class or function arrived or was sent."""
    return _keys.get(obj)


def made_here(obj: object) -> bool:
    """Whether a class or function was made here from a pickle."""
    return obj in _made


def note_made(obj: Any) -> None:
    """Know a class or function as one that was made here from a pickle."""
    _made.add(obj)


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


def has_content(obj: Any, content: str) -> bool:
    """Whether the content of something of this process has that id."""
    return _content_of[0](obj) == content


def known(key: Key) -> Any:
    """What has arrived or was sent under that key, if it still exists."""
    return _by_key.get(key)


def present(key: Key) -> Any:
    """The class or function of that key, if this process has it."""
    here = _by_key.get(key)
    module, qualname, content = key
    current = named(module, qualname)
    if current is here or not isinstance(current, (type, types.FunctionType)):
        return here
    if current in _made or content[:1] == "?" or not has_content(current, content):
        return here
    remember(key, current)
    return current

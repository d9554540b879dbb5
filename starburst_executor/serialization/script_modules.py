"""Which modules are scripts, whose definitions are pickled by value."""

from __future__ import annotations

import importlib.machinery
import sys
import types
import weakref
from typing import Any

from starburst_executor.serialization import known_code

__all__ = ["is_named", "is_script", "space_name"]


def is_script(name: str | None) -> bool:
    """Whether a module's definitions are pickled by value."""
    if name == "__main__" or name in known_code.scripts:
        return True
    module = sys.modules.get(name or "")
    if module is None or _importable.get(module.__name__) is module:
        return False
    if not _is_unimportable(module):
        _importable[module.__name__] = module
        return False
    known_code.scripts.add(module.__name__)
    return True


_importable: weakref.WeakValueDictionary[str, types.ModuleType]
_importable = weakref.WeakValueDictionary()  # positive results, which never change


def _is_unimportable(module: types.ModuleType) -> bool:
    attributes = getattr(module, "__dict__", {})  # no getattr: lazy modules import on it
    spec = attributes.get("__spec__")
    if spec is not None:
        return bool(getattr(spec, "_initializing", False))
    name = attributes.get("__name__", "")
    if "." in name or name in sys.builtin_module_names:
        return False
    return importlib.machinery.PathFinder.find_spec(name) is None


def space_name(function: types.FunctionType) -> str | None:
    """The script whose globals a function uses."""
    name = function.__globals__.get("__name__")
    module = sys.modules.get(name) if isinstance(name, str) else None
    if module is None or vars(module) is not function.__globals__:
        return None
    return name if is_script(name) else None


def is_named(obj: Any) -> bool:
    """Whether an object's module and qualified name lead to any object."""
    module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    return (
        isinstance(module, str) and isinstance(name, str) and known_code.named(module, name) is obj
    )

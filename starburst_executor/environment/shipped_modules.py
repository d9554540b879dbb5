"""Imports, in a child, the modules shipped with the session.

They are unpacked in a directory of the worker, but look to the user as they did on the client:

* Tracebacks show the client's path, with the source that runs.
* `__file__` is the client's path too if that exists here, as on the client's own machine, so that
  data files beside a module are found; else it is the unpacked file, beside its package's data
  files.

The code is always what was shipped, even if the file was edited since.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterable
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from importlib.util import decode_source
from pathlib import Path
from types import CodeType, ModuleType

from starburst_executor.environment.source_lines import renamed, show_lines

__all__ = ["ORIGINS", "add_to_path"]

ORIGINS = ".origins"  # a file in each directory; hidden files of a package are never shipped

_origins: dict[str, dict[str, str]] = {}
"""For each directory of shipped modules: where its contents were on the client."""


def add_to_path(folders: Iterable[str]) -> None:
    """Make the modules in these directories importable, ahead of installed ones."""
    folders = list(folders)
    for folder in folders:
        origins = Path(folder, ORIGINS)
        _origins[folder] = json.loads(origins.read_bytes()) if origins.exists() else {}
    if _hook not in sys.path_hooks:
        sys.path_hooks.insert(0, _hook)
    sys.path[:0] = folders
    importlib.invalidate_caches()


def _hook(path: str) -> FileFinder:
    if _folder_of(path) is None:
        raise ImportError(f"{path} holds no shipped modules")
    return FileFinder(
        path,
        (ExtensionFileLoader, EXTENSION_SUFFIXES),
        (_ShippedLoader, SOURCE_SUFFIXES),
        (SourcelessFileLoader, BYTECODE_SUFFIXES),
    )


def _folder_of(path: str) -> str | None:
    return next((f for f in _origins if path == f or path.startswith(f + os.sep)), None)


def _origin_of(path: str) -> str | None:
    """Where a shipped file was on the client."""
    folder = _folder_of(path)
    if folder is None:
        return None
    name = path[len(folder) + 1 :].replace(os.sep, "/")
    top, _, rest = name.partition("/")
    found = _origins[folder].get(name)
    if found is None and top in _origins[folder]:
        found = str(Path(_origins[folder][top], rest))
    return found


class _ShippedLoader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType | None:
        code = super().get_code(fullname)
        origin = _origin_of(self.path)
        if code is None or origin is None:
            return code
        source = decode_source(self.get_data(self.path))
        show_lines(origin, source.splitlines(keepends=True))
        return renamed(code, origin)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        # Not in `exec_module`, which would appear in the traceback of an import.
        origin = _origin_of(self.path)
        if origin is None or not os.path.isfile(origin):  # noqa: PTH113  never raises
            return None
        module = ModuleType(spec.name)
        module.__file__ = origin
        return module

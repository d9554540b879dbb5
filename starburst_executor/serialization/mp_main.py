"""`__main__` for processes that `multiprocessing` spawns inside a task.

A spawned process runs the main script again, as `__mp_main__`. A child has no script to run: the
user's would start another executor, or is not on this machine. So the child's `__main__` names this
module in the script's place, and dumps its contents to a file when `multiprocessing` asks for the
name; the spawned process reads that file.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

from starburst_executor.serialization.namespace import Home, Space
from starburst_executor.serialization.scripts import Pickler

__all__ = ["MainSpec", "load", "new_main"]

_FILE = "STARBURST_MAIN"


class MainSpec:
    """The `__spec__` of a child's `__main__`; reading its name means a spawn is imminent."""

    loader = None
    origin = None
    parent = ""
    cached = None
    has_location = False
    submodule_search_locations = None

    @property
    def name(self) -> str:
        """The module to run as `__mp_main__`, once the namespace is written."""
        target = Path(os.environ[_FILE])
        draft = target.with_name(f"{target.name}.{os.getpid()}")
        draft.write_bytes(_dump(vars(sys.modules["__main__"])))
        draft.replace(target)
        return __name__


def new_main(folder: Path) -> types.ModuleType:
    """An empty `__main__`, of which spawned processes get a copy.

    Args:
        folder: Where to write the copy.
    """
    module: Any = types.ModuleType("__main__")
    module.__spec__ = MainSpec()
    os.environ[_FILE] = str(folder / f"main.{os.getpid()}")
    return module  # type: ignore[no-any-return]


def _dump(values: dict[str, Any]) -> bytes:
    """The picklable part of a namespace; a task's open files and locks are left out."""
    stream = io.BytesIO()
    Pickler(stream).dump(
        {
            name: value
            for name, value in values.items()
            if not (name.startswith("__") and name.endswith("__")) and _is_picklable(value)
        }
    )
    return stream.getvalue()


def _is_picklable(value: object) -> bool:
    try:
        Pickler(io.BytesIO()).dump(value)
    except Exception:  # in the spawned process, using it raises a NameError
        return False
    return True


def load(globals_: dict[str, Any]) -> None:
    """Fill the globals of a spawned process's `__main__`."""
    home = Home()
    home.spaces["__main__"] = Space("__main__", globals_)
    with home.receive():
        values = pickle.loads(Path(os.environ[_FILE]).read_bytes())
    globals_.update(values)


if __name__ == "__mp_main__":
    load(globals())

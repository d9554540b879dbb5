"""Executors inside tasks: how deep they are, and whether one may be made here and now.

    client              worker                        child
      depth of the        DEPTH_VARIABLE = depth + 1    inherits it: an executor that a task makes
      session in its                                    has a session of that depth
      manifest

A session knows its depth, not whoever starts its workers, so that replacements and workers on ECS hand
down the same. A child also knows while it only unpickles or imports for a task: an executor that is made
then is made by a module's own code, at every import, and would nest sessions without end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from starburst_executor.errors import NestingError

__all__ = [
    "DEPTH_MAX",
    "DEPTH_VARIABLE",
    "check_nesting",
    "hand_down_depth",
    "importing_for_task",
]

DEPTH_VARIABLE = "STARBURST_DEPTH"
"""Environment variable that tells a task how many sessions it is inside of; workers set it."""

DEPTH_MAX = 3
"""So many sessions within one another: a grid of searches with parallel fits takes two."""

_importing: ContextVar[bool] = ContextVar("importing_for_task", default=False)


@contextmanager
def importing_for_task() -> Iterator[None]:
    """While a child unpickles, and so imports, what a task needs."""
    token = _importing.set(True)
    try:
        yield
    finally:
        _importing.reset(token)


def hand_down_depth(depth: int) -> None:
    """Tell what this process starts, tasks among it, that it is inside a session of this depth."""
    os.environ[DEPTH_VARIABLE] = str(depth + 1)


def check_nesting() -> int:
    """The depth of a session that is made here.

    Raises:
        NestingError: none may be.
    """
    if _importing.get():
        raise NestingError(
            "a worker is importing a module for a task, and that module makes a StarburstExecutor when it is "
            "imported, as each worker of it would again, without end. Put what makes the executor under "
            '`if __name__ == "__main__":` (the main guard of a script), or into a function that no import calls'
        )
    depth = int(os.environ.get(DEPTH_VARIABLE, "0"))
    if depth >= DEPTH_MAX:
        raise NestingError(
            f"this task is inside {depth} sessions, each made by a task of the one before, and {DEPTH_MAX} sessions "
            "are allowed within one another. Most likely a task recurs: it calls the function that submitted it, or "
            "runs a script without a main guard. Submit from one level, or pass the id of a session and `attach`"
        )
    return depth

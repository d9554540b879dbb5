"""Executors inside tasks: how deep they are nested, and whether one may be created here.

    client              worker                        child
      depth of the        DEPTH_VARIABLE = depth + 1    inherits it: an executor that a task
      session in its                                    creates has a session of that depth
      manifest

The session holds its depth, not the process that starts its workers, so replacements and workers
on ECS pass on the same depth. A child also knows when it is only unpickling or importing for a
task: an executor created then is created by module-level code, at every import, and would nest
sessions endlessly.
"""

from __future__ import annotations

import os
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
"""Environment variable with the number of sessions a task is nested in; workers set it."""

DEPTH_MAX = 3
"""Most sessions nested in one another: a grid of searches with parallel fits takes two."""

_importing: ContextVar[bool] = ContextVar("importing_for_task", default=False)


class importing_for_task:
    """Marks that a child is unpickling, and so importing, what a task needs.

    A class, because a generator takes four times as long and every task goes through here.
    """

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = _importing.set(True)

    def __exit__(self, *exc: object) -> None:
        _importing.reset(self._token)


def hand_down_depth(depth: int) -> None:
    """Tell the processes started here, tasks included, that they are inside a session this deep."""
    os.environ[DEPTH_VARIABLE] = str(depth + 1)


def check_nesting() -> int:
    """The depth of a session created here.

    Raises:
        NestingError: no executor may be created here.
    """
    if _importing.get():
        raise NestingError(
            "a worker is importing a module for a task, and that module creates a "
            "StarburstExecutor when it is imported. Each of its workers would do the same, "
            "endlessly. Create the executor under "
            '`if __name__ == "__main__":` (the main guard of a script), or in a function that '
            "no import calls"
        )
    depth = int(os.environ.get(DEPTH_VARIABLE, "0"))
    if depth >= DEPTH_MAX:
        raise NestingError(
            f"this task is inside {depth} sessions, each created by a task of the one before; at "
            f"most {DEPTH_MAX} sessions may be nested. Most likely a task recurses: it calls the "
            "function that submitted it, or runs a script without a main guard. Submit from one "
            "level, or pass on a session's id and `attach` to it"
        )
    return depth

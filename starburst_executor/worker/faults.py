"""What follows from an error on a worker, by its class: the only place that decides it.

    WAIT        the store is away for now, or refuses the worker's credentials for now: what is held
                stays held, and the call is repeated, as long as it takes
    FAIL_TASK   an object is gone, is not what its name says, or is refused for good: the task that
                needs it fails, and no other
    TRY_AGAIN   this machine is short of something, which often passes: a few tries, then LEAVE
    LEAVE       this machine's own disk is full or gone: everything is handed back, which counts as
                no attempt, and the worker leaves and says why

An error that is none of these is a mistake in this package. While one task's objects are moved, it
fails that task, which otherwise would take down one worker after the other; anywhere else, the
worker hands back, leaves and raises it.
"""

from __future__ import annotations

from enum import Enum, auto
from pathlib import Path

from starburst_executor.errors import (
    Conflict,
    DamagedObject,
    LocalDiskError,
    ObjectNotFound,
    StoreDenied,
    StoreError,
    StoreMissing,
    StoreUnavailable,
)

__all__ = ["ENDURANCE", "Consequence", "consequence", "reason_to_leave"]

# Tries while the machine has too few descriptors, threads or too little memory.
ENDURANCE = 8


class Consequence(Enum):
    """What a worker does about an error."""

    WAIT = auto()
    FAIL_TASK = auto()
    TRY_AGAIN = auto()
    LEAVE = auto()


# The first that matches counts.
_TABLE: tuple[tuple[type[Exception], Consequence], ...] = (
    (DamagedObject, Consequence.FAIL_TASK),
    (ObjectNotFound, Consequence.FAIL_TASK),
    (StoreUnavailable, Consequence.WAIT),
    (StoreDenied, Consequence.WAIT),
    (StoreMissing, Consequence.WAIT),
    (Conflict, Consequence.WAIT),
    (StoreError, Consequence.FAIL_TASK),
    (LocalDiskError, Consequence.LEAVE),
    (OSError, Consequence.TRY_AGAIN),
    (MemoryError, Consequence.TRY_AGAIN),
)


def consequence(error: Exception) -> Consequence | None:
    """What follows from an error; None if it is a mistake in this package."""
    for kind, follows in _TABLE:
        if isinstance(error, kind):
            return follows
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return Consequence.TRY_AGAIN
    return None


def reason_to_leave(error: Exception, folder: Path) -> str:
    """What a worker says that leaves because of an error.

    Args:
        error: The error, or one that it caused.
        folder: The worker's temp folder.
    """
    causes = (error, error.__cause__)
    disk = next((one for one in causes if isinstance(one, LocalDiskError)), None)
    if disk is not None:
        return (
            f"this worker's temp folder {folder} is full or gone: {disk}. Free up space on its "
            "file system, or set TMPDIR to another one"
        )
    if isinstance(error, StoreError):
        return f"the store goes on refusing what tasks need: {error}"
    return f"no task can be run on this machine: {error}"

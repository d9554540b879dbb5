"""What became of a child process that let go of its worker without ending."""

from __future__ import annotations

import os
import select
import subprocess
import time
from contextlib import suppress
from pathlib import Path

__all__ = ["what_became_of"]

# A process that ends closes its descriptors a moment before its parent is told.
_MOMENT = 1.0


def what_became_of(process: subprocess.Popen[bytes]) -> str:
    """What a task did to a process that lives without our descriptors; "" if it is dead."""
    until = time.monotonic() + _MOMENT
    while True:
        program = _other_program(process)
        if program:
            return (
                f"it was replaced by another program, {program}, as os.execv and the like do;"
                " subprocess.run starts one beside it"
            )
        if _has_ended(process.pid):
            return ""
        if time.monotonic() >= until:
            return (
                "it has closed descriptors that it had not opened, the worker's among them,"
                " as os.closerange does"
            )
        select.select([], [], [], 0.005)


def _has_ended(pid: int) -> bool:
    """Whether it has; its number stays taken until somebody waits for it."""
    try:
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, pid, flags) is not None
    except ChildProcessError:  # somebody else did
        return True


def _other_program(process: subprocess.Popen[bytes]) -> str:
    """The command line of a process that now runs another program; "" if that is unknown."""
    with suppress(OSError):  # not Linux, or gone
        words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[:-1]
        started = process.args
        assert isinstance(started, list)
        if words and words != [os.fsencode(word) for word in started]:
            return b" ".join(words).decode(errors="replace")[:200]
    return ""

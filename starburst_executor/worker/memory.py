"""How much memory there is, and how much of it this process uses."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["available", "resident"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
# Of this container, by version of control groups.
_GROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def available() -> int:
    """Bytes that the processes here may use together: the machine's, or less in a container."""
    limits = [_PAGE * os.sysconf("SC_PHYS_PAGES")]
    for file in _GROUP_LIMITS:
        with suppress(OSError, ValueError):  # another version, or "max"
            limits.append(int(file.read_text()))
    return min(limits)


def resident() -> int:
    """Memory of this process in bytes; its peak where the current value is not available."""
    try:
        with Path("/proc/self/statm").open("rb", buffering=0) as file:
            return int(file.read(64).split()[1]) * _PAGE
    except FileNotFoundError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024

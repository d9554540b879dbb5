"""What a task prints: files for its stdout and stderr, of which the last 1 MiB counts.

Both are opened for appending, so truncating one starts it anew for everybody who has it open.
What will not be kept is given back to the disk while the task still runs: the worker looks at the
files now and then, and punches a hole over all but the end. The size, from which follows how much
was cut, stays as it is.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import sys
from typing import Any

__all__ = ["OUTPUT_MAX", "Output", "log_error", "shorten", "tail"]

OUTPUT_MAX = 1024 * 1024  # bytes of stdout, and of stderr, kept of one task
SLACK = 4 * OUTPUT_MAX  # more than kept, before it is worth a system call

_KEEP_SIZE_AND_PUNCH = 0x01 | 0x02  # of Linux's fallocate


def tail(file: int, limit: int = OUTPUT_MAX) -> bytes:
    """The last `limit` bytes of an open file, after a line that says how much was cut."""
    size = os.fstat(file).st_size
    cut = max(0, size - limit)
    data = os.pread(file, size - cut, cut)
    return b"[starburst: the first %d bytes were cut]\n%b" % (cut, data) if cut else data


def shorten(file: int) -> int:
    """Give the disk back what `tail` will not show; returns how many bytes the file holds now.

    Raises:
        OSError: the file cannot be read or written.
    """
    status = os.fstat(file)
    held = min(status.st_size, 512 * status.st_blocks)
    if held <= OUTPUT_MAX + SLACK:
        return held
    if not _punch(file, status.st_size - OUTPUT_MAX):
        # No holes here (macOS, NFS): start anew with the end. What is written in between is lost.
        end = tail(file)
        os.ftruncate(file, 0)
        os.write(file, end)
    return OUTPUT_MAX


def _punch(file: int, length: int) -> bool:
    """Make a hole of the first bytes; False where files cannot have any."""
    if sys.platform != "linux":
        return False
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    if fallocate(file, _KEEP_SIZE_AND_PUNCH, 0, length) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number))


class Output:
    """What is written to fd 1 and 2, by Python, C code and subprocesses alike; for the child."""

    def __init__(self) -> None:
        # Copies, so that a task that closes or redirects fd 1 does no harm here.
        self._files = (os.dup(1), os.dup(2))
        for number, name in (1, "stdout"), (2, "stderr"):
            stream = _stream(number, f"<{name}>")
            for attribute in (name, f"__{name}__"):
                setattr(sys, attribute, stream)

    def flush(self) -> None:
        """Have Python's own buffers written."""
        _flush(sys.stdout)
        _flush(sys.stderr)
        if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
            _flush(sys.__stdout__)
            _flush(sys.__stderr__)

    def take(self) -> tuple[bytes, bytes]:
        """What was written to stdout and to stderr since the last call; after `flush`."""
        stdout, stderr = map(_emptied, self._files)
        return stdout, stderr


class _LogError(OSError):
    """What a task printed could not be written: no fault of the task's."""


class _LogFile(io.FileIO):
    """A standard stream's file, whose errors are told from those of the task's own files."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in _DISK:
                raise _LogError(*error.args) from error
            raise


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def _stream(number: int, name: str) -> io.TextIOWrapper:
    # By line: whoever looks at a running task sees what it has printed, and a crash loses
    # none of it. Nothing printed may fail for want of an encoding.
    file = _LogFile(number, "w", closefd=False)
    file.name = name
    buffer = io.BufferedWriter(file)
    stream = io.TextIOWrapper(buffer, "utf-8", "backslashreplace", line_buffering=True)
    stream.mode = "w"  # type: ignore[misc]  # as the interpreter's own have it
    return stream


def log_error(error: BaseException | None) -> OSError | None:
    """What kept a task's output from being written, if that is why the task failed."""
    seen: set[int] = set()  # a task may tie causes in a circle
    while error is not None and id(error) not in seen:
        if isinstance(error, _LogError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _flush(stream: Any) -> None:
    # Not `suppress`, which takes as long again: this is done twice for each task.
    try:  # noqa: SIM105
        stream.flush()
    except Exception:  # it may be anything of the task's, or closed
        pass


def _emptied(file: int) -> bytes:
    if not os.lseek(file, 0, os.SEEK_END):
        return b""
    data = tail(file)
    os.ftruncate(file, 0)
    return data

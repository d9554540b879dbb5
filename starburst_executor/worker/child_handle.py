"""One child process, from the worker's side."""

from __future__ import annotations

import errno
import logging
import math
import os
import signal as signals
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from starburst_executor.storage.base import local_disk
from starburst_executor.worker.child_exit import what_became_of
from starburst_executor.worker.ipc import (
    CHILD_MODULE,
    MESSAGE_MAX,
    TO_CHILD,
    Reply,
    delete_files,
)
from starburst_executor.worker.output import shorten, tail

__all__ = ["Job"]

log = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds until a killed process that does not end is given up


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One call to make in a child process."""

    key: Hashable
    label: str  # the task's id, for messages
    function: Path  # file with the callable's cargo
    function_digest: str
    call: bytes  # cargo of (args, kwargs)
    blobs: Path  # directory where each blob that the cargos name is a file of that name
    path: tuple[str, ...]  # directories for sys.path
    timeout: float | None  # seconds of run time


# "gone": it closed its end of `life`, most likely by ending.
Ruling: TypeAlias = Literal["gone", "crashed", "unready", "timeout", "killed", "replaced"]


class QueuedJob:
    """A job on its way, with its number in the order of arrival."""

    __slots__ = ("began", "job", "number", "refusals", "since", "unwanted")

    def __init__(self, number: int, job: Job) -> None:
        self.number = number
        self.job = job
        self.began = 0.0  # UTC
        self.since = math.inf  # monotonic
        self.unwanted = False
        self.refusals = 0  # by children that could not carry it out


class ChildHandle:
    """A child process as seen from here. Its oldest unanswered job is the one it runs.

    Args:
        outputs: Where its stdout and stderr go.
        arguments: For `child.main`, after those that are made here.
        jobs_max: How many jobs it may run in all.
    """

    def __init__(self, outputs: tuple[Path, Path], arguments: list[str], jobs_max: float) -> None:
        self.jobs_left = jobs_max
        self.leave_by = math.inf  # set once it is to end, or said that it does
        self.ready = False
        self.ready_by = math.inf  # monotonic
        self.initialized = False
        self.slow = False  # its job is long: send nothing ahead
        self.verdict: Ruling | None = None  # once set, it is dying of this
        self.path: tuple[str, ...] = ()
        self.sent: deque[QueuedJob] = deque()
        self._paths = outputs
        self._files: list[int] = []
        with ExitStack() as undo:
            undo.callback(self._close_files)
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            for path in outputs:
                with local_disk(path):
                    self._files.append(os.open(path, flags, 0o600))
            self.channel, self._theirs = _socket_pair()
            undo.callback(self._theirs.close)
            undo.callback(self.channel.close)
            self.life, life = os.pipe()
            undo.callback(os.close, self.life)
            try:
                self._process = self._spawn(life, arguments)
            finally:
                os.close(life)
            undo.pop_all()

    def _spawn(self, life: int, arguments: list[str]) -> subprocess.Popen[bytes]:
        theirs = self._theirs.fileno()
        ends = [str(theirs), str(life), str(os.getpid())]
        module = ["-P", "-m", CHILD_MODULE]  # -P: not from the cwd
        return subprocess.Popen(
            [sys.executable, *module, *ends, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._files[0],
            stderr=self._files[1],
            pass_fds=(theirs, life),
            start_new_session=True,
        )

    def window(self, most: int) -> int:
        """How many jobs it may hold, the one that it runs included."""
        if not self.ready or self.verdict or self.leaving:
            return 0
        if self.jobs_left < most:
            most = int(self.jobs_left)
        return most if self.initialized and not self.slow else min(most, 1)

    @property
    def leaving(self) -> bool:
        """Whether it begins no other job, and ends by itself."""
        return self.leave_by < math.inf

    def send(self, data: bytes) -> bool:
        """Put a message into the socket; False if that is full."""
        try:
            self.channel.send(data)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOBUFS):  # the latter: macOS
                raise
            return False
        return True

    def receive(self) -> Iterator[bytes]:
        """The messages that the child has sent."""
        with suppress(BlockingIOError):
            while data := self.channel.recv(MESSAGE_MAX):
                yield data

    def recall(self) -> list[QueuedJob]:
        """Take back the jobs that it has not read; it will never run them.

        These need not be the last that were sent: while one message is read here, the
        child may read the next.
        """
        unread = set()
        with suppress(BlockingIOError):
            while data := self._theirs.recv(MESSAGE_MAX, socket.MSG_DONTWAIT):
                unread.add(TO_CHILD.decode(data).number)
        recalled = [entry for entry in self.sent if entry.number in unread]
        self.sent = deque(entry for entry in self.sent if entry.number not in unread)
        return recalled

    def shorten_output(self) -> int:
        """Give the disk back what it printed and nobody will see; bytes that are left."""
        return sum(map(shorten, self._files))

    def output(self) -> tuple[bytes, bytes]:
        """The last of what it wrote to stdout and to stderr in the job that it runs."""
        stdout, stderr = map(tail, self._files)
        return stdout, stderr

    def leave(self) -> None:
        """Ask it to end by itself."""
        self.send(b"")

    def kill(self) -> None:
        """Kill its process group; only before `reap`, for then the number may be another's."""
        if self._process.returncode is None:
            # ESRCH: all gone. EPERM: macOS, if only zombies are left.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signals.SIGKILL)

    def fate(self) -> str:
        """What became of a process that let go of us, if it lives; "" if it is dead."""
        return what_became_of(self._process)

    def reap(self) -> int:
        """Wait for the end of a child that was killed; returns Popen's return code."""
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            log.warning(
                "child %d was killed but did not end within %g s; it may hang in a"
                " file system that does not answer",
                self._process.pid,
                PATIENCE,
            )
            return -signals.SIGKILL

    def close(self) -> None:
        self.channel.close()
        self._theirs.close()
        os.close(self.life)
        self._close_files()

    def _close_files(self) -> None:
        for file in self._files:
            os.close(file)
        delete_files(self._paths)


_MESSAGES = (
    socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM
)  # macOS has no other; a child is then told to leave, since it sees no end of file


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets that keep messages apart: ours, never blocking, and the child's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, _MESSAGES)
    for end in (ours, theirs):
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, buffer, 4 * MESSAGE_MAX)
    # Being non-blocking belongs to a socket's open file, which the child shares with
    # our copy of its end: that one is only ever read with MSG_DONTWAIT.
    ours.setblocking(False)
    return ours, theirs


REPLIES = msgspec.msgpack.Decoder(Reply)


def seconds_left(child: ChildHandle) -> float:
    """When the job of a child has run for too long; the initializer's time is free."""
    timeout = child.sent[0].job.timeout if child.initialized and child.sent else None
    return math.inf if timeout is None else child.sent[0].since + timeout


def death_kind(child: ChildHandle) -> Literal["timeout", "initializer", "crashed"]:
    if child.verdict == "timeout":
        return "timeout"
    return "crashed" if child.initialized else "initializer"

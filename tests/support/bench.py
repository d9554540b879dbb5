"""A pool of child processes on a bench: the files a worker would have fetched, and ways to wait."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starburst_executor.protocol.outcome import Failure, decode_outcome
from starburst_executor.protocol.payload import digest_of
from starburst_executor.runtime import SystemRuntime
from starburst_executor.serialization.pickling import dumps, loads, pack_call
from starburst_executor.worker.child_handle import Job
from starburst_executor.worker.pool import ChildPool, JobResult, ProcessPool

PATIENCE = 60.0  # seconds until a test that waits has failed
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Bench:
    """Slots with the files that a worker would have fetched, and ways to wait for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spool = folder / "spool"
        self.blobs = folder / "blobs"
        self.blobs.mkdir()
        self.runtime = SystemRuntime()
        self.signal = self.runtime.signal()
        self.slots: ChildPool
        self._jobs = 0

    def open(self, size: int = 1, initializer: Path | None = None) -> ChildPool:
        self.slots = ProcessPool(
            size,
            folder=self.spool,
            initializer=initializer,
            runtime=self.runtime,
            signal=self.signal,
        )
        return self.slots

    def keep(self, digest: str, data: memoryview) -> None:
        (self.blobs / digest).write_bytes(data)

    def cargo(self, obj: object) -> Path:
        cargo = dumps(obj, self.keep)
        path = self.folder / digest_of(cargo)
        if not path.exists():
            path.write_bytes(cargo)
        return path

    def job(
        self,
        function: Callable[..., object],
        *args: object,
        key: object = None,
        timeout: float | None = None,
        path: tuple[str, ...] = (),
    ) -> Job:
        self._jobs += 1
        cargo = self.cargo(function)
        return Job(
            key=self._jobs if key is None else key,
            label=f"task-{self._jobs}",
            function=cargo,
            function_digest=cargo.name,
            call=pack_call(args, {}, self.keep),
            blobs=self.blobs,
            path=path,
            timeout=timeout,
        )

    def start(self, function: Callable[..., object], *args: Any, **options: Any) -> Job:
        job = self.job(function, *args, **options)
        self.slots.start(job)
        return job

    def wait(self, count: int) -> list[JobResult]:
        """The next `count` jobs to end; fails if more do."""
        ended: list[JobResult] = []
        until = time.monotonic() + PATIENCE
        while len(ended) < count:
            left = until - time.monotonic()
            assert self.signal.wait(max(0.0, left)), f"{len(ended)} of {count} ended"
            self.signal.clear()
            ended += self.slots.take()
        assert len(ended) == count
        return ended

    def run(self, function: Callable[..., object], *args: Any, **options: Any) -> JobResult:
        self.start(function, *args, **options)
        return self.wait(1)[0]

    def result(self, function: Callable[..., object], *args: Any, **opts: Any) -> Any:
        return value_of(self.run(function, *args, **opts))

    def warm_up(self) -> None:
        """Let the slots learn that jobs are tiny, so that they send some ahead."""
        for _ in range(20):
            self.start(same, 0)
        self.wait(20)


def value_of(ended: JobResult) -> Any:
    files = {digest: file for digest, file, _ in ended.blobs}
    cargo = decode_outcome(ended.outcome).value
    assert cargo is not None, failure_of(ended)
    return loads(cargo, lambda digest, size: bytearray(files[digest].read_bytes()))


def failure_of(ended: JobResult) -> Failure:
    failure = decode_outcome(ended.outcome).failure
    assert failure is not None
    return failure


def same(x: object) -> object:
    return x


def wait_until_gone(pids: list[int]) -> None:
    """Wait until processes, children of others, have ended."""
    until = time.monotonic() + PATIENCE
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        readable = select.select([descriptor], [], [], until - time.monotonic())[0]
        os.close(descriptor)
        assert readable, f"process {pid} is still there"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kill_nine() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_hard() -> None:
    os.write(2, b"last words\n")
    os._exit(7)


def raise_error() -> None:
    raise ZeroDivisionError("on purpose")


def hang() -> None:
    threading.Event().wait()


class AtPickle:
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def __reduce__(self) -> str:
        self.act()
        raise AssertionError("unreachable")


class Gate:
    """A place where a job stops until it is let through; both sides wait for each other."""

    def __init__(self, folder: Path) -> None:
        self.paths = (str(folder / "reached"), str(folder / "open"))
        for path in self.paths:
            os.mkfifo(path)

    def await_arrival(self) -> None:
        Path(self.paths[0]).read_bytes()

    def let_through(self) -> None:
        Path(self.paths[1]).write_bytes(b"")


def stop_at(paths: tuple[str, str], text: str = "") -> int:
    sys.stdout.write(text)
    Path(paths[0]).write_bytes(b"")  # blocks until somebody reads
    Path(paths[1]).read_bytes()
    return os.getpid()


def start_sleeper(file: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(["sleep", "90"])
    Path(file).write_text(str(process.pid))
    return process


def big_array(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(count)

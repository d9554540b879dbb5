"""What a task may change about the process it runs in, and how it was before.

A task that changes the directory, closes descriptor 1 or blocks a signal does so for every task
after it. What a process can undo of that is undone after each task; where it cannot, it says why
it is not fit for another one, and is replaced.

Left alone is what tasks share on purpose: imported modules and their globals, entries added to
`sys.path`, descriptors that are still open, idle pools of threads. Of these, only too many count.

All of this happens after every task, so what takes more than a microsecond or two is done by
`restore` only now and then, or when something hints that it may be needed.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # as `signal`, without a slow enum around each
import contextlib
import gc
import importlib
import io
import locale
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from starburst_executor.worker import memory

__all__ = ["ProcessState"]

THREADS_MAX = 64  # that tasks left behind, beside those of thread pools
# A closer look takes as long as a tiny task: now and then, and after each longer one.
CLOSER_EVERY = 0.02
CLOSER_AFTER = 0.005

_SIGNALS = sorted(
    number
    for number in signal.valid_signals()
    if number < 32 and number not in (signal.SIGKILL, signal.SIGSTOP)
)
_STREAMS = ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__")


class _Unfit(Exception):
    """Why this process should not run another task."""


class ProcessState:
    """How this process was when it was made, or last accepted as it is.

    Args:
        memory_max: Bytes of resident memory beyond which a process is not fit any more.
    """

    def __init__(self, memory_max: float) -> None:
        self._memory_max = memory_max
        self._looked_at = 0.0
        self._limits_module = _resource()
        self._standard = [os.dup(number) for number in range(3)]
        self._directory: int | None = None
        self.accept()

    def accept(self) -> None:
        """Take the process as it is now for what it should be: its initializer made it so."""
        self._streams = {name: getattr(sys, name) for name in _STREAMS}
        if self._directory is not None:
            os.close(self._directory)
        self._directory = _open_directory()
        self._umask = os.umask(0o022)
        os.umask(self._umask)
        self._locale = locale.setlocale(locale.LC_ALL)
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._limits = _limits(self._limits_module)
        self._settings = [get() for get, _ in _SETTINGS]
        self._descriptors_max = self._limits[self._limits_module.RLIMIT_NOFILE][0] // 2
        self._threads = frozenset(threading.enumerate())
        self._timer = signal.getitimer(signal.ITIMER_REAL)[0] > 0
        self.accept_imports()

    def accept_imports(self) -> None:
        """Take over what importing a module changes: it will not be imported again."""
        self._environ = os.environ
        self._variables: dict[bytes, bytes] = dict(_raw_environment())
        self._handlers = list(map(_signal.getsignal, _SIGNALS))
        self._path = list(sys.path)

    def restore(self, seconds: float) -> str:
        """Undo what a task has changed.

        Args:
            seconds: How long the task ran.

        Returns:
            Why this process is not fit for another task; "" if it is.
        """
        try:
            self._restore_limits()
            self._restore_files()
            self._restore_signals()
            self._restore_rest()
            self._look_for_leaks(seconds)
        except _Unfit as unfit:
            return str(unfit)
        except Exception as error:  # it may be anything that a task has broken
            return f"what a task has changed cannot be undone: {error!r}"
        return ""

    def _restore_limits(self) -> None:
        # Whoever changes a limit imports that module: cheaper to see than a dozen limits.
        if "resource" not in sys.modules:
            return
        for kind, pair in _limits(self._limits_module).items():
            if pair != self._limits[kind]:
                self._limits_module.setrlimit(kind, self._limits[kind])

    def _restore_files(self) -> None:
        for number, copy in enumerate(self._standard):
            os.dup2(copy, number)
        if self._directory is not None:
            os.fchdir(self._directory)
        os.umask(self._umask)
        for name, stream in self._streams.items():
            if not _is_open(stream):
                self._streams[name] = stream = _reopened(name)
            if getattr(sys, name, None) is not stream:
                setattr(sys, name, stream)

    def _restore_signals(self) -> None:
        if not self._timer:
            signal.alarm(0)
        signal.set_wakeup_fd(-1)
        handlers = list(map(_signal.getsignal, _SIGNALS))
        if handlers != self._handlers:
            self._restore_handlers(handlers)
        _signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _restore_handlers(self, handlers: list[Any]) -> None:
        # A timer whose handler is gone would end the process.
        for timer in (signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        for number, now, before in zip(_SIGNALS, handlers, self._handlers, strict=True):
            if now is not before:
                signal.signal(number, before)

    def _restore_rest(self) -> None:
        if os.environ is not self._environ:
            os.environ = self._environ  # noqa: B003  the very object that it was
        if _raw_environment() != self._variables:
            self._restore_variables()
        if locale.setlocale(locale.LC_ALL) != self._locale:
            locale.setlocale(locale.LC_ALL, self._locale)
        if [get() for get, _ in _SETTINGS] != self._settings:
            for before, (_, put) in zip(self._settings, _SETTINGS, strict=True):
                put(before)
        if sys.path != self._path:
            lacking = [entry for entry in self._path if entry not in sys.path]
            sys.path[:0] = lacking

    def _restore_variables(self) -> None:
        for name in _raw_environment().keys() - self._variables.keys():
            del os.environb[name]
        for name, value in self._variables.items():
            if _raw_environment().get(name) != value:
                os.environb[name] = value

    def _look_for_leaks(self, seconds: float) -> None:
        if threading.active_count() != len(self._threads):
            self._check_threads()
        # The kernel gives out the lowest that is free: so at least so many are open.
        lowest = os.dup(0)
        os.close(lowest)
        if lowest >= self._descriptors_max:
            self._check_descriptors()
        now = time.monotonic()
        if seconds >= CLOSER_AFTER or now - self._looked_at >= CLOSER_EVERY:
            self._looked_at = now
            self._check_descriptors()
            self._check_memory()

    def _check_threads(self) -> None:
        # Those of thread pools wait for work by design, and end when they are told to.
        known = self._threads.union(
            *(getattr(sys.modules.get(module), name, ()) for module, name in _POOLED)
        )
        left = [thread for thread in threading.enumerate() if thread not in known]
        stubborn = [t.name for t in left if not t.daemon]
        if stubborn:
            raise _Unfit(f"a task left threads that run on: {', '.join(stubborn[:5])}")
        if len(left) > THREADS_MAX:
            raise _Unfit(f"tasks left {len(left)} threads")

    def _check_descriptors(self) -> None:
        if _open_descriptors() < self._descriptors_max:
            return
        gc.collect()  # what nobody can reach any more is closed by that
        count = _open_descriptors()
        if count >= self._descriptors_max:
            raise _Unfit(f"tasks left {count} file descriptors open")

    def _check_memory(self) -> None:
        if memory.resident() <= self._memory_max:
            return
        gc.collect()
        if (used := memory.resident()) > self._memory_max:
            raise _Unfit(f"its memory has grown to {used / 2**20:.0f} MiB")


# Where the threads of pools are registered, so that the interpreter ends them at exit.
_POOLED = (
    ("concurrent.futures.thread", "_threads_queues"),
    ("concurrent.futures.process", "_threads_wakeups"),
)

# What is read by one call and set by another, and seldom changed.
_SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (sys.gettrace, sys.settrace),
    (sys.getprofile, sys.setprofile),
    (threading.gettrace, threading.settrace),
    (threading.getprofile, threading.setprofile),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (sys.getswitchinterval, sys.setswitchinterval),
    (gc.isenabled, lambda enabled: gc.enable() if enabled else gc.disable()),
]


def _resource() -> Any:
    """The module of resource limits, without leaving a trace that it was imported."""
    known = "resource" in sys.modules
    module = importlib.import_module("resource")
    if not known:
        del sys.modules["resource"]
    return module


def _limits(resource: Any) -> dict[int, tuple[int, int]]:
    kinds = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
    return {kind: resource.getrlimit(kind) for kind in kinds}


def _raw_environment() -> dict[bytes, bytes]:
    """What is in `os.environ`, not decoded one by one."""
    raw: dict[bytes, bytes] = vars(os.environ)["_data"]
    return raw


def _open_directory() -> int | None:
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # it was deleted, or may not be read
        return None


def _is_open(stream: Any) -> bool:
    try:
        return not stream.closed
    except (AttributeError, ValueError):  # None; or detached from what is below it
        return stream is None


def _reopened(name: str) -> io.TextIOWrapper:
    """A standard stream anew, for a task has closed it."""
    number = ("stdin", "stdout", "stderr").index(name.strip("_"))
    stream = os.fdopen(number, "w" if number else "r", encoding="utf-8", errors="backslashreplace")
    assert isinstance(stream, io.TextIOWrapper)
    stream.reconfigure(line_buffering=True)
    return stream


def _open_descriptors() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(FileNotFoundError):
            return sum(1 for _ in os.scandir(folder))
    return 0

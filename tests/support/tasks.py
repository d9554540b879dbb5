"""What test sessions run: in a module of its own, for each process that runs tasks imports it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

DEADLINE = 60.0  # seconds; only a failing test waits so long


def until(condition: Callable[[], T], what: str = "", seconds: float = DEADLINE) -> T:
    """Look until the condition holds, and return it; fails the test if it never does."""
    end = time.monotonic() + seconds
    pause = threading.Event()
    while not (result := condition()):
        assert time.monotonic() < end, f"not so within {seconds} s: {what or condition}"
        pause.wait(0.01)
    return result


@dataclass(frozen=True)
class Gate:
    """Holds tasks until the test opens it, and tells which have come; a directory of files."""

    folder: Path

    def hold(self, value: Any = None) -> Any:
        """Say that a task has come, block until the gate is open, and return `value`."""
        self.arrive(value)
        until(self.is_open, "gate opened", 2 * DEADLINE)  # no test waits so long for another thing
        return value

    def arrive(self, value: Any = None) -> int:
        """Say that a task has come; returns how many had."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = len(self.arrivals())
        name = f"{before:04d}-{os.getpid()}-{value}"
        (self.folder / name.replace("/", "_")).touch()
        return before

    def is_open(self) -> bool:
        return self.folder.with_suffix(".open").exists()

    def open(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.with_suffix(".open").touch()

    def arrivals(self) -> list[str]:
        """What has come: `number-pid-value`, in order."""
        return sorted(p.name for p in self.folder.iterdir()) if self.folder.exists() else []

    def await_arrivals(self, count: int = 1) -> list[int]:
        """Process ids of the first so many tasks, once they have come."""
        until(lambda: len(self.arrivals()) >= count, f"{count} tasks at the gate")
        return [int(name.split("-")[1]) for name in self.arrivals()]


def double(x: Any) -> Any:
    return x + x


def add(*args: Any, **kwargs: Any) -> Any:
    return sum(args) + sum(kwargs.values())


def odd_fails(x: int) -> int:
    if x % 2:
        raise ValueError(f"{x} is odd")
    return x


def hold_after_the_first(gate: Gate, i: int) -> int:
    """Let all pass until the first has come: in which order tasks begin is not promised."""
    if i and any(name.endswith("-0") for name in gate.arrivals()):
        gate.hold(i)
    else:
        gate.arrive(i)
    return i


def chained() -> None:
    try:
        dict[str, int]()["absent"]
    except KeyError as error:
        raise RuntimeError("outer") from error


def exits() -> None:
    raise SystemExit("bye")


class ExitsWhenUnpickled:
    """Like an object of a module that calls `sys.exit` when it is imported."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return sys.exit, ("while unpickling",)


def returns_what_exits() -> object:
    return ExitsWhenUnpickled()


def interrupts() -> None:
    raise KeyboardInterrupt


def new_lock() -> object:
    return threading.Lock()


def process_id(_: object = None) -> int:
    return os.getpid()


class Multiplier:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def times(self, x: int) -> int:
        return self.factor * x

    def __call__(self, x: int) -> int:
        return self.times(x)


_settings: list[object] = []


def remember(*values: object) -> None:
    _settings.extend(values)


def remembered() -> list[object]:
    return _settings


def fail_to_start() -> None:
    raise OSError("no licence here")


async def answer() -> int:
    return 42


def fail(text: str) -> None:
    raise ValueError(text)


def shout(text: str) -> None:
    sys.stdout.write(text + "\n")
    os.write(2, b"to stderr\n")


def shout_and_hold(text: str, gate: Gate) -> None:
    shout(text)
    gate.hold()


def shout_and_crash(text: str) -> None:
    shout(text)
    os._exit(3)


def parent_once(gate: Gate, times: int) -> int:
    """Kill the worker that runs this, the first so many times; returns how often it began."""
    before = gate.arrive()
    if before < times:
        os.kill(os.getppid(), signal.SIGKILL)
        threading.Event().wait()
    return before + 1


def hold_the_first(gate: Gate) -> int:
    """Block for ever the first time, and return at once from then on."""
    before = gate.arrive()
    if not before:
        threading.Event().wait()
    return before + 1


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def kill_self() -> None:
    say("about to be killed")
    os.kill(os.getpid(), signal.SIGKILL)


def exit_at_once() -> None:
    say("about to exit")
    os._exit(7)


def segfault() -> None:
    say("about to crash")
    ctypes.string_at(0)


def abort() -> None:
    say("about to abort")
    os.abort()


class FailsToUnpickle:
    def __reduce__(self) -> tuple[Any, ...]:
        return _raise, ("not here",)


class CrashesAtUnpickle:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


class FailsToPickle:
    def __reduce__(self) -> tuple[Any, ...]:
        raise RuntimeError("never pickled")


class CrashesAtPickle:
    def __reduce__(self) -> tuple[Any, ...]:
        os._exit(11)


def _raise(text: str) -> None:
    raise LookupError(text)


def start_and_leave(path: Path) -> int:
    """Start a process that would go on for an hour; its id goes into a file."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    path.write_text(str(process.pid))
    return process.pid


def pair_with(i: int) -> Callable[[Any], tuple[Any, int]]:
    """A function of its own for each `i`, so that they are stored apart."""
    return lambda x: (x, i)


def crash_to_start() -> None:
    os._exit(5)

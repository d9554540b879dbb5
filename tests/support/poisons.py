"""Tasks that spoil the process they run in, and one that notices if it was spoilt.

In a module of its own, for the processes that run tasks import it, and so does the benchmark.
"""

from __future__ import annotations

import io
import locale
import os
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["ENDS_ITS_PROCESS", "POISONS", "innocent"]

_kept: list[object] = []


def leaks_descriptors() -> None:
    try:
        while True:
            os.dup(0)
    except OSError:
        pass


def closes_stdin() -> None:
    os.close(0)


def closes_stdout() -> None:
    os.close(1)


def closes_stderr() -> None:
    os.close(2)


def replaces_streams() -> None:
    sys.stdout = io.StringIO()
    sys.stderr = None


def closes_streams() -> None:
    sys.stdout.close()
    sys.stdin.close()


def changes_directory() -> None:
    os.chdir("/")


def deletes_its_directory() -> None:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    Path(folder).rmdir()


def sets_umask() -> None:
    os.umask(0o777)


def empties_environment() -> None:
    os.environ.clear()
    os.environ["TMPDIR"] = "/nowhere"


def sets_locale() -> None:
    for name in ("de_DE.UTF-8", "C.UTF-8", "POSIX"):
        try:
            locale.setlocale(locale.LC_ALL, name)
        except locale.Error:
            continue


def ignores_signals() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def blocks_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def leaves_an_alarm() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def lowers_soft_limits() -> None:
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS):
        resource.setrlimit(kind, (4, resource.getrlimit(kind)[1]))


def lowers_hard_limits() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))


def leaves_hooks() -> None:
    def listen(*_: object) -> None:
        _kept.append(_)

    threading.setprofile(listen)
    sys.setprofile(listen)


def lowers_the_recursion_limit() -> None:
    sys.setrecursionlimit(60)


def leaves_a_thread() -> None:
    threading.Thread(target=threading.Event().wait).start()


def leaves_many_threads() -> None:
    for _ in range(200):
        threading.Thread(target=threading.Event().wait, daemon=True).start()


def leaks_memory() -> None:
    _kept.append(b"x" * (200 << 20))


def interrupts_itself_later() -> None:
    threading.Timer(0.02, signal.raise_signal, (signal.SIGINT,)).start()


def closes_everything() -> None:
    os.closerange(3, 1000)
    threading.Event().wait()


def becomes_another_program() -> None:
    os.execv("/bin/sleep", ["sleep", "60"])


ENDS_ITS_PROCESS = [closes_everything, becomes_another_program]

POISONS: list[Callable[[], None]] = [
    leaks_descriptors,
    closes_stdin,
    closes_stdout,
    closes_stderr,
    replaces_streams,
    closes_streams,
    changes_directory,
    deletes_its_directory,
    sets_umask,
    empties_environment,
    sets_locale,
    ignores_signals,
    blocks_signals,
    leaves_an_alarm,
    lowers_soft_limits,
    lowers_hard_limits,
    leaves_hooks,
    lowers_the_recursion_limit,
    leaves_a_thread,
    leaves_many_threads,
    leaks_memory,
    interrupts_itself_later,
    *ENDS_ITS_PROCESS,
]


def surroundings() -> dict[str, object]:
    """What a task should find as the first one did."""
    mask = os.umask(0)
    os.umask(mask)
    return {
        "directory": str(Path.cwd()),
        "umask": mask,
        # The variable names a file of this very process, which another has elsewhere.
        "environment": {k: v for k, v in os.environ.items() if k != "STARBURST_MAIN"},
        "locale": locale.setlocale(locale.LC_ALL),
        "handlers": [signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGTERM)],
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "limits": [
            resource.getrlimit(kind) for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)
        ],
        "profile": (sys.getprofile(), threading.getprofile()),
        "recursion": sys.getrecursionlimit(),
        "streams": [
            (stream.fileno(), stream.closed) for stream in (sys.stdin, sys.stdout, sys.stderr)
        ],
        "threads": threading.active_count() > 100,
    }


def innocent(number: int) -> tuple[int, dict[str, object]]:
    """Use a little of everything, and tell what was found."""
    sys.stdout.write(f"{number}\n")
    found = surroundings()
    with tempfile.TemporaryFile() as file:
        file.write(b"here")
    assert sys.stdin.read() == ""
    os.write(2, b"")
    return number, found

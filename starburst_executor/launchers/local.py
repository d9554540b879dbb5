"""Workers as processes of this machine.

What happens on both sides, and what tells a live worker from a dead one:

    client                                    worker (its own process session)
      opens a lock file, takes flock
      starts the worker with that fd ------->   holds the lock for as long as it lives
      writes its pid, closes its own fd         `hold_lock`: keeps the fd from its children
      may end at any time                       goes on

    anyone with the same user on this machine, later
      the lock cannot be taken: the worker lives, and the pid in the file is its own
      the lock can be taken: the worker has ended, however it ended

A pid never counts as proof of life, because pids are reused.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import signal
import site
import subprocess
import sys
import threading
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import starburst_executor
from starburst_executor.config import data_home
from starburst_executor.environment import bootstrap
from starburst_executor.errors import LaunchFailed, StarburstError
from starburst_executor.protocol.origin import Origin
from starburst_executor.runtime import Runtime, SystemRuntime

__all__ = ["LocalLauncher", "hold_lock"]

log = logging.getLogger(__name__)

_LOCK_FD = "STARBURST_LOCK_FD"

_POLL_SECONDS = 0.01  # between checks whether a signalled worker has ended

# A killed process is gone at once, unless the kernel waits for a device or a network disk.
_KILL_SECONDS = 10.0

_TAIL_BYTES = 4096  # a traceback and some lines before it


def hold_lock() -> bool:
    """Keep this worker's lock from its children; call it before the worker starts any process.

    A process that inherits the lock would make a dead worker look alive. `subprocess` closes
    other descriptors by itself; other ways to start a program do not. A bare `fork` copies all
    of them, so a worker must not fork processes that outlive it.

    Does nothing in a worker that no `LocalLauncher` started.

    Returns:
        Whether a `LocalLauncher` started this worker.
    """
    number = os.environ.pop(_LOCK_FD, None)
    if number is None:
        return False
    fd = int(number)
    os.set_inheritable(fd, False)
    _write_pid(fd, os.getpid())  # again: a client killed in mid-launch could not
    return True


class LocalLauncher:
    """Workers on this machine, which carry on when the client that started them ends or is killed.

    They run in the client's directory and environment, without a terminal. A worker is started
    with Python's `-P`, so that no file in that directory shadows a module of the standard library;
    tasks are unaffected, because they run in their own processes. If the package is not installed
    (a checkout, a vendored copy), its folder goes first on the worker's `PYTHONPATH`, so that a
    worker runs exactly the code that its client runs.

    Every process of the same user on this machine sees and stops the same workers. Ended workers
    that this process started are reaped at its next `launch`, `live`, `ended` or `stop`.

    Args:
        folder: Where to keep locks and logs of workers; defaults to `data_home() / "workers"`.
        command: What to run instead of this package's worker, with `SESSION_URL --id WORKER_ID`
            appended.
        runtime: Clock, waits and ids.
        origin: Where the session was created: workers start in its directory, or without it, in
            this process's.
    """

    name = "local"
    lag = 0.0  # the lock exists before its worker does

    def __init__(
        self,
        folder: Path | None = None,
        command: Sequence[str] | None = None,
        runtime: Runtime | None = None,
        origin: Origin | None = None,
    ) -> None:
        self._directory = (origin and origin.directory) or None
        self._folder = data_home() / "workers" if folder is None else folder
        self.command = tuple(
            command or (sys.executable, "-P", "-m", "starburst_executor", "worker")
        )
        self._runtime = SystemRuntime() if runtime is None else runtime
        self._halted = False

    def launch(self, session_url: str, count: int) -> list[str]:
        """Start `count` workers; return their ids.

        Raises:
            LaunchFailed: the directory to start them in is gone.
            OSError: a worker could not be started; a note names those that were.
        """
        _children.collect()
        if self._directory is not None and not Path(self._directory).is_dir():
            raise LaunchFailed(_directory_missing(session_url, self._directory))
        started: list[str] = []
        for _ in range(count):
            if self._halted:
                break
            worker_id = "w-" + self._runtime.new_id(10)
            try:
                self._start(session_url, worker_id)
            except OSError as error:
                error.add_note(
                    f"started {len(started)} of {count} workers of {session_url}: "
                    f"{', '.join(started) or '-'}"
                )
                raise
            started.append(worker_id)
        return started

    def live(self, session_url: str) -> set[str]:
        """Ids of the workers whose lock is held."""
        _children.collect()
        return {lock.name for lock in self._locks(session_url) if _is_held(lock)}

    def ended(self, session_url: str) -> set[str]:
        """Ids of the workers whose lock nobody holds any more."""
        _children.collect()
        return {lock.name for lock in self._locks(session_url) if not _is_held(lock)}

    def stop(
        self,
        session_url: str,
        worker_ids: Collection[str] | None = None,
        *,
        grace: float,
    ) -> None:
        """Stop workers of any client on this machine: SIGTERM, then SIGKILL after `grace` seconds.

        Raises:
            StarburstError: one survived SIGKILL.
        """
        wanted = self.live(session_url) if worker_ids is None else worker_ids
        locks = [self._session_folder(session_url) / worker_id for worker_id in wanted]
        surviving = self._end(locks, signal.SIGTERM, grace)
        unkillable = self._end(surviving, signal.SIGKILL, _KILL_SECONDS)
        if unkillable:
            raise StarburstError(_unkillable(unkillable))

    def forget(self, session_url: str) -> None:
        """Remove locks and logs of ended workers; live ones stay, so that `stop` finds them."""
        folder = self._session_folder(session_url)
        ended = self.ended(session_url)
        for worker_id in ended:
            _log_of(folder / worker_id).unlink(missing_ok=True)
            (folder / worker_id).unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise

    def platform(self) -> str:
        """This machine's platform."""
        return bootstrap.here()

    def log_tail(self, session_url: str, worker_id: str) -> str:
        """The last lines of the worker's stdout and stderr."""
        try:
            with _log_of(self._session_folder(session_url) / worker_id).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return text if size <= _TAIL_BYTES else text.partition("\n")[2] or text

    def taken_away(self, session_url: str, worker_id: str) -> bool:
        """Always False: a lock does not tell how its holder ended."""
        return False

    def shortage(self, session_url: str) -> str:
        """This machine starts as many as it is told to."""
        return ""

    def halt(self) -> None:
        """Start no more workers."""
        self._halted = True

    def _start(self, session_url: str, worker_id: str) -> None:
        folder = self._session_folder(session_url)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = folder / worker_id
        fd = self._held_lock(lock)
        try:
            pid = self._spawn(session_url, lock, fd)
            _write_pid(fd, pid)
        except OSError:
            lock.unlink()
            raise
        finally:
            os.close(fd)
        log.info(
            "started worker %s (pid %d) for %s; it prints to %s",
            worker_id,
            pid,
            session_url,
            _log_of(lock),
        )

    def _held_lock(self, lock: Path) -> int:
        # Renamed once it is held: an unheld lock would look like an ended worker's.
        unheld = self._folder / f"{lock.name}.new"
        fd = _above_standard(os.open(unheld, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unheld.rename(lock)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _spawn(self, session_url: str, lock: Path, fd: int) -> int:
        with _log_of(lock).open("ab") as output:
            process = subprocess.Popen(
                [*self.command, session_url, "--id", lock.name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_worker_environment(fd),
                cwd=self._directory,
                pass_fds=(fd,),
                start_new_session=True,
            )
        return _children.adopt(process, lock)

    def _session_folder(self, session_url: str) -> Path:
        return self._folder / hashlib.sha256(session_url.encode()).hexdigest()[:32]

    def _locks(self, session_url: str) -> Iterable[Path]:
        folder = self._session_folder(session_url)
        try:
            return [path for path in folder.iterdir() if not path.suffix]
        except FileNotFoundError:
            return []

    def _end(self, locks: Iterable[Path], number: signal.Signals, seconds: float) -> list[Path]:
        """Send a signal and wait up to `seconds`; return the locks of workers still alive."""
        pause = self._runtime.signal()
        deadline = self._runtime.monotonic() + seconds
        signalled: set[Path] = set()
        left = [lock for lock in locks if _is_alive(lock)]
        while left:
            signalled.update(lock for lock in left if lock not in signalled and _send(lock, number))
            if self._runtime.monotonic() >= deadline:
                break
            pause.wait(_POLL_SECONDS)
            left = [lock for lock in left if _is_alive(lock)]
        return left


class _Children:
    """The workers that this process started, through any launcher, and must reap when they end."""

    def __init__(self) -> None:
        self._pids: dict[Path, int] = {}
        # A pid that another thread reaped may belong to any process by now.
        self._lock = threading.Lock()

    def adopt(self, process: subprocess.Popen[bytes], lock: Path) -> int:
        # The worker must outlive the `Popen` object, which would otherwise warn about it.
        process.returncode = 0
        with self._lock:
            self._pids[lock] = process.pid
        return process.pid

    def collect(self) -> None:
        with self._lock:
            self._pids = {lock: pid for lock, pid in self._pids.items() if _still_runs(pid)}

    def __contains__(self, lock: Path) -> bool:
        return lock in self._pids


_children = _Children()


def _still_runs(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] == 0
    except (
        ChildProcessError
    ):  # already reaped, or this process is a fork of the one that started it
        return False


def _is_alive(lock: Path) -> bool:
    _children.collect()
    return _is_held(lock) or lock in _children


def _is_held(lock: Path) -> bool:
    try:
        fd = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two processes checking at once do not take each other for a worker.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _above_standard(fd: int) -> int:
    """The same file as descriptor 3 or higher: 0 to 2 are the worker's standard streams.

    A client started without some of its standard streams gets their numbers for files it opens.
    """
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def _write_pid(fd: int, pid: int) -> None:
    os.pwrite(fd, f"{pid}\n".encode(), 0)


def _pid_of(lock: Path) -> int | None:
    try:
        text = lock.read_text()
    except FileNotFoundError:
        return None
    return int(text) if text.endswith("\n") else None


def _send(lock: Path, number: signal.Signals) -> bool:
    """Signal the worker if its pid is known yet; its lock is held, so the pid is still its own."""
    pid = _pid_of(lock)
    if pid is None:
        return False
    with suppress(ProcessLookupError):  # it ended just now
        os.kill(pid, number)
    return True


def _unkillable(locks: Sequence[Path]) -> str:
    names = ", ".join(f"{lock.name} (pid {_pid_of(lock) or 'not known'})" for lock in locks)
    return (
        f"{len(locks)} workers are still alive {_KILL_SECONDS:.0f} s after SIGKILL: {names}. "
        "Either the kernel is waiting for a disk or device on their behalf, or they run on another "
        "machine that shares this folder, or a process that they forked holds their lock. Find "
        f"the process that has the files in {locks[0].parent} open, and end it there."
    )


def _directory_missing(session_url: str, directory: str) -> str:
    return (
        f"workers of {session_url} start in {directory}, the working directory of the program that "
        "created the session, and there is no such directory on this machine: it was removed, or "
        "the session was created on another machine. Tasks may need its files. Restore it "
        f"(mkdir -p {directory}) and attach again, or attach on the machine that has it; nothing "
        "is lost meanwhile."
    )


def _log_of(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.log")


def _worker_environment(fd: int) -> dict[str, str]:
    environment = {**os.environ, _LOCK_FD: str(fd)}
    source = Path(starburst_executor.__file__).resolve().parent.parent
    installed = {Path(p).resolve() for p in (*site.getsitepackages(), site.getusersitepackages())}
    # Never for an installed package: all of site-packages would then precede the standard library.
    if source not in installed:
        others = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(source), others)))
    return environment

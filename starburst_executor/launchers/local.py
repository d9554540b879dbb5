"""Workers as processes of this machine."""

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

import platformdirs

from starburst_executor.environment import bootstrap
from starburst_executor.errors import LaunchFailed, StarburstError
from starburst_executor.protocol.origin import Origin
from starburst_executor.runtime import Runtime, SystemRuntime

__all__ = ["LocalLauncher", "data_home", "hold_lock"]

log = logging.getLogger(__name__)

_LOCK_FD = "STARBURST_LOCK_FD"

_LOOK_SECONDS = 0.01  # between looks at whether a worker that was told to end has ended

_KILL_SECONDS = (
    10.0  # a killed process is gone at once, unless the kernel waits for a device or a network disk
)

_TAIL_BYTES = 4096  # a traceback and some lines before it


def data_home() -> Path:
    """The folder for what belongs to this user on this machine: `STARBURST_HOME`, else the platform's own place."""
    named = os.environ.get("STARBURST_HOME")
    if named:
        return Path(named).expanduser().absolute()
    return platformdirs.user_data_path("starburst_executor")


def hold_lock() -> bool:
    """Keep this worker's lock for the worker alone; call it before anything is started from the worker.

    A process that inherits the lock would make a dead worker look alive. `subprocess` closes
    foreign descriptors by itself, other ways to start a program do not. A bare `fork` copies all
    of them, so a worker must not fork processes that outlive it.

    Does nothing in a worker that no `LocalLauncher` started.

    Returns:
        Whether one did.
    """
    number = os.environ.pop(_LOCK_FD, None)
    if number is None:
        return False
    fd = int(number)
    os.set_inheritable(fd, False)
    _write_pid(fd, os.getpid())  # again, for a client killed in mid-launch could not
    return True


class LocalLauncher:
    """Workers on this machine, which go on when the client that started them ends or is killed.

    They run in the client's directory and environment, without a terminal. A worker is started with
    Python's `-P`, so that no file of that directory stands in for a module of the standard library;
    tasks are not affected, for they run in processes of their own. Where the package is not installed
    (a checkout, a vendored copy) its folder goes to the front of the worker's `PYTHONPATH`, so that a
    worker runs the very code that its client runs.

    Any process of the same user on this machine sees and stops the same workers. Ended workers that
    this process started are collected at its next call of `launch`, `live`, `ended` or `stop`.

    Args:
        folder: Where to note workers; default `data_home()/"workers"`.
        command: What to run instead of this package's worker; it gets `SESSION_URL --id WORKER_ID` added.
        runtime: Clock, waits and ids.
        origin: Where the session was made: workers start in its directory, else in that of this process.
    """

    name = "local"
    lag = 0.0  # a lock is there before its worker is

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
        """Start `count` workers; returns their ids.

        Raises:
            LaunchFailed: the directory that they start in is gone.
            OSError: a worker could not be started; a note names those that were.
        """
        _children.collect()
        if self._directory is not None and not Path(self._directory).is_dir():
            raise LaunchFailed(_gone(session_url, self._directory))
        started: list[str] = []
        for _ in range(count):
            if self._halted:
                break
            worker_id = "w-" + self._runtime.new_id(10)
            try:
                self._start(session_url, worker_id)
            except OSError as e:
                e.add_note(
                    f"started {len(started)} of {count} workers of {session_url}: {', '.join(started) or '-'}"
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
        """End workers of any client on this machine: SIGTERM, then SIGKILL after `grace` seconds.

        Raises:
            StarburstError: one could be neither ended nor killed.
        """
        wanted = self.live(session_url) if worker_ids is None else worker_ids
        locks = [self._session_folder(session_url) / worker_id for worker_id in wanted]
        stubborn = self._end(locks, signal.SIGTERM, grace)
        immortal = self._end(stubborn, signal.SIGKILL, _KILL_SECONDS)
        if immortal:
            raise StarburstError(_immortal(immortal))

    def forget(self, session_url: str) -> None:
        """Remove locks and logs of workers that have ended; live workers stay known, so that `stop` finds them."""
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
        """That of this machine."""
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
        """Never known: a lock does not tell how its holder ended."""
        return False

    def halt(self) -> None:
        """Start none from now on."""
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
        # Under another name until it is held, or whoever looked between would take it for an ended worker's.
        nascent = self._folder / f"{lock.name}.new"
        fd = _above_standard(os.open(nascent, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            nascent.rename(lock)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _spawn(self, session_url: str, lock: Path, fd: int) -> int:
        with _log_of(lock).open("ab") as printed:
            process = subprocess.Popen(
                [*self.command, session_url, "--id", lock.name],
                stdin=subprocess.DEVNULL,
                stdout=printed,
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
        """Send a signal and wait up to `seconds`; returns the locks of those that still live."""
        pause = self._runtime.signal()
        deadline = self._runtime.monotonic() + seconds
        told: set[Path] = set()
        left = [lock for lock in locks if _is_alive(lock)]
        while left:
            told.update(lock for lock in left if lock not in told and _send(lock, number))
            if self._runtime.monotonic() >= deadline:
                break
            pause.wait(_LOOK_SECONDS)
            left = [lock for lock in left if _is_alive(lock)]
        return left


class _Children:
    """The workers that this process started, by whichever launcher, and has to collect when they end."""

    def __init__(self) -> None:
        self._pids: dict[Path, int] = {}
        # A pid that another thread collected may be anybody's by now.
        self._lock = threading.Lock()

    def adopt(self, process: subprocess.Popen[bytes], lock: Path) -> int:
        # The worker is to outlive the object, which otherwise warns of just that.
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
    ):  # somebody else collected it, or this process is a fork of the one that started it
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
        # Shared, so that two who look do not take each other for a worker.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _above_standard(fd: int) -> int:
    """The same file as 3 or higher: in the worker, 0 to 2 are what it reads from and prints to.

    A client that was started without some of these gets their numbers for the files that it opens.
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
    """Signal the worker if its pid is known yet; its lock was just seen held, so that the pid is still its own."""
    pid = _pid_of(lock)
    if pid is None:
        return False
    with suppress(ProcessLookupError):  # it ended just now
        os.kill(pid, number)
    return True


def _immortal(locks: Sequence[Path]) -> str:
    names = ", ".join(f"{lock.name} (pid {_pid_of(lock) or 'not known'})" for lock in locks)
    return (
        f"{len(locks)} workers are still there {_KILL_SECONDS:.0f} s after SIGKILL: {names}. Either the kernel waits "
        "for a disk or device on their behalf, or they run on another machine that shares this folder, or a process "
        f"that they forked keeps their lock. Look for who has the files in {locks[0].parent} open, and end it there."
    )


def _gone(session_url: str, directory: str) -> str:
    return (
        f"workers of {session_url} start in {directory}, the working directory of the program that made the "
        "session, and there is no such directory on this machine: it was removed, or the session was made on "
        f"another machine. Tasks may need what is in it. Bring it back (mkdir -p {directory}) and attach again, "
        "or attach where it is; nothing is lost meanwhile."
    )


def _log_of(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.log")


def _worker_environment(fd: int) -> dict[str, str]:
    environment = {**os.environ, _LOCK_FD: str(fd)}
    source = Path(__file__).resolve().parents[2]
    installed = {Path(p).resolve() for p in (*site.getsitepackages(), site.getusersitepackages())}
    # Never for an installed package: PYTHONPATH comes before the standard library, all of site-packages would.
    if source not in installed:
        others = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(source), others)))
    return environment

"""The worker as a process: what `python -m starburst_executor worker SESSION_URL` runs."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from starburst_executor.coordination.autoscaler import Autoscaler
from starburst_executor.errors import LocalDiskError, StarburstError, VersionMismatch
from starburst_executor.launchers.base import Launcher
from starburst_executor.launchers.local import LocalLauncher, hold_lock
from starburst_executor.nesting import hand_down_depth
from starburst_executor.protocol.manifest import Heartbeat, Manifest, WorkerState
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.worker_spec import MARKET_VARIABLE
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.base import local_disk
from starburst_executor.storage.url import open_store, split_session_url
from starburst_executor.worker import memory
from starburst_executor.worker.cache import DiskCache
from starburst_executor.worker.faults import reason_to_leave
from starburst_executor.worker.loop import Worker
from starburst_executor.worker.pool import ProcessPool
from starburst_executor.worker.pulse import Watchdog
from starburst_executor.worker.stop_signals import stopped_by_signals

__all__ = ["serve"]

T = TypeVar("T")

log = logging.getLogger(__name__)

# A role that was just made is refused for a while, and an outage may be over in a minute or two; a
# worker that can never reach its store must say so before it has cost much.
_START_SECONDS = 120.0
_ECS_TASK = "@ecs-task"  # what `aws.ecs` gives to each of the tasks that it starts at once


def serve(session_url: str, worker_id: str | None = None) -> str:
    """Work for a session until there is no reason to stay; returns why it left.

    On SIGTERM and SIGINT it hands back what it holds and leaves within two seconds; so it does when
    EC2 gives notice that it is reclaiming the Spot instance it runs on, if `STARBURST_MARKET` says
    that it is one.

    Args:
        session_url: `<store>/sessions/<session id>`.
        worker_id: This worker's id, or "@ecs-task" for its ECS task's; by default a new one.

    Raises:
        SessionNotFound: no such session.
        VersionMismatch: the session's pickles were made by another Python version.
    """
    _open_standard_files()
    launched_here = hold_lock()
    in_ecs = worker_id == _ECS_TASK
    if worker_id == _ECS_TASK:
        from starburst_executor.aws.ecs.metadata import worker_id_of_task

        worker_id = worker_id_of_task()
    store_url, session_id = split_session_url(session_url)
    runtime = SystemRuntime(width=4)
    session = Session(open_store(store_url), session_id, runtime)
    try:
        manifest = _when_it_answers(session, session.check_open)
        _check_python(manifest)
        hand_down_depth(manifest.depth)
        launcher: Launcher | None = None
        if launched_here:
            launcher = LocalLauncher(origin=manifest.origin)
        elif in_ecs:
            launcher = _open_ecs(manifest)
        name = worker_id or f"w-{runtime.new_id(10)}"
        return _serve_in_folder(session, manifest, name, launcher, launched_here)
    finally:
        runtime.close()
        session.store.close()


def _serve_in_folder(
    session: Session,
    manifest: Manifest,
    worker_id: str,
    launcher: Launcher | None,
    launched_here: bool,
) -> str:
    folder = None
    try:
        with _temp_folder() as folder:
            if manifest.origin is not None:
                with local_disk(folder):
                    manifest.origin.leave_to_children(folder, same_machine=launched_here)
            return _serve(session, manifest, worker_id, launcher, folder)
    except LocalDiskError as error:  # before there was anything to hand back
        reason = reason_to_leave(error, folder or _temp_root())
        log.error("worker %s: %s", worker_id, reason)
        last = _describe(worker_id, manifest, session.runtime.time())
        session.bury(replace(last, state=WorkerState.BROKEN, reason=reason))
        return reason


@contextmanager
def _temp_folder() -> Iterator[Path]:
    """The folder for this worker's files, removed at the end as far as it can be.

    Raises:
        LocalDiskError: it cannot be made.
    """
    with local_disk(_temp_root()):
        made = tempfile.TemporaryDirectory(prefix="starburst-", ignore_cleanup_errors=True)
    with made as folder:
        yield Path(folder)


def _temp_root() -> Path:
    """Where temp folders are made, or would be if it were possible."""
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        return Path(os.environ.get("TMPDIR", "/tmp"))


def _when_it_answers(session: Session, call: Callable[[], T]) -> T:
    """Do what a worker cannot start without, through a short outage or refusal of the store."""
    return session.outlast(call, _START_SECONDS)


def _open_standard_files() -> None:
    """Reserve descriptors 0 to 2: child processes use those as their standard files."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def _open_ecs(manifest: Manifest) -> Launcher | None:
    """What starts more workers like this one; None, with the reason in the log, if nothing can."""
    from starburst_executor.aws.ecs.launcher import open_ecs_within

    try:
        return open_ecs_within(manifest.spec, manifest.deployment)
    except (StarburstError, ValueError) as error:
        log.warning("this worker cannot start others: %s", error)
        return None


def _serve(
    session: Session,
    manifest: Manifest,
    worker_id: str,
    launcher: Launcher | None,
    folder: Path,
) -> str:
    cache = DiskCache(session, folder / "library", _disk_of_a_cache(manifest, folder))
    aside = ThreadPoolExecutor(2, "starburst-transfer")
    aside.submit(int).result()  # start one thread while threads can be started
    pool = ProcessPool(
        manifest.spec.slots,
        folder=folder / "slots",
        initializer=_initializer(session, cache, manifest),
        runtime=session.runtime,
        signal=session.runtime.signal(),
        jobs_max=manifest.limits.max_tasks_per_child,
        memory_max=_memory_of_a_child(manifest),
    )
    autoscaler = _autoscaler(session, manifest, launcher, pool)
    watchdog: Watchdog | None = None

    def move(call: Callable[[], None]) -> None:
        # If a second thread cannot be started, the first will get to it.
        with suppress(RuntimeError):
            aside.submit(call)

    try:
        describe = _describe(worker_id, manifest, session.runtime.time())
        worker = Worker(
            session, worker_id, pool, cache, move, manifest, describe, autoscaler, folder
        )
        watchdog = Watchdog(worker.pulse, session.runtime)
        with stopped_by_signals(worker.stop):
            _when_it_answers(session, worker.heartbeats.beat)
            _start("starburst-beat", worker.heartbeats.run)
            _start("starburst-watchdog", watchdog.run)
            if autoscaler is not None:
                _start("starburst-autoscaler", autoscaler.run)
            return _work(worker, manifest)
    finally:
        if autoscaler is not None:
            autoscaler.close()
        pool.close()
        aside.shutdown(wait=False, cancel_futures=True)
        if watchdog is not None:
            watchdog.close()


def _start(name: str, run: Callable[[], None]) -> None:
    threading.Thread(target=run, name=name, daemon=True).start()


def _work(worker: Worker, manifest: Manifest) -> str:
    """Work until there is no reason to stay; returns the reason to leave."""
    log.info("worker %s is at session %s", worker.id, manifest.session_id)
    with _spot_watched(worker, manifest):
        reason = worker.run()
    worker.heartbeats.close()
    return reason


@contextmanager
def _spot_watched(worker: Worker, manifest: Manifest) -> Iterator[None]:
    """Make the worker leave when its Spot instance is reclaimed; Fargate itself sends SIGTERM."""
    on_ec2 = manifest.spec.launch_type == "EC2"
    if not on_ec2 or os.environ.get(MARKET_VARIABLE) != "spot":
        yield
        return
    from starburst_executor.aws.ecs.spot_notice import SpotNotice

    notice = SpotNotice(worker.stop)
    try:
        yield
    finally:
        notice.close()


def _autoscaler(
    session: Session,
    manifest: Manifest,
    launcher: Launcher | None,
    pool: ProcessPool,
) -> Autoscaler | None:
    """What starts other workers, if this one can."""
    if launcher is None:
        return None

    def broken(error: Exception) -> None:
        log.error("this worker starts no more workers: %s", error)
        autoscaler.close()

    autoscaler = Autoscaler(session, launcher, manifest, broken, pool.signal.set)
    return autoscaler


def _memory_of_a_child(manifest: Manifest) -> float:
    """Bytes that a child may keep between tasks: three quarters of a slot's share of what is here.

    Workers on this machine share it; one on ECS has its container to itself.
    """
    here = manifest.workers if manifest.spec.launcher == "local" else 1
    return 0.75 * memory.available() / (here * manifest.spec.slots)


def _disk_of_a_cache(manifest: Manifest, folder: Path) -> float:
    """Bytes that a worker may keep of what tasks need: half of its share of the free disk."""
    here = manifest.workers if manifest.spec.launcher == "local" else 1
    with local_disk(folder):
        return shutil.disk_usage(folder).free / 2 / here


def _initializer(session: Session, cache: DiskCache, manifest: Manifest) -> Path | None:
    if manifest.initializer is None:
        return None
    initializer = manifest.initializer
    cache.pin(initializer)

    def fetch() -> Path:
        cache.fetch(cache.missing(initializer))
        return cache.function(initializer)

    return _when_it_answers(session, fetch)


def _check_python(manifest: Manifest) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if manifest.python != here:
        raise VersionMismatch(
            f"session {manifest.session_id} was created with Python {manifest.python} and this "
            f"worker runs Python {here}: their pickles are not compatible. Start workers with "
            f"Python {manifest.python}."
        )


def _describe(worker_id: str, manifest: Manifest, now: float) -> Heartbeat:
    return Heartbeat(
        worker=worker_id,
        host=socket.gethostname(),
        pid=os.getpid(),
        python=".".join(map(str, sys.version_info[:3])),
        package=version("starburst-executor"),
        started=now,
        slots=manifest.spec.slots,
        market=os.environ.get(MARKET_VARIABLE, ""),
    )

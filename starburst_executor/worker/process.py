"""The worker as a process: what `python -m starburst_executor worker SESSION_URL` runs."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from starburst_executor.coordination.autoscaler import Autoscaler
from starburst_executor.errors import StarburstError, VersionMismatch
from starburst_executor.launchers.base import Launcher
from starburst_executor.launchers.local import LocalLauncher, hold_lock
from starburst_executor.nesting import hand_down_depth
from starburst_executor.protocol.manifest import Heartbeat, Manifest
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.worker_spec import MARKET_VARIABLE
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.url import open_store, split_session_url
from starburst_executor.worker import memory
from starburst_executor.worker.cache import DiskCache
from starburst_executor.worker.loop import Worker
from starburst_executor.worker.pool import ProcessPool

__all__ = ["serve"]

T = TypeVar("T")

log = logging.getLogger(__name__)

# A role that was just made is refused for a while; one that lacks a permission is soon told so.
_REFUSED_SECONDS = 60.0
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
    manifest = _when_it_answers(session, session.check_open)
    _check_python(manifest)
    hand_down_depth(manifest.depth)
    launcher: Launcher | None = None
    if launched_here:
        launcher = LocalLauncher(origin=manifest.origin)
    elif in_ecs:
        launcher = _open_ecs(manifest)
    with tempfile.TemporaryDirectory(prefix="starburst-") as folder:
        if manifest.origin is not None:
            manifest.origin.leave_to_children(Path(folder), same_machine=launched_here)
        try:
            name = worker_id or f"w-{runtime.new_id(10)}"
            return _serve(session, manifest, name, launcher, Path(folder))
        finally:
            runtime.close()
            session.store.close()


def _when_it_answers(session: Session, call: Callable[[], T]) -> T:
    """Do what a worker cannot start without, through a short outage or refusal of the store."""
    return session.outlast(lambda: session.patiently(call), _REFUSED_SECONDS)


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
    cache = DiskCache(session, folder / "library")
    aside = ThreadPoolExecutor(2, "starburst-transfer")
    aside.submit(int).result()  # start one thread while threads can be started
    pool = ProcessPool(
        manifest.spec.slots,
        folder=folder / "slots",
        initializer=_when_it_answers(session, partial(_initializer, cache, manifest)),
        runtime=session.runtime,
        signal=session.runtime.signal(),
        jobs_max=manifest.limits.max_tasks_per_child,
        memory_max=_memory_of_a_child(manifest),
    )
    autoscaler = _autoscaler(session, manifest, launcher, pool)

    def move(call: Callable[[], None]) -> None:
        # If a second thread cannot be started, the first will get to it.
        with suppress(RuntimeError):
            aside.submit(call)

    try:
        describe = _describe(worker_id, manifest, session.runtime.time())
        worker = Worker(
            session, worker_id, pool, cache, move, manifest, describe, autoscaler, folder
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda n, _: worker.stop(f"it got {signal.Signals(n).name}"))
        _when_it_answers(session, worker.heartbeats.beat)
        beating = threading.Thread(target=worker.heartbeats.run, name="starburst-beat", daemon=True)
        beating.start()
        if autoscaler is not None:
            threading.Thread(
                target=autoscaler.run, name="starburst-autoscaler", daemon=True
            ).start()
        log.info("worker %s is at session %s", worker_id, session.id)
        with _spot_watched(worker, manifest):
            reason = worker.run()
        worker.heartbeats.close()
        return reason
    finally:
        if autoscaler is not None:
            autoscaler.close()
        pool.close()
        aside.shutdown(wait=False, cancel_futures=True)


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


def _initializer(cache: DiskCache, manifest: Manifest) -> Path | None:
    if manifest.initializer is None:
        return None
    cache.fetch(cache.missing(manifest.initializer))
    return cache.function(manifest.initializer)


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

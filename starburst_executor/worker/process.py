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
from importlib.metadata import version
from pathlib import Path

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

log = logging.getLogger(__name__)

_ECS_TASK = "@ecs-task"  # what `aws.ecs` gives to each of the tasks that it starts at once


def serve(session_url: str, worker_id: str | None = None) -> str:
    """Work for a session until there is no reason to stay; returns why it left.

    SIGTERM and SIGINT make it hand back what it holds and leave, within two seconds; so does EC2's notice that
    it takes back the Spot instance that this runs on, if `STARBURST_MARKET` says that it is one.

    Args:
        session_url: `<store>/sessions/<session id>`.
        worker_id: This worker's id, or "@ecs-task" for that of the ECS task it runs in; default a new one.

    Raises:
        SessionNotFound: no such session.
        VersionMismatch: the session's pickles are of another Python.
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
    manifest = session.check_open()
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


def _open_standard_files() -> None:
    """Let no other file have their numbers: children get those as what they read from and print to."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def _open_ecs(manifest: Manifest) -> Launcher | None:
    """What starts more of this worker's kind; None, and why in the log, if nothing can."""
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
    library = DiskCache(session, folder / "library")
    aside = ThreadPoolExecutor(2, "starburst-transfer")
    aside.submit(int).result()  # one thread is there when there can be no more
    slots = ProcessPool(
        manifest.spec.slots,
        folder=folder / "slots",
        initializer=_initializer(library, manifest),
        runtime=session.runtime,
        signal=session.runtime.signal(),
        jobs_max=manifest.limits.max_tasks_per_child,
        memory_max=_memory_of_a_child(manifest),
    )
    staff = _staff(session, manifest, launcher, slots)

    def move(call: Callable[[], None]) -> None:
        # Where a second thread cannot be started, the first will come to it.
        with suppress(RuntimeError):
            aside.submit(call)

    try:
        describe = _describe(worker_id, manifest, session.runtime.time())
        worker = Worker(session, worker_id, slots, library, move, manifest, describe, staff)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda n, _: worker.stop(f"it got {signal.Signals(n).name}"))
        worker.beater.beat()
        beating = threading.Thread(target=worker.beater.run, name="starburst-beat", daemon=True)
        beating.start()
        if staff is not None:
            threading.Thread(target=staff.run, name="starburst-staff", daemon=True).start()
        log.info("worker %s is at session %s", worker_id, session.id)
        with _spot_watched(worker, manifest):
            reason = worker.run()
        worker.beater.close()
        return reason
    finally:
        if staff is not None:
            staff.close()
        slots.close()
        aside.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _spot_watched(worker: Worker, manifest: Manifest) -> Iterator[None]:
    """Have the worker leave when its Spot instance is taken back; Fargate sends SIGTERM by itself."""
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


def _staff(
    session: Session,
    manifest: Manifest,
    launcher: Launcher | None,
    slots: ProcessPool,
) -> Autoscaler | None:
    """What starts other workers, if this one knows how."""
    if launcher is None:
        return None

    def broken(error: Exception) -> None:
        log.error("this worker starts no more of its kind: %s", error)
        staff.close()

    staff = Autoscaler(session, launcher, manifest, broken, slots.signal.set)
    return staff


def _memory_of_a_child(manifest: Manifest) -> float:
    """Bytes that a child may keep between tasks: three quarters of a slot's share of what is here.

    Workers on this machine share it; one on ECS has its container for itself.
    """
    here = manifest.workers if manifest.spec.launcher == "local" else 1
    return 0.75 * memory.available() / (here * manifest.spec.slots)


def _initializer(library: DiskCache, manifest: Manifest) -> Path | None:
    if manifest.initializer is None:
        return None
    library.fetch(library.missing(manifest.initializer))
    return library.function(manifest.initializer)


def _check_python(manifest: Manifest) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if manifest.python != here:
        raise VersionMismatch(
            f"session {manifest.session_id} was made with Python {manifest.python} and this worker runs "
            f"Python {here}: pickles of one cannot be used in the other. Start workers with Python "
            f"{manifest.python}."
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

"""Extending, scaling, ending and deleting sessions."""

from __future__ import annotations

import logging
import math
import numbers

from msgspec.structs import replace

from starburst_executor.costs.limits import check_workers
from starburst_executor.errors import (
    SessionNotFound,
)
from starburst_executor.launchers.base import Launcher
from starburst_executor.protocol.liveness import possibly_live_workers
from starburst_executor.protocol.manifest import Manifest, SessionState
from starburst_executor.protocol.session import Session

__all__ = ["delete", "extend", "scale", "terminate"]

log = logging.getLogger(__name__)


def extend(session: Session, seconds: float) -> Manifest:
    """Move the absolute time limit `seconds` on, from now if it has passed.

    The limit on idle time grows by as much. Neither can be shortened.

    Raises:
        TypeError, ValueError: `seconds` is not a positive number.
        SessionNotFound: there is no such session.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real):
        raise TypeError(f"seconds must be a number, not {seconds!r}")
    seconds = float(seconds)
    if not 0 < seconds < math.inf:
        raise ValueError(
            f"seconds must be positive, not {seconds!r}: a session can only be extended"
        )
    now = session.store.list(session.key("session.json"), limit=1).now
    before = session.load()
    deadline = max(before.deadline, now) + seconds

    def edit(manifest: Manifest) -> Manifest:
        limits = replace(manifest.limits, session_timeout=before.limits.session_timeout + seconds)
        return replace(manifest, deadline=max(manifest.deadline, deadline), limits=limits)

    return session.amend(edit)


def scale(session: Session, workers: int | None) -> Manifest:
    """Have at most so many workers at once from now on; None: as many as before the first `scale`.

    Raises:
        ValueError: they would cost more an hour than the session's `max_hourly_cost`.
        SessionNotFound: there is no such session.
    """

    def edit(manifest: Manifest) -> Manifest:
        before = manifest.unscaled or manifest.workers
        if workers is None:
            scaled = replace(manifest, workers=before, unscaled=0)
        else:
            scaled = replace(manifest, workers=workers, unscaled=before)
        check_workers(scaled)
        return scaled

    return session.amend(edit)


def terminate(session: Session, launcher: Launcher, grace: float = 2.0) -> None:
    """Mark the session terminated and stop its workers; its results stay readable.

    Args:
        session: Which.
        launcher: What started its workers.
        grace: Seconds that workers have to hand back.
    """
    session.amend(lambda m: replace(m, state=SessionState.TERMINATED))
    launcher.stop(session.url, grace=grace)


def delete(session: Session, launcher: Launcher) -> None:
    """Delete every object of a session, once each of its workers has ended or is lost.

    `tasks` objects go first: a batch without its record looks all pending and would be run again.
    `session.json` goes last. Then the prefix is listed again, for what was written meanwhile.
    """
    try:
        manifest = session.load()
    except SessionNotFound:
        manifest = None
    if manifest is not None:
        terminate(session, launcher)
        _await_workers(session, manifest, launcher)
    while entries := session.list_all(session.prefix)[0]:
        keys = [entry.key for entry in entries]
        session.store.delete(key for key in keys if key.endswith("/tasks"))
        last = session.key("session.json")
        session.store.delete(key for key in keys if not key.endswith("/tasks") and key != last)
        session.store.delete([last] if last in keys else [])
    launcher.forget(session.url)


def _await_workers(session: Session, manifest: Manifest, launcher: Launcher) -> None:
    """Return when no heartbeat is fresh but of workers that their launcher knows to have ended."""
    while True:
        beats = session.beats()
        ended = launcher.ended(session.url)
        left = possibly_live_workers(beats, manifest.intervals, ended)
        if not left:
            return
        log.info("session %s: waiting for %s to end", session.id, ", ".join(sorted(left)))
        session.runtime.signal().wait(min(5.0, manifest.intervals.heartbeat / 2))

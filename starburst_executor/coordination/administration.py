"""Extending, scaling, terminating and deleting sessions.

Works from an id and a store alone: nothing here needs the Python that created the session.
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Iterable

from msgspec.structs import replace

from starburst_executor.costs.limits import check_workers
from starburst_executor.errors import (
    SessionNotFound,
)
from starburst_executor.inspection.status import SessionSummary, list_summaries
from starburst_executor.launchers.base import Launcher
from starburst_executor.protocol.bounds import FOREVER, LATEST
from starburst_executor.protocol.liveness import possibly_live_workers
from starburst_executor.protocol.manifest import Intervals, Manifest, SessionState
from starburst_executor.protocol.session import Session
from starburst_executor.runtime import Runtime
from starburst_executor.storage.base import Store

__all__ = ["delete", "extend", "scale", "terminate", "terminate_all", "unfinished_sessions"]

log = logging.getLogger(__name__)

_STOP_GRACE = 2.0  # seconds that workers have to hand back their tasks


def extend(session: Session, seconds: float) -> Manifest:
    """Extend the absolute time limit by `seconds`, from now if it has passed.

    The session timeout grows by the same amount. Neither can be shortened.

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
    deadline = min(max(before.deadline, now) + seconds, LATEST)

    def edit(manifest: Manifest) -> Manifest:
        timeout = min(before.limits.session_timeout + seconds, FOREVER)
        limits = replace(manifest.limits, session_timeout=timeout)
        return replace(manifest, deadline=max(manifest.deadline, deadline), limits=limits)

    return session.amend(edit)


def scale(session: Session, workers: int | None) -> Manifest:
    """Cap the number of workers from now on; None restores the cap from before the first `scale`.

    Raises:
        ValueError: they would cost more per hour than the session's `max_hourly_cost`.
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


def terminate(session: Session, launcher: Launcher) -> None:
    """Mark the session terminated and stop its workers; its results stay readable.

    Args:
        session: The session.
        launcher: What started its workers.
    """
    session.amend(_terminated)
    launcher.stop(session.url, grace=_STOP_GRACE)


def unfinished_sessions(store: Store) -> list[SessionSummary]:
    """The sessions of a store that have unfinished tasks and were not terminated."""
    return [
        summary
        for summary in list_summaries(store)
        if summary.pending + summary.running and summary.state != str(SessionState.TERMINATED)
    ]


def terminate_all(store: Store, sessions: Iterable[SessionSummary], runtime: Runtime) -> None:
    """Mark sessions terminated, so that neither clients nor workers start more workers."""
    for summary in sessions:
        session = Session(store, summary.session_id, runtime)
        try:
            session.amend(_terminated)
        except SessionNotFound:  # its own client was quicker
            continue


def _terminated(manifest: Manifest) -> Manifest:
    return replace(manifest, state=SessionState.TERMINATED)


def delete(session: Session, launcher: Launcher) -> None:
    """Delete all objects of a session, once each of its workers has ended or is lost.

    `tasks` objects go first: a batch without its record looks all pending and would run again.
    `session.json` goes last. Then the prefix is listed again, for objects written meanwhile.

    A session whose `session.json` somebody else removed may have workers that have not noticed.
    """
    try:
        intervals = session.amend(_terminated).intervals
    except SessionNotFound:
        intervals = Intervals()  # what it had is not known, and is hardly longer
    launcher.stop(session.url, grace=_STOP_GRACE)
    _await_workers(session, intervals, launcher)
    while entries := session.list_all(session.prefix)[0]:
        keys = [entry.key for entry in entries]
        session.store.delete(key for key in keys if key.endswith("/tasks"))
        last = session.key("session.json")
        session.store.delete(key for key in keys if not key.endswith("/tasks") and key != last)
        session.store.delete([last] if last in keys else [])
    launcher.forget(session.url)


def _await_workers(session: Session, intervals: Intervals, launcher: Launcher) -> None:
    """Wait until every fresh heartbeat is of a worker that the launcher knows to have ended."""
    while True:
        heartbeats = session.beats()
        ended = launcher.ended(session.url)
        left = possibly_live_workers(heartbeats, intervals, ended)
        if not left:
            return
        log.info("session %s: waiting for %s to end", session.id, ", ".join(sorted(left)))
        session.runtime.signal().wait(min(5.0, intervals.heartbeat / 2))

"""Which workers are lost, and what becomes of the tasks they held.

A worker is lost if two looks, half a lease apart on the observer's own clock, find it not live (see
`protocol.liveness`) and its heartbeat unchanged or missing. One look is never enough: a laptop that
wakes up finds every heartbeat stale, even those of live workers. A worker is also lost if its
launcher says that it has ended.

Recovery relies on stored records, never on what heartbeats claim: it checks every unfinished
record, requeues the tasks that name a lost worker, writes missing markers, and only then archives
dead heartbeats. So it may stop at any point, and any process may repeat it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from msgspec.structs import replace

from starburst_executor.errors import DamagedObject, NewerSchema, ObjectNotFound, SessionTerminated
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.listing import BatchListing
from starburst_executor.protocol.liveness import heartbeat_age, live_workers
from starburst_executor.protocol.manifest import Heartbeat, Intervals, WorkerState
from starburst_executor.protocol.session import HeartbeatListing, Session, VersionedRecord
from starburst_executor.protocol.vanished import read_again

__all__ = ["MARKER_GRACE", "LeaseTracker", "Recovery"]

log = logging.getLogger(__name__)

# A marker is written a round trip after its record; in between, every observer would write it too.
MARKER_GRACE = 2.0


@dataclass(slots=True)
class _Watched:
    """A stale or missing (version None) heartbeat, and since when, on the observer's own clock."""

    version: str | None
    since: float


class LeaseTracker:
    """What one process knows about the workers of a session.

    Args:
        intervals: Lease and heartbeat.
    """

    def __init__(self, intervals: Intervals) -> None:
        self._intervals = intervals
        self._half = intervals.lease / 2
        self._watched: dict[str, _Watched] = {}
        self._last_look = -math.inf
        self.live: list[str] = []  # sorted ids of those not known to be lost
        self.suspects = False  # whether a second look may find a worker lost

    def look(
        self, beats: HeartbeatListing, named: Iterable[str], ended: Iterable[str], now: float
    ) -> dict[str, str]:
        """Update from one listing of heartbeats.

        Args:
            beats: The listing.
            named: Workers that unfinished records name.
            ended: Workers that have ended according to their launcher.
            now: Seconds on the observer's own monotonic clock.

        Returns:
            Lost workers, each with the reason.
        """
        if now - self._last_look > 4 * self._half:
            self._watched.clear()  # this process slept: earlier observations prove nothing
        self._last_look = now
        lost = {
            worker: "its process ended" for worker in ended if worker in {*named, *beats.entries}
        }
        live = live_workers(beats, self._intervals)
        for worker in {*named, *beats.entries} - lost.keys():
            if worker in live:
                self._watched.pop(worker, None)
            else:
                self._judge_silent(worker, beats, now, lost)
        self._watched = {w: s for w, s in self._watched.items() if w in {*named, *beats.entries}}
        self.suspects = bool(self._watched.keys() - lost.keys())
        self.live = sorted(beats.entries.keys() - lost.keys())
        return lost

    def _judge_silent(
        self, worker: str, beats: HeartbeatListing, now: float, lost: dict[str, str]
    ) -> None:
        entry = beats.entries.get(worker)
        version = entry.version if entry else None
        seen = self._watched.get(worker)
        if seen is None or seen.version != version:
            self._watched[worker] = _Watched(version, now)
        elif now - seen.since >= self._half:
            age = heartbeat_age(beats, worker)
            lost[worker] = f"no heartbeat for {age:.0f} s" if entry else "it has no heartbeat"


class Recovery:
    """Requeues tasks of lost workers; reads only records that changed since the last look.

    Args:
        session: The session.
        intervals: Lease and heartbeat.
        max_attempts: Fail a task after this many losses while running.
    """

    def __init__(self, session: Session, intervals: Intervals, max_attempts: int) -> None:
        self._session = session
        self._max_attempts = max_attempts
        self._known: dict[Batch, VersionedRecord] = {}
        self.leases = LeaseTracker(intervals)

    def look(self, unfinished: list[BatchListing], ended: Iterable[str] = ()) -> dict[str, str]:
        """Check records and heartbeats once, and repair them; returns the lost workers."""
        beats = self._session.beats()
        self._read_changed(unfinished)
        named = {worker for known in self._known.values() for worker in _holders(known)}
        now = self._session.runtime.monotonic()
        lost = self.leases.look(beats, named, ended, now)
        for sight in unfinished:
            self._mend(sight, lost, beats.now)
        self._bury(lost, beats)
        return lost

    def _read_changed(self, unfinished: list[BatchListing]) -> None:
        listed = {sight.batch: sight for sight in unfinished}
        self._known = {
            batch: known
            for batch, known in self._known.items()
            if batch in listed and listed[batch].record is not None  # else it was removed
        }
        changed = [
            sight.batch
            for sight in unfinished
            if sight.record is not None
            and (
                sight.batch not in self._known
                or self._known[sight.batch].version != sight.record.version
            )
        ]
        reads = self._session.runtime.gather([partial(self._read, batch) for batch in changed])
        self._known.update({b: k for b, k in zip(changed, reads, strict=True) if k is not None})

    def _read(self, batch: Batch) -> VersionedRecord | None:
        try:
            return read_again(self._session, batch, self._known.get(batch))
        except (DamagedObject, ObjectNotFound) as error:
            log.warning("cannot judge batch %s: %s", batch, error)
            return None

    def _mend(self, sight: BatchListing, lost: dict[str, str], now: float) -> None:
        known = self._known.get(sight.batch)
        if known is None:
            return
        if _holders(known) & lost.keys():
            log.warning("batch %s: requeueing tasks of lost workers: %s", sight.batch, lost)
            self._requeue(sight.batch, known, lost)
        elif sight.record is not None and now - sight.record.modified >= MARKER_GRACE:
            self._session.mark(sight.batch, known.record, sight.markers)

    def _requeue(self, batch: Batch, known: VersionedRecord, lost: dict[str, str]) -> None:
        try:
            known = self._session.requeue(batch, known, lost, self._max_attempts)
        except SessionTerminated:
            self._session.check_open()
            del self._known[batch]  # somebody removed the record alone
            return
        self._known[batch] = known
        self._session.mark(batch, known.record)

    def _bury(self, lost: dict[str, str], beats: HeartbeatListing) -> None:
        for worker in lost.keys() & beats.entries.keys():
            # If its heartbeat cannot be read, only the store knows when it was last seen.
            heard = beats.entries[worker].modified
            unread = Heartbeat(worker=worker, started=heard, written=heard)
            try:
                last = self._session.heartbeat(worker) or unread
            except NewerSchema:
                raise
            except DamagedObject:
                last = unread
            self._session.bury(
                replace(last, state=WorkerState.LOST, reason=lost[worker], ended=last.written)
            )


def _holders(known: VersionedRecord) -> set[str]:
    return {task.worker for task in known.record.tasks if task.state.held}

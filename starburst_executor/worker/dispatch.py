"""Hands claimed tasks to the child pool, and takes back how they ended."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from starburst_executor.errors import DamagedObject, NewerSchema, ObjectNotFound
from starburst_executor.protocol.keys import task_id
from starburst_executor.protocol.manifest import LiveLog
from starburst_executor.protocol.records import Piece
from starburst_executor.protocol.session import Session, damage
from starburst_executor.protocol.transitions import AttemptEnd
from starburst_executor.worker.assignment import Assignment, AttemptKey
from starburst_executor.worker.cache import ObjectCache
from starburst_executor.worker.child_handle import Job
from starburst_executor.worker.committing import Committer
from starburst_executor.worker.faults import Consequence, consequence, reason_to_leave
from starburst_executor.worker.heartbeat import HeartbeatThread, WorkTally
from starburst_executor.worker.planner import ClaimPlanner
from starburst_executor.worker.pool import ChildPool, JobResult
from starburst_executor.worker.session_check import SessionCheck
from starburst_executor.worker.stop_request import StopRequest
from starburst_executor.worker.timers import Timers
from starburst_executor.worker.transfers import Transfers

__all__ = ["Dispatcher"]

log = logging.getLogger(__name__)


class Dispatcher:
    """Moves attempts between what the worker holds and the child pool.

    Args:
        session: Where arguments are read from.
        planner: What the worker holds.
        pool: Runs the tasks.
        cache: Has callables, blobs and modules.
        committer: Writes starts and hand-backs.
        transfers: Moves large objects.
        heartbeats: Tells whether others know that this worker is alive.
        check: Tells whether the session goes on.
        timers: When to read records again.
        stop: Told when no task can be run here.
        tally: Counts what ended.
        folder: The worker's temp folder, for messages.
    """

    def __init__(
        self,
        session: Session,
        planner: ClaimPlanner,
        pool: ChildPool,
        cache: ObjectCache,
        committer: Committer,
        transfers: Transfers,
        heartbeats: HeartbeatThread,
        check: SessionCheck,
        timers: Timers,
        stop: StopRequest,
        tally: WorkTally,
        folder: Path,
    ) -> None:
        self._session = session
        self._runtime = session.runtime
        self._planner = planner
        self._pool = pool
        self._cache = cache
        self._committer = committer
        self._transfers = transfers
        self._heartbeats = heartbeats
        self._check = check
        self._timers = timers
        self._stop = stop
        self._tally = tally
        self._folder = folder
        self._inbox: deque[JobResult] = deque()
        self._calls: dict[AttemptKey, bytes] = {}  # arguments that name blobs
        self.paused = False  # heartbeats do not get through: nothing new may start

    # --- what ended -------------------------------------------------------------------

    def collect(self) -> deque[JobResult]:
        """Take from the pool what has ended, to be noted later; all that is not yet noted.

        Raises:
            SlotsBroken: no task can be run here any more.
        """
        self._inbox.extend(self._pool.take())
        return self._inbox

    def take_ended(self) -> None:
        """Note which tasks have ended and which results are stored.

        Raises:
            SlotsBroken: no task can be run here any more.
        """
        self.collect()
        while self._inbox:
            result = self._inbox.popleft()
            self._tally.add(result)
            self._note_end(result)
            if result.kind == "initializer":
                self._stop.make("its initializer failed")
        for key, end, failed in self._transfers.take_uploaded():
            assignment = self._planner.assignments.get(key.batch)
            if assignment is None or assignment.uploading.get(key.position) != key:
                continue
            if failed is not None:
                if self._leaves_because_of(failed):
                    continue  # what is still being uploaded is handed back
                end = end._replace(ok=False, outcome=Piece(inline=damage(failed)))
            del assignment.uploading[key.position]
            assignment.ended[key.position] = end

    def repeat_transfers(self) -> None:
        """Try again to move what could not be moved at the time."""
        self._transfers.repeat_due(self._is_held)

    def _is_held(self, key: AttemptKey) -> bool:
        assignment = self._planner.assignments.get(key.batch)
        return assignment is not None and key in (
            assignment.waiting.get(key.position),
            assignment.uploading.get(key.position),
        )

    def _leaves_because_of(self, error: Exception) -> bool:
        """Whether a transfer failed for a reason that is this worker's, and have it leave."""
        if consequence(error) in (Consequence.FAIL_TASK, None):
            log.error("a task fails: %r", error)
            return False
        self._stop.make(reason_to_leave(error, self._folder), broken=True)
        return True

    def _note_end(self, result: JobResult) -> None:
        key = result.key
        assert isinstance(key, AttemptKey)
        assignment = self._planner.assignments.get(key.batch)
        if assignment is None or assignment.dispatched.get(key.position) != key:
            result.delete_blobs()
            return
        del assignment.dispatched[key.position]
        self._calls.pop(key, None)
        seconds = max(0.0, result.ended - result.began)
        self._planner.learn_run(assignment, key.position, seconds)
        if result.blobs:
            assignment.uploading[key.position] = key
            self._transfers.upload(key, _attempt_end(key, result), result.blobs)
        else:
            assignment.ended[key.position] = _attempt_end(key, result)

    # --- what starts ------------------------------------------------------------------

    def dispatch_waiting(self) -> None:
        """Hand to the pool what is claimed and has everything it needs here."""
        self._take_fetched()
        if self._cache.overfull:
            self._cache.evict(self._in_use())
        for assignment in list(self._planner.assignments.values()):
            for key in list(assignment.waiting.values()):
                if key not in self._transfers.fetching and self._may_start():
                    self._dispatch(assignment, key)

    def _in_use(self) -> list[tuple[str, bytes]]:
        """Callables and arguments, as far as they name blobs, of all that is held."""
        held = {
            key: assignment
            for assignment in self._planner.assignments.values()
            for key in assignment.queued
        }
        self._calls = {key: call for key, call in self._calls.items() if key in held}
        return [
            (assignment.function(key.position), self._calls.get(key, b""))
            for key, assignment in held.items()
        ]

    def _may_start(self) -> bool:
        """Whether others know that this worker is alive, and it that the session goes on."""
        lease = self._check.manifest.intervals.lease
        return (
            not self.paused and self._heartbeats.silent() <= lease / 2 and not self._check.overdue
        )

    def _dispatch(self, assignment: Assignment, key: AttemptKey) -> None:
        try:
            call = self._session.arguments(assignment.batch, assignment.tasks, key.position)
            header = assignment.tasks.header
            digest = assignment.function(key.position)
            function = self._cache.function(digest)
            missing = self._cache.missing(digest, b"" if header.light else call)
            if not header.light:
                self._calls[key] = call
            if missing:
                self._transfers.fetch(key, missing)
                return
            path = self._cache.path(header.modules)
        except NewerSchema:
            raise
        except (DamagedObject, ObjectNotFound) as error:
            self._fail(assignment, key, error)
            return
        if not self._committer.record_start(assignment, key):
            return
        del assignment.waiting[key.position]
        assignment.dispatched[key.position] = key
        self._pool.start(
            Job(
                key=key,
                label=task_id(key.batch.lane, key.batch.number + key.position),
                function=function,
                function_digest=digest,
                call=call,
                blobs=self._cache.blobs,
                path=path,
                timeout=self._check.manifest.limits.task_timeout,
            )
        )

    def _fail(self, assignment: Assignment, key: AttemptKey, error: Exception) -> None:
        now = self._runtime.time()
        if assignment.waiting.get(key.position) == key:
            del assignment.waiting[key.position]
            outcome = Piece(inline=damage(error))
            assignment.ended[key.position] = AttemptEnd(
                key.position, key.attempt, False, now, now, outcome
            )

    def _take_fetched(self) -> None:
        for key, failed in self._transfers.take_fetched():
            assignment = self._planner.assignments.get(key.batch)
            if failed is None or assignment is None:
                continue
            if not self._leaves_because_of(failed):
                self._fail(assignment, key, failed)

    # --- what is taken back -----------------------------------------------------------

    def hand_back(self, found: Iterable[tuple[Assignment, list[AttemptKey]]]) -> None:
        """Hand back those of the attempts that have not started."""
        for assignment, unstarted in found:
            keys = [key for key in unstarted if key not in self._transfers.fetching]
            # They wait here again: it may be that they cannot be handed back now.
            self._withdraw(assignment, keys)
            releases = {
                key.position: key.attempt
                for key in keys
                if assignment.waiting.get(key.position) == key
            }
            if releases:
                self._committer.commit(assignment, releases=releases)

    def check_lease(self) -> None:
        """Start nothing new while heartbeats do not get through; read records before going on."""
        if self._heartbeats.silent() <= self._check.manifest.intervals.lease / 2:
            if self.paused:
                self.paused = False
                self._timers.refresh = -math.inf
            return
        self._heartbeats.poke()
        if not self.paused:
            self.paused = True
            for assignment in self._planner.assignments.values():
                self._withdraw(assignment, list(assignment.dispatched.values()))

    def _withdraw(self, assignment: Assignment, keys: list[AttemptKey]) -> None:
        for key in self._pool.withdraw(keys):
            assert isinstance(key, AttemptKey)
            assignment.waiting[key.position] = assignment.dispatched.pop(key.position)

    def stop_all(self) -> None:
        """Stop every task, running or not, and note those that had just ended."""
        assignments = self._planner.assignments.values()
        self._pool.withdraw([key for one in assignments for key in one.dispatched.values()])
        for key in list(self._pool.begun()):
            self._pool.kill(key)
        self.take_ended()

    # --- once a heartbeat -------------------------------------------------------------

    def refresh_held(self) -> None:
        """Read, once a heartbeat, the records that name this worker, or may do so."""
        interval = self._check.manifest.intervals.heartbeat
        now = self._timers.now
        if now < self._timers.refresh:
            return
        for assignment in list(self._planner.assignments.values()):
            if not assignment.settled:
                known = self._session.read(assignment.batch, assignment.known)
                self._committer.accept(assignment, known)
                self._write_live_logs(assignment, interval)
        self._timers.refresh = now + interval

    def _write_live_logs(self, assignment: Assignment, interval: float) -> None:
        begun = self._pool.begun()
        for key in assignment.dispatched.values():
            ran = self._runtime.time() - begun.get(key, math.inf)
            if ran < interval / 2:
                continue
            out, err = self._pool.live_output(key)
            if out or err:
                text = LiveLog(
                    stdout=out.decode(errors="replace"),
                    stderr=err.decode(errors="replace"),
                )
                self._session.put_live_log(key.batch, key.position, key.attempt, text)


def _attempt_end(key: AttemptKey, result: JobResult) -> AttemptEnd:
    return AttemptEnd(
        position=key.position,
        attempt=key.attempt,
        ok=result.ok,
        started=result.began,
        ended=result.ended,
        outcome=Piece(inline=result.outcome),
        stdout=Piece(inline=result.stdout) if result.stdout else None,
        stderr=Piece(inline=result.stderr) if result.stderr else None,
    )

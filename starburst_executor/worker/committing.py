"""Everything that a worker writes about batches: claims, starts, ends, hand-backs and markers.

All that there is to write about one batch goes into one compare-and-swap. A worker holds what the
record says it holds, whether or not a reply said so; tasks that the record no longer assigns to
it were cancelled or taken over, and are stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

from starburst_executor.errors import Conflict, DamagedObject, SessionTerminated, StoreError
from starburst_executor.protocol import transitions
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.records import Piece, Record
from starburst_executor.protocol.session import Session, VersionedRecord, damage
from starburst_executor.protocol.transitions import AttemptEnd, WorkerUpdate
from starburst_executor.worker.assignment import Assignment, AttemptKey, packed
from starburst_executor.worker.cache import ObjectCache
from starburst_executor.worker.planner import ClaimPlanner
from starburst_executor.worker.pool import ChildPool
from starburst_executor.worker.timers import Timers

__all__ = ["Committer"]

log = logging.getLogger(__name__)

# Larger records would make every compare-and-swap slow, so large results are stored beside them.
INLINE_RECORD = 64 << 10


class Committer:
    """Writes records on behalf of one worker.

    Args:
        session: The session.
        worker: The worker's id.
        planner: What the worker holds.
        pool: Runs the tasks; those that are no longer the worker's are stopped there.
        cache: Tells whether claimed tasks could begin at once.
        timers: When to read records again.
    """

    def __init__(
        self,
        session: Session,
        worker: str,
        planner: ClaimPlanner,
        pool: ChildPool,
        cache: ObjectCache,
        timers: Timers,
    ) -> None:
        self._session = session
        self._runtime = session.runtime
        self._worker = worker
        self._planner = planner
        self._pool = pool
        self._cache = cache
        self._timers = timers

    # --- what is written --------------------------------------------------------------

    def commit(
        self,
        assignment: Assignment,
        *,
        claim: int = 0,
        starts: Mapping[int, tuple[int, float]] | None = None,
        releases: Mapping[int, int] | None = None,
    ) -> None:
        """Write ends, starts, claims and hand-backs of one batch in one compare-and-swap.

        Args:
            assignment: The batch; the ends to write are those it has collected.
            claim: How many more tasks to claim.
            starts: Position -> attempt and start time, besides those overdue.
            releases: Position -> attempt of tasks to hand back.
        """
        releases = releases or {}
        finishes = self._pack(assignment)
        holding = len(assignment.queued) + len(assignment.uploading) - len(releases)
        seen: list[Record] = []  # what the update was applied to, once or more often
        update = partial(
            WorkerUpdate,
            finishes=tuple(finishes),
            starts={**self._planner.unwritten_starts(assignment), **(starts or {})},
            releases=releases,
            claim=holding + claim if claim else 0,
            begin=min(self._starting(assignment), claim),
        )

        def edit(record: Record) -> Record:
            seen.append(record)
            return self._apply(assignment, record, update)

        began = self._runtime.monotonic()
        try:
            known = self._session.change(assignment.batch, assignment.known, edit)
        except StoreError:
            self._doubt(assignment)
            raise
        assignment.committed_at = self._runtime.monotonic()
        self._planner.learn_round_trip(assignment.committed_at - began)
        for finish in finishes:
            assignment.ended.pop(finish.position, None)
        self.accept(assignment, known)
        # If the last try changed nothing, an earlier one had taken effect unnoticed, and there is
        # no telling who made a marker due.
        self.mark(assignment, None if known.record is seen[-1] else seen[-1])

    def commit_claim(self, assignment: Assignment, count: int) -> bool:
        """Claim more tasks of a batch in one try; False if there was a conflict."""
        if assignment.ended:  # which must be written anyway
            self.commit(assignment, claim=count)
            return True
        update = partial(
            WorkerUpdate,
            claim=len(assignment.queued) + len(assignment.uploading) + count,
            begin=min(count, self._starting(assignment)),
        )
        try:
            known, written = self._change_once(
                assignment, partial(self._apply, assignment, update=update)
            )
        except StoreError:
            self._planner.assignments[assignment.batch] = assignment
            self._doubt(assignment)
            raise
        # A claim is a write like any other: the first end after it can wait for more to join it.
        assignment.committed_at = self._runtime.monotonic()
        self.accept(assignment, known)
        return written

    def commit_due(self, interval: float, wanted: Callable[[Assignment], int]) -> None:
        """Write the ends and starts that are due, and forget batches of which nothing is held.

        Args:
            interval: Seconds for which ends are collected.
            wanted: How many tasks of a batch to claim in the same write.
        """
        now = self._runtime.monotonic()
        for assignment in list(self._planner.assignments.values()):
            # The worker would be idle, or nearly so, if it kept its last end to itself.
            last = not assignment.waiting and not assignment.dispatched
            due = last or now >= assignment.committed_at + interval
            if (assignment.ended and due) or self._planner.unwritten_starts(assignment):
                self.commit(assignment, claim=wanted(assignment))
            if assignment.settled and assignment is not self._planner.current:
                del self._planner.assignments[assignment.batch]

    def record_start(self, assignment: Assignment, key: AttemptKey) -> bool:
        """Whether a task may start; if it was lost before, its start is written first.

        So a task that takes down every worker it runs on is found out.
        """
        if assignment.waiting.get(key.position) != key:
            return False
        if not assignment.task(key).lost or not assignment.claimed(key):
            return True
        if self._planner.dispatched >= self._pool.size:
            return False
        now = self._runtime.time()
        self.commit(assignment, starts={key.position: (key.attempt, now)})
        return assignment.waiting.get(key.position) == key

    def fail_batch(self, batch: Batch, error: DamagedObject) -> None:
        """Fail all tasks of a batch that cannot be read."""
        log.error("batch %s cannot be run: %s", batch, error)
        known = self._session.read(batch, VersionedRecord(Record.fresh(batch.size), None))
        outcome = damage(error)
        known = self._session.change(
            batch,
            known,
            lambda record: transitions.fail_all(record, self._runtime.time(), outcome),
        )
        self._session.mark(batch, known.record)

    def hand_back_all(self) -> None:
        """Hand back everything, as far as the store allows; what is in doubt stays assigned."""
        assignments = self._planner.assignments
        busy = [assignment for assignment in assignments.values() if assignment.busy]
        self._runtime.gather([partial(self._hand_back, assignment) for assignment in busy])
        for assignment in list(assignments.values()):
            if assignment.doubt is None:
                del assignments[assignment.batch]

    def _hand_back(self, assignment: Assignment) -> None:
        keys = [*assignment.queued, *assignment.uploading.values()]
        try:
            self.commit(assignment, releases={key.position: key.attempt for key in keys})
        except (StoreError, SessionTerminated) as error:
            log.warning(
                "worker %s could not hand back %s: %s", self._worker, assignment.batch, error
            )

    # --- how --------------------------------------------------------------------------

    def _apply(
        self, assignment: Assignment, record: Record, update: Callable[..., WorkerUpdate]
    ) -> Record:
        solo = self._planner.solo(assignment)
        return transitions.advance(
            record,
            self._worker,
            self._runtime.time(),
            update(last_chance=self._planner.last_chance, solo=solo),
        )

    def _change_once(
        self, assignment: Assignment, edit: Callable[[Record], Record]
    ) -> tuple[VersionedRecord, bool]:
        batch, known = assignment.batch, assignment.known
        try:
            return self._session.change_once(batch, known, edit), True
        except Conflict:
            # Perhaps with an earlier try of this very write: then the record names this worker.
            # Otherwise others are at it, and the next try should not be in step with theirs.
            pause = self._runtime.random.uniform(0, self._planner.lead)
            self._runtime.signal().wait(pause)
            return self._session.read(batch, known), False

    def _starting(self, assignment: Assignment) -> int:
        """How many tasks of the batch would start as soon as they are claimed."""
        header = assignment.tasks.header
        if not header.light or any(self._cache.missing(f) for f in header.functions):
            return 0
        return self._planner.free

    def _doubt(self, assignment: Assignment) -> None:
        """A write had no answer: it may have taken effect, or may yet do so."""
        assignment.doubt = set()
        self._timers.refresh = self._runtime.monotonic()

    def _pack(self, assignment: Assignment) -> list[AttemptEnd]:
        """The ends to write; what is too large for the record is first stored beside it."""
        finishes = list(assignment.ended.values())
        weight = sum(len(p.inline) for f in finishes for p in _pieces(f))
        if assignment.known.size + 4 * weight // 3 <= INLINE_RECORD:
            return finishes
        nonce = self._runtime.new_id(12)
        finishes, pack = packed(finishes, nonce)
        if pack:
            self._session.put_pack(assignment.batch, nonce, pack)
        return finishes

    # --- what the record says ---------------------------------------------------------

    def accept(self, assignment: Assignment, known: VersionedRecord) -> None:
        """Hold what the record says this worker holds; stop what is no longer its own."""
        gone = assignment.accept(known, self._worker, self._runtime.monotonic())
        withdrawn = self._pool.withdraw(gone) if gone else ()
        for key in gone:
            if key not in withdrawn:
                self._pool.kill(key)
        if assignment.busy:
            self._timers.idle_since = self._runtime.monotonic()

    def mark(self, assignment: Assignment, before: Record | None = None) -> None:
        """Write the markers that are due; those due `before` were for somebody else to write."""
        due = set(transitions.due_markers(assignment.known.record)) - assignment.marked
        if before is not None:
            due -= set(transitions.due_markers(before))
        if due:
            self._session.mark(assignment.batch, assignment.known.record, assignment.marked)
            assignment.marked |= due


def _pieces(finish: AttemptEnd) -> list[Piece]:
    return [p for p in (finish.outcome, finish.stdout, finish.stderr) if p is not None]

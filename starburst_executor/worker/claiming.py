"""Looks for open batches and claims tasks from them."""

from __future__ import annotations

from collections.abc import Iterable

from starburst_executor.coordination.recovery import MARKER_GRACE
from starburst_executor.errors import DamagedObject, NewerSchema, ObjectNotFound
from starburst_executor.protocol.listing import BatchListing
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import Session, VersionedRecord
from starburst_executor.worker.assignment import Assignment
from starburst_executor.worker.cache import ObjectCache
from starburst_executor.worker.committing import Committer
from starburst_executor.worker.dispatch import Dispatcher
from starburst_executor.worker.heartbeat import HeartbeatThread
from starburst_executor.worker.membership import Membership
from starburst_executor.worker.open_batches import OpenBatches
from starburst_executor.worker.planner import (
    FEW_WORKERS,
    FRONT_SECONDS,
    ClaimPlanner,
    worth_claiming,
)
from starburst_executor.worker.session_check import SessionCheck
from starburst_executor.worker.timers import Timers

__all__ = ["Claimer"]

# After this many conflicts in a row a worker claims elsewhere; among few workers, which keep to
# the order of submission, later.
CONFLICTS = 2
CONFLICTS_OF_FEW = 8
# How many times a look that saw only part of the queue, and found nothing, is soon repeated.
PERSISTENCE = 4
# How many times looks are soon repeated while others were faster; beyond that, something else is
# the matter.
BEATEN_MOST = 16
# Batches tried after one listing; each costs a read.
TRIES = 4


class Claimer:
    """Claims tasks for one worker.

    Args:
        session: The session.
        check: Has the manifest.
        batches: The open batches.
        planner: What the worker holds, and how much more it should claim.
        committer: Writes the claims.
        dispatcher: Starts what was claimed.
        membership: Tells whether the worker is surplus.
        cache: Fetches callables and modules before their tasks are claimed.
        heartbeats: Asked for a heartbeat with each look.
        timers: When to look.
    """

    def __init__(
        self,
        session: Session,
        check: SessionCheck,
        batches: OpenBatches,
        planner: ClaimPlanner,
        committer: Committer,
        dispatcher: Dispatcher,
        membership: Membership,
        cache: ObjectCache,
        heartbeats: HeartbeatThread,
        timers: Timers,
    ) -> None:
        self._session = session
        self._random = session.runtime.random
        self._check = check
        self._batches = batches
        self._planner = planner
        self._committer = committer
        self._dispatcher = dispatcher
        self._membership = membership
        self._cache = cache
        self._heartbeats = heartbeats
        self._timers = timers
        self._beaten = 0  # looks in a row that found work which others claimed first

    # --- when and how much ------------------------------------------------------------

    def claim_more(self) -> None:
        """Claim more, from the current batch or from others, if there is not enough to do."""
        if self._dispatcher.paused or self._membership.surplus:
            return
        timers = self._timers
        current = self._planner.current
        front = self._front_is_due()
        if current is not None and not front and self._claim_from(current):
            self._dispatcher.dispatch_waiting()
            timers.reset_poll()
        if self._planner.full() or (timers.now < timers.look and not front):
            return
        claimed = self._look_and_claim()
        now = timers.now
        if claimed:
            timers.reset_poll()
            timers.look = now
        elif 0 < self._beaten <= BEATEN_MOST:
            # There is work, and others were faster: try again soon, but not in step with them.
            pause = self._planner.lead * 2**self._beaten
            pause = min(pause, self._check.manifest.intervals.poll_first)
            timers.look = now + self._random.uniform(0, pause)
        else:
            timers.look = now + timers.back_off()

    def wanted(self, assignment: Assignment) -> int:
        """How many more tasks to claim in a write to this batch that is made anyway."""
        if self._dispatcher.paused or self._membership.surplus:
            return 0
        if self._few and assignment is not self._planner.current:
            return 0
        return 0 if self._front_is_due() else self._planner.wanted(assignment)

    @property
    def _few(self) -> bool:
        return self._check.manifest.workers <= FEW_WORKERS

    def _front_is_due(self) -> bool:
        """Whether to look for work before the batch that this worker could go on with."""
        patience = FRONT_SECONDS if self._few else self._check.manifest.intervals.session_check
        if self._timers.now < self._batches.listed_at + patience:
            return False
        current = self._planner.current
        return current is not None and self._planner.wanted(current) > 0

    # --- where from -------------------------------------------------------------------

    def _look_and_claim(self) -> bool:
        """Claim from the first open batch, or one of the first; whether anything was claimed."""
        beaten = self._beaten + 1
        self._beaten = 0
        for listing in self._candidates():
            self._beaten = beaten
            assignment = self._approach(listing)
            if assignment is not None and self._claim_from(assignment):
                self._beaten = 0
                self._dispatcher.dispatch_waiting()
                return True
            if assignment is not None and self._planner.full():
                # It has enough to do after all; what is left of this batch comes first next time.
                self._batches.window.clear()
                break
        if self._batches.unseen and beaten <= PERSISTENCE:
            self._beaten = beaten
        return False

    def _candidates(self) -> Iterable[BatchListing]:
        batches, workers = self._batches, self._check.manifest.workers
        stale = batches.age() > self._check.manifest.intervals.commit
        if not batches.window or stale or self._front_is_due():
            batches.list_some(workers, polled_in_vain=self._timers.polled_in_vain)
            self._heartbeats.poke()
        tries = TRIES
        while batches.window and tries:
            near = worth_claiming(
                batches.window,
                workers,
                batches.queue.now,
                short=self._planner.short(batches.window[0].batch.size),
            )
            listing = near[self._random.randrange(len(near))]
            batches.window.remove(listing)
            tries -= 1
            yield listing

    def _approach(self, listing: BatchListing) -> Assignment | None:
        """Get what is needed before claiming from a batch: header, record, callables."""
        try:
            assignment = self._planner.assignments.get(listing.batch) or self._assign(listing)
            self._read_newer(assignment, listing)
            self._cache.path(assignment.tasks.header.modules)
            for digest in assignment.tasks.header.functions:
                self._cache.function(digest)
        except NewerSchema:
            raise
        except ObjectNotFound:
            return None  # it is being deleted
        except DamagedObject as error:
            self._committer.fail_batch(listing.batch, error)
            return None
        if assignment.known.record.count(State.PENDING):
            return assignment
        self._mark_drained(listing, assignment)
        return None

    def _assign(self, listing: BatchListing) -> Assignment:
        tasks = self._session.tasks(listing.batch)
        known = VersionedRecord(tasks.header.fresh_record(), None)
        return Assignment(listing.batch, tasks, known, set(listing.markers))

    def _read_newer(self, assignment: Assignment, listing: BatchListing) -> None:
        """Read the record if the listing shows another than is known."""
        if listing.record is None or listing.record.version == assignment.known.version:
            return
        known = self._session.read(listing.batch, assignment.known)
        if known.version is None:
            # Not all pending, but gone: a claim would run again what has ended.
            raise ObjectNotFound(f"{listing.batch.record_key} was deleted")
        self._committer.accept(assignment, known)
        if assignment.busy:
            self._planner.assignments.setdefault(assignment.batch, assignment)

    def _mark_drained(self, listing: BatchListing, assignment: Assignment) -> None:
        """Write what somebody died before writing: nothing is pending in a batch listed as open."""
        if self._batches.queue.now - listing.modified < MARKER_GRACE:
            return
        if assignment.known.version is None:
            # Its tasks were cancelled before they were stored, and only its header says so.
            self._session.withdraw(assignment.batch, assignment.tasks.header.withdrawn)
        else:
            self._committer.mark(assignment)

    def _claim_from(self, assignment: Assignment) -> bool:
        """Claim, giving up after a few conflicts; whether anything was claimed."""
        self._dispatcher.take_ended()  # or what ended during the look would seem still to do
        for _ in range(CONFLICTS_OF_FEW if self._few else CONFLICTS):
            count = self._planner.wanted(assignment)
            if not count:
                return False
            before = len(assignment.waiting)
            written = self._committer.commit_claim(assignment, count)
            if len(assignment.waiting) > before:
                self._planner.assignments.pop(assignment.batch, None)
                self._planner.assignments[assignment.batch] = assignment
                self._committer.mark(assignment)
                return True
            if written:
                return False
        return False

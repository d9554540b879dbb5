"""The worker: polls, claims, has tasks run by its slots, and says how they ended.

    Worker.run (one thread)                       Beater (another)
      look for open batches                         heartbeat, every 20 s while anything is held,
      claim -> slots -> take what ended             else when the loop asks for it
      say it, with new claims, in one write

Large objects are moved by a third thread, so that the loop never waits for one; other workers are
started by a fourth (`staff`), in the first live worker by id. Nothing here unpickles: what a slot
gives back is bytes.

A worker holds what the record says that it holds, whether or not a reply told it so; what the
record no longer names it for was cancelled or taken, and is stopped.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial

from msgspec.structs import replace

from starburst_executor.coordination.autoscaler import Autoscaler
from starburst_executor.coordination.recovery import MARKER_GRACE, Recovery
from starburst_executor.errors import (
    Conflict,
    DamagedObject,
    NewerSchema,
    ObjectNotFound,
    SessionNotFound,
    SessionTerminated,
    StoreError,
)
from starburst_executor.protocol import transitions
from starburst_executor.protocol.keys import Batch, task_id
from starburst_executor.protocol.listing import BatchListing
from starburst_executor.protocol.manifest import (
    Heartbeat,
    LiveLog,
    Manifest,
    SessionState,
    WorkerState,
)
from starburst_executor.protocol.records import Piece, Record, State
from starburst_executor.protocol.session import Session, VersionedRecord, damage
from starburst_executor.protocol.transitions import AttemptEnd, WorkerUpdate
from starburst_executor.runtime import Signal
from starburst_executor.worker.assignment import Assignment, AttemptKey, packed
from starburst_executor.worker.cache import ObjectCache
from starburst_executor.worker.child_handle import Job
from starburst_executor.worker.heartbeat import HeartbeatThread
from starburst_executor.worker.planner import (
    FEW_WORKERS,
    FRONT_SECONDS,
    ClaimPlanner,
    worth_claiming,
)
from starburst_executor.worker.pool import ChildPool, JobResult, SlotsBroken

__all__ = ["Worker"]

log = logging.getLogger(__name__)

# A record larger than this would make every compare-and-swap slow: results go beside it.
INLINE_RECORD = 64 << 10
# So many list the queue from its front on; of more each lists a part, or pages would be many.
LIST_ALL = 128
# After so many conflicts in a row a worker claims elsewhere: of few workers, which keep to the order, later.
CONFLICTS = 2
CONFLICTS_OF_FEW = 8
# A look that saw only a part of the queue, and nothing to do there, is so often soon followed by another.
PERSISTENCE = 4
# As often do looks follow soon where others were faster; more means that they do not take it either.
BEATEN_MOST = 16
# Tries while the machine has no descriptor, memory or disk left; a worker that cannot go on leaves.
ENDURANCE = 8


class Worker:
    """One poller process of a session.

    Args:
        session: The session to work for.
        worker_id: This worker's own id, new at each start.
        slots: What runs the tasks; its signal is the one that wakes this worker.
        library: Where callables, blobs and modules are kept.
        aside: Makes a call on another thread; large objects are moved so.
        manifest: The session's manifest, read at start.
        describe: This process, as its heartbeats shall tell.
        staff: Starts other workers; its `run` must be under way on another thread. None: this one cannot.
    """

    def __init__(
        self,
        session: Session,
        worker_id: str,
        slots: ChildPool,
        library: ObjectCache,
        aside: Callable[[Callable[[], None]], object],
        manifest: Manifest,
        describe: Heartbeat,
        staff: Autoscaler | None = None,
    ) -> None:
        self.session = session
        self.id = worker_id
        self._runtime = session.runtime
        self._slots = slots
        self._library = library
        self._aside = aside
        self._manifest = manifest
        self._intervals = manifest.intervals
        self._queue = session.queue()
        self._queue.learn(manifest.lanes)
        self._repair = Recovery(session, manifest.intervals, manifest.limits.max_attempts)
        self._heartbeat = describe
        self._staff = staff
        self._ended: frozenset[str] = frozenset()  # workers, as their launcher says
        # There are more workers than wanted: it claims nothing more, and leaves when nothing is left.
        self._surplus = False
        self._kept = False  # one of `min_workers`: it stays though idle
        self._signal: Signal = slots.signal
        last_chance = manifest.limits.max_attempts - 1
        self._load = ClaimPlanner(slots, self._runtime, last_chance)
        self._uploaded: deque[tuple[AttemptKey, AttemptEnd]] = deque()
        self._fetched: deque[tuple[AttemptKey, Exception | None]] = deque()
        self._inbox: deque[JobResult] = deque()
        self._fetching: set[AttemptKey] = set()
        self._stop_reason: str | None = None
        self._idle_reason: str | None = None
        # The session is being deleted: nothing may be written any more.
        self._gone = False
        self._broken = False  # no task can be run here
        self._accident: Exception | None = None
        self._endured = 0  # rounds in a row in which the machine was short of something
        self._paused = False
        self._window: list[BatchListing] = []
        self._window_at = -math.inf
        self._unfinished = True
        self._from_front = False
        self._unseen = False  # the last look found nothing, and did not see all
        self._beaten = 0  # looks in a row that found work, and others took it
        self._live = manifest.workers  # as of the last look at heartbeats
        self._busy_seconds = 0.0
        self._counts = {True: 0, False: 0}
        now = self._runtime.monotonic()
        self._store_time = (manifest.created, now)
        self._poll = self._intervals.poll_first
        self._idle_since = now
        # When things are due, on the monotonic clock.
        self._next_look = now
        self._next_refresh = now + self._intervals.heartbeat
        self._next_check = now + self._intervals.session_check
        self._next_count = now
        # This one was started by somebody who has just counted.
        self._grows_from = now + self._intervals.session_check
        self._next_repair = now + self._repair_interval()
        self.beater = HeartbeatThread(
            session,
            self._intervals.heartbeat,
            self._describe,
            lambda: self._load.working,
        )

    # --- life -----------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """Hand back and leave, soon."""
        self._stop_reason = self._stop_reason or reason
        self._signal.set()

    def run(self) -> str:
        """Work until told to stop or until there is no reason to stay; returns why it left.

        What it did not expect is raised once it has handed back and left.

        The beater's `run` must be under way on another thread, and `beater.beat` have succeeded:
        a worker beats before its first claim.
        """
        while True:
            reason = self._work()
            log.info("worker %s leaves: %s", self.id, reason)
            if self._leave(reason):
                if self._accident is not None:
                    raise self._accident
                return reason

    def _work(self) -> str:
        while True:
            reason = self._stop_reason or self._turn()
            if reason is not None:
                return reason

    def _turn(self) -> str | None:
        """One round of the loop; a reason if the worker should leave."""
        self._signal.clear()
        if self._stop_reason:
            return self._stop_reason
        try:
            reason = self._do_what_is_due()
        except SessionTerminated as error:
            self._gone = True
            return str(error)
        except NewerSchema as error:
            return f"this version is too old for the session: {error}"
        except SlotsBroken as error:
            log.error("worker %s: %s", self.id, error)
            self._broken = True
            return str(error)
        except StoreError as error:
            self._pause_after(error)
            return None
        except OSError as error:
            return self._endure(error)
        except Exception as error:
            self._accident, self._broken = error, True
            return f"an error that it did not expect: {error!r}"
        self._endured = 0
        if reason is None:
            self._wait()
        return reason

    def _pause_after(self, error: Exception) -> None:
        log.warning("worker %s: %s", self.id, error)
        self._next_look = self._runtime.monotonic() + self._back_off()
        self._signal.wait(self._runtime.random.uniform(0.1, 1.0))

    def _endure(self, error: OSError) -> str | None:
        """Bear with a machine that is short of something, for a moment; then a reason to leave it."""
        self._endured += 1
        if self._endured < ENDURANCE:
            self._pause_after(error)
            return None
        self._broken = True
        return f"no task can be run on this machine: {error}"

    def _do_what_is_due(self) -> str | None:
        self._take_ended()
        self._check_lease()
        reason = self._check_session()
        if reason is not None:
            return reason
        self._refresh_held()
        self._give_waiting()
        self._hand_back_stuck()
        self._say_what_is_due()
        self._claim_more()
        self._give_waiting()
        self._repair_when_due()
        self._count_workers_when_due()
        self._idle_reason = self._reason_to_leave()
        return self._idle_reason

    def _wait(self) -> None:
        """Wait until something is due, or a slot is free, or another thread has news.

        An end alone is no reason to go round: of tiny tasks there are thousands a second.
        """
        until = self._runtime.monotonic() + self._until_next()
        while (left := until - self._runtime.monotonic()) > 0 and self._signal.wait(left):
            self._signal.clear()
            try:
                self._inbox.extend(self._slots.take())
            except SlotsBroken:
                return  # the next round is told of it again
            if self._stop_reason or self._uploaded or self._fetched:
                return
            if self._launcher_knows_more():
                return
            if self._load.queued - len(self._inbox) < self._slots.size:
                return
            for ended in self._inbox:
                until = min(until, self._due_to_be_said(ended))

    def _due_to_be_said(self, ended: JobResult) -> float:
        assert isinstance(ended.key, AttemptKey)
        hold = self._load.holds.get(ended.key.batch)
        return hold.said_at + self._intervals.commit if hold else math.inf

    def _until_next(self) -> float:
        """Seconds until something is due that no signal tells."""
        if self._paused:
            return self._intervals.heartbeat / 4
        now = self._runtime.monotonic()
        due = [self._next_check, self._next_count, now + self._load.until_due()]
        if self._unfinished:
            due.append(self._next_repair)
        for hold in self._load.holds.values():
            if hold.ended:
                due.append(hold.said_at + self._intervals.commit)
            if hold.busy or hold.doubt is not None:
                due.append(self._next_refresh)
        if self._surplus:
            pass  # it claims nothing
        elif self._load.full():
            due.append(now + self._load.until_not_full())
        else:
            due.append(self._next_look)
        if not self._load.working:
            due.append(self._idle_since + self._patience())
        return max(0.0, min(due) - now)

    # --- what ended -----------------------------------------------------------------

    def _take_ended(self) -> None:
        self._inbox.extend(self._slots.take())
        while self._inbox:
            ended = self._inbox.popleft()
            key = ended.key
            assert isinstance(key, AttemptKey)
            self._busy_seconds += max(0.0, ended.ended - ended.began)
            self._counts[ended.ok] += 1
            self._note_end(key, ended)
            if ended.kind == "initializer":
                self.stop("its initializer failed")
        while self._uploaded:
            key, finish = self._uploaded.popleft()
            hold = self._load.holds.get(key.batch)
            if hold is not None and hold.uploading.get(key.position) == key:
                del hold.uploading[key.position]
                hold.ended[key.position] = finish

    def _note_end(self, key: AttemptKey, ended: JobResult) -> None:
        hold = self._load.holds.get(key.batch)
        if hold is None or hold.given.get(key.position) != key:
            for _, path, _ in ended.blobs:
                path.unlink(missing_ok=True)
            return
        del hold.given[key.position]
        self._load.learn_run(hold, key.position, max(0.0, ended.ended - ended.began))
        if ended.blobs:
            hold.uploading[key.position] = key
            self._aside(partial(self._upload, key, ended))
        else:
            hold.ended[key.position] = _finish(key, ended)

    def _upload(self, key: AttemptKey, ended: JobResult) -> None:
        """Store what an outcome names before the outcome itself; on the thread of transfers."""
        finish = _finish(key, ended)
        try:
            self._in_tries(partial(self._put_blobs, ended))
        except Exception as error:
            if not isinstance(error, StoreError):
                log.exception("worker %s could not store a result", self.id)
            failure = Piece(inline=damage(error))
            finish = finish._replace(ok=False, outcome=failure)
        with suppress(OSError):  # the folder is removed at the end
            for _, path, _ in ended.blobs:
                path.unlink(missing_ok=True)
        self._uploaded.append((key, finish))
        self._signal.set()

    def _put_blobs(self, ended: JobResult) -> None:
        for digest, path, _ in ended.blobs:
            self.session.put_blob(digest, path)

    def _in_tries(self, call: Callable[[], None]) -> None:
        """Make a call again while this machine is short of something; on the thread of transfers."""
        for _ in range(ENDURANCE - 1):
            try:
                return call()
            except (StoreError, FileNotFoundError):
                raise
            except OSError as error:
                log.warning("worker %s: %s", self.id, error)
            self._runtime.signal().wait(self._runtime.random.uniform(0.1, 1.0))
        return call()

    # --- saying it ------------------------------------------------------------------

    def _say_what_is_due(self) -> None:
        now = self._runtime.monotonic()
        for hold in list(self._load.holds.values()):
            # The worker would stand idle, or almost, while it kept its last end to itself.
            last = not hold.waiting and not hold.given
            due = last or now >= hold.said_at + self._intervals.commit
            if (hold.ended and due) or self._load.unwritten_starts(hold):
                self._say(hold, claim=self._wanted(hold))
            if not hold.busy and hold.doubt is None and hold is not self._load.current:
                del self._load.holds[hold.batch]

    def _say(
        self,
        hold: Assignment,
        *,
        claim: int = 0,
        starts: Mapping[int, tuple[int, float]] | None = None,
        releases: Mapping[int, int] | None = None,
    ) -> None:
        """Write ends, starts, claims and hand-backs of one batch in one compare-and-swap."""
        finishes = self._pack(hold)
        starts = {**self._load.unwritten_starts(hold), **(starts or {})}
        holding = len(hold.queued) + len(hold.uploading) - len(releases or {})
        begin = min(self._beginning(hold), claim)
        seen: list[Record] = []  # what the change was applied to, once or more often

        def edit(record: Record) -> Record:
            seen.append(record)
            return self._edit(
                record,
                finishes=finishes,
                starts=starts,
                releases=releases,
                claim=holding + claim if claim else 0,
                begin=begin,
            )

        began = self._runtime.monotonic()
        try:
            known = self.session.change(hold.batch, hold.known, edit)
        except StoreError:
            self._doubt(hold)
            raise
        hold.said_at = self._runtime.monotonic()
        self._load.learn_round_trip(hold.said_at - began)
        for finish in finishes:
            hold.ended.pop(finish.position, None)
        self._accept(hold, known)
        # Where the last try changed nothing, an earlier one had taken effect unnoticed, and it
        # cannot be told who made a marker due.
        self._mark(hold, None if known.record is seen[-1] else seen[-1])

    def _edit(
        self,
        record: Record,
        *,
        claim: int,
        begin: int,
        finishes: Iterable[AttemptEnd] = (),
        starts: Mapping[int, tuple[int, float]] | None = None,
        releases: Mapping[int, int] | None = None,
    ) -> Record:
        update = WorkerUpdate(
            finishes=tuple(finishes),
            starts=starts or {},
            releases=releases or {},
            claim=claim,
            begin=begin,
            last_chance=self._load.last_chance,
            solo=not self._load.queued,
        )
        return transitions.advance(record, self.id, self._runtime.time(), update)

    def _doubt(self, hold: Assignment) -> None:
        """A write had no answer: it may have taken effect, or may still do so."""
        hold.doubt = set()
        self._next_refresh = self._runtime.monotonic()

    def _pack(self, hold: Assignment) -> list[AttemptEnd]:
        """The ends to be said, with what is too large for the record stored beside it first."""
        finishes = list(hold.ended.values())
        weight = sum(len(p.inline) for f in finishes for p in _pieces(f))
        if hold.known.size + 4 * weight // 3 <= INLINE_RECORD:
            return finishes
        nonce = self._runtime.new_id(12)
        finishes, pack = packed(finishes, nonce)
        if pack:
            self.session.put_pack(hold.batch, nonce, pack)
        return finishes

    def _accept(self, hold: Assignment, known: VersionedRecord) -> None:
        """Make this worker's idea of what it holds that of the record; stop what is no longer its own."""
        gone = hold.accept(known, self.id, self._runtime.monotonic())
        withdrawn = self._slots.withdraw(gone)
        for key in gone:
            if key not in withdrawn:
                self._slots.kill(key)
        if hold.busy:
            self._idle_since = self._runtime.monotonic()

    def _mark(self, hold: Assignment, before: Record | None = None) -> None:
        """Write the markers that are due; those due `before` were somebody else's to write."""
        due = set(transitions.due_markers(hold.known.record)) - hold.marked
        if before is not None:
            due -= set(transitions.due_markers(before))
        if due:
            self.session.mark(hold.batch, hold.known.record, hold.marked)
            hold.marked |= due

    # --- claiming -------------------------------------------------------------------

    def _claim_more(self) -> None:
        if self._paused or self._surplus:
            return
        current = self._load.current
        front = self._front_is_due()
        if current is not None and not front and self._claim_from(current):
            self._give_waiting()
            self._poll = self._intervals.poll_first
        now = self._runtime.monotonic()
        if self._load.full() or (now < self._next_look and not front):
            return
        claimed = self._look_and_claim()
        now = self._runtime.monotonic()
        if claimed:
            self._poll = self._intervals.poll_first
            self._next_look = now
        elif 0 < self._beaten <= BEATEN_MOST:
            # There is work, and others were faster: try again soon, but not in step with them.
            pause = self._load.lead * 2**self._beaten
            pause = min(pause, self._intervals.poll_first)
            self._next_look = now + self._runtime.random.uniform(0, pause)
        else:
            self._next_look = now + self._back_off()

    def _wanted(self, hold: Assignment) -> int:
        few = self._manifest.workers <= FEW_WORKERS
        if self._paused or self._surplus or (few and hold is not self._load.current):
            return 0
        return 0 if self._front_is_due() else self._load.wanted(hold)

    def _front_is_due(self) -> bool:
        """Whether to look for work before the batch that this worker could go on with."""
        few = self._manifest.workers <= FEW_WORKERS
        patience = FRONT_SECONDS if few else self._intervals.session_check
        if self._runtime.monotonic() < self._window_at + patience:
            return False
        current = self._load.current
        return current is not None and self._load.wanted(current) > 0

    def _beginning(self, hold: Assignment) -> int:
        """How many tasks of the batch would begin as soon as they are claimed."""
        header = hold.tasks.header
        if not header.light or any(self._library.missing(f) for f in header.functions):
            return 0
        return self._load.free

    def _look_and_claim(self) -> bool:
        """Claim from the first open batch, or one of the first; whether anything was claimed."""
        beaten = self._beaten + 1
        self._beaten = 0
        for sight in self._candidates():
            self._beaten = beaten
            hold = self._approach(sight)
            if hold is not None and self._claim_from(hold):
                self._beaten = 0
                self._give_waiting()
                return True
        if self._unseen and beaten <= PERSISTENCE:
            self._beaten = beaten
        return False

    def _candidates(self) -> Iterable[BatchListing]:
        now = self._runtime.monotonic()
        stale = now - self._window_at > self._intervals.commit
        if not self._window or stale or self._front_is_due():
            self._look()
        tries = 4  # each costs a read; then look again
        while self._window and tries:
            near = worth_claiming(
                self._window,
                self._manifest.workers,
                self._queue.now,
                short=self._load.short(self._window[0].batch.size),
            )
            sight = near[self._runtime.random.randrange(len(near))]
            self._window.remove(sight)
            tries -= 1
            yield sight

    def _look(self) -> None:
        """List some open batches: the first ones, or where many workers look, some anywhere."""
        queue, workers = self._queue, self._manifest.workers
        if workers <= LIST_ALL:
            found = queue.look_for_open(2 * workers)
            self._unseen = False
        else:
            # What is finished need be listed no more once it was seen from the front on: there look
            # those every other time that have found nothing for a while.
            idle = self._poll > self._intervals.poll_first
            self._from_front = idle and not self._from_front
            at_random = self._runtime.random.randrange(2 * workers)
            ahead = 0 if self._from_front else at_random
            found = queue.look_for_open(16, ahead, untouched=4, pages=3)
            self._unseen = found[1] and not found[0]
        self._window, self._unfinished = found
        self._window_at = self._runtime.monotonic()
        self._store_time = (queue.now, self._window_at)
        self.beater.poke()

    def _approach(self, sight: BatchListing) -> Assignment | None:
        """What is needed before claiming from a batch: header, record, callable."""
        try:
            hold = self._load.holds.get(sight.batch) or self._new_hold(sight)
            self._read_newer(hold, sight)
            self._library.path(hold.tasks.header.modules)
            for digest in hold.tasks.header.functions:
                self._library.function(digest)
        except NewerSchema:
            raise
        except ObjectNotFound:
            return None  # it is being deleted
        except DamagedObject as error:
            self._fail_damaged(sight.batch, error)
            return None
        if hold.known.record.count(State.PENDING):
            return hold
        self._tell_drained(sight, hold)
        return None

    def _tell_drained(self, sight: BatchListing, hold: Assignment) -> None:
        """What has nothing to claim is still listed as open: if nobody is at it, somebody died at it."""
        if self._queue.now - sight.modified < MARKER_GRACE:
            return
        if hold.known.version is None:
            # Its tasks were cancelled before they were stored, and only its header says so.
            self.session.withdraw(hold.batch, hold.tasks.header.withdrawn)
        else:
            self._mark(hold)

    def _new_hold(self, sight: BatchListing) -> Assignment:
        tasks = self.session.tasks(sight.batch)
        known = VersionedRecord(tasks.header.fresh_record(), None)
        return Assignment(sight.batch, tasks, known, set(sight.markers))

    def _read_newer(self, hold: Assignment, sight: BatchListing) -> None:
        """Read the record if the listing shows another than is known."""
        if sight.record is None or sight.record.version == hold.known.version:
            return
        known = self.session.read(sight.batch, hold.known)
        if known.version is None:
            # Not all pending, but gone: to claim would be to run again what has ended.
            raise ObjectNotFound(f"{sight.batch.record_key} was deleted")
        self._accept(hold, known)
        if hold.busy:
            self._load.holds.setdefault(hold.batch, hold)

    def _fail_damaged(self, batch: Batch, error: DamagedObject) -> None:
        log.error("batch %s cannot be run: %s", batch, error)
        known = self.session.read(batch, VersionedRecord(Record.fresh(batch.size), None))
        outcome = damage(error)
        known = self.session.change(
            batch,
            known,
            lambda record: transitions.fail_all(record, self._runtime.time(), outcome),
        )
        self.session.mark(batch, known.record)

    def _claim_from(self, hold: Assignment) -> bool:
        """Claim, with a few conflicts at most: then better elsewhere. Whether anything was claimed."""
        self._take_ended()  # or what ended during the look would seem to be still to do
        few = self._manifest.workers <= FEW_WORKERS
        for _ in range(CONFLICTS_OF_FEW if few else CONFLICTS):
            count = self._load.wanted(hold)
            if not count:
                return False
            before = len(hold.waiting)
            written = self._try_claim(hold, count)
            if len(hold.waiting) > before:
                self._load.holds.pop(hold.batch, None)
                self._load.holds[hold.batch] = hold
                self._mark(hold)
                return True
            if written:
                return False
        return False

    def _try_claim(self, hold: Assignment, count: int) -> bool:
        """Whether it was written; else there was a conflict."""
        if hold.ended:  # which must be said anyway
            self._say(hold, claim=count)
            return True
        holding = len(hold.queued) + len(hold.uploading)
        begin = min(count, self._beginning(hold))
        edit = partial(self._edit, claim=holding + count, begin=begin)
        try:
            known, written = self._change_once(hold, edit)
        except StoreError:
            self._load.holds[hold.batch] = hold
            self._doubt(hold)
            raise
        # A claim is a write like another: the first end after it can wait for more to say with it.
        hold.said_at = self._runtime.monotonic()
        self._accept(hold, known)
        return written

    def _change_once(
        self, hold: Assignment, edit: Callable[[Record], Record]
    ) -> tuple[VersionedRecord, bool]:
        try:
            return self.session.change_once(hold.batch, hold.known, edit), True
        except Conflict:
            # Perhaps with an earlier try of this very write: then the record names this worker.
            # Else others are at it: the next try should not be in step with theirs.
            pause = self._runtime.random.uniform(0, self._load.lead)
            self._runtime.signal().wait(pause)
            return self.session.read(hold.batch, hold.known), False

    # --- running --------------------------------------------------------------------

    def _may_begin(self) -> bool:
        """Whether others know that this worker lives, and it that the session goes on."""
        return (
            not self._paused
            and self.beater.silent() <= self._intervals.lease / 2
            and self._runtime.monotonic() < self._next_check
        )

    def _give_waiting(self) -> None:
        """Hand to the slots what is claimed and has all that it needs here."""
        self._take_fetched()
        for hold in list(self._load.holds.values()):
            for key in list(hold.waiting.values()):
                if key not in self._fetching and self._may_begin():
                    self._give(hold, key)

    def _give(self, hold: Assignment, key: AttemptKey) -> None:
        try:
            call = self.session.arguments(hold.batch, hold.tasks, key.position)
            header = hold.tasks.header
            digest = hold.function(key.position)
            function = self._library.function(digest)
            missing = self._library.missing(digest, b"" if header.light else call)
            if missing:
                self._fetching.add(key)
                self._aside(partial(self._fetch, key, missing))
                return
            path = self._library.path(header.modules)
        except NewerSchema:
            raise
        except (DamagedObject, ObjectNotFound) as error:
            self._fail(hold, key, error)
            return
        if not self._own_up(hold, key):
            return
        del hold.waiting[key.position]
        hold.given[key.position] = key
        self._slots.start(
            Job(
                key=key,
                label=task_id(key.batch.lane, key.batch.number + key.position),
                function=function,
                function_digest=digest,
                call=call,
                blobs=self._library.blobs,
                path=path,
                timeout=self._manifest.limits.task_timeout,
            )
        )

    def _own_up(self, hold: Assignment, key: AttemptKey) -> bool:
        """Whether the task may begin; the start of one that was lost before is written first."""
        if hold.waiting.get(key.position) != key:
            return False
        if not hold.task(key).lost or not hold.claimed(key):
            return True
        if self._load.given >= self._slots.size:
            return False
        now = self._runtime.time()
        self._say(hold, starts={key.position: (key.attempt, now)})
        return hold.waiting.get(key.position) == key

    def _fail(self, hold: Assignment, key: AttemptKey, error: Exception) -> None:
        now = self._runtime.time()
        if hold.waiting.get(key.position) == key:
            del hold.waiting[key.position]
            outcome = Piece(inline=damage(error))
            hold.ended[key.position] = AttemptEnd(
                key.position, key.attempt, False, now, now, outcome
            )

    def _fetch(self, key: AttemptKey, blobs: list[str]) -> None:
        """Bring blobs here; on the thread of transfers."""
        error: Exception | None = None
        try:
            self._in_tries(partial(self._library.fetch, blobs))
        except Exception as caught:
            error = caught
        self._fetched.append((key, error))
        self._signal.set()

    def _take_fetched(self) -> None:
        while self._fetched:
            key, error = self._fetched.popleft()
            self._fetching.discard(key)
            hold = self._load.holds.get(key.batch)
            if error is None or hold is None:
                continue
            if isinstance(error, StoreError):
                self._fail(hold, key, error)
            else:  # that is this machine's fault, and another may do better
                log.error("worker %s cannot keep what tasks need: %r", self.id, error)
                self._broken = True
                self.stop(f"it cannot keep what tasks need: {error}")

    def _hand_back_stuck(self) -> None:
        """Hand back what has waited too long behind a task that turned out long; if surplus, all that waits."""
        found = self._load.unbegun() if self._surplus else self._load.stuck()
        for hold, stuck in found:
            keys = [key for key in stuck if key not in self._fetching]
            withdrawn = self._slots.withdraw(keys)
            releases = {
                key.position: key.attempt
                for key in keys
                if key in withdrawn or hold.waiting.get(key.position) == key
            }
            if releases:
                self._say(hold, releases=releases)

    # --- leases and the session -----------------------------------------------------

    def _check_lease(self) -> None:
        """Begin nothing new while heartbeats do not get through; read before going on."""
        if self.beater.silent() <= self._intervals.lease / 2:
            if self._paused:
                self._paused = False
                self._next_refresh = -math.inf
            return
        self.beater.poke()
        if not self._paused:
            self._paused = True
            for hold in self._load.holds.values():
                for key in self._slots.withdraw(list(hold.given.values())):
                    assert isinstance(key, AttemptKey)
                    hold.waiting[key.position] = hold.given.pop(key.position)

    def _refresh_held(self) -> None:
        """Read, once a heartbeat, the records that this worker is named in, or may be."""
        now = self._runtime.monotonic()
        if now < self._next_refresh:
            return
        for hold in list(self._load.holds.values()):
            if hold.busy or hold.doubt is not None:
                self._accept(hold, self.session.read(hold.batch, hold.known))
                self._write_live_logs(hold)
        self._next_refresh = now + self._intervals.heartbeat

    def _write_live_logs(self, hold: Assignment) -> None:
        begun = self._slots.begun()
        for key in hold.given.values():
            ran = self._runtime.time() - begun.get(key, math.inf)
            if ran < self._intervals.heartbeat / 2:
                continue
            out, err = self._slots.live_output(key)
            if out or err:
                text = LiveLog(
                    stdout=out.decode(errors="replace"),
                    stderr=err.decode(errors="replace"),
                )
                self.session.put_live_log(key.batch, key.position, key.attempt, text)

    def _check_session(self) -> str | None:
        """Read the manifest, once a minute; a reason if the worker should leave."""
        if self._runtime.monotonic() >= self._next_check:
            before = self._manifest
            try:
                self._manifest = self.session.load()
            except SessionNotFound as error:
                raise SessionTerminated(f"session {self.session.id} was deleted") from error
            now = self._runtime.monotonic()
            if self._manifest.workers != before.workers:
                self._next_count = now
            self._next_check = now + self._intervals.session_check
            self._queue.learn(self._manifest.lanes)
        if self._manifest.state is SessionState.TERMINATED:
            return "the session was terminated"
        if self.store_now() >= self._manifest.deadline:
            return "the session's absolute time limit is reached; extend and attach go on from here"
        return None

    def store_now(self) -> float:
        """The store's clock, by the last listing."""
        at, monotonic = self._store_time
        return at + self._runtime.monotonic() - monotonic

    def _repair_interval(self) -> float:
        """Some four looks in a lease, of all workers together."""
        leases = max(1.0, self._live / 4)
        return self._intervals.lease * leases * self._runtime.random.uniform(0.75, 1.25)

    def _launcher_knows_more(self) -> bool:
        """Whether workers have ended that no repair was told of."""
        return self._staff is not None and self._staff.ended != self._ended

    def _repair_when_due(self) -> None:
        due = self._runtime.monotonic() >= self._next_repair
        if self._staff is not None and self._launcher_knows_more():
            self._ended = self._staff.ended
            due = True
        if not due or not self._unfinished:
            return
        sights = [sight for sight in self._queue.look() if sight.done is None]
        self._unfinished = bool(sights)
        self._window = [sight for sight in sights if sight.open]
        self._window_at = self._runtime.monotonic()
        if not self._window:
            self._next_look = self._window_at + self._back_off()  # this was one
        lost = self._repair.look(sights, self._ended)
        leases = self._repair.leases
        self._live = len(leases.live)
        wait = self._intervals.lease / 2 if leases.suspects else self._repair_interval()
        self._next_repair = self._runtime.monotonic() + wait
        if lost or not leases.suspects:
            # Who lives is known now; else it is soon asked whose heartbeat is fresh.
            rank = sum(worker < self.id for worker in leases.live)
            self._count_workers(rank, bool(lost))

    # --- leaving --------------------------------------------------------------------

    def _back_off(self) -> float:
        """The next pause between looks; doubles up to the last, with jitter."""
        pause = self._poll * self._runtime.random.uniform(0.8, 1.2)
        # An idle worker beats with its looks: they must not be further apart than leases allow.
        longest = min(self._intervals.poll_last, self._intervals.lease / 4)
        self._poll = min(self._poll * 2, longest)
        return pause

    def _patience(self) -> float:
        limits = self._manifest.limits
        if self._manifest.state is SessionState.CLOSED and not self._unfinished:
            return 0.0
        if self._kept:
            return limits.session_timeout
        return min(limits.idle_timeout, limits.session_timeout)

    def _reason_to_leave(self) -> str | None:
        if self._load.working:
            return None
        if self._surplus:
            return "there are more workers than wanted"
        now = self._runtime.monotonic()
        if now < self._idle_since + self._patience():
            return None
        rank = self._rank()
        self._kept = rank < self._least()
        if self._unfinished and (rank < 2 or self._kept):
            # The first two stay while anything is unfinished: somebody must be there to repair.
            self._idle_since = now
            return None
        if now < self._idle_since + self._patience():
            return None
        return f"idle for {now - self._idle_since:.0f} s"

    def _least(self) -> int:
        """How many workers stay though idle."""
        return min(self._manifest.min_workers, self._manifest.workers)

    def _needed(self) -> int:
        """So many workers shall stay; the first two in any case while anything is unfinished."""
        return max(self._manifest.workers, 2 if self._unfinished else 1)

    def _is_surplus(self) -> bool:
        return self._rank() >= self._needed()

    def _count_workers_when_due(self) -> None:
        if self._runtime.monotonic() >= self._next_count:
            self._count_workers(self._rank())

    def _count_workers(self, rank: int, lost: bool = False) -> None:
        """Leave if there are too many, stay if there are few; the first of all has started what lacks.

        Args:
            rank: How many live workers come before this one, by id.
            lost: Whether some were lost just now.
        """
        # What an idle worker finds out sooner by its looks for work, or by the manifest, it need not ask.
        checks = 1 if rank == 0 or self._load.working else 2
        wait = checks * self._intervals.session_check
        self._next_count = self._runtime.monotonic() + wait
        self._surplus = rank >= self._needed()
        self._kept = rank < self._least()
        if self._surplus:
            self._hand_back_stuck()
        # Where the first stands idle nothing waits, but what was sent back just now.
        full = not self._load.free or self._load.full()
        if rank == 0 and (full or lost or self._live < self._least()):
            self._grow(0 if full else self._load.free)

    def _grow(self, free: int) -> None:
        now = self._runtime.monotonic()
        if self._staff is not None and now >= self._grows_from:
            self._staff.manifest = self._manifest
            self._staff.ask_grow(free)

    def _rank(self) -> int:
        """How many live workers come before this one, by id."""
        beats = self.session.beats()
        half = self._intervals.lease / 2
        live = [w for w, e in beats.entries.items() if beats.now - e.modified <= half]
        self._live = len(live)
        # If others have left, this one must look after the rest sooner than it thought.
        soon = self._runtime.monotonic() + self._repair_interval()
        self._next_repair = min(self._next_repair, soon)
        return sum(worker < self.id for worker in live)

    def _leave(self, reason: str) -> bool:
        """Hand back and go; False if an idle worker found work at the last moment and stays."""
        self._stop_slots()
        if not self._gone:
            self._hand_back_all()
        self.beater.pause()
        try:
            if self._gone:
                self.session.forget(self.id)
            elif reason == self._idle_reason:
                return self._leave_idle(reason)
            else:
                self._say_goodbye(reason)
        except StoreError as error:
            log.warning("worker %s could not say goodbye: %s", self.id, error)
        return True

    def _leave_idle(self, reason: str) -> bool:
        """Delete the heartbeat, then look once more; both until the store answers.

        A client stores first and looks who lives after: so one of the two sees the other.
        """
        self.session.patiently(partial(self._say_goodbye, reason))
        if self._surplus and self.session.patiently(self._is_surplus):
            return True
        self._surplus = False  # others have left meanwhile
        if not self.session.patiently(self._open_work):
            return True
        self._idle_since = self._next_look = self._runtime.monotonic()
        self.session.patiently(self.beater.resume)
        return False

    def _say_goodbye(self, reason: str) -> None:
        state = WorkerState.BROKEN if self._broken else WorkerState.LEFT
        self.session.bury(replace(self._describe(), state=state, reason=reason))

    def _stop_slots(self) -> None:
        holds = self._load.holds.values()
        self._slots.withdraw([key for hold in holds for key in hold.given.values()])
        for key in list(self._slots.begun()):
            self._slots.kill(key)
        with suppress(SlotsBroken):
            self._take_ended()

    def _hand_back_all(self) -> None:
        busy = [hold for hold in self._load.holds.values() if hold.busy]
        self._runtime.gather([partial(self._hand_back, hold) for hold in busy])
        for hold in list(self._load.holds.values()):
            if hold.doubt is None:  # it may stay, and be told later what it holds
                del self._load.holds[hold.batch]

    def _hand_back(self, hold: Assignment) -> None:
        keys = [*hold.queued, *hold.uploading.values()]
        try:
            self._say(hold, releases={key.position: key.attempt for key in keys})
        except (StoreError, SessionTerminated) as error:
            log.warning("worker %s could not hand back %s: %s", self.id, hold.batch, error)

    def _open_work(self) -> bool:
        found, _ = self._queue.look_for_open(1)
        return bool(found)

    def _describe(self) -> Heartbeat:
        now = self._runtime.time()
        holding = self._load.queued
        return replace(
            self._heartbeat,
            state=WorkerState.WORKING if holding else WorkerState.IDLE,
            written=now,
            ended=now,
            holding=holding,
            completed=self._counts[True],
            failed=self._counts[False],
            busy=round(self._busy_seconds, 3),
            writes=self.session.store.tally.writes,
            reads=self.session.store.tally.reads,
        )


def _pieces(finish: AttemptEnd) -> list[Piece]:
    return [p for p in (finish.outcome, finish.stdout, finish.stderr) if p is not None]


def _finish(key: AttemptKey, ended: JobResult) -> AttemptEnd:
    return AttemptEnd(
        position=key.position,
        attempt=key.attempt,
        ok=ended.ok,
        started=ended.began,
        ended=ended.ended,
        outcome=Piece(inline=ended.outcome),
        stdout=Piece(inline=ended.stdout) if ended.stdout else None,
        stderr=Piece(inline=ended.stderr) if ended.stderr else None,
    )

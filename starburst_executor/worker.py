"""The worker: polls, claims, has tasks run by its slots, and says how they ended.

    Worker.run (one thread)                       Beater (another)
      look for open batches                         heartbeat, every 20 s while anything is held,
      claim -> slots -> take what ended             else when the loop asks for it
      say it, with new claims, in one write

Large objects are moved by a third thread, so that the loop never waits for one. Nothing here
unpickles: what a slot gives back is bytes.

A worker holds what the record says that it holds, whether or not a reply told it so; what the
record no longer names it for was cancelled or taken, and is stopped.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from msgspec.structs import replace

from starburst_executor import records
from starburst_executor.errors import (
    Conflict,
    DamagedObject,
    NewerSchema,
    ObjectNotFound,
    SessionNotFound,
    SessionTerminated,
    StoreError,
)
from starburst_executor.leases import MARKER_GRACE, Repair
from starburst_executor.library import Library
from starburst_executor.queue import Sight
from starburst_executor.records import (
    Batch,
    Finish,
    Heartbeat,
    LiveLog,
    Manifest,
    Piece,
    Record,
    SessionState,
)
from starburst_executor.runtime import Signal
from starburst_executor.session import Known, Session, Tasks, damage
from starburst_executor.slots import Ended, Job, Slots

__all__ = ["Beater", "Key", "Worker"]

log = logging.getLogger(__name__)

# A record larger than this would make every compare-and-swap slow: results go beside it.
INLINE_RECORD = 64 << 10
# A task that ends sooner has its start written together with its end.
LONG_TASK = 2.0
# As much work is claimed at a time, in seconds of all slots.
CLAIM_SECONDS = 1.0
# What has not begun by then, because the task before it turned out long, is handed back.
STUCK_SECONDS = 5.0


class Key(NamedTuple):
    """One attempt, as the slots know it."""

    batch: Batch
    position: int
    attempt: int


@dataclass(slots=True)
class Hold:
    """A batch of which this worker holds tasks, or held the last."""

    batch: Batch
    tasks: Tasks
    known: Known
    marked: set[str]
    waiting: dict[int, Key] = field(
        default_factory=dict
    )  # claimed, not given to a slot yet
    given: dict[int, Key] = field(
        default_factory=dict
    )  # queued at the slots, or running
    uploading: dict[int, Key] = field(
        default_factory=dict
    )  # ended, its large results on the way
    ended: dict[int, Finish] = field(default_factory=dict)  # not yet said
    claimed_at: dict[int, float] = field(default_factory=dict)  # monotonic
    size: int = 0  # bytes of the record as last written

    @property
    def busy(self) -> bool:
        """Whether anything of it is unfinished or unsaid."""
        return bool(self.waiting or self.given or self.uploading or self.ended)

    @property
    def queued(self) -> list[Key]:
        """What is still to be run, or runs."""
        return [*self.waiting.values(), *self.given.values()]


class Beater:
    """Writes heartbeats, on a thread of its own: the loop may be held up by a slow request.

    Args:
        session: Where to.
        interval: Seconds between beats while the worker holds anything.
        content: Makes the heartbeat.
        holding: Whether the worker holds anything.
    """

    def __init__(
        self,
        session: Session,
        interval: float,
        content: Callable[[], Heartbeat],
        holding: Callable[[], bool],
    ) -> None:
        self._session = session
        self._interval = interval
        self._content = content
        self._holding = holding
        self._wake = session.runtime.signal()
        self._quiet = (
            session.runtime.signal()
        )  # no beat is in flight, and none will be begun
        self._paused = self._closed = False
        self._tried = -math.inf
        self.last = -math.inf  # monotonic time of the last beat that was answered

    def beat(self) -> None:
        """Beat now; raises what the store raises."""
        self._session.beat(self._content())
        self._tried = self.last = self._session.runtime.monotonic()

    def run(self) -> None:
        """Beat until `close`."""
        while not self._closed:
            self._wake.wait(self._patience())
            self._wake.clear()
            if self._paused:
                self._quiet.set()
            elif self._since(self._tried) >= self._interval:
                self._try()

    def poke(self) -> None:
        """Have it beat soon if a beat is due, and notice whether anything is held now."""
        self._wake.set()

    def pause(self) -> None:
        """Return when no beat is in flight; none follows until `resume`."""
        self._quiet.clear()
        self._paused = True
        self._wake.set()
        self._quiet.wait()

    def resume(self) -> None:
        """Beat again, at once."""
        self.beat()
        self._paused = False

    def close(self) -> None:
        """Have `run` return; after `pause`."""
        self._closed = True
        self._wake.set()

    def _try(self) -> None:
        self._tried = self._session.runtime.monotonic()
        try:
            self.beat()
        except StoreError as error:
            log.warning("heartbeat failed: %s", error)

    def _patience(self) -> float | None:
        if self._paused or not self._holding():
            return None
        return max(0.0, self._interval - self._since(self._tried))

    def _since(self, moment: float) -> float:
        return self._session.runtime.monotonic() - moment


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
    """

    def __init__(
        self,
        session: Session,
        worker_id: str,
        slots: Slots,
        library: Library,
        aside: Callable[[Callable[[], None]], object],
        manifest: Manifest,
        describe: Heartbeat,
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
        self._repair = Repair(session, manifest.intervals, manifest.limits.max_attempts)
        self._heartbeat = describe
        self._signal: Signal = slots.signal
        self._holds: dict[Batch, Hold] = {}
        self._uploaded: deque[tuple[Key, Finish]] = deque()
        self._fetched: deque[tuple[Key, Exception | None]] = deque()
        self._inbox: deque[Ended] = deque()
        self._fetching: set[Key] = set()
        self._gone = (
            False  # the session is being deleted: nothing may be written any more
        )
        self._window: list[Sight] = []
        self._window_at = -math.inf
        self._recent: dict[str, deque[float]] = {}  # function digest -> last run times
        self._round_trip = 0.02
        self._stop_reason: str | None = None
        self._busy_seconds = 0.0
        self._counts = {True: 0, False: 0}
        now = self._runtime.monotonic()
        self._store_time = (manifest.created, now)
        self._poll = self._intervals.poll_first
        self._next_look = now
        self._idle_since = now
        self._said_at = now
        self._refreshed_at = now
        self._checked_at = now
        self._ranked = ""
        self._unfinished = True
        self._beaten = False  # the last look found work, and others took it
        self._paused = False
        self._next_repair = now + self._repair_interval()
        self.beater = Beater(
            session,
            self._intervals.heartbeat,
            self._describe,
            lambda: any(hold.busy for hold in self._holds.values()),
        )

    # --- life -----------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """Hand back and leave, soon; safe to call from a signal handler."""
        self._stop_reason = self._stop_reason or reason
        self._signal.set()

    def run(self) -> str:
        """Work until told to stop or until there is no reason to stay; returns why it left.

        The beater's `run` must be under way on another thread, and `beater.beat` have succeeded:
        a worker beats before its first claim.
        """
        while True:
            reason = self._work()
            log.info("worker %s leaves: %s", self.id, reason)
            if self._leave(reason):
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
            self._take_ended()
            self._check_lease()
            reason = self._check_session() or self._refresh_held()
            if reason is None:
                self._give_waiting()
                self._hand_back_stuck()
                self._say_what_is_due()
                self._claim_more()
                self._give_waiting()
                self._repair_when_due()
                reason = self._reason_to_leave()
        except SessionTerminated as error:
            self._gone = True
            return str(error)
        except NewerSchema as error:
            return f"this version is too old for the session: {error}"
        except StoreError as error:
            log.warning("worker %s: %s", self.id, error)
            self._next_look = self._runtime.monotonic() + self._back_off()
            self._signal.wait(self._runtime.random.uniform(0.1, 1.0))
            return None
        if reason is None:
            self._wait()
        return reason

    def _wait(self) -> None:
        """Wait until something is due, or a slot is free, or another thread has news.

        An end alone is no reason to go round: of tiny tasks there are thousands a second.
        """
        until = self._runtime.monotonic() + self._until_next()
        while (left := until - self._runtime.monotonic()) > 0 and self._signal.wait(
            left
        ):
            self._signal.clear()
            self._inbox.extend(self._slots.take())
            if self._stop_reason or self._uploaded or self._fetched:
                return
            if self._queued - len(self._inbox) < self._slots.size:
                return
            if self._inbox:
                until = min(until, self._said_at + self._intervals.commit)

    def _until_next(self) -> float:
        """Seconds until something is due that no signal tells."""
        now = self._runtime.monotonic()
        if self._paused:
            return self._intervals.heartbeat / 4
        due = [self._checked_at + self._intervals.session_check]
        if self._unfinished:
            due.append(self._next_repair)
        if self._working:
            due.append(self._refreshed_at + self._intervals.heartbeat)
            if self._unsaid:
                due.append(self._said_at + self._intervals.commit)
            ahead = self._work_ahead()
            if math.isfinite(ahead):
                due.append(now + max(ahead - self._lead(), 0.002))
            else:
                due.append(now + LONG_TASK)
        if not self._full():
            due.append(self._next_look)
        if not self._working:
            due.append(self._idle_since + self._patience())
        return max(0.0, min(due) - now)

    @property
    def _working(self) -> bool:
        return any(hold.busy for hold in self._holds.values())

    @property
    def _unsaid(self) -> bool:
        return any(hold.ended for hold in self._holds.values())

    # --- what ended -----------------------------------------------------------------

    def _take_ended(self) -> None:
        self._inbox.extend(self._slots.take())
        while self._inbox:
            ended = self._inbox.popleft()
            key = ended.key
            assert isinstance(key, Key)
            self._busy_seconds += ended.ended - ended.began
            self._counts[ended.ok] += 1
            self._learn_pace(key, ended.ended - ended.began)
            self._note_end(key, ended)
            if ended.kind == "initializer":
                self.stop("its initializer failed")
        while self._uploaded:
            key, finish = self._uploaded.popleft()
            hold = self._holds.get(key.batch)
            if hold is not None and hold.uploading.pop(key.position, None) == key:
                hold.ended[key.position] = finish

    def _note_end(self, key: Key, ended: Ended) -> None:
        hold = self._holds.get(key.batch)
        if hold is None or hold.given.pop(key.position, None) != key:
            for _, path, _ in ended.blobs:
                path.unlink(missing_ok=True)
        elif ended.blobs:
            hold.uploading[key.position] = key
            self._aside(partial(self._upload, key, ended))
        else:
            hold.ended[key.position] = _finish(key, ended)

    def _upload(self, key: Key, ended: Ended) -> None:
        """Store what an outcome names before the outcome itself; on the thread of transfers."""
        try:
            for digest, path, _ in ended.blobs:
                self.session.put_blob(digest, path)
            finish = _finish(key, ended)
        except StoreError as error:
            finish = _finish(key, ended)._replace(
                ok=False, outcome=Piece(inline=damage(error))
            )
        finally:
            for _, path, _ in ended.blobs:
                path.unlink(missing_ok=True)
        self._uploaded.append((key, finish))
        self._signal.set()

    def _learn_pace(self, key: Key, seconds: float) -> None:
        hold = self._holds.get(key.batch)
        if hold is None:
            return
        function = hold.tasks.header.functions[
            hold.tasks.header.calls[key.position].function
        ]
        self._recent.setdefault(function, deque(maxlen=5)).append(seconds)

    # --- saying it ------------------------------------------------------------------

    def _say_what_is_due(self) -> None:
        now = self._runtime.monotonic()
        due = now - self._said_at >= self._intervals.commit
        for hold in list(self._holds.values()):
            starts = self._unwritten_starts(hold)
            if starts or (hold.ended and (due or self._nothing_else(hold))):
                self._say(hold, claim=self._wanted(hold))
            if not hold.busy and hold.batch != self._current:
                del self._holds[hold.batch]

    def _nothing_else(self, hold: Hold) -> bool:
        """Whether the worker would stand idle, or almost, while it kept an end to itself."""
        return not hold.waiting and not hold.given

    @property
    def _current(self) -> Batch | None:
        """The batch that this worker stays with: the last one claimed from."""
        return next(reversed(self._holds), None)

    def _unwritten_starts(self, hold: Hold) -> dict[int, tuple[int, float]]:
        """Tasks that run for long and are still recorded as claimed."""
        if all(
            task.state is not records.State.CLAIMED for task in hold.known.record.tasks
        ):
            return {}
        now = self._runtime.time()
        begun = self._slots.begun()
        return {
            position: (key.attempt, begun[key])
            for position, key in hold.given.items()
            if key in begun
            and now - begun[key] >= LONG_TASK
            and hold.known.record.tasks[position].state is records.State.CLAIMED
        }

    def _say(
        self,
        hold: Hold,
        *,
        claim: int = 0,
        releases: Mapping[int, int] | None = None,
    ) -> None:
        """Write ends, starts, claims and hand-backs of one batch in one compare-and-swap."""
        finishes = self._pack(hold)
        starts = self._unwritten_starts(hold)
        holding = len(hold.queued) + len(hold.uploading) - len(releases or {})
        begin = min(self._beginning(hold), claim)

        seen: list[Record] = []  # what the change was applied to, once or more often

        def edit(record: Record) -> Record:
            seen.append(record)
            return records.advance(
                record,
                self.id,
                self._runtime.time(),
                finishes=finishes,
                starts=starts,
                releases=releases,
                claim=holding + claim if claim else 0,
                begin=begin,
                last_chance=self._manifest.limits.max_attempts - 1,
                solo=not self._queued,
            )

        began = self._runtime.monotonic()
        known = self.session.change(hold.batch, hold.known, edit)
        self._said_at = self._runtime.monotonic()
        self._round_trip += 0.2 * (self._said_at - began - self._round_trip)
        for finish in finishes:
            hold.ended.pop(finish.position, None)
        self._accept(hold, known)
        # Where the last try changed nothing, an earlier one had taken effect unnoticed, and it
        # cannot be told who made a marker due.
        self._mark(hold, None if known.record is seen[-1] else seen[-1])

    def _pack(self, hold: Hold) -> list[Finish]:
        """The ends to be said, with what is too large for the record stored beside it first."""
        finishes = list(hold.ended.values())
        weight = sum(len(p.inline) for f in finishes for p in _pieces(f))
        if hold.size + 4 * weight // 3 <= INLINE_RECORD:
            return finishes
        nonce = self._runtime.new_id(12)
        pack: list[bytes] = []
        offset = 0

        def place(piece: Piece | None) -> Piece | None:
            nonlocal offset
            if piece is None or len(piece.inline) < 256:
                return piece
            pack.append(piece.inline)
            placed = Piece(pack=nonce, start=offset, size=len(piece.inline))
            offset += placed.size
            return placed

        packed = [
            f._replace(
                outcome=place(f.outcome) or f.outcome,
                stdout=place(f.stdout),
                stderr=place(f.stderr),
            )
            for f in finishes
        ]
        if pack:
            self.session.put_pack(hold.batch, nonce, b"".join(pack))
        return packed

    def _accept(self, hold: Hold, known: Known) -> None:
        """Make this worker's idea of what it holds that of the record."""
        if known is not hold.known:
            hold.known = known
            hold.size = len(records.encode(known.record))
        held = records.held_by(known.record, self.id)
        for position, attempt in held.items():
            key = Key(hold.batch, position, attempt)
            mine = (hold.waiting, hold.given, hold.uploading, hold.ended)
            if not any(position in part for part in mine):
                hold.waiting[position] = key
                hold.claimed_at[position] = self._runtime.monotonic()
        gone = [
            key
            for key in [*hold.queued, *hold.uploading.values()]
            if held.get(key.position) != key.attempt
        ]
        for position in [p for p, f in hold.ended.items() if held.get(p) != f.attempt]:
            del hold.ended[position]
        self._drop(hold, gone)
        if hold.busy:
            self._idle_since = self._runtime.monotonic()
            self.beater.poke()

    def _drop(self, hold: Hold, keys: list[Key]) -> None:
        """Stop what is no longer this worker's: cancelled, or taken after it was thought lost."""
        withdrawn = self._slots.withdraw(keys)
        for key in keys:
            hold.waiting.pop(key.position, None)
            hold.uploading.pop(key.position, None)
            if hold.given.pop(key.position, None) and key not in withdrawn:
                self._slots.kill(key)

    def _mark(self, hold: Hold, before: Record | None = None) -> None:
        """Write the markers that are due; those due `before` were somebody else's to write."""
        due = set(records.due_markers(hold.known.record)) - hold.marked
        if before is not None:
            due -= set(records.due_markers(before))
        if due:
            self.session.mark(hold.batch, hold.known.record, hold.marked)
            hold.marked |= due

    # --- claiming -------------------------------------------------------------------

    def _claim_more(self) -> None:
        if self._paused:
            return
        current = self._holds.get(self._current) if self._current else None
        if current is not None and (count := self._wanted(current)):
            self._say(current, claim=count)
            self._give_waiting()
            self._poll = self._intervals.poll_first
        if self._full() or self._runtime.monotonic() < self._next_look:
            return
        claimed = self._look_and_claim()
        now = self._runtime.monotonic()
        if claimed:
            self._poll = self._intervals.poll_first
            self._next_look = now
        elif self._beaten:
            # There is work, and others were faster: try again soon, but not in step with them.
            self._next_look = now + self._runtime.random.uniform(
                0, 5 * self._round_trip
            )
        else:
            self._next_look = now + self._back_off()

    def _wanted(self, hold: Hold) -> int:
        """How many more tasks of this batch to claim now."""
        record = hold.known.record
        pending = record.count(records.State.PENDING)
        if not pending or self._full() or self._paused:
            return 0
        pace = self._pace_of(hold.tasks)
        free = self._free()
        if pace is None or pace >= LONG_TASK or self._lost_first(record):
            return min(free, (pending + 1) // 2)
        unbegun = self._queued - len(self._slots.begun())
        per_claim = math.ceil(self._slots.size * CLAIM_SECONDS / max(pace, 1e-4))
        return max(
            0,
            min(per_claim - unbegun, (pending + 1) // 2, records.MAX_BATCH_TASKS)
            or free,
        )

    def _lost_first(self, record: Record) -> bool:
        first = next(t for t in record.tasks if t.state is records.State.PENDING)
        return first.lost > 0

    def _pace_of(self, tasks: Tasks) -> float | None:
        """The longest of its callables' run times, each the (lower) median of the last few.

        Not the mean: the first call in a process pays for imports.
        """
        recents = [self._recent.get(digest) for digest in tasks.header.functions]
        paces = [sorted(r)[(len(r) - 1) // 2] for r in recents if r]
        return max(paces) if paces and len(paces) == len(recents) else None

    def _free(self) -> int:
        """Slots with nothing to run."""
        return max(0, self._slots.size - self._queued)

    @property
    def _queued(self) -> int:
        return sum(len(h.waiting) + len(h.given) for h in self._holds.values())

    def _beginning(self, hold: Hold) -> int:
        """How many tasks of the batch would begin as soon as they are claimed."""
        header = hold.tasks.header
        if not header.light or any(self._library.missing(f) for f in header.functions):
            return 0
        return self._free()

    def _lead(self) -> float:
        """How long before the work runs out the next is claimed: a few round trips."""
        return min(0.5, 5 * self._round_trip)

    def _work_ahead(self) -> float:
        """Seconds until a slot runs out of work, as far as run times are known; 0 if one is free."""
        if self._free():
            return 0.0
        now = self._runtime.time()
        begun = self._slots.begun()
        ahead = 0.0
        for hold in self._holds.values():
            pace = self._pace_of(hold.tasks)
            if pace is None or pace >= LONG_TASK:
                return math.inf
            for key in hold.queued:
                spent = now - begun[key] if key in begun else 0.0
                # One that ran over what was expected has, as a rule, as long again to go.
                ahead += pace - spent if spent < pace else max(spent, 0.0)
        return ahead / self._slots.size

    def _full(self) -> bool:
        """Whether there is enough to do for now."""
        if self._last_chance_held():
            return True
        return self._free() == 0 and self._work_ahead() > self._lead()

    def _last_chance_held(self) -> bool:
        """Whether a task is held that must be alone, so that its fate is blamed on nobody else."""
        last = self._manifest.limits.max_attempts - 1
        return any(
            (task := hold.known.record.tasks[key.position]).lost > 0
            and task.losses >= last
            for hold in self._holds.values()
            for key in hold.queued
        )

    def _look_and_claim(self) -> bool:
        """Claim from a batch at random among the first open ones; whether anything was claimed."""
        self._beaten = False
        for sight in self._candidates():
            self._beaten = True
            hold = self._approach(sight)
            if hold is None:
                continue
            if self._try_claim(hold) and hold.queued:
                self._give_waiting()
                return True
        return False

    def _candidates(self) -> Iterable[Sight]:
        now = self._runtime.monotonic()
        reach = 2 * max(1, self._manifest.workers)
        if not self._window or now - self._window_at > self._intervals.commit:
            large = reach > 64
            start = self._runtime.random.random() if large else 0.0
            enough = 16 if large else reach
            self._window, self._unfinished = self._queue.look_for_open(enough, start)
            self._window_at = now
            self._store_time = (self._queue.now, self._runtime.monotonic())
            self.beater.poke()
        tries = 4  # each costs a read; then look again
        while self._window and tries:
            nearest = self._window[:reach]
            # What nobody has begun with is claimed without a conflict.
            nearest = [sight for sight in nearest if not sight.record] or nearest
            sight = nearest[self._runtime.random.randrange(len(nearest))]
            self._window.remove(sight)
            tries -= 1
            yield sight

    def _approach(self, sight: Sight) -> Hold | None:
        """What is needed before claiming from a batch: header, record, callable."""
        batch = sight.batch
        if batch in self._holds:
            return None
        try:
            tasks = self.session.tasks(batch)
            hold = Hold(
                batch,
                tasks,
                Known(tasks.header.fresh_record(), None),
                set(sight.markers),
            )
            if sight.record is not None:
                hold.known = self.session.read(batch, hold.known)
            self._library.path(tasks.header.modules)
            for digest in tasks.header.functions:
                self._library.function(digest)
        except NewerSchema:
            raise
        except ObjectNotFound:
            return None
        except DamagedObject as error:
            self._fail_damaged(batch, error)
            return None
        if not hold.known.record.count(records.State.PENDING):
            # The marker that says so is late, or missing: then whoever notices writes it.
            if (
                sight.record is None
                or self._queue.now - sight.record.modified >= MARKER_GRACE
            ):
                self._mark(hold)
            return None
        return hold

    def _fail_damaged(self, batch: Batch, error: DamagedObject) -> None:
        log.error("batch %s cannot be run: %s", batch, error)
        known = self.session.read(batch, Known(Record.fresh(batch.size), None))
        outcome = damage(error)
        known = self.session.change(
            batch,
            known,
            lambda record: records.fail_all(record, self._runtime.time(), outcome),
        )
        self.session.mark(batch, known.record)

    def _try_claim(self, hold: Hold) -> bool:
        """Claim with at most two conflicts; then better elsewhere."""
        for _ in range(2):
            count = self._wanted(hold)
            if not count:
                return False
            edit = partial(
                records.advance,
                worker=self.id,
                now=self._runtime.time(),
                claim=count,
                begin=min(count, self._beginning(hold)),
                last_chance=self._manifest.limits.max_attempts - 1,
                solo=not self._queued,
            )
            try:
                known = self.session.change_once(hold.batch, hold.known, edit)
            except Conflict:
                hold.known = self.session.read(hold.batch, hold.known)
                if records.held_by(hold.known.record, self.id):
                    known = (
                        hold.known
                    )  # the conflict was with an earlier try of this very write
                else:
                    continue
            self._holds[hold.batch] = hold
            self._accept(hold, known)
            self._mark(hold)
            return True
        return False

    # --- running --------------------------------------------------------------------

    def _give_waiting(self) -> None:
        """Hand to the slots what is claimed and has all that it needs here."""
        self._take_fetched()
        if self._paused:
            return
        for hold in self._holds.values():
            for key in list(hold.waiting.values()):
                if key not in self._fetching:
                    self._give(hold, key)

    def _give(self, hold: Hold, key: Key) -> None:
        try:
            call = self.session.arguments(hold.batch, hold.tasks, key.position)
            header = hold.tasks.header
            digest = header.functions[header.calls[key.position].function]
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
        del hold.waiting[key.position]
        hold.given[key.position] = key
        self._slots.start(
            Job(
                key=key,
                label=records.task_id(key.batch.lane, key.batch.number + key.position),
                function=function,
                function_digest=digest,
                call=call,
                blobs=self._library.blobs,
                path=path,
                timeout=self._manifest.limits.task_timeout,
            )
        )

    def _fail(self, hold: Hold, key: Key, error: Exception) -> None:
        now = self._runtime.time()
        del hold.waiting[key.position]
        outcome = Piece(inline=damage(error))
        hold.ended[key.position] = Finish(
            key.position, key.attempt, False, now, now, outcome
        )

    def _fetch(self, key: Key, blobs: list[str]) -> None:
        """Bring blobs here; on the thread of transfers."""
        try:
            self._library.fetch(blobs)
            self._fetched.append((key, None))
        except (StoreError, OSError) as error:
            self._fetched.append((key, error))
        self._signal.set()

    def _take_fetched(self) -> None:
        while self._fetched:
            key, error = self._fetched.popleft()
            self._fetching.discard(key)
            hold = self._holds.get(key.batch)
            if error is not None and hold is not None and key.position in hold.waiting:
                self._fail(hold, key, error)

    def _hand_back_stuck(self) -> None:
        """Hand back what has waited too long behind a task that turned out long."""
        now = self._runtime.monotonic()
        for hold in list(self._holds.values()):
            begun = self._slots.begun()
            stuck = [
                key
                for key in hold.queued
                if now - hold.claimed_at.get(key.position, now) > STUCK_SECONDS
                and key not in begun
                and key not in self._fetching
            ]
            if stuck and not self._free():
                withdrawn = self._slots.withdraw(stuck)
                self._release(
                    hold,
                    [k for k in stuck if k.position in hold.waiting or k in withdrawn],
                )

    def _release(self, hold: Hold, keys: Iterable[Key]) -> None:
        releases = {key.position: key.attempt for key in keys}
        if releases:
            self._say(hold, releases=releases)

    # --- leases and the session -----------------------------------------------------

    def _check_lease(self) -> None:
        """Begin nothing new while heartbeats do not get through; read before going on."""
        silent = self._runtime.monotonic() - self.beater.last
        if silent <= self._intervals.lease / 2:
            if self._paused:
                self._paused = False
                self._refreshed_at = -math.inf
            return
        self.beater.poke()
        if not self._paused:
            self._paused = True
            for hold in self._holds.values():
                for key in self._slots.withdraw(list(hold.given.values())):
                    assert isinstance(key, Key)
                    hold.waiting[key.position] = hold.given.pop(key.position)

    def _refresh_held(self) -> str | None:
        """Read, once a heartbeat, the records that this worker is named in."""
        now = self._runtime.monotonic()
        if now - self._refreshed_at < self._intervals.heartbeat:
            return None
        self._refreshed_at = now
        for hold in [h for h in self._holds.values() if h.busy]:
            self._accept(hold, self.session.read(hold.batch, hold.known))
            self._write_live_logs(hold)
        return None

    def _write_live_logs(self, hold: Hold) -> None:
        begun = self._slots.begun()
        for key in hold.given.values():
            if (
                self._runtime.time() - begun.get(key, math.inf)
                < self._intervals.heartbeat / 2
            ):
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
        now = self._runtime.monotonic()
        if now - self._checked_at >= self._intervals.session_check:
            self._checked_at = now
            try:
                self._manifest = self.session.load()
            except SessionNotFound as error:
                raise SessionTerminated(
                    f"session {self.session.id} was deleted"
                ) from error
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
        leases = max(1.0, self._manifest.workers / 4)
        return self._intervals.lease * leases * self._runtime.random.uniform(0.75, 1.25)

    def _repair_when_due(self) -> None:
        now = self._runtime.monotonic()
        if now < self._next_repair or not self._unfinished:
            return
        sights = [sight for sight in self._queue.look() if sight.done is None]
        self._unfinished = bool(sights)
        self._repair.look(sights)
        suspects = self._repair.leases.suspects
        wait = self._intervals.lease / 2 if suspects else self._repair_interval()
        self._next_repair = self._runtime.monotonic() + wait

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
        return min(limits.idle_timeout, limits.session_timeout)

    def _reason_to_leave(self) -> str | None:
        if self._working:
            return None
        if self._ranked != self._manifest.nonce:
            self._ranked = self._manifest.nonce
            if self._rank() >= self._manifest.workers:
                return "there are more workers than wanted"
        idle = self._runtime.monotonic() - self._idle_since
        if idle < self._patience():
            return None
        if self._unfinished and self._rank() < 2:
            # The first two stay while anything is unfinished: somebody must be there to repair.
            self._idle_since = self._runtime.monotonic()
            return None
        return f"idle for {idle:.0f} s"

    def _rank(self) -> int:
        """How many live workers come before this one, by id."""
        beats = self.session.beats()
        half = self._intervals.lease / 2
        return sum(
            worker < self.id and beats.now - entry.modified <= half
            for worker, entry in beats.entries.items()
        )

    def _leave(self, reason: str) -> bool:
        """Hand back and go; False if an idle worker found work at the last moment and stays."""
        idle = not self._working
        self._stop_slots()
        if not self._gone:
            self._hand_back_all()
        self.beater.pause()
        try:
            if self._gone:
                self.session.forget(self.id)
                return True
            self.session.bury(replace(self._describe(), state="left", reason=reason))
            if idle and reason.startswith("idle") and self._open_work():
                self._idle_since = self._next_look = self._runtime.monotonic()
                self.beater.resume()
                return False
        except StoreError as error:
            log.warning("worker %s could not say goodbye: %s", self.id, error)
        return True

    def _stop_slots(self) -> None:
        self._slots.withdraw(
            [k for h in self._holds.values() for k in h.given.values()]
        )
        for key in list(self._slots.begun()):
            self._slots.kill(key)
        self._take_ended()

    def _hand_back_all(self) -> None:
        calls = [
            partial(self._hand_back, hold) for hold in self._holds.values() if hold.busy
        ]
        self._runtime.gather(calls)
        self._holds.clear()

    def _hand_back(self, hold: Hold) -> None:
        keys = [*hold.queued, *hold.uploading.values()]
        try:
            self._say(hold, releases={key.position: key.attempt for key in keys})
        except (StoreError, SessionTerminated) as error:
            log.warning(
                "worker %s could not hand back %s: %s", self.id, hold.batch, error
            )

    def _open_work(self) -> bool:
        found, _ = self._queue.look_for_open(1)
        return bool(found)

    def _describe(self) -> Heartbeat:
        now = self._runtime.time()
        holding = self._queued
        return replace(
            self._heartbeat,
            state="working" if holding else "idle",
            written=now,
            ended=now,
            holding=holding,
            completed=self._counts[True],
            failed=self._counts[False],
            busy=round(self._busy_seconds, 3),
        )


def _pieces(finish: Finish) -> list[Piece]:
    return [p for p in (finish.outcome, finish.stdout, finish.stderr) if p is not None]


def _finish(key: Key, ended: Ended) -> Finish:
    return Finish(
        position=key.position,
        attempt=key.attempt,
        ok=ended.ok,
        started=ended.began,
        ended=ended.ended,
        outcome=Piece(inline=ended.outcome),
        stdout=Piece(inline=ended.stdout) if ended.stdout else None,
        stderr=Piece(inline=ended.stderr) if ended.stderr else None,
    )

"""The watching half of a client: lists the queue, settles futures, asks for workers.

One thread per executor. A look is one LIST: 50 ms apart while results stream in, backing off to
5 s, and never so often that parsing listings takes more than a tenth of a core.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starburst_executor.client.future import TaskFuture
from starburst_executor.client.results import ResultReader
from starburst_executor.coordination.recovery import Recovery
from starburst_executor.errors import (
    DamagedObject,
    InitializerFailed,
    NewerSchema,
    ObjectNotFound,
    SessionNotFound,
    SessionTerminated,
    StoreError,
    StoreUnavailable,
)
from starburst_executor.formatting import duration
from starburst_executor.inspection.stuck import past_limit
from starburst_executor.protocol import transitions
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.listing import BatchListing, QueueReader
from starburst_executor.protocol.manifest import Manifest, SessionState
from starburst_executor.protocol.records import Piece, Record, State, Task
from starburst_executor.protocol.session import Session, VersionedRecord

__all__ = ["Watcher"]

log = logging.getLogger(__name__)

# Seconds until a record that was not there before is read, unless its batch is done: its first
# version says only who claimed it, and is followed by another when a short task ends.
_CLAIM_GRACE = 2.0

# Where tasks take long, the look after an end need not follow within 50 ms: results may be seen
# late by so much of a task's run time.
_LATE = 0.1

# So long before its absolute time limit, at most, a session that has finished nothing yet is warned of.
_SOON_SECONDS = 3600.0

_SOON_SHARE = 0.1


@dataclass(slots=True)
class _Waited:
    """A stored batch with futures that have not ended."""

    futures: dict[int, TaskFuture[Any]]
    known: VersionedRecord
    sight: BatchListing | None = None
    fetching: set[int] = field(default_factory=set)


class Watcher:
    """Watches one session for one client.

    Args:
        session: The session.
        manifest: Its manifest.
        queue: What is known of its queue already.
        outcomes: Opens outcomes.
        staff: Has workers kept there; called with how many tasks are unfinished.
        ended_workers: Ids of workers that the launcher knows to have ended, as of its last look.
        broken: Called with an error after which nothing can go on: an initializer failed, or the
            session was ended by somebody else.
    """

    def __init__(
        self,
        session: Session,
        manifest: Manifest,
        queue: QueueReader,
        outcomes: ResultReader,
        staff: Callable[[int], None],
        ended_workers: Callable[[], frozenset[str]],
        broken: Callable[[Exception], None],
    ) -> None:
        self.session = session
        self.manifest = manifest
        self.queue = queue
        self._outcomes = outcomes
        self._staff = staff
        self._ended_workers = ended_workers
        self._broken = broken
        self._runtime = session.runtime
        self._intervals = manifest.intervals
        self._grace = min(_CLAIM_GRACE, 0.4 * manifest.intervals.look_last)
        self._repair = Recovery(session, manifest.intervals, manifest.limits.max_attempts)
        self._lock = threading.Lock()
        self._waited: dict[Batch, _Waited] = {}
        self._unfinished = 0
        self._idle = self._runtime.signal()
        self._idle.set()
        self._wake = self._runtime.signal()
        self._nap = self._runtime.signal()  # set once closed
        self._closed = False
        self._abandoned: BaseException | None = None  # why nothing is watched any more
        self._pause = self._intervals.look_first
        now = self._runtime.monotonic()
        self._checked_at = now
        self._staffed_at = -math.inf
        self._next_repair = now + self._repair_interval()
        self._ended: set[str] = set()
        self._run_time: float | None = None
        self._warned: set[str] = set()

    # --- called by others ---------------------------------------------------------------

    @property
    def unfinished(self) -> int:
        """How many stored tasks have futures that have not ended."""
        return self._unfinished

    def add(self, batch: Batch, futures: dict[int, TaskFuture[Any]]) -> None:
        """Watch the futures of a batch that is stored; once all were abandoned, these are too."""
        if not futures:
            return
        fresh = VersionedRecord(Record.fresh(batch.size), None)
        with self._lock:
            abandoned = self._abandoned
            if abandoned is None:
                self._watch(batch, futures, fresh)
        if abandoned is None:
            self.hurry()
        else:
            _end(futures, abandoned)

    def _watch(
        self, batch: Batch, futures: dict[int, TaskFuture[Any]], fresh: VersionedRecord
    ) -> None:
        waited = self._waited.setdefault(batch, _Waited({}, fresh))
        self._unfinished += len(futures.keys() - waited.futures.keys())
        self._idle.clear()
        waited.futures.update(futures)
        waited.known = fresh  # read again: it may tell of these futures already

    def hurry(self) -> None:
        """Look soon."""
        self._pause = self._intervals.look_first
        self._wake.set()

    def stored_pending(self) -> dict[Batch, list[int]]:
        """Positions, by batch, of the watched futures that are not known to run."""
        with self._lock:
            return {
                batch: [p for p, f in waited.futures.items() if not f.running()]
                for batch, waited in self._waited.items()
            }

    def learn(self, batch: Batch, known: VersionedRecord) -> None:
        """Take over a record that was read or written elsewhere in this client."""
        with self._lock:
            waited = self._waited.get(batch)
        if waited is not None:
            self._take_in(batch, waited, known)

    def abandon(self, error: BaseException) -> None:
        """End every watched future with an error, and every one that is added later."""
        with self._lock:
            self._abandoned = self._abandoned or error
            waited, self._waited = self._waited, {}
            self._unfinished = 0
        for one in waited.values():
            _end(one.futures, error)
        self._idle.set()

    def wait_until_idle(self) -> None:
        """Return when every watched future has ended."""
        self._idle.wait()

    def close(self) -> None:
        """Have `run` return."""
        self._closed = True
        self._nap.set()
        self._wake.set()

    # --- the loop -------------------------------------------------------------------

    def run(self) -> None:
        """Look until `close`."""
        while not self._closed:
            if not self._wait():
                return
            began = self._runtime.thread_time()
            try:
                progress = self._turn()
            except NewerSchema as error:
                self._broken(error)
                return
            except StoreError as error:
                log.warning("session %s: %s", self.session.id, error)
                progress = False
            except Exception as error:
                # Whatever it is (the session was ended, workers cannot be started): without this
                # thread every future would wait for ever.
                log.exception("session %s cannot be watched any more", self.session.id)
                self._broken(error)
                return
            cost = self._runtime.thread_time() - began
            self._pace(progress, cost)

    def _wait(self) -> bool:
        """Wait for the next look, or for something to look for; False once closed."""
        if self._wake.wait(self._pause if self._unfinished else None):
            self._wake.clear()
            if self._unfinished and not self._closed:
                self._staffed_at = -math.inf  # there may be more to do for more workers
                self._nap.wait(self._intervals.look_first)
        return not self._closed

    def _pace(self, progress: bool, cost: float) -> None:
        """Look again soon after something ended, and about when the next end is due."""
        first, last = self._intervals.look_first, self._intervals.look_last
        late = min(max(first, _LATE * (self._run_time or 0.0)), last)
        if progress:
            self._pause = late
        else:
            self._pause = min(2 * self._pause, last, self._until_due() + late)
        self._pause = max(self._pause, 10 * cost)

    def _until_due(self) -> float:
        """Seconds until the next end is to be expected, by the run times seen."""
        if self._run_time is None:
            return math.inf
        with self._lock:
            records = [w.sight.record for w in self._waited.values() if w.sight]
        due = (r.modified + self._run_time - self.queue.now for r in records if r)
        return min((seconds for seconds in due if seconds > 0), default=math.inf)

    def _turn(self) -> bool:
        """One look and what follows from it; whether any future ended."""
        if not self.unfinished:
            return False
        self._check_session()
        sights = {sight.batch: sight for sight in self.queue.look()}
        self._warn_of_deadline()
        progress = self._read_changed(sights)
        self._keep_workers(sights.values())
        return progress

    def _check_session(self) -> None:
        now = self._runtime.monotonic()
        if now - self._checked_at < self._intervals.session_check:
            return
        self._checked_at = now
        try:
            self.manifest = self.session.load()
        except SessionNotFound as error:
            raise SessionTerminated(
                f"session {self.session.id} was deleted while tasks were unfinished"
            ) from error
        if self.manifest.state is SessionState.TERMINATED:
            raise SessionTerminated(
                f"session {self.session.id} was terminated while tasks were unfinished; "
                "cleanup() in another client or on the command line does that"
            )
        self.queue.learn(self.manifest.lanes)

    def _warn_of_deadline(self) -> None:
        left = self.manifest.deadline - self.queue.now
        if left <= 0 and "past" not in self._warned:
            self._checked_at = -math.inf  # another client may have extended it
            self._check_session()
            left = self.manifest.deadline - self.queue.now
        if left <= 0:
            text = f"session {self.session.id} (unfinished tasks: {self.unfinished}) is"
            self._warn_once("past", f"{text} {past_limit(self.manifest)}")
            return
        self._warned.discard("past")
        soon = min(_SOON_SECONDS, _SOON_SHARE * self.manifest.limits.absolute_timeout)
        slots = max(1, self.manifest.workers * self.manifest.spec.slots)
        need = self.unfinished * (self._run_time or 0.0) / slots
        if need > left or (left <= soon and not self._run_time):
            work = f" and some {duration(need)} of work" if need else ""
            self._warn_once(
                f"before {self.manifest.deadline}",
                f"session {self.session.id} (unfinished tasks: {self.unfinished}) has {duration(left)} until its absolute "
                f"time limit{work}: call extend(seconds) in time.",
            )

    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning("%s", text)

    # --- results --------------------------------------------------------------------

    def _read_changed(self, sights: dict[Batch, BatchListing]) -> bool:
        with self._lock:
            changed = []
            for batch, waited in self._waited.items():
                sight = sights.get(batch) or waited.sight
                waited.sight = sight
                if self._worth_reading(batch, sight, waited.known):
                    changed.append((batch, waited))
        calls = [partial(self._read, batch, waited.known) for batch, waited in changed]
        reads = self._runtime.gather(calls)
        progress = False
        for (batch, waited), known in zip(changed, reads, strict=True):
            if known is not None:
                progress = self._take_in(batch, waited, known) or progress
        return progress

    def _worth_reading(
        self, batch: Batch, sight: BatchListing | None, known: VersionedRecord
    ) -> bool:
        """Whether its record is new; not yet if it says, most likely, that it was just claimed."""
        if self.queue.done(batch):
            # Listings need not show it any more; perhaps none did since it is waited for.
            return True
        if not sight or not sight.record or sight.record.version == known.version:
            return False
        age = self.queue.now - sight.record.modified
        return known.version is not None or age >= self._grace

    def _read(self, batch: Batch, known: VersionedRecord) -> VersionedRecord | None:
        try:
            return self.session.read(batch, known)
        except (NewerSchema, SessionTerminated):
            raise
        except (ObjectNotFound, StoreError) as error:
            log.warning("batch %s: %s", batch, error)
            return None

    def _take_in(self, batch: Batch, waited: _Waited, known: VersionedRecord) -> bool:
        """Settle what has ended; whether anything had."""
        with self._lock:
            futures = dict(waited.futures)
        ended: dict[int, TaskFuture[Any]] = {}
        for position, future in futures.items():
            task = known.record.tasks[position]
            if task.state.final:
                ended[position] = future
            elif task.state is State.RUNNING:
                future.note_running()
        settled = self._settle_all(batch, known.record, ended)
        if len(settled) == len(ended):
            waited.known = known  # else it is read again, and what lacks is settled then
        with self._lock:
            for position in settled:
                if waited.futures.pop(position, None) and batch in self._waited:
                    self._unfinished -= 1
            if not waited.futures:
                self._waited.pop(batch, None)
            if not self._unfinished:
                self._idle.set()
        return bool(settled)

    def _settle_all(
        self, batch: Batch, record: Record, ended: dict[int, TaskFuture[Any]]
    ) -> list[int]:
        """Settle the futures of ended tasks; the positions of those whose outcome could be had."""
        settled: list[int] = []
        try:
            tasks = self._in_few_reads(batch, record, ended)
            for position, future in ended.items():
                self._settle(batch, position, tasks[position], future)
                settled.append(position)
        except StoreUnavailable as error:
            log.warning("batch %s: an outcome cannot be had yet: %s", batch, error)
        return settled

    def _in_few_reads(self, batch: Batch, record: Record, ended: Iterable[int]) -> dict[int, Task]:
        """The tasks with packed outcomes made inline: one read for each pack, not for each task."""
        tasks = {position: record.tasks[position] for position in ended}
        packs: dict[str, list[int]] = {}
        for position, task in tasks.items():
            if task.outcome is not None and task.outcome.pack:
                packs.setdefault(task.outcome.pack, []).append(position)
        for pack, positions in packs.items():
            if len(positions) > 1:
                tasks |= self._read_pack(batch, pack, {p: tasks[p] for p in positions})
        return tasks

    def _read_pack(self, batch: Batch, pack: str, tasks: dict[int, Task]) -> dict[int, Task]:
        places = {p: task.outcome for p, task in tasks.items() if task.outcome is not None}
        start = min(piece.start for piece in places.values())
        stop = max(piece.start + piece.size for piece in places.values())
        try:
            data = self.session.get_piece(batch, Piece(pack=pack, start=start, size=stop - start))
        except DamagedObject:
            return {}  # each task's own read tells which of them can still be had
        return {
            p: transitions.inlined(
                tasks[p], data[piece.start - start : piece.start + piece.size - start]
            )
            for p, piece in places.items()
        }

    def _settle(self, batch: Batch, position: int, task: Task, future: TaskFuture[Any]) -> None:
        if task.state is State.CANCELLED:
            future.settle_cancelled()
            return
        if task.started:
            seconds = task.ended - task.started
            self._run_time = (
                seconds if self._run_time is None else 0.9 * self._run_time + 0.1 * seconds
            )
        settled = self._outcomes.settled(batch, position, task)
        future.settle(settled)
        if isinstance(settled[1], InitializerFailed):
            self._broken(settled[1])

    # --- workers --------------------------------------------------------------------

    def _repair_interval(self) -> float:
        return self._intervals.lease * self._runtime.random.uniform(0.75, 1.0)

    def _keep_workers(self, sights: Iterable[BatchListing]) -> None:
        now = self._runtime.monotonic()
        if now - self._staffed_at >= min(1.0, self._intervals.heartbeat / 4):
            self._staffed_at = now
            fresh = self._ended_workers() - self._ended
            self._ended |= fresh
            self._staff(self.unfinished)
            if fresh:
                self._next_repair = now
        if now >= self._next_repair:
            unfinished = [sight for sight in sights if sight.done is None]
            self._repair.look(unfinished, self._ended)
            suspects = self._repair.leases.suspects
            wait = self._intervals.lease / 2 if suspects else self._repair_interval()
            self._next_repair = self._runtime.monotonic() + wait

    @property
    def live_workers(self) -> list[str]:
        """Workers with a heartbeat, as of the last repair look."""
        return self._repair.leases.live


def _end(futures: dict[int, TaskFuture[Any]], error: BaseException) -> None:
    for future in futures.values():
        future.settle((False, error))

"""How much work a worker holds, how long it will take, and how much to claim next, and where.

The order in which tasks start
    Tasks are claimed in submission order (with several clients: by lane, then number) and run in
    the order in which they were claimed, with these exceptions:

    Up to `FEW_WORKERS` workers: all claim from the first open batch. A task starts before an
        earlier one only if another worker holds the earlier one: at most `CLAIM_SECONDS` of work
        per worker. If tasks are tiny and a batch runs within `SHORT_BATCH` seconds, each worker
        takes a batch to itself.
    More workers: each prefers a batch that no other worker is writing, one of the first `spread` of
        those, so that writers rarely collide. At most twice as many unfinished batches as workers
        precede it; a batch is at most a quarter of a slot's share of all tasks waiting when it was
        stored. With more than `open_batches.LIST_ALL` workers, this holds as of each worker's last
        look at the queue.
    Requeued tasks, from a worker that was lost or had to leave, come first again. With few workers,
        one that stays with a batch notices within `FRONT_SECONDS`; with many, those looking for a
        batch do.
    Tasks waiting behind one that turns out to be long are handed back after `STUCK_SECONDS`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from starburst_executor.protocol import records, tasks_object
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.listing import BatchListing
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import TasksObject
from starburst_executor.runtime import Runtime
from starburst_executor.worker.assignment import Assignment, AttemptKey
from starburst_executor.worker.pool import ChildPool

__all__ = [
    "FEW_WORKERS",
    "FRONT_SECONDS",
    "LONG_TASK",
    "STUCK_SECONDS",
    "ClaimPlanner",
    "spread",
    "worth_claiming",
]

# A task that ends sooner has its start written together with its end.
LONG_TASK = 2.0
# Work claimed at a time, in seconds across all slots.
CLAIM_SECONDS = 1.0
# A task that has not started by then, behind one that turned out to be long, is handed back.
STUCK_SECONDS = 5.0
# Up to this many workers may share one record; S3 sustains about 15 writes a second to it.
FEW_WORKERS = 8
# With few workers, how often one looks for work ahead of the batch it is staying with.
FRONT_SECONDS = 5.0
# A batch of tiny tasks that takes no longer than this many seconds is left to one worker.
SHORT_BATCH = 4.0
TINY_TASK = 0.05
# A record not written for this long has no active writer, or one that rarely writes.
QUIET_SECONDS = 5.0


class ClaimPlanner:
    """The work a worker holds. Makes no requests.

    Args:
        slots: The pool that runs the tasks.
        runtime: The clocks.
        last_chance: A task that was lost this many times while running must be held alone.
    """

    def __init__(self, slots: ChildPool, runtime: Runtime, last_chance: int) -> None:
        self.assignments: dict[Batch, Assignment] = {}  # the last one was claimed from last
        self.last_chance = last_chance
        self._slots = slots
        self._runtime = runtime
        self._recent: dict[str, deque[float]] = {}  # function digest -> last run times
        self._round_trip = 0.02

    @property
    def working(self) -> bool:
        """Whether anything is unfinished or unwritten; safe from any thread."""
        return any(hold.busy for hold in list(self.assignments.values()))

    @property
    def queued(self) -> int:
        """How many tasks are running or yet to run; safe from any thread."""
        holds = list(self.assignments.values())
        return sum(len(hold.waiting) + len(hold.dispatched) for hold in holds)

    def solo(self, hold: Assignment) -> bool:
        """Whether it holds nothing but ends of this batch, which go into the same write."""
        return not any(
            one.waiting or one.dispatched or one.uploading or (one.ended and one is not hold)
            for one in self.assignments.values()
        )

    @property
    def running(self) -> bool:
        """Whether any task has begun and not ended."""
        return bool(self._slots.begun())

    @property
    def dispatched(self) -> int:
        """How many tasks the child pool has."""
        return sum(len(hold.dispatched) for hold in self.assignments.values())

    @property
    def free(self) -> int:
        """Slots with nothing to run."""
        return max(0, self._slots.size - self.queued)

    @property
    def current(self) -> Assignment | None:
        """The batch last claimed from, which the worker stays with while it lasts."""
        return next(reversed(self.assignments.values()), None)

    def learn_run(self, hold: Assignment, position: int, seconds: float) -> None:
        """Learn how long a task of this batch took."""
        function = hold.function(position)
        self._recent.setdefault(function, deque(maxlen=5)).append(seconds)

    def learn_round_trip(self, seconds: float) -> None:
        """Learn how long a write took."""
        self._round_trip += 0.2 * (seconds - self._round_trip)

    def wanted(self, hold: Assignment) -> int:
        """How many more tasks of this batch to claim now."""
        record = hold.known.record
        pending = record.count(State.PENDING)
        if not pending or self.full():
            return 0
        half = (pending + 1) // 2
        pace = self._pace_of(hold.tasks)
        if pace is None or pace >= LONG_TASK or _first_pending_was_lost(record):
            return min(self.free, half)
        per_claim = math.ceil(self._slots.size * CLAIM_SECONDS / max(pace, 1e-4))
        unbegun = self.queued - len(self._slots.begun())
        more = max(per_claim - unbegun, self.free, 1)
        return min(more, half, tasks_object.MAX_BATCH_TASKS)

    def short(self, tasks: int) -> bool:
        """Whether this worker alone would soon finish that many tasks like those last claimed."""
        current = self.current
        pace = self._pace_of(current.tasks) if current else None
        if pace is None or pace > TINY_TASK:
            return False
        return pace * tasks / self._slots.size <= SHORT_BATCH

    def full(self) -> bool:
        """Whether there is enough to do for now."""
        if self._last_chance_held():
            return True
        return not self.free and self._ahead() > self.lead

    def until_not_full(self) -> float:
        """Seconds until the next claim if no task ends first; inf if it has to wait for one."""
        if self._last_chance_held():
            return math.inf
        return max(self._ahead() - self.lead, 0.002)

    def until_due(self) -> float:
        """Seconds until a start must be written or a task has been stuck for too long."""
        now, wall = self._runtime.monotonic(), self._runtime.time()
        begun = self._slots.begun()
        due = math.inf
        for hold in self.assignments.values():
            for key in hold.queued:
                if key not in begun:
                    left = hold.claimed_at[key.position] + STUCK_SECONDS - now
                elif hold.claimed(key):
                    left = begun[key] + LONG_TASK - wall
                else:
                    continue
                # Overdue work that could not be done yet is retried periodically.
                due = min(due, left if left > 0 else LONG_TASK / 2)
        return due

    def unwritten_starts(self, hold: Assignment) -> dict[int, tuple[int, float]]:
        """Attempt and start of long-running tasks that are still recorded as claimed."""
        if not hold.dispatched:
            return {}
        now = self._runtime.time()
        begun = self._slots.begun()
        return {
            key.position: (key.attempt, begun[key])
            for key in hold.dispatched.values()
            if key in begun and now - begun[key] >= LONG_TASK and hold.claimed(key)
        }

    def stuck(self) -> list[tuple[Assignment, list[AttemptKey]]]:
        """Tasks that have waited too long behind ones that turned out to be long."""
        if self.free:
            return []
        now = self._runtime.monotonic()
        begun = self._slots.begun()
        found: list[tuple[Assignment, list[AttemptKey]]] = []
        for hold in self.assignments.values():
            keys = [
                key
                for key in hold.queued
                if key not in begun and now - hold.claimed_at[key.position] >= STUCK_SECONDS
            ]
            if keys:
                found.append((hold, keys))
        return found

    def unbegun(self) -> list[tuple[Assignment, list[AttemptKey]]]:
        """Tasks that are held and have not started."""
        begun = self._slots.begun()
        found = [
            (hold, [key for key in hold.queued if key not in begun])
            for hold in self.assignments.values()
        ]
        return [(hold, keys) for hold, keys in found if keys]

    @property
    def lead(self) -> float:
        """How long before work runs out to claim more: a few round trips."""
        return min(0.5, 5 * self._round_trip)

    def _ahead(self) -> float:
        """Seconds until a slot runs out of work, by known run times; 0 if one is free."""
        if self.free:
            return 0.0
        now = self._runtime.time()
        begun = self._slots.begun()
        first, queued = math.inf, 0.0
        for hold in self.assignments.values():
            if not hold.waiting and not hold.dispatched:
                continue
            pace = self._pace_of(hold.tasks)
            if pace is None or pace >= LONG_TASK:
                return math.inf
            for key in hold.queued:
                if key not in begun:
                    queued += pace
                    continue
                spent = max(now - begun[key], 0.0)
                # A task past its expected run time typically needs as long again.
                first = min(first, pace - spent if spent < pace else spent)
        return (first if first < math.inf else 0.0) + queued / self._slots.size

    def _pace_of(self, tasks: TasksObject) -> float | None:
        """The longest of its callables' run times, each the (lower) median of the last few.

        Not the mean: the first call in a process pays for imports.
        """
        recents = [self._recent.get(digest) for digest in tasks.header.functions]
        paces = [sorted(r)[(len(r) - 1) // 2] for r in recents if r]
        return max(paces) if paces and len(paces) == len(recents) else None

    def _last_chance_held(self) -> bool:
        """Whether it holds a task that must run alone, so that no other is blamed if it crashes."""
        return any(
            (task := hold.task(key)).lost > 0 and task.losses >= self.last_chance
            for hold in self.assignments.values()
            for key in hold.queued
        )


def _first_pending_was_lost(record: records.Record) -> bool:
    return next(t for t in record.tasks if t.state is State.PENDING).lost > 0


def spread(workers: int) -> int:
    """Among how many idle batches each of that many workers chooses."""
    return 1 if workers <= FEW_WORKERS else -(-workers // 2)


def worth_claiming(
    sights: Sequence[BatchListing], workers: int, now: float, *, short: bool = False
) -> Sequence[BatchListing]:
    """The open batches from which a worker should pick one at random.

    Args:
        sights: The open batches in order, starting with the first one listed.
        workers: How many workers there are.
        now: The store's clock when they were listed.
        short: One worker alone would soon finish the first of them.
    """
    if workers <= FEW_WORKERS and not short:
        return sights[:1]
    near = sights[: 2 * workers]
    free = [sight for sight in near if _is_quiet(sight, now)]
    return free or near if short else (free or near)[: spread(workers)]


def _is_quiet(sight: BatchListing, now: float) -> bool:
    """Whether a claim will likely not conflict: the record is missing or has not changed lately."""
    return sight.record is None or now - sight.record.modified >= QUIET_SECONDS

"""How much work a worker has, how long it will take, and how much more to claim, and where.

The order in which tasks start
    Tasks are claimed in submission order (with several clients: by lane, then number), and run in
    the order in which they were claimed, with these exceptions.

    up to `FEW_WORKERS` workers: all claim from the first open batch. A task begins before an earlier one
        only where another worker holds that one: at most `CLAIM_SECONDS` of work for each worker. Where tasks
        are tiny and a batch is run within `SHORT_BATCH` seconds, each worker takes one for itself.
    more workers: each prefers a batch that nobody is at, one of the first `spread` of those, so that
        writers seldom meet. At most twice as many unfinished batches as there are workers lie before it; a
        batch is at most a quarter of a slot's share of all that waited when it was stored. With more than
        `open_batches.LIST_ALL` workers that is by what each knew of the queue at its last look.
    What was sent back, by a worker that was lost or had to leave, is again the first in order. A worker that
        stays with a batch notices within `FRONT_SECONDS`; among many workers those do that look for a batch.
    What waits behind a task that turned out long is handed back after `STUCK_SECONDS`.
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
# Work claimed at a time, in seconds of all slots.
CLAIM_SECONDS = 1.0
# A task that has not started by then, behind one that turned out to be long, is handed back.
STUCK_SECONDS = 5.0
# Up to this many workers may all write one record; on S3 it takes about 15 writes a second.
FEW_WORKERS = 8
# How often one of few workers looks for work in front of the batch it is staying with.
FRONT_SECONDS = 5.0
# A batch of tiny tasks that takes no longer than this many seconds is left to one worker.
SHORT_BATCH = 4.0
TINY_TASK = 0.05
# Nobody is writing a record that was not written for this long, or only seldom.
QUIET_SECONDS = 5.0


class ClaimPlanner:
    """The work a worker holds. Makes no requests.

    Args:
        slots: What runs the tasks.
        runtime: The clocks.
        last_chance: A task that was lost this many times while running must be held alone.
    """

    def __init__(self, slots: ChildPool, runtime: Runtime, last_chance: int) -> None:
        self.assignments: dict[Batch, Assignment] = {}  # the last one is that last claimed from
        self.last_chance = last_chance
        self._slots = slots
        self._runtime = runtime
        self._recent: dict[str, deque[float]] = {}  # function digest -> last run times
        self._round_trip = 0.02

    @property
    def working(self) -> bool:
        """Whether anything is unfinished or unwritten; may be read by any thread."""
        return any(hold.busy for hold in list(self.assignments.values()))

    @property
    def queued(self) -> int:
        """How many tasks are yet to run, or running; may be read by any thread."""
        holds = list(self.assignments.values())
        return sum(len(hold.waiting) + len(hold.dispatched) for hold in holds)

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
        """Whether this worker alone would soon have run that many tasks like those last claimed."""
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
        """Seconds until more should be claimed if nothing ends first; inf if only an end can tell."""
        if self._last_chance_held():
            return math.inf
        return max(self._ahead() - self.lead, 0.002)

    def until_due(self) -> float:
        """Seconds until a start must be written, or a task has been stuck for too long."""
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
                # What cannot be done when it is due is tried again now and then.
                due = min(due, left if left > 0 else LONG_TASK / 2)
        return due

    def unwritten_starts(self, hold: Assignment) -> dict[int, tuple[int, float]]:
        """Attempt and begin of tasks that have run for long and are still recorded as claimed."""
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
        """What has waited too long behind tasks that turned out to be long."""
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
        """What is held and has not started."""
        begun = self._slots.begun()
        found = [
            (hold, [key for key in hold.queued if key not in begun])
            for hold in self.assignments.values()
        ]
        return [(hold, keys) for hold, keys in found if keys]

    @property
    def lead(self) -> float:
        """How long before work runs out more is claimed: a few round trips."""
        return min(0.5, 5 * self._round_trip)

    def _ahead(self) -> float:
        """Seconds until a slot runs out of work, as far as run times are known; 0 if one is free."""
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
                # One that ran over what was expected has, as a rule, as long again to go.
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
        """Whether a task is held that must be alone, so that no other is blamed for what it does."""
        return any(
            (task := hold.task(key)).lost > 0 and task.losses >= self.last_chance
            for hold in self.assignments.values()
            for key in hold.queued
        )


def _first_pending_was_lost(record: records.Record) -> bool:
    return next(t for t in record.tasks if t.state is State.PENDING).lost > 0


def spread(workers: int) -> int:
    """How many of the batches that nobody is working on each of that many workers chooses among."""
    return 1 if workers <= FEW_WORKERS else -(-workers // 2)


def worth_claiming(
    sights: Sequence[BatchListing], workers: int, now: float, *, short: bool = False
) -> Sequence[BatchListing]:
    """Those of the open batches from which a worker should pick one at random.

    Args:
        sights: The open batches in order, from the first one that was listed.
        workers: How many workers there are.
        now: The store's clock when they were listed.
        short: One worker alone would soon have run the first of them.
    """
    if workers <= FEW_WORKERS and not short:
        return sights[:1]
    near = sights[: 2 * workers]
    free = [sight for sight in near if _nobody_is_at(sight, now)]
    return free or near if short else (free or near)[: spread(workers)]


def _nobody_is_at(sight: BatchListing, now: float) -> bool:
    """Whether a claim most likely meets no other: the record is missing, or has not changed lately."""
    return sight.record is None or now - sight.record.modified >= QUIET_SECONDS

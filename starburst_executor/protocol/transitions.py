"""Every change to a record, as pure functions: `record, event, now -> record`.

    pending ----> claimed ----> running ----> completed
     ^   |           |             |--------> failed
     |   +-> cancelled <-----------+
     +---------------+-------------+   handed back, or the worker was lost: next round

`session` applies changes and handles concurrent writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace

from starburst_executor.protocol.records import (
    Interruption,
    PastAttempt,
    Piece,
    Record,
    State,
    Task,
)

__all__ = [
    "AttemptEnd",
    "WorkerUpdate",
    "advance",
    "cancel",
    "due_markers",
    "fail_all",
    "held_by",
    "inlined",
    "requeue_lost",
]


class AttemptEnd(NamedTuple):
    """How an attempt ended."""

    position: int
    attempt: int
    ok: bool
    started: float
    ended: float
    outcome: Piece
    stdout: Piece | None = None
    stderr: Piece | None = None


def held_by(record: Record, worker: str) -> dict[int, int]:
    """Position -> attempt of every task that the worker holds according to the record."""
    return {
        i: task.attempt
        for i, task in enumerate(record.tasks)
        if task.worker == worker and task.state.held
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerUpdate:
    """Everything that one worker writes about one batch in a single change.

    Attributes:
        finishes: Attempts that ended.
        starts: Position -> attempt and start time of tasks that are running.
        releases: Position -> attempt of tasks that are handed back.
        claim: Claim pending tasks until the worker holds this many.
        begin: How many of the newly claimed tasks start at once.
        last_chance: A task lost this many times while running is claimed only if `solo`.
        solo: The worker holds nothing else, in this batch or any other.
    """

    finishes: tuple[AttemptEnd, ...] = ()
    starts: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    releases: Mapping[int, int] = field(default_factory=dict)
    claim: int = 0
    begin: int = 0
    last_chance: int = 0
    solo: bool = False


def advance(record: Record, worker: str, now: float, update: WorkerUpdate) -> Record:
    """Apply everything that one worker has to write, in one change.

    Each part applies only where the record still names that attempt, so a worker that was declared
    lost changes nothing. An attempt's number is given out once, by a claim, so it says whose it is.
    Updates are idempotent, so a write whose reply was lost may be repeated.

    Args:
        record: The record as it is.
        worker: The worker's id.
        now: UTC seconds.
        update: What the worker has to write.
    """
    tasks = list(record.tasks)
    for finish in update.finishes:
        _finish(tasks, finish)
    for position, (attempt, began) in update.starts.items():
        if _holds(tasks[position], attempt):
            tasks[position] = replace(tasks[position], state=State.RUNNING, started=began)
    released = [i for i, a in update.releases.items() if _holds(tasks[i], a)]
    for position in released:
        tasks[position] = _back(tasks[position], now, Interruption.HANDED_BACK)
    if update.claim:
        limit = math.inf if update.solo else update.last_chance
        chosen = _choose(tasks, worker, update.claim, limit, frozenset(released))
        _take(tasks, chosen, worker, now, update.begin)
    return replace(record, tasks=tuple(tasks), round=record.round + bool(released))


def _holds(task: Task, attempt: int) -> bool:
    return task.attempt == attempt and task.state.held


def _finish(tasks: list[Task], finish: AttemptEnd) -> None:
    task = tasks[finish.position]
    if not _holds(task, finish.attempt):
        return
    tasks[finish.position] = replace(
        task,
        state=State.COMPLETED if finish.ok else State.FAILED,
        started=finish.started,
        ended=finish.ended,
        outcome=finish.outcome,
        stdout=finish.stdout,
        stderr=finish.stderr,
    )


def _back(task: Task, now: float, how: Interruption) -> Task:
    """Pending again for the next round, with the attempt added to its history."""
    lost = how is Interruption.LOST
    running = task.state is State.RUNNING
    past = PastAttempt(
        attempt=task.attempt,
        worker=task.worker,
        claimed=task.claimed,
        started=task.started,
        ended=now,
        how=how,
    )
    return Task(
        attempt=task.attempt,
        lost=task.lost + lost,
        losses=task.losses + (lost and running),
        past=(*task.past, past)[-_PAST_KEPT:],
    )


_PAST_KEPT = 8  # attempts; a task may be handed back any number of times


def _choose(
    tasks: Sequence[Task],
    worker: str,
    count: int,
    losses_below: float,
    exclude: frozenset[int],
) -> list[int]:
    """Positions to claim so that the worker holds `count`, as far as there are enough.

    A task that was lost before is claimed alone: if it crashes the worker, no other task is
    blamed for it.
    """
    wanted = count - sum(task.worker == worker and task.state.held for task in tasks)
    chosen: list[int] = []
    for i, task in enumerate(tasks):
        if len(chosen) >= wanted:
            break
        if task.state is not State.PENDING or i in exclude:
            continue
        if not task.lost:
            chosen.append(i)
        elif not chosen and task.losses < losses_below:
            return [i]
    return chosen


def _take(tasks: list[Task], chosen: Iterable[int], worker: str, now: float, begin: int) -> None:
    for rank, i in enumerate(chosen):
        starts = rank < begin
        tasks[i] = replace(
            tasks[i],
            state=State.RUNNING if starts else State.CLAIMED,
            attempt=tasks[i].attempt + 1,
            worker=worker,
            claimed=now,
            started=now if starts else 0,
        )


def requeue_lost(
    record: Record,
    lost: Collection[str],
    now: float,
    max_attempts: int,
    outcome: Callable[[int, Task], bytes],
) -> Record:
    """Requeue what lost workers held; fail tasks that were lost while running too often.

    Args:
        record: The record as it is.
        lost: Ids of the lost workers.
        now: UTC seconds.
        max_attempts: Fail a task that was lost this many times while running.
        outcome: Position and task -> the outcome to store for a task that fails this way.
    """
    tasks = list(record.tasks)
    went_back = False
    for i, task in enumerate(tasks):
        if not task.state.held or task.worker not in lost:
            continue
        back = _back(task, now, Interruption.LOST)
        if back.losses < max_attempts:
            tasks[i], went_back = back, True
            continue
        piece = Piece(inline=outcome(i, task))
        tasks[i] = replace(
            back, state=State.FAILED, worker=task.worker, claimed=task.claimed,
            started=task.started, ended=now, outcome=piece,
        )  # fmt: skip
    return replace(record, tasks=tuple(tasks), round=record.round + went_back)


def cancel(record: Record, positions: Iterable[int], now: float, *, running: bool) -> Record:
    """Cancel the pending tasks among `positions`; with `running`, those a worker holds too."""
    tasks = list(record.tasks)
    for i in positions:
        state = tasks[i].state
        if state is State.PENDING or (running and state.held):
            tasks[i] = replace(tasks[i], state=State.CANCELLED, ended=now)
    return replace(record, tasks=tuple(tasks))


def inlined(task: Task, outcome: bytes) -> Task:
    """The task with its outcome inline in the record."""
    return replace(task, outcome=Piece(inline=outcome))


def fail_all(record: Record, now: float, outcome: bytes) -> Record:
    """Fail every task that is not final, because none of the batch can run."""
    failed = Piece(inline=outcome)
    tasks = (
        task if task.state.final else replace(task, state=State.FAILED, ended=now, outcome=failed)
        for task in record.tasks
    )
    return replace(record, tasks=tuple(tasks))


def due_markers(record: Record) -> tuple[str, ...]:
    """The markers this record calls for; each states a fact that no later record can undo."""
    if record.finished:
        counts = (record.count(s) for s in (State.COMPLETED, State.FAILED, State.CANCELLED))
        return (".".join(["done", *map(str, counts)]),)
    if any(task.state is State.PENDING for task in record.tasks):
        return (f"requeued.{record.round}",) if record.round else ()
    if len(record.tasks) == 1 and not record.round:
        return ()  # the existence of its record says as much
    return (f"drained.{record.round}",)

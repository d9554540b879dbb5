"""Every change of a record, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from starburst_executor.protocol.records import PastAttempt, Piece, Record, State, Task

__all__ = [
    "AttemptEnd",
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
    """Position -> attempt of what the record says that worker holds."""
    return {
        i: task.attempt
        for i, task in enumerate(record.tasks)
        if task.worker == worker and task.state.held
    }


def advance(
    record: Record,
    worker: str,
    now: float,
    *,
    finishes: Iterable[AttemptEnd] = (),
    starts: Mapping[int, tuple[int, float]] | None = None,
    releases: Mapping[int, int] | None = None,
    claim: int = 0,
    begin: int = 0,
    last_chance: int = 0,
    solo: bool = False,
) -> Record:
    """All that one worker has to say, in one change.

    Each part holds only where the record still names this worker and that attempt, so that a
    worker which was given up for lost changes nothing; and may be repeated, so that a write whose
    reply was lost does no harm.

    Args:
        record: The record as it is.
        worker: Who speaks.
        now: UTC seconds.
        finishes: Attempts that ended.
        starts: Position -> attempt and begin time, of tasks that run.
        releases: Position -> attempt, of tasks handed back.
        claim: Hold at least so many of what is pending, if there are.
        begin: Of newly claimed tasks, so many begin at once.
        last_chance: A task lost while running so often is taken only when `solo`.
        solo: The worker holds nothing else, here or elsewhere.
    """
    tasks = list(record.tasks)
    for finish in finishes:
        _finish(tasks, worker, finish)
    for position, (attempt, began) in (starts or {}).items():
        if _holds(tasks[position], worker, attempt):
            tasks[position] = replace(tasks[position], state=State.RUNNING, started=began)
    released = [i for i, a in (releases or {}).items() if _holds(tasks[i], worker, a)]
    for position in released:
        tasks[position] = _back(tasks[position], now, "handed back")
    if claim:
        limit = math.inf if solo else last_chance
        chosen = _choose(tasks, worker, claim, limit, frozenset(released))
        _take(tasks, chosen, worker, now, begin)
    return replace(record, tasks=tuple(tasks), round=record.round + bool(released))


def _holds(task: Task, worker: str, attempt: int) -> bool:
    return task.worker == worker and task.attempt == attempt and task.state.held


def _finish(tasks: list[Task], worker: str, finish: AttemptEnd) -> None:
    task = tasks[finish.position]
    if not _holds(task, worker, finish.attempt):
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


def _back(task: Task, now: float, how: str, *, lost: bool = False) -> Task:
    """Pending again, for the next round, with the attempt kept for the record."""
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


_PAST_KEPT = 8  # of a task that is handed back again and again, the last attempts


def _choose(
    tasks: Sequence[Task],
    worker: str,
    count: int,
    losses_below: float,
    exclude: frozenset[int],
) -> list[int]:
    """Positions to claim, so that the worker holds `count` if there are as many.

    What was lost once is claimed alone: if it takes the worker down it is found out, and those
    claimed beside it are not blamed.
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
    """Send back what lost workers held; fail what was lost while running for the last time.

    Args:
        record: The record as it is.
        lost: Ids of workers that are lost.
        now: UTC seconds.
        max_attempts: Fail a task at so many losses while running.
        outcome: Position and task -> the outcome to store for one that fails so.
    """
    tasks = list(record.tasks)
    went_back = False
    for i, task in enumerate(tasks):
        if not task.state.held or task.worker not in lost:
            continue
        back = _back(task, now, "lost", lost=True)
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
    """Cancel the pending ones of `positions`; with `running`, those that a worker has as well."""
    tasks = list(record.tasks)
    for i in positions:
        state = tasks[i].state
        if state is State.PENDING or (running and state.held):
            tasks[i] = replace(tasks[i], state=State.CANCELLED, ended=now)
    return replace(record, tasks=tuple(tasks))


def inlined(task: Task, outcome: bytes) -> Task:
    """The task as if its outcome were in the record."""
    return replace(task, outcome=Piece(inline=outcome))


def fail_all(record: Record, now: float, outcome: bytes) -> Record:
    """Fail every task that is not final: nothing of the batch can be run."""
    failed = Piece(inline=outcome)
    tasks = (
        task if task.state.final else replace(task, state=State.FAILED, ended=now, outcome=failed)
        for task in record.tasks
    )
    return replace(record, tasks=tuple(tasks))


def due_markers(record: Record) -> tuple[str, ...]:
    """The markers that this record deserves; each is a fact that no later record can make wrong."""
    if record.finished:
        counts = (record.count(s) for s in (State.COMPLETED, State.FAILED, State.CANCELLED))
        return (".".join(["done", *map(str, counts)]),)
    if any(task.state is State.PENDING for task in record.tasks):
        return (f"requeued.{record.round}",) if record.round else ()
    if len(record.tasks) == 1 and not record.round:
        return ()  # that its record exists says as much
    return (f"drained.{record.round}",)

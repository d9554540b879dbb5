"""The history of each task, for people: its attempts, times, error and output.

Read from records and outcomes as stored. Nothing is unpickled, so any version of Python can look at
the tasks of any other.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Literal

from starburst_executor.errors import (
    DamagedObject,
    ObjectNotFound,
    SessionNotFound,
    StoreError,
)
from starburst_executor.formatting import utc
from starburst_executor.inspection.records import read_record
from starburst_executor.protocol import vanished
from starburst_executor.protocol.keys import Batch, parse_task_id, task_id
from starburst_executor.protocol.listing import BatchListing
from starburst_executor.protocol.manifest import SessionState
from starburst_executor.protocol.outcome import decode_outcome
from starburst_executor.protocol.records import Piece, Record, State, Task
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.task_names import NO_NAME, Name

__all__ = [
    "Attempt",
    "Found",
    "Output",
    "TaskError",
    "TaskGroup",
    "TaskHistory",
    "TaskStateName",
    "TaskView",
    "attempts",
    "find",
    "find_one",
    "group_errors",
    "history",
    "idle_seconds",
    "read_again",
    "read_output",
    "view",
    "views",
]

log = logging.getLogger(__name__)

_CONCURRENT = 64  # records in memory at once; one may hold 64 KiB of outcomes
_SAMPLES = 5  # task ids shown for a group of failures


TaskStateName = Literal["pending", "claimed", "running", "completed", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A task with its place in the session.

    Attributes:
        batch: Its batch.
        position: Its position in the batch.
        index: Its position in submission order.
        stored: When it was stored, in UTC seconds by the store's clock.
        now: When the queue was listed, by the same clock.
        task: Its state.
        name: Its name; empty unless requested.
    """

    batch: Batch
    position: int
    index: int
    stored: float
    now: float
    task: Task
    name: Name = NO_NAME

    @property
    def task_id(self) -> str:
        """Id of the task within the session."""
        return task_id(self.batch.lane, self.batch.number + self.position)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskError:
    """Why a task failed, in words.

    Attributes:
        kind: "raised", "crashed", "timeout", "lost", "initializer", "unserializable" or "damaged".
        type: Qualified name of the exception's class.
        message: Its text.
        traceback: The remote traceback; "" if there is none.
        exit_code: Exit code of the process that ran the task, if it died.
        signal: Number of the signal that killed it.
        stderr: The tail of its stderr, if it died.
    """

    kind: str
    type: str
    message: str
    traceback: str = ""
    exit_code: int | None = None
    signal: int | None = None
    stderr: str = ""

    def __str__(self) -> str:
        text = f"{self.type}: {self.message}" if self.message else self.type
        if self.signal is not None:
            return f"{text} (signal {self.signal})"
        if self.exit_code is not None:
            return f"{text} (exit code {self.exit_code})"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskView:
    """One line of a list of tasks.

    Attributes:
        index: Position in submission order.
        task_id: Id within the session.
        state: Its current state.
        worker: The worker that has it or had it last; "" if none has.
        attempt: How often it was claimed.
        queued: Seconds between being stored and its last attempt, or until now.
        ran: Seconds that its last attempt has run.
        error: Why it failed; None unless it did.
        call: Its function and abbreviated arguments; "" if not stored.
        label: The label given by its submitter; "" for none.
    """

    index: int
    task_id: str
    state: TaskStateName
    worker: str
    attempt: int
    queued: float
    ran: float
    error: TaskError | None
    call: str = ""
    label: str = ""

    @property
    def name(self) -> str:
        """Its label, or else the call."""
        return self.label or self.call


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One worker's attempt at a task; times by that worker's clock.

    Attributes:
        number: Counted from 1.
        worker: The worker's id.
        claimed: When the worker claimed it.
        started: When a process started it; None if none did.
        ended: When it ended; None if it has not.
        how: How it ended ("completed", "failed", "cancelled", "lost", "handed back"), or its state.
    """

    number: int
    worker: str
    claimed: datetime
    started: datetime | None
    ended: datetime | None
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a task has printed."""

    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskHistory:
    """Everything known about one task.

    Attributes:
        task: The task, as in a list.
        stored_at: When it was stored.
        function: Digest of the callable; "" if its batch was removed from the store.
        argument_bytes: Size of its pickled arguments, without large buffers.
        attempts: First to last; if there are very many, the last eight.
        output: What it has printed.
    """

    task: TaskView
    stored_at: datetime
    function: str
    argument_bytes: int
    attempts: list[Attempt]
    output: Output


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskGroup:
    """Tasks that failed in the same place.

    Attributes:
        count: How many there are.
        task_ids: Some of them.
        error: The error of the first.
        names: The same ids, each with the task's name.
    """

    count: int
    task_ids: list[str]
    error: TaskError
    names: list[str]


# --- finding -----------------------------------------------------------------------


def find(
    session: Session,
    states: Collection[State] | None = None,
    without: Collection[Batch] = (),
    *,
    named: bool = False,
) -> Iterator[Found]:
    """The tasks of a session in submission order, by default in any state, else one of `states`.

    Batches in `without`, and batches whose markers rule out such tasks, are not read. With `named`,
    task names are read too, which takes one more request per batch with a match.
    """
    batches, now = _placed_batches(session)
    wanted = (
        placed
        for placed in batches
        if placed.batch not in without and (states is None or _may_have(placed.listing, states))
    )
    while some := list(islice(wanted, _CONCURRENT)):
        records = session.runtime.gather([partial(_read, session, p) for p in some])
        chosen = [
            [f for f in _tasks(placed, record, now) if states is None or f.task.state in states]
            for placed, record in zip(some, records, strict=True)
        ]
        if named:
            filled = [found for found in chosen if found]
            chosen = session.runtime.gather([partial(_named, session, f) for f in filled])
        for found in chosen:
            yield from found


def _named(session: Session, tasks: list[Found]) -> list[Found]:
    """Tasks of one batch with their names, if these can be read."""
    batch = tasks[0].batch
    try:
        names = session.names(batch)
    except (DamagedObject, ObjectNotFound) as error:
        log.warning("session %s: %s", session.id, error)
        return tasks
    return [replace(found, name=names[found.position]) for found in tasks]


def find_one(session: Session, name: str) -> Found:
    """One task by its id.

    Raises:
        ValueError: `name` is not a task id.
        LookupError: the session has no such task.
    """
    lane, number = parse_task_id(name)
    batches, now = _placed_batches(session)
    for placed in batches:
        batch = placed.batch
        if batch.lane == lane and batch.number <= number < batch.end:
            tasks = list(_tasks(placed, _read(session, placed), now))
            return _named(session, [tasks[number - batch.number]])[0]
    raise LookupError(f"session {session.id} has no task {name}")


def read_again(session: Session, found: Found) -> Found:
    """The task as it is now, with the times of the first read."""
    task = session.read(found.batch).record.tasks[found.position]
    return Found(
        batch=found.batch,
        position=found.position,
        index=found.index,
        stored=found.stored,
        now=found.now,
        task=task,
        name=found.name,
    )


@dataclass(slots=True, kw_only=True)
class _PlacedBatch:
    """A batch and its place in the session."""

    listing: BatchListing
    first: int = 0  # index of its first task
    stored: float = 0

    @property
    def batch(self) -> Batch:
        return self.listing.batch


def _placed_batches(session: Session) -> tuple[list[_PlacedBatch], float]:
    """All batches, finished ones too, in submission order; and the store's time."""
    prefix = session.key("queue/")
    entries, now = session.list_all(prefix)
    found: dict[Batch, _PlacedBatch] = {}
    for entry in entries:
        folder, _, name = entry.key[len(prefix) :].partition("/")
        batch = Batch.parse(folder)
        if batch is None:
            continue
        placed = found.setdefault(batch, _PlacedBatch(listing=BatchListing(batch)))
        placed.listing.add(name, entry)
        if name == "tasks":
            placed.stored = entry.modified
    found |= {batch: _PlacedBatch(listing=BatchListing(batch)) for batch in _gaps(session, found)}
    first = 0
    ordered = [found[batch] for batch in sorted(found)]
    for placed in ordered:
        placed.first = first
        first += placed.batch.size
    return ordered, now


def _gaps(session: Session, found: Collection[Batch]) -> Iterable[Batch]:
    """Batches of which nothing is left."""
    try:
        manifest = session.load()
    except SessionNotFound:  # the remains of a deleted one
        return ()
    if manifest.state is SessionState.TERMINATED:  # perhaps it is being deleted
        return ()
    return vanished.gaps(found, manifest.lanes)


def _may_have(listing: BatchListing, states: Collection[State]) -> bool:
    if listing.done is None:
        return True
    final = (State.COMPLETED, State.FAILED, State.CANCELLED)
    return any(n and s in states for s, n in zip(final, listing.done, strict=True))


def _read(session: Session, placed: _PlacedBatch) -> Record:
    if not placed.listing.complete:
        return vanished.remains(session, placed.batch)
    return read_record(session, placed.listing).record


def _tasks(placed: _PlacedBatch, record: Record, now: float) -> Iterator[Found]:
    for position, task in enumerate(record.tasks):
        yield Found(
            batch=placed.batch,
            position=position,
            index=placed.first + position,
            stored=placed.stored,
            now=now,
            task=task,
        )


# --- showing -----------------------------------------------------------------------


def views(session: Session, states: Collection[State] | None = None) -> Iterator[TaskView]:
    """One line per task, in submission order; see `find`."""
    found = find(session, states, named=True)
    while some := list(islice(found, 4 * _CONCURRENT)):
        yield from session.runtime.gather([partial(view, session, f) for f in some])


def view(session: Session, found: Found) -> TaskView:
    """The line for one task; reads its outcome if it failed and the record does not hold it."""
    task = found.task
    ended = task.ended or found.now
    started = task.started or ended
    return TaskView(
        index=found.index,
        task_id=found.task_id,
        state=task.state.value,
        worker=task.worker,
        attempt=task.attempt,
        queued=max(0.0, started - found.stored),
        ran=max(0.0, ended - task.started) if task.started else 0.0,
        error=_error(session, found),
        call=found.name.call,
        label=found.name.label,
    )


def _error(session: Session, found: Found) -> TaskError | None:
    if found.task.state is not State.FAILED or found.task.outcome is None:
        return None
    try:
        data = session.get_piece(found.batch, found.task.outcome)
        failure = decode_outcome(data).failure
    except StoreError as error:
        return TaskError(kind="damaged", type=type(error).__name__, message=str(error))
    if failure is None:
        return None
    return TaskError(
        kind=failure.kind,
        type=failure.type or failure.kind,
        message=failure.message,
        traceback=failure.traceback,
        exit_code=failure.exit_code,
        signal=failure.signal,
        stderr=failure.stderr,
    )


def attempts(task: Task) -> list[Attempt]:
    """Every recorded attempt at a task, the current one last."""
    tries = [
        Attempt(
            number=past.attempt,
            worker=past.worker,
            claimed=utc(past.claimed),
            started=utc(past.started) if past.started else None,
            ended=utc(past.ended),
            how=past.how.value,
        )
        for past in task.past
    ]
    # The final lost attempt is among the past ones already.
    if task.worker and not (tries and tries[-1].number == task.attempt):
        tries.append(
            Attempt(
                number=task.attempt,
                worker=task.worker,
                claimed=utc(task.claimed),
                started=utc(task.started) if task.started else None,
                ended=utc(task.ended) if task.ended else None,
                how=str(task.state),
            )
        )
    return tries


def read_output(session: Session, found: Found) -> Output:
    """What a task has printed; for a running one, as of its worker's last heartbeat."""
    task = found.task
    if task.state.held:
        out, err = session.live_log(found.batch, found.position, task.attempt)
        return Output(stdout=out, stderr=err)
    return Output(
        stdout=_text(session, found.batch, task.stdout),
        stderr=_text(session, found.batch, task.stderr),
    )


def _text(session: Session, batch: Batch, piece: Piece | None) -> str:
    if piece is None:
        return ""
    return session.get_piece(batch, piece).decode(errors="replace")


def history(session: Session, found: Found) -> TaskHistory:
    """Everything known about one task."""
    function, size = _call(session, found)
    return TaskHistory(
        task=view(session, found),
        stored_at=utc(found.stored),
        function=function,
        argument_bytes=size,
        attempts=attempts(found.task),
        output=read_output(session, found),
    )


def _call(session: Session, found: Found) -> tuple[str, int]:
    """Digest of a task's callable, and size of its arguments; nothing if they were removed."""
    try:
        header = session.tasks(found.batch).header
    except ObjectNotFound:
        return "", 0
    call = header.calls[found.position]
    return header.functions[call.function], max(0, call.size)


def group_errors(tasks: Iterable[TaskView]) -> list[TaskGroup]:
    """Failed tasks grouped by kind of failure and line; the largest group first."""
    groups: dict[tuple[object, ...], list[TaskView]] = {}
    for task in tasks:
        if task.error is not None:
            groups.setdefault(_place(task.error), []).append(task)
    made = [
        TaskGroup(
            count=len(group),
            task_ids=[task.task_id for task in group[:_SAMPLES]],
            error=error,
            names=[f"{task.task_id} {task.name}".rstrip() for task in group[:_SAMPLES]],
        )
        for group in groups.values()
        if (error := group[0].error) is not None
    ]
    return sorted(made, key=lambda group: -group.count)


def _place(error: TaskError) -> tuple[object, ...]:
    """Where and how it failed, ignoring the message, which may contain arguments."""
    frames = tuple(line for line in error.traceback.splitlines() if line.startswith('  File "'))
    return error.kind, error.type, error.exit_code, error.signal, frames


def idle_seconds(session: Session) -> float:
    """Seconds since anything of a session was written, by the store's clock; remains count too."""
    entries, now = session.list_all(session.prefix)
    return now - max((entry.modified for entry in entries), default=now)

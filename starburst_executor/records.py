"""The records of a session: what they hold, under which keys, and how they may change.

Everything here is a value or a pure function. A change of state is a function
`record, event, now -> record`; who applies it, and what happens when somebody else wrote
in the meantime, is the business of `session`.

    pending ----> claimed ----> running ----> completed
     ^   |           |             |--------> failed
     |   +-> cancelled <-----------+
     +---------------+-------------+   handed back, or the worker was lost: next round

A *batch* is the tasks that one write stored. Its name, `{lane}-{number}.{size}`, says which
numbers of which lane it holds, so that a listing tells the size of a session and shows
whether anything is missing in between.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Self, TypeVar

import msgspec
from msgspec.structs import replace

from starburst_executor.errors import DamagedObject, NewerSchema
from starburst_executor.rate import Rate
from starburst_executor.spec import WorkerSpec

__all__ = [
    "MAX_BATCH_BYTES",
    "MAX_BATCH_TASKS",
    "Batch",
    "Finish",
    "Header",
    "Heartbeat",
    "Intervals",
    "Lane",
    "Limits",
    "LiveLog",
    "Manifest",
    "Past",
    "Piece",
    "Queued",
    "Record",
    "SessionState",
    "State",
    "Task",
    "advance",
    "cancel",
    "decode",
    "due_markers",
    "encode",
    "encode_tasks",
    "fail_all",
    "held_by",
    "inlined",
    "parse_task_id",
    "read_header",
    "requeue_lost",
    "task_id",
]

SCHEMA = 1

# A batch larger than this would make each compare-and-swap of its record slow; a smaller
# one would cost a request for fewer tasks.
MAX_BATCH_TASKS = 256
MAX_BATCH_BYTES = 4 << 20


# --- names -------------------------------------------------------------------------


class Batch(NamedTuple):
    """The tasks written by one PUT: numbers `number` to `number + size - 1` of a lane."""

    lane: int
    number: int
    size: int

    def __str__(self) -> str:
        return f"{self.lane:04d}-{self.number:08d}.{self.size}"

    @property
    def end(self) -> int:
        """The number after the last."""
        return self.number + self.size

    @property
    def tasks_key(self) -> str:
        """Header and arguments; created once. Sorts after every other key of the batch."""
        return f"queue/{self}/tasks"

    @property
    def record_key(self) -> str:
        """State of every task; changed by compare-and-swap alone."""
        return f"queue/{self}/record"

    def marker_key(self, marker: str) -> str:
        """An empty object whose name is a fact about the record."""
        return f"queue/{self}/{marker}"

    def pack_key(self, nonce: str) -> str:
        """What one write finished and was too large for the record."""
        return f"results/{self}/{nonce}"

    def live_log_key(self, position: int, attempt: int) -> str:
        """What a running task has printed so far."""
        return f"logs/{self}/{position}.{attempt}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The batch of that name, or None where it is not one."""
        match = _BATCH_NAME.fullmatch(name)
        return cls(*map(int, match.groups())) if match else None


_BATCH_NAME = re.compile(r"(\d{4})-(\d{8})\.(\d+)")


def task_id(lane: int, number: int) -> str:
    """The public id of a task, such as `0-17`; unique within its session."""
    return f"{lane}-{number}"


def parse_task_id(text: str) -> tuple[int, int]:
    """Lane and number of a task id.

    Raises:
        ValueError: it is not a task id.
    """
    lane, dash, number = text.partition("-")
    if not (dash and lane.isdecimal() and number.isdecimal()):
        raise ValueError(
            f"{text!r} is not a task id; one looks like '0-17' (lane 0, task 17)"
        )
    return int(lane), int(number)


def lane_prefix(lane: int) -> str:
    """What all keys of a lane begin with."""
    return f"queue/{lane:04d}-"


def before(lane: int, number: int) -> str:
    """A key just before those of the batch that begins at `number`."""
    return f"queue/{lane:04d}-{number:08d}"


# --- structs -----------------------------------------------------------------------


class _Stored(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """Base of what is stored as JSON. Unknown fields are refused: an older program would drop them."""


class SessionState(StrEnum):
    """`open` takes work; `closed` was shut down and kept; `terminated` is being deleted, or was stopped."""

    OPEN = "open"
    CLOSED = "closed"
    TERMINATED = "terminated"


class State(StrEnum):
    """State of a task.

    `claimed` means only that a worker has promised to look at it; `running`, that its start was
    recorded, which for a task of a second or two happens together with its end.
    """

    PENDING = "pending"
    CLAIMED = "claimed"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing can change it any more."""
        return self in _FINAL

    @property
    def held(self) -> bool:
        """Whether a worker has it."""
        return self is State.CLAIMED or self is State.RUNNING


_FINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED})


class Limits(_Stored, frozen=True, kw_only=True):
    """How long things may take, in seconds, and how often they are tried."""

    task_timeout: float | None = None
    max_attempts: int = 3
    idle_timeout: float = 300
    session_timeout: float = 3600
    absolute_timeout: float = 7 * 86400


class Intervals(_Stored, frozen=True, kw_only=True):
    """How often clients and workers look, in seconds. The defaults suit S3; tests take shorter ones.

    A lost worker is found after at least half a `lease` and at most one and a half.
    """

    lease: float = 120
    heartbeat: float = 20
    poll_first: float = 1
    poll_last: float = 30
    look_first: float = 0.05
    look_last: float = 5
    commit: float = 1
    session_check: float = 60


class Lane(_Stored, frozen=True, kw_only=True):
    """The batches of one submitting client, and how far they are finished.

    `finished` and the three counts are a lower bound, written when the manifest is written anyway.
    """

    client: str
    taken: bool = True
    number: int = 0  # reached, when given back
    finished: int = 0  # every task below this number is final
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    # Requests to the store of the clients that have had it, added up as each gave it back.
    writes: int = 0
    reads: int = 0


class Manifest(_Stored, frozen=True, kw_only=True):
    """`session.json`: the session as a whole; written by clients alone."""

    schema: int = SCHEMA
    nonce: str = ""
    session_id: str
    depth: int = 0  # how many sessions it is inside of
    name: str | None = None
    owner: str = ""
    python: str
    package: str
    created: float
    deadline: float  # by the store's clock
    state: SessionState = SessionState.OPEN
    workers: int  # most at once
    min_workers: int = (
        0  # so many stay though idle, and are started though nothing waits
    )
    unscaled: int = 0  # what `workers` was before `scale` set another; 0: it has not
    spec: WorkerSpec
    deployment: dict[str, Any] | None = None  # `config.Deployment` of workers on ECS
    limits: Limits
    intervals: Intervals
    lanes: tuple[Lane, ...] = ()
    initializer: str | None = None  # digest under functions/
    modules: dict[str, str] = {}  # of the initializer: name -> digest under modules/
    rate: Rate | None = None  # what it costs; None: nothing, or nobody knows
    max_hourly_cost: float | None = None  # dollars
    cost_alert: float | None = None  # dollars, of all the session


class Heartbeat(_Stored, frozen=True, kw_only=True):
    """`workers/<id>`: for people; nothing but its being written is ever decided upon."""

    schema: int = SCHEMA
    worker: str
    host: str = ""
    pid: int = 0
    python: str = ""
    package: str = ""
    state: str = "idle"
    started: float = 0
    written: float = 0
    ended: float = 0
    holding: int = 0
    completed: int = 0
    failed: int = 0
    busy: float = 0  # seconds of task time, all slots together
    slots: int = 1
    reason: str = ""  # why it left
    # Requests to the store so far: PUT, COPY, POST and LIST; GET and HEAD.
    writes: int = 0
    reads: int = 0
    market: str = ""  # "spot" or "on-demand", where whoever started it said so


class LiveLog(_Stored, frozen=True, kw_only=True):
    """What a running task had printed when its worker last beat; the tail of it."""

    stdout: str = ""
    stderr: str = ""


class Piece(_Stored, frozen=True, kw_only=True):
    """Some bytes of a task: in the record itself, or a part of a pack of results."""

    inline: bytes = b""
    pack: str = ""
    start: int = 0
    size: int = 0


class Past(_Stored, frozen=True, kw_only=True):
    """An attempt that did not end the task."""

    attempt: int
    worker: str
    claimed: float
    started: float = 0
    ended: float
    how: str  # "lost" or "handed back"


class Task(_Stored, frozen=True, kw_only=True):
    """State of one task. Times are UTC seconds by the clock of whoever made the step."""

    state: State = State.PENDING
    attempt: int = 0  # claims so far
    lost: int = 0  # times its worker was lost, at whatever state
    losses: int = 0  # of these, while running: the ones that count
    worker: str = ""
    claimed: float = 0
    started: float = 0
    ended: float = 0
    past: tuple[Past, ...] = ()
    outcome: Piece | None = None
    stdout: Piece | None = None
    stderr: Piece | None = None


class Record(_Stored, frozen=True, kw_only=True):
    """State of every task of a batch. `nonce` makes the bytes of each write unlike all others."""

    schema: int = SCHEMA
    nonce: str = ""
    round: int = 0  # how often tasks of it went back to pending
    tasks: tuple[Task, ...]

    @classmethod
    def fresh(cls, count: int, withdrawn: Collection[int] = ()) -> Self:
        """The record of a batch that nobody has touched: all pending, but for the withdrawn."""
        tasks = (_WITHDRAWN if i in withdrawn else _PENDING for i in range(count))
        return cls(tasks=tuple(tasks))

    def count(self, state: State) -> int:
        """How many tasks are in that state."""
        return sum(task.state is state for task in self.tasks)

    @property
    def finished(self) -> bool:
        """Whether every task is final."""
        return all(task.state in _FINAL for task in self.tasks)


_PENDING = Task()
_WITHDRAWN = Task(state=State.CANCELLED)

# --- JSON --------------------------------------------------------------------------

T = TypeVar("T")

_encoder = msgspec.json.Encoder()
_decoders: dict[type, msgspec.json.Decoder[object]] = {}


class _Schema(msgspec.Struct):
    schema: int = 0


def encode(value: msgspec.Struct) -> bytes:
    """The JSON that is stored."""
    return _encoder.encode(value)


def decode(data: bytes, kind: type[T], key: str) -> T:
    """What `encode` made of it.

    Raises:
        NewerSchema: a newer version of this package wrote it.
        DamagedObject: it is not such an object.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        value = decoder.decode(data)
        schema = getattr(value, "schema", SCHEMA)
    except msgspec.DecodeError as error:  # ValidationError is one
        schema = _schema_of(data)
        if schema <= SCHEMA:
            raise DamagedObject(
                f"{key} cannot be read: {error} ({len(data)} bytes)"
            ) from error
    if schema > SCHEMA:
        raise NewerSchema(
            f"{key} has schema {schema}; this version of starburst_executor knows {SCHEMA}. "
            "A newer version wrote it: upgrade with pip install -U starburst-executor."
        )
    assert isinstance(value, kind)
    return value


def _schema_of(data: bytes) -> int:
    try:
        return msgspec.json.decode(data, type=_Schema).schema
    except msgspec.DecodeError:
        return 0


# --- the tasks object --------------------------------------------------------------

_MAGIC = b"SBX1"


class Call(NamedTuple):
    """Where one task's call is: index of its function, offset and size of its arguments; size -1: withdrawn."""

    function: int
    start: int
    size: int


class Header(_Stored, frozen=True, kw_only=True):
    """Head of a tasks object."""

    schema: int = SCHEMA
    functions: tuple[str, ...]  # digests under functions/
    modules: dict[
        str, str
    ] = {}  # archives that the pickles need: name -> digest under modules/
    calls: tuple[Call, ...]
    light: bool = True  # no arguments of it name a blob

    @property
    def withdrawn(self) -> frozenset[int]:
        """Positions that were cancelled before they were stored."""
        return frozenset(i for i, call in enumerate(self.calls) if call.size < 0)

    def fresh_record(self) -> Record:
        """The record of this batch before anyone touched it."""
        return Record.fresh(len(self.calls), self.withdrawn)


class Queued(NamedTuple):
    """One task as it is handed to the batch writer."""

    function: str
    arguments: bytes | None  # None: withdrawn


def encode_tasks(
    calls: Sequence[Queued], modules: Mapping[str, str], *, light: bool = True
) -> bytes:
    """The tasks object of a batch: magic, length of the header, header, arguments."""
    functions: dict[str, int] = {}
    places: list[Call] = []
    body: list[bytes] = []
    offset = 0
    for function, arguments in calls:
        index = functions.setdefault(function, len(functions))
        if arguments is None:
            places.append(Call(index, offset, -1))
            continue
        places.append(Call(index, offset, len(arguments)))
        body.append(arguments)
        offset += len(arguments)
    header = Header(
        functions=tuple(functions),
        modules=dict(modules),
        calls=tuple(places),
        light=light,
    )
    head = encode(header)
    return b"".join([_MAGIC, struct.pack("<I", len(head)), head, *body])


def read_header(data: bytes, key: str) -> tuple[Header, int] | int:
    """Header and offset of the arguments; or, where `data` is too short, how many bytes it takes.

    Raises:
        DamagedObject: it is no tasks object.
    """
    if len(data) < 8 or data[:4] != _MAGIC:
        raise DamagedObject(f"{key} is not a tasks object ({len(data)} bytes)")
    (length,) = struct.unpack("<I", data[4:8])
    body = 8 + length
    if len(data) < body:
        return int(body)
    return decode(data[8:body], Header, key), int(body)


# --- changes -----------------------------------------------------------------------


class Finish(NamedTuple):
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
    finishes: Iterable[Finish] = (),
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
            tasks[position] = replace(
                tasks[position], state=State.RUNNING, started=began
            )
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


def _finish(tasks: list[Task], worker: str, finish: Finish) -> None:
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
    past = Past(
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


def _take(
    tasks: list[Task], chosen: Iterable[int], worker: str, now: float, begin: int
) -> None:
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


def cancel(
    record: Record, positions: Iterable[int], now: float, *, running: bool
) -> Record:
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
        task
        if task.state.final
        else replace(task, state=State.FAILED, ended=now, outcome=failed)
        for task in record.tasks
    )
    return replace(record, tasks=tuple(tasks))


def due_markers(record: Record) -> tuple[str, ...]:
    """The markers that this record deserves; each is a fact that no later record can make wrong."""
    if record.finished:
        counts = (
            record.count(s) for s in (State.COMPLETED, State.FAILED, State.CANCELLED)
        )
        return (".".join(["done", *map(str, counts)]),)
    if any(task.state is State.PENDING for task in record.tasks):
        return (f"requeued.{record.round}",) if record.round else ()
    if len(record.tasks) == 1 and not record.round:
        return ()  # that its record exists says as much
    return (f"drained.{record.round}",)

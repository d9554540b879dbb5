"""`session.json` and the heartbeats: the session as a whole, and its workers."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, TypeAlias

from msgspec import Meta, field

from starburst_executor.protocol.bounds import Amount, Count, Digest, Moment, Seconds
from starburst_executor.protocol.codec import SCHEMA, Stored, decodable
from starburst_executor.protocol.origin import Origin
from starburst_executor.protocol.session_prices import SessionPrices
from starburst_executor.protocol.worker_spec import WorkerSpec

__all__ = [
    "Heartbeat",
    "Intervals",
    "Lane",
    "Limits",
    "LiveLog",
    "Manifest",
    "SessionState",
    "WorkerState",
]


class SessionState(StrEnum):
    """The life of a session.

    `open` takes work; `closed` was shut down and kept; `terminated` was stopped or is deleted.
    """

    OPEN = "open"
    CLOSED = "closed"
    TERMINATED = "terminated"


class WorkerState(StrEnum):
    """What a worker said it was doing in its last heartbeat.

    `left` is a worker that said goodbye, `broken` one that left because it could run no task,
    and `lost` is written on behalf of a worker that stopped sending heartbeats.
    """

    IDLE = "idle"
    WORKING = "working"
    LEFT = "left"
    LOST = "lost"
    BROKEN = "broken"

    @property
    def gone(self) -> bool:
        """Whether the worker is no longer there."""
        return self not in (WorkerState.IDLE, WorkerState.WORKING)


Wait: TypeAlias = Annotated[float, Meta(ge=0, le=1e9)]  # longer is more than the system can wait


class Limits(Stored, frozen=True, kw_only=True):
    """How long things may take, in seconds, and how often to try them."""

    task_timeout: Seconds | None = None
    max_attempts: int = 3
    idle_timeout: Seconds = 300
    session_timeout: Seconds = 3600
    absolute_timeout: Seconds = 7 * 86400
    max_tasks_per_child: int | None = None  # None: no such limit


class Intervals(Stored, frozen=True, kw_only=True):
    """How often clients and workers poll, in seconds. The defaults suit S3; tests use shorter ones.

    A lost worker is noticed after at least half a `lease`, and at most one and a half.
    """

    lease: Wait = 120
    heartbeat: Wait = 20
    poll_first: Wait = 1
    poll_last: Wait = 30
    look_first: Wait = 0.05
    look_last: Wait = 5
    commit: Wait = 1
    session_check: Wait = 60


class Lane(Stored, frozen=True, kw_only=True):
    """The batches of one submitting client, and how far they are finished.

    `finished` and the three counts are lower bounds, written when the manifest is written anyway.
    """

    client: str
    taken: bool = True
    number: Count = 0  # the number reached when it was given back
    finished: Count = 0  # every task below this number is final
    completed: Count = 0
    failed: Count = 0
    cancelled: Count = 0
    # Store requests of the clients that have had it, added up as each gave it back.
    writes: Count = 0
    reads: Count = 0


@decodable
class Manifest(Stored, frozen=True, kw_only=True):
    """`session.json`: the session as a whole; written only by clients."""

    schema: int = SCHEMA
    nonce: str = ""
    session_id: str
    depth: Count = 0  # how many sessions it is nested in
    name: str | None = None
    owner: str = ""
    python: str
    package: str
    created: Moment
    deadline: Moment  # by the store's clock
    state: SessionState = SessionState.OPEN
    workers: Count  # most at once
    min_workers: Count = 0  # started immediately, and kept even when idle
    unscaled: Count = 0  # `workers` before `scale` changed it; 0: it never did
    spec: WorkerSpec
    deployment: dict[str, Any] | None = None  # `config.Deployment` of workers on ECS
    limits: Limits
    intervals: Intervals
    lanes: Annotated[tuple[Lane, ...], Meta(max_length=10_000)] = ()
    initializer: Digest | None = None  # digest under functions/
    # Of the initializer: name -> digest under modules/
    modules: dict[str, Digest] = field(default_factory=dict)
    rate: SessionPrices | None = None  # None: it costs nothing, or the prices are unknown
    max_hourly_cost: Amount | None = None  # dollars
    cost_alert: Amount | None = None  # dollars, for the whole session
    origin: Origin | None = None  # None: created by a version that did not record it


@decodable
class Heartbeat(Stored, frozen=True, kw_only=True):
    """`workers/<id>`: for people; the protocol relies only on when it was written."""

    schema: int = SCHEMA
    worker: str
    host: str = ""
    pid: Count = 0
    python: str = ""
    package: str = ""
    state: WorkerState = WorkerState.IDLE
    started: Moment = 0
    written: Moment = 0
    ended: Moment = 0
    holding: Count = 0
    completed: Count = 0
    failed: Count = 0
    busy: Seconds = 0  # seconds of task time, all slots together
    slots: Count = 1
    reason: str = ""  # why it left
    # Requests to the store so far: PUT, COPY, POST and LIST; GET and HEAD.
    writes: Count = 0
    reads: Count = 0
    market: str = ""  # "spot" or "on-demand", if its launcher set it


@decodable
class LiveLog(Stored, frozen=True, kw_only=True):
    """The tail of what a running task had printed at its worker's last heartbeat."""

    stdout: str = ""
    stderr: str = ""

"""How far a session is, and what sessions a store has."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from starburst_executor.costs.alert import warning
from starburst_executor.costs.bill import CostSummary, CostTracker
from starburst_executor.errors import (
    DamagedObject,
    SessionNotFound,
)
from starburst_executor.inspection.records import read_record
from starburst_executor.inspection.stuck import Stuck, explain, known_to_have_ended
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.listing import BatchListing, QueueReader, Totals
from starburst_executor.protocol.liveness import live_workers
from starburst_executor.protocol.manifest import Manifest
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import HeartbeatListing, Session, VersionedRecord
from starburst_executor.protocol.task_names import one_line
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.base import Store
from starburst_executor.tables import Column, age, fitted, percent

__all__ = [
    "SessionList",
    "SessionStateName",
    "SessionStatus",
    "SessionSummary",
    "ids_like",
    "resolve",
    "session_ids",
    "read_status",
    "list_summaries",
]

log = logging.getLogger(__name__)

SessionStateName = Literal["open", "closed", "terminated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStatus:
    """How far a session is; counts of tasks, and of workers with a fresh heartbeat.

    Each task is counted once. `running` are those that a worker is known to have begun, `claimed` those that it
    has taken and not begun as far as is known: the start of a task of a second or two is written with its end.
    Everything else that counts tasks (lists, the live line, the report) means the same by these words.
    `last_activity` is when anything was last written, a heartbeat too, and never goes back.
    The parts may be some seconds apart, so that the counts of a session at work need not add up to
    a single moment.
    """

    session_id: str
    name: str | None
    state: SessionStateName
    total: int
    pending: int
    claimed: int
    running: int
    completed: int
    failed: int
    cancelled: int
    workers: int
    workers_wanted: int
    created_at: datetime
    last_activity: datetime
    deadline: datetime
    cost: CostSummary | None = None  # None: nothing costs anything, or it was not reckoned
    stuck: Stuck | None = None  # why nothing moves; None: something does, or all is finished

    @property
    def finished(self) -> int:
        """Tasks that nothing can change any more."""
        return self.completed + self.failed + self.cancelled

    @property
    def progress(self) -> float:
        """Share of the tasks that are finished, 0 to 1; 1 where there are none."""
        return self.finished / self.total if self.total else 1.0

    def _repr_html_(self) -> str:
        from starburst_executor.inspection.notebook import status_html

        return status_html(self)

    def __str__(self) -> str:
        lines = [
            f"Session {self.session_id}" + (f" ({self.name})" if self.name else ""),
            f"  State:     {self.state}",
            *([f"  Stuck:     {self.stuck}"] if self.stuck else []),
            f"  Progress:  {self.progress:.1%} ({self.finished} of {self.total})",
            *(
                f"  {label + ':':<10} {count}"
                for label, count in (
                    ("Pending", self.pending),
                    ("Claimed", self.claimed),
                    ("Running", self.running),
                    ("Completed", self.completed),
                    ("Failed", self.failed),
                    ("Cancelled", self.cancelled),
                )
            ),
            f"  Workers:   {self.workers} of {self.workers_wanted}",
            f"  Until:     {self.deadline:%Y-%m-%d %H:%M:%S} UTC",
            *(
                f"  {label + ':':<10} {text}"
                for label, text in (self.cost.lines() if self.cost else ())
            ),
        ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSummary:
    """One line of a list of sessions; the counts are those of `SessionStatus`."""

    session_id: str
    name: str | None
    created_at: datetime
    last_activity: datetime
    total: int
    pending: int
    claimed: int
    running: int
    completed: int
    failed: int
    cancelled: int
    workers: int
    state: SessionStateName
    idle: float  # seconds since `last_activity`, by the store's clock
    alert: str | None = None  # that it has cost more than its `cost_alert`

    @property
    def progress(self) -> float:
        """Share of the tasks that are finished, 0 to 1; 1 where there are none."""
        finished = self.completed + self.failed + self.cancelled
        return finished / self.total if self.total else 1.0


_LIST = (
    Column("session_id"),
    Column("name", least=4),
    Column("state", least=6),
    Column("done", right=True),
    Column("tasks", right=True),
    Column("run", right=True),
    Column("fail", right=True),
    Column("cancel", right=True),
    Column("workers", right=True),
    Column("idle", right=True),
)


class SessionList(list[SessionSummary]):
    """Summaries of sessions, which print as a table; a notebook shows them as one too."""

    def lines(self, width: int | None = None) -> list[list[str]]:
        """The cells of the table, padded, its headings first; see `tables.fitted`."""
        rows = (
            (
                one.session_id,
                one_line(one.name or "-"),
                one.state,
                percent(one.progress),
                *(str(n) for n in (one.total, one.running, one.failed, one.cancelled)),
                str(one.workers),
                age(one.idle),
            )
            for one in self
        )
        return fitted(_LIST, rows, width)

    def __str__(self) -> str:
        if not self:
            return "no sessions"
        width = shutil.get_terminal_size().columns
        return "\n".join("".join(cells).rstrip() for cells in self.lines(width))

    def _repr_html_(self) -> str:
        from starburst_executor.inspection.notebook import sessions_html

        return sessions_html(self)


def read_status(
    session: Session,
    queue: QueueReader | None = None,
    known: dict[Batch, VersionedRecord] | None = None,
    reckon: Callable[[Manifest, HeartbeatListing], CostSummary | None] = lambda manifest, beats: (
        None
    ),
) -> SessionStatus:
    """The status of a session.

    Args:
        session: Which.
        queue: What is known of its queue already; saves listing what is finished.
        known: Records of unfinished batches as they were read before, kept up to date here; saves
            reading those that have not changed.
        reckon: Tells what it has cost, such as `Ledger(session).look`; by default it is not reckoned, for
            that reads heartbeats.

    Raises:
        SessionNotFound: there is no such session.
    """
    manifest = session.load()
    if queue is None:
        queue = session.queue()
        queue.learn(manifest.lanes)
    sights = queue.look()
    unfinished = [sight for sight in sights if sight.done is None]
    counts = _count(session, unfinished, queue.totals, {} if known is None else known)
    beats = session.beats()
    gone = known_to_have_ended(session, manifest)
    live = live_workers(beats, manifest.intervals) - gone
    # What the manifest says is finished is not listed; but then it was written after that.
    written = session.store.list(session.key("session.json"), limit=1).entries
    # And workers that left took their heartbeats with them, but for the last.
    ended, _ = session.list_all(session.key("ended/"))
    moments = [e.modified for e in (*written, *ended, *beats.entries.values())]
    moments += [sight.modified for sight in sights]
    last_activity = max([manifest.created, *moments])
    return SessionStatus(
        session_id=session.id,
        name=manifest.name,
        state=manifest.state.value,
        total=sum(counts.values()),
        **{str(state): counts[state] for state in State},
        workers=len(live),
        workers_wanted=manifest.workers,
        created_at=_utc(manifest.created),
        last_activity=_utc(last_activity),
        deadline=_utc(manifest.deadline),
        cost=reckon(manifest, beats),
        stuck=explain(session, manifest, counts, beats, live, gone, last_activity),
    )


def _count(
    session: Session,
    unfinished: list[BatchListing],
    done: Totals,
    known: dict[Batch, VersionedRecord],
) -> dict[State, int]:
    counts = dict.fromkeys(State, 0)
    counts[State.COMPLETED] = done.completed
    counts[State.FAILED] = done.failed
    counts[State.CANCELLED] = done.cancelled
    reads = session.runtime.gather(
        [partial(read_record, session, sight, known.get(sight.batch)) for sight in unfinished]
    )
    known.clear()
    for sight, read in zip(unfinished, reads, strict=True):
        known[sight.batch] = read
        for state in State:
            counts[state] += read.record.count(state)
    return counts


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def session_ids(store: Store, beginning: str = "") -> Iterator[str]:
    """Ids of the sessions in a store that begin so, in order; those half deleted too."""
    prefix = "sessions/"
    after = ""
    while True:
        page = store.list(prefix + beginning, after=after, delimiter="/")
        for folder in page.prefixes:
            yield folder[len(prefix) :].rstrip("/")
        if not page.truncated:
            return
        # Begin behind everything that lies below the last folder.
        after = page.prefixes[-1] + "\U0010ffff"


def resolve(store: Store, text: str) -> str:
    """The one session id that `text` is, begins, or begins the last part of.

    Raises:
        SessionNotFound: there is none.
        ValueError: there are several.
    """
    if _WHOLE_ID.fullmatch(text) or store.list(f"sessions/{text}/", limit=1).entries:
        return text
    found = ids_like(store, text)
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise ValueError(f"{text!r} is the beginning of {len(found)} session ids: {some}")
    raise SessionNotFound(
        f"no session id in {store.url} is or begins with {text!r}. It may have been cleaned up, or be in "
        "another store or region: `starburst-executor list --store URL` shows what a store has."
    )


_WHOLE_ID = re.compile(r"\d{8}-\d{6}-[a-z0-9]{6}")


def ids_like(store: Store, text: str) -> list[str]:
    """The session ids that begin so; if there are none, those whose last part does."""
    return list(session_ids(store, text)) or [
        one for one in session_ids(store) if one.rpartition("-")[2].startswith(text)
    ]


def list_summaries(store: Store) -> SessionList:
    """A summary of each session in a store, oldest first."""
    # Two pools: a status that waited for a thread of the pool it runs on would wait for ever.
    with closing(SystemRuntime()) as outer, closing(SystemRuntime()) as inner:
        ids = session_ids(store)
        calls = [partial(_summary, Session(store, one, inner)) for one in ids]
        found = [summary for summary in outer.gather(calls) if summary is not None]
    return SessionList(sorted(found, key=lambda summary: summary.created_at))


def _summary(session: Session) -> SessionSummary | None:
    def reckon(manifest: Manifest, beats: HeartbeatListing) -> CostSummary | None:
        if manifest.cost_alert is None:
            return None
        return CostTracker(session).look(manifest, beats)

    try:
        queue = session.queue()
        queue.learn(session.load().lanes)
        now = read_status(session, queue, reckon=reckon)
    except SessionNotFound:
        return None  # being deleted, or debris of one that was
    except DamagedObject as error:
        log.warning("session %s: %s", session.id, error)
        return None
    return SessionSummary(
        session_id=now.session_id,
        name=now.name,
        created_at=now.created_at,
        last_activity=now.last_activity,
        total=now.total,
        pending=now.pending,
        claimed=now.claimed,
        running=now.running,
        completed=now.completed,
        failed=now.failed,
        cancelled=now.cancelled,
        workers=now.workers,
        state=now.state,
        idle=max(0.0, queue.now - now.last_activity.timestamp()),
        alert=warning(session.id, now.cost) if now.cost and now.cost.alert else None,
    )

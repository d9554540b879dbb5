"""How far a session is, and which sessions a store has.

Works from an id and a store alone: nothing here needs the Python that created the session.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Literal

from starburst_executor.costs.alert import warning
from starburst_executor.costs.bill import CostSummary, CostTracker
from starburst_executor.errors import (
    SessionNotFound,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from starburst_executor.formatting import one_line, printable, utc
from starburst_executor.inspection.records import read_record
from starburst_executor.inspection.stuck import Stuck, explain, known_to_have_ended
from starburst_executor.protocol import vanished
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.listing import BatchListing, QueueReader, Totals
from starburst_executor.protocol.liveness import live_workers
from starburst_executor.protocol.manifest import Manifest, SessionState
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import HeartbeatListing, Session, VersionedRecord
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.base import Store
from starburst_executor.tables import Column, age, fitted, percent

__all__ = [
    "SessionList",
    "SessionStateName",
    "SessionStatus",
    "SessionSummary",
    "ids_like",
    "list_summaries",
    "read_status",
    "resolve",
    "session_ids",
]

log = logging.getLogger(__name__)

SessionStateName = Literal["open", "closed", "terminated"]

ListedStateName = Literal["open", "closed", "terminated", "unreadable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStatus:
    """How far a session is: counts of tasks, and of workers with a fresh heartbeat.

    Each task is counted once. `running` tasks are known to have been started by a worker. `claimed`
    tasks were taken and, as far as is known, not started: the start of a task of a second or two is
    written along with its end. Whatever counts tasks (lists, the live line, the report) means the
    same by these words. `last_activity` is when anything was last written, heartbeats included, and
    never goes backwards. The counts may be taken seconds apart, so for a session at work they need
    not describe a single moment. Tasks that can never end, because somebody removed their objects
    from the store, count as failed.
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
    cost: CostSummary | None = None  # None: nothing costs anything, or it was not calculated
    stuck: Stuck | None = None  # why nothing moves; None: something does, or all is finished

    @property
    def finished(self) -> int:
        """Tasks in a final state: completed, failed or cancelled."""
        return self.completed + self.failed + self.cancelled

    @property
    def progress(self) -> float:
        """Share of the tasks that are finished, 0 to 1; 1 if there are none."""
        return self.finished / self.total if self.total else 1.0

    def _repr_html_(self) -> str:
        from starburst_executor.inspection.notebook import status_html

        return status_html(self)

    def __str__(self) -> str:
        lines = [
            f"Session {self.session_id}" + (f" ({one_line(self.name)})" if self.name else ""),
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
        return printable("\n".join(lines))


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSummary:
    """One line of a list of sessions; the counts mean the same as in `SessionStatus`.

    Of a session that cannot be read, the state is "unreadable", `error` says why, and all counts
    are 0.
    """

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
    state: ListedStateName
    idle: float  # seconds since `last_activity`, by the store's clock
    alert: str | None = None  # the warning, if it has cost more than its `cost_alert`
    error: str | None = None  # why it cannot be read

    @property
    def progress(self) -> float:
        """Share of the tasks that are finished, 0 to 1; 1 if there are none."""
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
    """Summaries of sessions, shown as a table when printed or in a notebook."""

    def lines(self, width: int | None = None) -> list[list[str]]:
        """The padded cells of the table, headings first; see `tables.fitted`."""
        rows = (
            (
                one.session_id,
                one.name or "-",
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
    reckon: Callable[[Manifest, HeartbeatListing], CostSummary | None] = lambda *_: None,
) -> SessionStatus:
    """The status of a session.

    Args:
        session: The session.
        queue: What is already known of its queue; saves listing what is finished.
        known: Records of unfinished batches as read before, updated here; saves reading those that
            have not changed.
        reckon: Calculates what it has cost, such as `CostTracker(session).look`; by default it is
            left out, because that reads heartbeats.

    Raises:
        SessionNotFound: there is no such session.
    """
    manifest = session.load()
    if queue is None:
        queue = session.queue()
        queue.learn(manifest.lanes)
    listings = queue.look()
    unfinished = [listing for listing in listings if listing.done is None]
    counts = _count(session, unfinished, queue.totals, {} if known is None else known)
    if manifest.state is not SessionState.TERMINATED:  # else somebody may be deleting it
        lost = vanished.lost(queue, {listing.batch for listing in listings}, manifest.lanes)
        _count_lost(session, lost, counts)
    heartbeats = session.beats()
    gone = known_to_have_ended(session, manifest)
    live = live_workers(heartbeats, manifest.intervals) - gone
    # Batches that the manifest counts as finished are not listed; but it was written after them.
    written = session.store.list(session.key("session.json"), limit=1).entries
    # Workers that left deleted their heartbeats, except for the last one, under `ended/`.
    ended, _ = session.list_all(session.key("ended/"))
    moments = [e.modified for e in (*written, *ended, *heartbeats.entries.values())]
    moments += [listing.modified for listing in listings]
    last_activity = max([manifest.created, *moments])
    return SessionStatus(
        session_id=session.id,
        name=manifest.name,
        state=manifest.state.value,
        total=sum(counts.values()),
        **{str(state): counts[state] for state in State},
        workers=len(live),
        workers_wanted=manifest.workers,
        created_at=utc(manifest.created),
        last_activity=utc(last_activity),
        deadline=utc(manifest.deadline),
        cost=reckon(manifest, heartbeats),
        stuck=explain(session, manifest, counts, heartbeats, live, gone, last_activity),
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
        [partial(read_record, session, listing, known.get(listing.batch)) for listing in unfinished]
    )
    known.clear()
    for listing, read in zip(unfinished, reads, strict=True):
        known[listing.batch] = read
        for state in State:
            counts[state] += read.record.count(state)
    return counts


def _count_lost(session: Session, lost: Collection[Batch], counts: dict[State, int]) -> None:
    """Count the tasks of batches that have lost objects; those that can never end have failed."""
    calls = [partial(vanished.remains, session, batch) for batch in lost]
    for record in session.runtime.gather(calls):
        for state in State:
            counts[state] += record.count(state)


def session_ids(store: Store, beginning: str = "") -> Iterator[str]:
    """Ids in a store that start with `beginning`, in order; half-deleted sessions too."""
    prefix = "sessions/"
    after = ""
    while True:
        page = store.list(prefix + beginning, after=after, delimiter="/")
        for folder in page.prefixes:
            yield folder[len(prefix) :].rstrip("/")
        if not page.truncated:
            return
        # Continue after everything below the last folder.
        after = page.prefixes[-1] + "\U0010ffff"


def resolve(store: Store, text: str) -> str:
    """The one session id that is `text`, or starts with it, or whose last part does.

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
        raise ValueError(f"{len(found)} session ids start with {text!r}: {some}")
    raise SessionNotFound(
        f"no session id in {store.url} is or starts with {text!r}. It may have been cleaned up, or "
        "be in another store or region: `starburst-executor list --store URL` shows what a store "
        "has."
    )


_WHOLE_ID = re.compile(r"\d{8}-\d{6}-[a-z0-9]{6}")


def ids_like(store: Store, text: str) -> list[str]:
    """The session ids that start with `text`; if none do, those whose last part does."""
    return list(session_ids(store, text)) or [
        one for one in session_ids(store) if one.rpartition("-")[2].startswith(text)
    ]


def list_summaries(store: Store) -> SessionList:
    """A summary of each session in a store, oldest first."""
    # Two pools: a status waiting for a thread of the pool it runs on could deadlock.
    with closing(SystemRuntime()) as outer, closing(SystemRuntime()) as inner:
        ids = session_ids(store)
        calls = [partial(_summary, Session(store, one, inner)) for one in ids]
        found = [summary for summary in outer.gather(calls) if summary is not None]
    return SessionList(sorted(found, key=lambda summary: summary.created_at))


def _unreadable(session: Session, error: StoreError) -> SessionSummary:
    page = session.store.list(session.prefix, limit=1)
    written = [utc(entry.modified) for entry in page.entries]
    since = max(written, default=utc(page.now))
    return SessionSummary(
        session_id=session.id,
        name=None,
        created_at=since,
        last_activity=since,
        total=0,
        pending=0,
        claimed=0,
        running=0,
        completed=0,
        failed=0,
        cancelled=0,
        workers=0,
        state="unreadable",
        idle=max(0.0, page.now - since.timestamp()),
        error=str(error),
    )


def _summary(session: Session) -> SessionSummary | None:
    def reckon(manifest: Manifest, heartbeats: HeartbeatListing) -> CostSummary | None:
        if manifest.cost_alert is None:
            return None
        return CostTracker(session).look(manifest, heartbeats)

    try:
        queue = session.queue()
        queue.learn(session.load().lanes)
        now = read_status(session, queue, reckon=reckon)
    except SessionNotFound:
        return None  # being deleted, or the remains of a deleted one
    except (StoreUnavailable, StoreDenied):
        raise
    except StoreError as error:
        return _unreadable(session, error)
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

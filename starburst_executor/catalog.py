"""Sessions as a whole: their status, lists of them, and how they end.

Works from an id and a store alone; nothing here needs the Python that made the session.
"""

from __future__ import annotations

import logging
import math
import numbers
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from msgspec.structs import replace

from starburst_executor.errors import (
    DamagedObject,
    SessionNotFound,
)
from starburst_executor.launch import Launcher
from starburst_executor.ledger import Bill, Ledger, check_workers, warning
from starburst_executor.names import one_line
from starburst_executor.queue import Queue, Sight, Totals
from starburst_executor.records import (
    MAX_BATCH_TASKS,
    Batch,
    Manifest,
    Record,
    SessionState,
    State,
    Task,
    before,
    lane_prefix,
    parse_task_id,
    task_id,
)
from starburst_executor.runtime import SystemRuntime
from starburst_executor.session import Beats, Known, Session
from starburst_executor.store import Store
from starburst_executor.tables import Column, age, fitted, percent

__all__ = [
    "SessionList",
    "SessionStateName",
    "SessionStatus",
    "SessionSummary",
    "all_logs",
    "delete",
    "extend",
    "find_task",
    "ids_like",
    "resolve",
    "scale",
    "session_ids",
    "status",
    "summaries",
    "task_log",
    "terminate",
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
    cost: Bill | None = None  # None: nothing costs anything, or it was not reckoned

    @property
    def finished(self) -> int:
        """Tasks that nothing can change any more."""
        return self.completed + self.failed + self.cancelled

    @property
    def progress(self) -> float:
        """Share of the tasks that are finished, 0 to 1; 1 where there are none."""
        return self.finished / self.total if self.total else 1.0

    def _repr_html_(self) -> str:
        from starburst_executor.views import status_html

        return status_html(self)

    def __str__(self) -> str:
        lines = [
            f"Session {self.session_id}" + (f" ({self.name})" if self.name else ""),
            f"  State:     {self.state}",
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
        from starburst_executor.views import sessions_html

        return sessions_html(self)


def status(
    session: Session,
    queue: Queue | None = None,
    known: dict[Batch, Known] | None = None,
    reckon: Callable[[Manifest, Beats], Bill | None] = lambda manifest, beats: None,
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
    live = [
        e
        for e in beats.entries.values()
        if beats.now - e.modified <= manifest.intervals.lease
    ]
    # What the manifest says is finished is not listed; but then it was written after that.
    written = session.store.list(session.key("session.json"), limit=1).entries
    # And workers that left took their heartbeats with them, but for the last.
    ended, _ = session.list_all(session.key("ended/"))
    moments = [e.modified for e in (*written, *ended, *beats.entries.values())]
    moments += [sight.modified for sight in sights]
    return SessionStatus(
        session_id=session.id,
        name=manifest.name,
        state=manifest.state.value,
        total=sum(counts.values()),
        **{str(state): counts[state] for state in State},
        workers=len(live),
        workers_wanted=manifest.workers,
        created_at=_utc(manifest.created),
        last_activity=_utc(max([manifest.created, *moments])),
        deadline=_utc(manifest.deadline),
        cost=reckon(manifest, beats),
    )


def _count(
    session: Session,
    unfinished: list[Sight],
    done: Totals,
    known: dict[Batch, Known],
) -> dict[State, int]:
    counts = dict.fromkeys(State, 0)
    counts[State.COMPLETED] = done.completed
    counts[State.FAILED] = done.failed
    counts[State.CANCELLED] = done.cancelled
    reads = session.runtime.gather(
        [
            partial(_record, session, sight, known.get(sight.batch))
            for sight in unfinished
        ]
    )
    known.clear()
    for sight, read in zip(unfinished, reads, strict=True):
        known[sight.batch] = read
        for state in State:
            counts[state] += read.record.count(state)
    return counts


def _record(session: Session, sight: Sight, before: Known | None) -> Known:
    before = before or Known(Record.fresh(sight.batch.size), None)
    if sight.record is None or sight.record.version == before.version:
        return before
    return session.read(sight.batch, before)


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
        raise ValueError(
            f"{text!r} is the beginning of {len(found)} session ids: {some}"
        )
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


def summaries(store: Store) -> SessionList:
    """A summary of each session in a store, oldest first."""
    # Two pools: a status that waited for a thread of the pool it runs on would wait for ever.
    with closing(SystemRuntime()) as outer, closing(SystemRuntime()) as inner:
        ids = session_ids(store)
        calls = [partial(_summary, Session(store, one, inner)) for one in ids]
        found = [summary for summary in outer.gather(calls) if summary is not None]
    return SessionList(sorted(found, key=lambda summary: summary.created_at))


def _summary(session: Session) -> SessionSummary | None:
    def reckon(manifest: Manifest, beats: Beats) -> Bill | None:
        if manifest.cost_alert is None:
            return None
        return Ledger(session).look(manifest, beats)

    try:
        queue = session.queue()
        queue.learn(session.load().lanes)
        now = status(session, queue, reckon=reckon)
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


def task_log(session: Session, name: str) -> str:
    """What one task has printed so far: stdout, then stderr.

    Raises:
        ValueError: `name` is not a task id.
        LookupError: the session has no such task.
    """
    batch, position = find_task(session, name)
    record = _record_of(session, batch)
    return _log_of(session, batch, position, record.tasks[position])


def all_logs(session: Session) -> str:
    """What all tasks have printed so far, each under a line with its id."""
    parts: list[str] = []
    for sight in session.queue().look():
        record = _record_of(session, sight.batch)
        for position, task in enumerate(record.tasks):
            text = _log_of(session, sight.batch, position, task)
            if text:
                name = task_id(sight.batch.lane, sight.batch.number + position)
                parts.append(f"--- task {name} ({task.state})\n{text}")
    return "".join(part if part.endswith("\n") else f"{part}\n" for part in parts)


def find_task(session: Session, name: str) -> tuple[Batch, int]:
    """The batch of a task and its position there; a listing of a few keys.

    Raises:
        ValueError: `name` is not a task id.
        LookupError: the session has no such task.
    """
    lane, number = parse_task_id(name)
    after = session.key(before(lane, max(0, number - MAX_BATCH_TASKS + 1)))
    while True:
        page = session.store.list(session.key(lane_prefix(lane)), after=after)
        for entry in page.entries:
            batch = Batch.parse(entry.key.rsplit("/", 2)[1])
            if batch and batch.number <= number < batch.end:
                return batch, number - batch.number
            if batch and batch.number > number:
                raise LookupError(f"session {session.id} has no task {name}")
        if not page.truncated:
            raise LookupError(f"session {session.id} has no task {name}")
        after = page.entries[-1].key


def _record_of(session: Session, batch: Batch) -> Record:
    fresh = session.tasks(batch).header.fresh_record()
    return session.read(batch, Known(fresh, None)).record


def _log_of(session: Session, batch: Batch, position: int, task: Task) -> str:
    if task.state.held:
        return "".join(session.live_log(batch, position, task.attempt))
    pieces = [piece for piece in (task.stdout, task.stderr) if piece is not None]
    return "".join(session.get_piece(batch, p).decode(errors="replace") for p in pieces)


def extend(session: Session, seconds: float) -> Manifest:
    """Move the absolute time limit `seconds` on, from now if it has passed.

    The limit on idle time grows by as much. Neither can be shortened.

    Raises:
        TypeError, ValueError: `seconds` is not a positive number.
        SessionNotFound: there is no such session.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real):
        raise TypeError(f"seconds must be a number, not {seconds!r}")
    seconds = float(seconds)
    if not 0 < seconds < math.inf:
        raise ValueError(
            f"seconds must be positive, not {seconds!r}: a session can only be extended"
        )
    now = session.store.list(session.key("session.json"), limit=1).now
    before = session.load()
    deadline = max(before.deadline, now) + seconds

    def edit(manifest: Manifest) -> Manifest:
        limits = replace(
            manifest.limits, session_timeout=before.limits.session_timeout + seconds
        )
        return replace(
            manifest, deadline=max(manifest.deadline, deadline), limits=limits
        )

    return session.amend(edit)


def scale(session: Session, workers: int | None) -> Manifest:
    """Have at most so many workers at once from now on; None: as many as before the first `scale`.

    Raises:
        ValueError: they would cost more an hour than the session's `max_hourly_cost`.
        SessionNotFound: there is no such session.
    """

    def edit(manifest: Manifest) -> Manifest:
        before = manifest.unscaled or manifest.workers
        if workers is None:
            scaled = replace(manifest, workers=before, unscaled=0)
        else:
            scaled = replace(manifest, workers=workers, unscaled=before)
        check_workers(scaled)
        return scaled

    return session.amend(edit)


def terminate(session: Session, launcher: Launcher, grace: float = 2.0) -> None:
    """Mark the session terminated and stop its workers; its results stay readable.

    Args:
        session: Which.
        launcher: What started its workers.
        grace: Seconds that workers have to hand back.
    """
    session.amend(lambda m: replace(m, state=SessionState.TERMINATED))
    launcher.stop(session.url, grace=grace)


def delete(session: Session, launcher: Launcher) -> None:
    """Delete every object of a session, once each of its workers has ended or is lost.

    `tasks` objects go first: a batch without its record looks all pending and would be run again.
    `session.json` goes last. Then the prefix is listed again, for what was written meanwhile.
    """
    try:
        manifest = session.load()
    except SessionNotFound:
        manifest = None
    if manifest is not None:
        terminate(session, launcher)
        _await_workers(session, manifest, launcher)
    while entries := session.list_all(session.prefix)[0]:
        keys = [entry.key for entry in entries]
        session.store.delete(key for key in keys if key.endswith("/tasks"))
        last = session.key("session.json")
        session.store.delete(
            key for key in keys if not key.endswith("/tasks") and key != last
        )
        session.store.delete([last] if last in keys else [])
    launcher.forget(session.url)


def _await_workers(session: Session, manifest: Manifest, launcher: Launcher) -> None:
    """Return when no heartbeat is fresh but of workers that their launcher knows to have ended."""
    while True:
        beats = session.beats()
        ended = launcher.ended(session.url)
        fresh = [
            worker
            for worker, entry in beats.entries.items()
            if worker not in ended
            and beats.now - entry.modified <= manifest.intervals.lease
        ]
        if not fresh:
            return
        log.info("session %s: waiting for %s to end", session.id, ", ".join(fresh))
        session.runtime.signal().wait(min(5.0, manifest.intervals.heartbeat / 2))

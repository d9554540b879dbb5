"""Sessions as a whole: their status, lists of them, and how they end.

Works from an id and a store alone; nothing here needs the Python that made the session.
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from msgspec.structs import replace

from starburst_executor.errors import (
    DamagedObject,
    SessionNotFound,
)
from starburst_executor.launch import Launcher
from starburst_executor.ledger import Bill, Ledger, check_workers, warning
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
from starburst_executor.stuck import Stuck, explain, known_to_have_ended

__all__ = [
    "SessionList",
    "SessionStatus",
    "SessionSummary",
    "all_logs",
    "delete",
    "extend",
    "find_task",
    "scale",
    "session_ids",
    "status",
    "summaries",
    "task_log",
    "terminate",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStatus:
    """How far a session is; counts of tasks, and of workers with a fresh heartbeat.

    The parts may be some seconds apart, so that the counts of a session at work need not add up to
    a single moment.
    """

    session_id: str
    name: str | None
    state: str  # open, closed, terminated
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
    stuck: Stuck | None = (
        None  # why nothing moves; None: something does, or all is finished
    )

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
    """One line of a list of sessions."""

    session_id: str
    created_at: datetime
    last_activity: datetime
    total: int
    pending: int
    running: int
    completed: int
    failed: int
    state: str
    alert: str | None = None  # that it has cost more than its `cost_alert`


class SessionList(list[SessionSummary]):
    """Summaries of sessions; a notebook shows them as a table."""

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
    gone = known_to_have_ended(session, manifest)
    live = [
        worker
        for worker, e in beats.entries.items()
        if beats.now - e.modified <= manifest.intervals.lease and worker not in gone
    ]
    # What the manifest says is finished is not listed; but then it was written after that.
    written = session.store.list(session.key("session.json"), limit=1).entries
    moments = [e.modified for e in (*written, *beats.entries.values())]
    moments += [sight.modified for sight in sights]
    last_activity = max([manifest.created, *moments])
    return SessionStatus(
        session_id=session.id,
        name=manifest.name,
        state=str(manifest.state),
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
        now = status(session, reckon=reckon)
    except SessionNotFound:
        return None  # being deleted, or debris of one that was
    except DamagedObject as error:
        log.warning("session %s: %s", session.id, error)
        return None
    return SessionSummary(
        session_id=now.session_id,
        created_at=now.created_at,
        last_activity=now.last_activity,
        total=now.total,
        pending=now.pending,
        running=now.claimed + now.running,
        completed=now.completed,
        failed=now.failed,
        state=now.state,
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

"""How a session went as a whole, and what held it back: figures, without any drawing.

    observe      reads records and heartbeats once    -> Observed
    review       sums them up                         -> Review

Nothing is unpickled. Times of attempts are by the clocks of their workers, times of storing by the
store's; if they disagree slightly, a negative wait counts as zero.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from starburst_executor.costs.bill import CostSummary, WorkerLifetime, summarize
from starburst_executor.errors import DamagedObject
from starburst_executor.inspection.tasks import Found, TaskGroup, find, group_errors, view
from starburst_executor.protocol.liveness import live_workers
from starburst_executor.protocol.manifest import Heartbeat, Intervals, Manifest
from starburst_executor.protocol.records import Interruption, State, Task
from starburst_executor.protocol.session import HeartbeatListing, Session

__all__ = [
    "Loss",
    "Observed",
    "Requests",
    "Review",
    "Run",
    "Spread",
    "Stay",
    "Stretch",
    "Trace",
    "Work",
    "observe",
    "review",
]

_MOST_ERRORS = 2000  # failures read for the grouping; each may cost a request
_STRETCHES = 240  # points of a curve over time; a screen shows no more


class Run(NamedTuple):
    """One attempt at a task, in UTC seconds.

    Attributes:
        number: Which attempt, counted from 1.
        worker: The worker's id.
        since: When the task began to wait for it.
        claimed: When the worker claimed it.
        started: When a process started it; 0 if none did, or that was never recorded.
        ended: When it ended, or now.
        how: "completed", "failed", "cancelled", "lost", "handed back", "running" or "claimed".
    """

    number: int
    worker: str
    since: float
    claimed: float
    started: float
    ended: float
    how: str

    @property
    def seconds(self) -> float:
        """How long a process ran it."""
        return max(0.0, self.ended - self.started) if self.started else 0.0

    @property
    def wasted(self) -> bool:
        """Whether the task had to be run again, or was no longer wanted."""
        return self.how in ("lost", "handed back", "cancelled")


class Trace(NamedTuple):
    """What happened to one task; times in UTC seconds.

    Attributes:
        place: Its place in submission order, from 0.
        task_id: Id within the session.
        state: Its state.
        stored: When it was stored.
        over: When it finished, or now.
        runs: Its attempts, the last one last.
        name: Its name.
    """

    place: int
    task_id: str
    state: str
    stored: float
    over: float
    runs: tuple[Run, ...]
    name: str = ""

    @property
    def called(self) -> str:
        """Its id, and its name if known."""
        return f"{self.task_id} {self.name}".rstrip()

    @property
    def waited(self) -> float:
        """Seconds between being stored and its first attempt, or until now."""
        began = next((run.started for run in self.runs if run.started), self.over)
        return max(0.0, began - self.stored)

    @property
    def seconds(self) -> float:
        """How long its last attempt ran."""
        return self.runs[-1].seconds if self.runs else 0.0

    @property
    def losses(self) -> int:
        """How often its worker was lost."""
        return sum(run.how == "lost" for run in self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """The life of one worker; times in UTC seconds by its own clock.

    Attributes:
        worker: Its id.
        host: Where it ran.
        slots: How many tasks it ran at once.
        started: When it started.
        ended: When it left or was last heard of, or now.
        live: Whether it is still alive.
        why: Why it left.
        billed: Its lifetime and store requests, as for the session's cost; None if it left no
            heartbeat.
    """

    worker: str
    host: str = ""
    slots: int = 1
    started: float
    ended: float
    live: bool = False
    why: str = ""
    billed: WorkerLifetime | None = None

    @property
    def seconds(self) -> float:
        """How long it lived."""
        return max(0.0, self.ended - self.started)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything that was read of a session.

    Attributes:
        manifest: The session as a whole.
        store: URL of its store.
        now: When it was read, by the store's clock.
        traces: Its tasks in submission order.
        stays: Its workers in order of arrival.
        failures: Failed tasks grouped by where they failed.
        grouped: How many failures were read for that.
        batches: How many batches its tasks were stored in.
    """

    manifest: Manifest
    store: str
    now: float
    traces: list[Trace]
    stays: list[Stay]
    failures: list[TaskGroup]
    grouped: int
    batches: int


# --- reading -----------------------------------------------------------------------


def observe(session: Session) -> Observed:
    """Read a session once: every record, every worker's last heartbeat, and why tasks failed.

    Raises:
        SessionNotFound: there is no such session.
    """
    manifest = session.load()
    heartbeats = session.beats()
    stays = {stay.worker: stay for stay in _stays(session, heartbeats, manifest.intervals)}
    last_heard = {worker: stay.ended for worker, stay in stays.items()}
    traces: list[Trace] = []
    failed: list[Found] = []
    batches = set()
    for found in find(session, named=True):
        traces.append(_trace(found, last_heard, manifest.intervals.heartbeat))
        batches.add(found.batch)
        if found.task.state is State.FAILED and len(failed) < _MOST_ERRORS:
            failed.append(found)
    views = session.runtime.gather([partial(view, session, one) for one in failed])
    return Observed(
        manifest=manifest,
        store=session.store.url,
        now=heartbeats.now,
        traces=traces,
        stays=_with_unheard(stays, traces),
        failures=group_errors(views),
        grouped=len(views),
        batches=len(batches),
    )


def _stays(session: Session, heartbeats: HeartbeatListing, intervals: Intervals) -> list[Stay]:
    entries, _ = session.list_all(session.key("ended/"))
    gone = [entry.key.rsplit("/", 1)[1] for entry in entries]
    here = [worker for worker in heartbeats.entries if worker not in set(gone)]
    calls = [partial(_heartbeat, session, worker, "ended") for worker in gone]
    calls += [partial(_heartbeat, session, worker, "workers") for worker in here]
    read = zip(session.runtime.gather(calls), gone + here, strict=True)
    live = live_workers(heartbeats, intervals)
    return [
        _stay(heartbeat, worker, heartbeats.now, worker in live)
        for heartbeat, worker in read
        if heartbeat
    ]


def _heartbeat(session: Session, worker: str, folder: str) -> Heartbeat | None:
    try:
        return session.heartbeat(worker, folder)
    except DamagedObject:
        return None  # its tasks tell when it lived


def _stay(last: Heartbeat, worker: str, now: float, heard: bool) -> Stay:
    gone = last.state.gone
    live = heard and not gone
    lived = max(0.0, (now if live else last.written) - last.started)
    return Stay(
        worker=worker,
        host=last.host,
        slots=last.slots,
        started=last.started,
        ended=max(now, last.written) if live else last.ended or last.written,
        live=live,
        why=f"{last.state}: {last.reason}" if gone else "" if live else "not heard from for long",
        billed=WorkerLifetime(lived, last.writes, last.reads, last.market, live),
    )


def _with_unheard(stays: dict[str, Stay], traces: Iterable[Trace]) -> list[Stay]:
    """Workers in order of arrival, including those known only from their tasks."""
    spans: dict[str, tuple[float, float]] = {}
    for trace in traces:
        for run in trace.runs:
            if run.how == "lost" or run.worker not in stays:
                first, last = spans.get(run.worker, (math.inf, 0.0))
                spans[run.worker] = min(first, run.claimed), max(last, run.ended)
    whole = dict(stays)
    for worker, (first, last) in spans.items():
        unheard = Stay(worker=worker, started=first, ended=last, why="left no last heartbeat")
        stay = stays.get(worker, unheard)
        whole[worker] = replace(stay, ended=max(stay.ended, last))
    return sorted(whole.values(), key=lambda stay: stay.started)


def _trace(found: Found, last_heard: dict[str, float], heartbeat: float) -> Trace:
    task = found.task
    over = task.ended or (found.stored if task.state.final else found.now)
    return Trace(
        found.index,
        found.task_id,
        str(task.state),
        found.stored,
        max(over, found.stored),
        tuple(_runs(task, found, last_heard, heartbeat)),
        str(found.name),
    )


def _runs(
    task: Task, found: Found, last_heard: dict[str, float], heartbeat: float
) -> Iterator[Run]:
    since = found.stored
    number = 0
    for past in task.past:
        number = past.attempt
        ended = past.ended
        if past.how is Interruption.LOST and past.worker in last_heard:
            # Not when somebody noticed: the worker died before its next heartbeat.
            died = last_heard[past.worker] + heartbeat
            ended = max(past.started or past.claimed, min(ended, died))
        yield Run(number, past.worker, since, past.claimed, past.started, ended, past.how.value)
        since = ended
    # The final lost attempt is among the past ones already.
    if task.worker and number != task.attempt:
        ended = task.ended or max(found.now, task.started, task.claimed)
        yield Run(
            task.attempt,
            task.worker,
            since,
            task.claimed,
            task.started,
            ended,
            str(task.state),
        )


# --- summing up --------------------------------------------------------------------


@dataclass(slots=True)
class Stretch:
    """Averages over a stretch of time; `finished` and `failed` are counts at its end.

    Attributes:
        start: UTC seconds.
        end: UTC seconds.
        live: Slots of live workers.
        busy: Slots running tasks.
        waiting: Waiting tasks.
        finished: Tasks finished so far, including failed and cancelled ones.
        failed: Tasks failed so far.
    """

    start: float
    end: float
    live: float = 0
    busy: float = 0
    waiting: float = 0
    finished: int = 0
    failed: int = 0


@dataclass(slots=True)
class Work:
    """Where the time of all slots went, in seconds.

    Attributes:
        useful: Attempts that ended their task, or still may.
        repeated: Attempts that were lost, handed back or cancelled.
        starting: From a worker's start until its first task began.
        handover: A slot was free while a task waited.
        tail: A slot was free, nothing waited, and other tasks still ran.
        idle: There was nothing to do, between the first task and the last.
        missing: A task waited for a wanted worker that did not exist; not the time of any slot.
    """

    useful: float = 0
    repeated: float = 0
    starting: float = 0
    handover: float = 0
    tail: float = 0
    idle: float = 0
    missing: float = 0

    @property
    def paid(self) -> float:
        """All the time that slots existed between the first task and the last."""
        return self.useful + self.repeated + self.starting + self.handover + self.tail + self.idle

    @property
    def efficiency(self) -> float:
        """Share of the paid time that was useful; 0 if there was none."""
        return self.useful / self.paid if self.paid else 0.0


class Loss(NamedTuple):
    """One way in which time was lost.

    Attributes:
        name: Name of the field of `Work`.
        label: For people.
        seconds: Total time of slots.
        advice: What would help.
    """

    name: str
    label: str
    seconds: float
    advice: str


class Spread(NamedTuple):
    """The distribution of some durations, in seconds."""

    size: int
    median: float
    high: float  # 95 of 100 are at or below
    most: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Spread:
        """The distribution of `seconds`."""
        ordered = sorted(seconds)
        if not ordered:
            return cls(0, 0.0, 0.0, 0.0)
        high = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]
        return cls(len(ordered), ordered[len(ordered) // 2], high, ordered[-1])


class Requests(NamedTuple):
    """Store requests of one party: all workers, or all clients.

    Attributes:
        writes: PUT, COPY, POST and LIST, which S3 prices alike.
        reads: GET and HEAD.
        counted: Whether those who made them counted them; otherwise they are estimated from what is
            stored. A client's count comes with the lane it gives back, a worker's with its
            heartbeat.
    """

    writes: int
    reads: int
    counted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """The summary of a session; times in UTC seconds.

    Attributes:
        observed: What it was computed from.
        begin: When the first task was stored.
        end: When the last task was finished, or now.
        counts: Tasks by state.
        retried: Tasks that took more than one attempt.
        lost: Attempts whose worker was lost.
        work: Where the time went.
        losses: The ways in which it was lost, the worst first.
        waits: How long tasks waited for their first attempt.
        runs: How long the last attempts of started tasks ran.
        stretches: The session from begin to end.
        worker_requests: Store requests of its workers.
        client_requests: Store requests of its clients.
        bill: What it has cost so far; None if nothing costs anything, or prices are unknown.
    """

    observed: Observed
    begin: float
    end: float
    counts: Counter[str]
    retried: int
    lost: int
    work: Work
    losses: list[Loss]
    waits: Spread
    runs: Spread
    stretches: list[Stretch] = field(repr=False)
    worker_requests: Requests
    client_requests: Requests
    bill: CostSummary | None

    @property
    def seconds(self) -> float:
        """From begin to end."""
        return self.end - self.begin

    @property
    def speedup(self) -> float:
        """How many times as fast it was as running the same attempts one after another."""
        return self.work.useful / self.seconds if self.seconds > 0 else 0.0

    @property
    def worst(self) -> Loss | None:
        """The largest loss; None if no time was lost."""
        return self.losses[0] if self.losses and self.losses[0].seconds > 0 else None


def review(observed: Observed) -> Review:
    """Sum up a session."""
    traces = observed.traces
    # What workers do before there is work, or once all is done, says nothing about efficiency.
    starts = (run.started for trace in traces for run in trace.runs if run.started)
    begin = min(
        (*(trace.stored for trace in traces), *starts),  # by clocks that differ
        default=observed.manifest.created,
    )
    end = max((trace.over for trace in traces), default=begin)
    work, stretches = _account(observed, begin, end)
    of_workers, of_clients = _requests(observed, end - begin)
    return Review(
        observed=observed,
        begin=begin,
        end=end,
        counts=Counter(trace.state for trace in traces),
        retried=sum(len(trace.runs) > 1 for trace in traces),
        lost=sum(trace.losses for trace in traces),
        work=work,
        losses=_losses(work),
        waits=Spread.of(trace.waited for trace in traces if trace.state != "cancelled"),
        runs=Spread.of(t.seconds for t in traces if t.runs and t.runs[-1].started),
        stretches=stretches,
        worker_requests=of_workers,
        client_requests=of_clients,
        bill=_bill(observed, of_workers, of_clients),
    )


_ADVICE = {
    "repeated": (
        "attempts lost, handed back or cancelled",
        "Spot reclaims, crashed workers and running out of memory cause this: see the workers.",
    ),
    "starting": (
        "workers starting up",
        "Fewer workers that live longer, a smaller image or a lighter initializer would help.",
    ),
    "handover": (
        "free workers while tasks waited",
        "Short tasks take as long to hand over as to run: give each more work (`chunksize`).",
    ),
    "tail": (
        "free workers while the last tasks ran",
        "Use fewer workers, more and shorter tasks, or submit the longest tasks first.",
    ),
    "idle": (
        "workers with nothing to do",
        "Work came too slowly: fewer workers, a shorter `idle_timeout`, or submit more at once.",
    ),
    "missing": (
        "tasks waiting for missing workers",
        "Workers took long to start, or not all could be started: see `doctor` and your quotas.",
    ),
}  # fmt: skip


def _losses(work: Work) -> list[Loss]:
    found = [
        Loss(name, label, getattr(work, name), advice) for name, (label, advice) in _ADVICE.items()
    ]
    return sorted(found, key=lambda loss: -loss.seconds)


class _State(NamedTuple):
    """The counts that hold from some moment on."""

    live: int = 0  # slots
    starting: int = 0  # of these, in workers that have not started a task
    busy: int = 0
    repeating: int = 0  # of these, wasted
    waiting: int = 0  # tasks
    unfinished: int = 0

    def __add__(self, change: Sequence[int]) -> _State:  # type: ignore[override]
        return _State(*(value + by for value, by in zip(self, change, strict=True)))


_LIVE, _STARTING, _BUSY, _REPEATING, _WAITING, _UNFINISHED = range(6)


class _Changes:
    """Which counts are higher, by how much, and between which moments.

    Args:
        begin: Nothing before it counts.
        end: Nothing after it counts.
    """

    def __init__(self, begin: float, end: float) -> None:
        self._begin = begin
        self._end = end
        self._at: dict[float, list[int]] = defaultdict(lambda: [0] * 6)

    def add(self, start: float, stop: float, fields: Iterable[int], by: int = 1) -> None:
        """Raise the fields by `by` from `start` to `stop`."""
        start, stop = max(start, self._begin), min(stop, self._end)
        if stop > start:
            first, last = self._at[start], self._at[stop]
            for i in fields:
                first[i] += by
                last[i] -= by

    def states(self) -> Iterator[tuple[float, float, _State]]:
        """Start, end and counts of each period, in order."""
        now = _State()
        for moment, following in pairwise(sorted(self._at)):
            now = now + self._at[moment]
            yield moment, following, now


def _account(observed: Observed, begin: float, end: float) -> tuple[Work, list[Stretch]]:
    """Go through the session once, from change to change, and add up."""
    wanted = observed.manifest.workers * observed.manifest.spec.slots
    work = Work()
    stretches = _empty_stretches(begin, end)
    for start, stop, state in _changes(observed, begin, end).states():
        _add(work, state, stop - start, wanted)
        _spread(stretches, state, start, stop)
    _count_ends(stretches, observed.traces)
    return work, stretches


def _changes(observed: Observed, begin: float, end: float) -> _Changes:
    changes = _Changes(begin, end)
    first: dict[str, float] = {}  # worker -> when its first task began
    for trace in observed.traces:
        changes.add(trace.stored, trace.over, [_UNFINISHED])
        since = trace.stored
        for run in trace.runs:
            began = run.started or run.ended
            changes.add(since, began, [_WAITING])
            changes.add(began, run.ended, [_BUSY, _REPEATING] if run.wasted else [_BUSY])
            if run.started:
                first[run.worker] = min(run.started, first.get(run.worker, math.inf))
            since = run.ended
        if not trace.runs or trace.runs[-1].how in ("lost", "handed back"):
            changes.add(since, trace.over, [_WAITING])
    for stay in observed.stays:
        began = min(stay.ended, first.get(stay.worker, stay.ended))
        changes.add(stay.started, stay.ended, [_LIVE], stay.slots)
        changes.add(stay.started, began, [_STARTING], stay.slots)
    return changes


def _add(work: Work, state: _State, seconds: float, wanted: int) -> None:
    free = max(0, state.live - state.starting - state.busy)
    handed = min(free, state.waiting)
    work.useful += seconds * (state.busy - state.repeating)
    work.repeated += seconds * state.repeating
    work.starting += seconds * state.starting
    work.handover += seconds * handed
    if state.unfinished:
        work.tail += seconds * (free - handed)
    else:
        work.idle += seconds * (free - handed)
    unserved = state.waiting - state.starting - handed
    work.missing += seconds * max(0, min(unserved, wanted - state.live))


def _empty_stretches(begin: float, end: float) -> list[Stretch]:
    if end <= begin:
        return []
    step = (end - begin) / _STRETCHES
    return [Stretch(start=begin + i * step, end=begin + (i + 1) * step) for i in range(_STRETCHES)]


def _spread(stretches: list[Stretch], state: _State, start: float, stop: float) -> None:
    """Add the counts from `start` to `stop` to the averages of the stretches they touch."""
    for i in range(bisect_right(stretches, start, key=_start) - 1, len(stretches)):
        stretch = stretches[i]
        if stretch.start >= stop:
            return
        share = min(stop, stretch.end) - max(start, stretch.start)
        share = max(0.0, share) / (stretch.end - stretch.start)
        stretch.live += share * state.live
        stretch.busy += share * state.busy
        stretch.waiting += share * state.waiting


def _start(stretch: Stretch) -> float:
    return stretch.start


def _count_ends(stretches: list[Stretch], traces: Iterable[Trace]) -> None:
    if not stretches:
        return
    for trace in traces:
        if trace.state in _FINAL:
            at = bisect_right(stretches, trace.over, key=_start) - 1
            stretch = stretches[max(0, at)]
            stretch.finished += 1
            stretch.failed += trace.state == "failed"
    for before, after in pairwise(stretches):
        after.finished += before.finished
        after.failed += before.failed


_FINAL = frozenset(str(state) for state in State if state.final)


# --- requests and cost --------------------------------------------------------------

_LONG = 2.0  # seconds; the start of a shorter task is written together with its end


def _requests(observed: Observed, seconds: float) -> tuple[Requests, Requests]:
    """Store requests of workers and of clients: counted if all reported them, else estimated."""
    lives = [stay.billed for stay in observed.stays]
    heard = [life for life in lives if life is not None]
    lanes = observed.manifest.lanes
    workers = Requests(sum(life.writes for life in heard), sum(life.reads for life in heard), True)
    clients = Requests(sum(lane.writes for lane in lanes), sum(lane.reads for lane in lanes), True)
    if len(heard) < len(lives):
        workers = _estimated_of_workers(observed)
    if any(lane.taken or not lane.writes for lane in lanes):
        clients = _estimated_of_clients(observed, seconds)
    return workers, clients


def _estimated_of_workers(observed: Observed) -> Requests:
    """The requests that the protocol makes for such a session; polling is the least certain."""
    intervals = observed.manifest.intervals
    alive = sum(stay.seconds for stay in observed.stays)
    runs = [run for trace in observed.traces for run in trace.runs]
    claims = len({(run.worker, run.claimed) for run in runs})
    takers = len({(run.worker, int(run.claimed)) for run in runs})
    starts = sum(run.seconds >= _LONG for run in runs)
    ends = len({(run.worker, int(run.ended / intervals.commit)) for run in runs})
    beats = alive / intervals.heartbeat + 2 * len(observed.stays)
    writes = 2 * observed.batches + max(claims, ends) + starts + beats
    looks = alive / intervals.poll_last + takers
    reads = 2 * claims + alive / intervals.session_check
    return Requests(round(writes + looks), round(reads), False)


def _estimated_of_clients(observed: Observed, seconds: float) -> Requests:
    looks = seconds / observed.manifest.intervals.look_last
    return Requests(round(observed.batches + looks), observed.batches, False)


def _bill(observed: Observed, of_workers: Requests, of_clients: Requests) -> CostSummary | None:
    lives = [stay.billed or WorkerLifetime(stay.seconds) for stay in observed.stays]
    if not of_workers.counted:
        lives = [life._replace(writes=0, reads=0) for life in lives]
    estimated = (of_clients, *(() if of_workers.counted else (of_workers,)))
    return summarize(
        observed.manifest,
        lives,
        writes=sum(one.writes for one in estimated),
        reads=sum(one.reads for one in estimated),
        clients_out=sum(lane.taken for lane in observed.manifest.lanes),
    )

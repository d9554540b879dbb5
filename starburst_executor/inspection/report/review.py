"""What became of a session as a whole, and what held it back: figures, without any drawing.

    observe      reads records and heartbeats once    -> Observed
    review       sums them up                         -> Review

Nothing is unpickled. Times of attempts are by the clocks of the workers that made them, times of
storing by the store's; where they disagree by a little, a wait counts as none.
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
        number: Which attempt, from 1.
        worker: Whose.
        since: When the task began to wait for it.
        claimed: When the worker took it.
        started: When a process began it; 0 if none did, or nobody got to say so.
        ended: When it was over, or now.
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
        """How long a process was at it."""
        return max(0.0, self.ended - self.started) if self.started else 0.0

    @property
    def wasted(self) -> bool:
        """Whether the task had to be done again, or was not wanted any more."""
        return self.how in ("lost", "handed back", "cancelled")


class Trace(NamedTuple):
    """What happened to one task; times in UTC seconds.

    Attributes:
        place: Its place in submission order, from 0.
        task_id: Id within the session.
        state: Where it is.
        stored: When it was stored.
        over: When it was finished, or now.
        runs: Its attempts, the last one last.
        name: What it is called.
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
        """Its id, and its name if it is known."""
        return f"{self.task_id} {self.name}".rstrip()

    @property
    def waited(self) -> float:
        """Seconds from being stored until its first attempt began, or until now."""
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
        slots: Tasks it ran at once.
        started: When it began.
        ended: When it left, was last heard of, or now.
        live: Whether it is still there.
        why: Why it left.
        billed: How long it lived and what it asked of the store, as for the session's bill; None if it left
            no word.
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
    """All that was read of a session.

    Attributes:
        manifest: The session as a whole.
        store: URL of its store.
        now: When it was read, by the store's clock.
        traces: Its tasks in submission order.
        stays: Its workers in the order in which they came.
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
    beats = session.beats()
    stays = {stay.worker: stay for stay in _stays(session, beats, manifest.intervals)}
    last_beats = {worker: stay.ended for worker, stay in stays.items()}
    traces: list[Trace] = []
    failed: list[Found] = []
    batches = set()
    for found in find(session, named=True):
        traces.append(_trace(found, last_beats, manifest.intervals.heartbeat))
        batches.add(found.batch)
        if found.task.state is State.FAILED and len(failed) < _MOST_ERRORS:
            failed.append(found)
    views = session.runtime.gather([partial(view, session, one) for one in failed])
    return Observed(
        manifest=manifest,
        store=session.store.url,
        now=beats.now,
        traces=traces,
        stays=_with_unheard(stays, traces),
        failures=group_errors(views),
        grouped=len(views),
        batches=len(batches),
    )


def _stays(session: Session, beats: HeartbeatListing, intervals: Intervals) -> list[Stay]:
    entries, _ = session.list_all(session.key("ended/"))
    gone = [entry.key.rsplit("/", 1)[1] for entry in entries]
    here = [worker for worker in beats.entries if worker not in set(gone)]
    calls = [partial(_heartbeat, session, worker, "ended") for worker in gone]
    calls += [partial(_heartbeat, session, worker, "workers") for worker in here]
    read = zip(session.runtime.gather(calls), gone + here, strict=True)
    live = live_workers(beats, intervals)
    return [_stay(beat, worker, beats.now, worker in live) for beat, worker in read if beat]


def _heartbeat(session: Session, worker: str, folder: str) -> Heartbeat | None:
    try:
        return session.heartbeat(worker, folder)
    except DamagedObject:
        return None  # its tasks tell when it lived


def _stay(beat: Heartbeat, worker: str, now: float, heard: bool) -> Stay:
    gone = beat.state.gone
    live = heard and not gone
    lived = max(0.0, (now if live else beat.written) - beat.started)
    return Stay(
        worker=worker,
        host=beat.host,
        slots=beat.slots,
        started=beat.started,
        ended=max(now, beat.written) if live else beat.ended or beat.written,
        live=live,
        why=f"{beat.state}: {beat.reason}" if gone else "" if live else "not heard of for long",
        billed=WorkerLifetime(lived, beat.writes, beat.reads, beat.market, live),
    )


def _with_unheard(stays: dict[str, Stay], traces: Iterable[Trace]) -> list[Stay]:
    """Workers by time of coming, with what tasks alone tell of them."""
    spans: dict[str, tuple[float, float]] = {}
    for trace in traces:
        for run in trace.runs:
            if run.how == "lost" or run.worker not in stays:
                first, last = spans.get(run.worker, (math.inf, 0.0))
                spans[run.worker] = min(first, run.claimed), max(last, run.ended)
    whole = dict(stays)
    for worker, (first, last) in spans.items():
        unheard = Stay(worker=worker, started=first, ended=last, why="left no last word")
        stay = stays.get(worker, unheard)
        whole[worker] = replace(stay, ended=max(stay.ended, last))
    return sorted(whole.values(), key=lambda stay: stay.started)


def _trace(found: Found, last_beats: dict[str, float], between: float) -> Trace:
    task = found.task
    over = task.ended or (found.stored if task.state.final else found.now)
    return Trace(
        found.index,
        found.task_id,
        str(task.state),
        found.stored,
        max(over, found.stored),
        tuple(_runs(task, found, last_beats, between)),
        str(found.name),
    )


def _runs(task: Task, found: Found, last_beats: dict[str, float], between: float) -> Iterator[Run]:
    since = found.stored
    number = 0
    for past in task.past:
        number = past.attempt
        ended = past.ended
        if past.how is Interruption.LOST and past.worker in last_beats:
            # Not when somebody noticed: the worker did not live to beat again.
            died = last_beats[past.worker] + between
            ended = max(past.started or past.claimed, min(ended, died))
        yield Run(number, past.worker, since, past.claimed, past.started, ended, past.how.value)
        since = ended
    # What was lost for the last time is among the past already.
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
    """What was so on average during a stretch of time; `finished` and `failed` at its end.

    Attributes:
        start: UTC seconds.
        end: UTC seconds.
        live: Slots of workers that lived.
        busy: Slots at work.
        waiting: Tasks that waited.
        finished: Tasks finished so far, failed and cancelled ones too.
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
        useful: Attempts that ended their task, or may yet.
        repeated: Attempts that were lost, handed back or cancelled.
        starting: From a worker's start until its first task began.
        handover: A slot was free while a task waited.
        tail: A slot was free, nothing waited, and other tasks still ran.
        idle: Nothing was to be done, between the first task and the last.
        missing: A task waited for a worker that was wanted and not there; no slot's time.
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
        """All the time that slots were there, between the first task and the last."""
        return self.useful + self.repeated + self.starting + self.handover + self.tail + self.idle

    @property
    def efficiency(self) -> float:
        """Share of the paid time that was useful; 0 where there was none."""
        return self.useful / self.paid if self.paid else 0.0


class Loss(NamedTuple):
    """One way in which time was lost.

    Attributes:
        name: Of the field of `Work`.
        label: For people.
        seconds: Of slots, all together.
        advice: What would help.
    """

    name: str
    label: str
    seconds: float
    advice: str


class Spread(NamedTuple):
    """How some seconds are spread."""

    size: int
    median: float
    high: float  # 95 of 100 are at or below
    most: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Spread:
        """The spread of these."""
        ordered = sorted(seconds)
        if not ordered:
            return cls(0, 0.0, 0.0, 0.0)
        high = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]
        return cls(len(ordered), ordered[len(ordered) // 2], high, ordered[-1])


class Requests(NamedTuple):
    """Requests to the store of one party: of all workers, or of all clients.

    Attributes:
        writes: PUT, COPY, POST and LIST, which S3 prices alike.
        reads: GET and HEAD.
        counted: Whether they were counted where they were made. If not they are estimated from what is
            stored: a client's count comes with the lane that it gives back, a worker's with its heartbeat.
    """

    writes: int
    reads: int
    counted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """What there is to say about a session; times in UTC seconds.

    Attributes:
        observed: What it was made from.
        begin: When the first task was stored.
        end: When the last task was finished, or now.
        counts: Tasks by state.
        retried: Tasks that took more than one attempt.
        lost: Attempts whose worker was lost.
        work: Where the time went.
        losses: The ways in which it was lost, the worst first.
        waits: Of tasks for their first attempt to begin.
        runs: Of the last attempts of tasks that began.
        stretches: The session from begin to end.
        worker_requests: What its workers asked of the store.
        client_requests: What its clients did.
        bill: What it has cost so far; None where nothing costs anything, or the price is not known.
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
        """How many times as fast as the same attempts one after another."""
        return self.work.useful / self.seconds if self.seconds > 0 else 0.0

    @property
    def worst(self) -> Loss | None:
        """What cost most; None where nothing cost anything."""
        return self.losses[0] if self.losses and self.losses[0].seconds > 0 else None


def review(observed: Observed) -> Review:
    """Sum up a session."""
    traces = observed.traces
    # What workers do before there is work, or once all is done, says nothing of how well they worked.
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
        "Spot capacity, crashes of whole workers and running out of memory do this: see the workers.",
    ),
    "starting": (
        "workers starting up",
        "Fewer workers that live longer, a smaller image or a lighter initializer would help.",
    ),
    "handover": (
        "free workers while tasks waited",
        "Short tasks cost as much to hand over as to run: give each more to do (`map` has `chunksize`).",
    ),
    "tail": (
        "free workers while the last tasks ran",
        "Fewer workers, more and shorter tasks, or the longest submitted first would even it out.",
    ),
    "idle": (
        "workers with nothing to do",
        "Work came too slowly: fewer workers, a shorter `idle_timeout`, or submit more at a time.",
    ),
    "missing": (
        "tasks waiting for workers that were not there",
        "Workers took long to be started, or fewer than wanted could be; `doctor` and quotas tell.",
    ),
}  # fmt: skip


def _losses(work: Work) -> list[Loss]:
    found = [
        Loss(name, label, getattr(work, name), advice) for name, (label, advice) in _ADVICE.items()
    ]
    return sorted(found, key=lambda loss: -loss.seconds)


class _State(NamedTuple):
    """What holds from one moment on."""

    live: int = 0  # slots
    starting: int = 0  # of these, in workers that have not begun a task
    busy: int = 0
    repeating: int = 0  # of these, in vain
    waiting: int = 0  # tasks
    unfinished: int = 0

    def __add__(self, change: Sequence[int]) -> _State:  # type: ignore[override]
        return _State(*(value + by for value, by in zip(self, change, strict=True)))


_LIVE, _STARTING, _BUSY, _REPEATING, _WAITING, _UNFINISHED = range(6)


class _Changes:
    """What is higher by how much between which moments.

    Args:
        begin: What was before does not count.
        end: What came later does not count.
    """

    def __init__(self, begin: float, end: float) -> None:
        self._begin = begin
        self._end = end
        self._at: dict[float, list[int]] = defaultdict(lambda: [0] * 6)

    def add(self, start: float, stop: float, fields: Iterable[int], by: int = 1) -> None:
        """Those fields are higher by `by` from `start` to `stop`."""
        start, stop = max(start, self._begin), min(stop, self._end)
        if stop > start:
            first, last = self._at[start], self._at[stop]
            for i in fields:
                first[i] += by
                last[i] -= by

    def states(self) -> Iterator[tuple[float, float, _State]]:
        """From when to when what holds, in order."""
        now = _State()
        for moment, following in pairwise(sorted(self._at)):
            now = now + self._at[moment]
            yield moment, following, now


def _account(observed: Observed, begin: float, end: float) -> tuple[Work, list[Stretch]]:
    """Go through the session once, from change to change, adding up."""
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
    """Add what held from `start` to `stop` to the averages of the stretches it touches."""
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
    """What workers and what clients asked of the store: counted where they say, else estimated."""
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
    """What the protocol makes of such a session; polling is the least certain part of it."""
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

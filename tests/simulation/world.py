"""Clients, workers and launchers of the real protocol code, as actors of the simulator.

What is real: `Session`, `Submitter`, `Watcher`, `FutureRegistry`, `Autoscaler`, `Worker`.
What is not: time, the store (a `Ledger` behind a `SimStore`), the processes that run tasks
(`SimSlots`), the worker's disk (`SimLibrary`) and what starts workers (`SimLauncher`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from starburst_executor.client.future import Settled, TaskFuture
from starburst_executor.client.registry import FutureRegistry
from starburst_executor.client.results import ResultReader
from starburst_executor.client.submitter import QueuedTask, Submitter
from starburst_executor.client.watcher import Watcher
from starburst_executor.coordination import administration
from starburst_executor.coordination.autoscaler import Autoscaler
from starburst_executor.errors import (
    DamagedObject,
    ObjectNotFound,
    SessionDetached,
    SessionError,
    StoreError,
)
from starburst_executor.protocol import lanes
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.listing import QueueReader
from starburst_executor.protocol.manifest import (
    Heartbeat,
    Intervals,
    Lane,
    Limits,
    Manifest,
    SessionState,
)
from starburst_executor.protocol.outcome import Failure, Outcome, decode_outcome, encode_outcome
from starburst_executor.protocol.payload import digest_of
from starburst_executor.protocol.records import State, Task
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.runtime import Signal
from starburst_executor.worker.assignment import AttemptKey
from starburst_executor.worker.child_handle import Job
from starburst_executor.worker.loop import Worker
from starburst_executor.worker.pool import JobResult
from tests.simulation.kernel import (
    Actor,
    FaultPlan,
    Latency,
    SimRuntime,
    SimStore,
    Simulation,
    s3_latency,
)
from tests.simulation.ledger import SESSION_ID, BrokenRule, Ledger

FUNCTION = b"the callable that all simulated tasks call"


class Work(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a simulated task does; its arguments are this, as JSON."""

    seconds: float = 0.1
    raises: bool = False
    poison: bool = False  # takes its worker down when its time is over
    size: int = 0  # bytes by which its result is longer than need be
    blob: str = ""  # digest of a blob that its arguments name


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A task that began to run."""

    label: str
    key: AttemptKey
    worker: str
    began: float  # virtual


# --- the worker's side -------------------------------------------------------------


class SimSlots:
    """`Slots` whose tasks take virtual time, and may take their worker down."""

    def __init__(self, world: World, worker: SimWorker, size: int) -> None:
        self.size = size
        self._runtime = worker.runtime
        self.signal: Signal = self._runtime.signal()
        self._world = world
        self._worker = worker
        self._queue: dict[Hashable, Job] = {}
        self._running: dict[Hashable, tuple[Job, float, object]] = {}
        self._done: list[JobResult] = []

    def start(self, job: Job) -> None:
        if job.key in self._queue or job.key in self._running:
            raise BrokenRule(f"{job.label} is started twice in one worker")
        self._queue[job.key] = job
        self._fill()

    def withdraw(self, keys: Iterable[Hashable]) -> set[Hashable]:
        return {key for key in keys if self._queue.pop(key, None)}

    def begun(self) -> dict[Hashable, float]:
        return {key: began for key, (_, began, _) in self._running.items()}

    def kill(self, key: Hashable) -> None:
        self._queue.pop(key, None)
        self._running.pop(key, None)
        self._done = [ended for ended in self._done if ended.key != key]
        self._fill()

    def take(self) -> list[JobResult]:
        done, self._done = self._done, []
        return done

    def live_output(self, key: Hashable) -> tuple[bytes, bytes]:
        return b"", b""

    def close(self) -> None:
        self._queue.clear()
        self._running.clear()

    def _fill(self) -> None:
        while self._queue and len(self._running) < self.size:
            key, job = next(iter(self._queue.items()))
            del self._queue[key]
            self._begin(key, job)

    def _begin(self, key: Hashable, job: Job) -> None:
        assert isinstance(key, AttemptKey)
        sim = self._world.sim
        work = msgspec.json.decode(job.call, type=Work)
        token = object()  # another for a task that is begun again
        self._running[key] = job, self._runtime.time(), token
        body = Body(label=job.label, key=key, worker=self._worker.id, began=sim.now)
        self._world.began(body)
        limit = math.inf if job.timeout is None else job.timeout
        seconds = min(work.seconds, limit)
        sim.at(sim.now + seconds, partial(self._end, key, token, work, limit))

    def _end(self, key: AttemptKey, token: object, work: Work, limit: float) -> None:
        running = self._running.get(key)
        if running is None or running[2] is not token or self._worker.dead:
            return
        if work.poison:
            self._world.sim.note(self._worker.id, "is taken down by", running[0].label)
            self._worker.crash()
            return
        del self._running[key]
        self._world.ledger.ended.add(key)
        failure = None
        if work.seconds > limit:
            failure = Failure(kind="timeout", type="TaskTimeout")
        elif work.raises:
            failure = Failure(kind="raised", type="ValueError", message="as it was told")
        value = f"{running[0].label} attempt {key.attempt} by {self._worker.id}".encode()
        outcome = Outcome(failure=failure) if failure else Outcome(value=value + b"." * work.size)
        self._done.append(
            JobResult(
                key=key,
                began=running[1],
                ended=self._runtime.time(),
                outcome=encode_outcome(outcome),
                ok=failure is None,
                kind="raised" if failure else "returned",
                blobs=(),
                stdout=b"",
                stderr=b"",
            )
        )
        self._fill()
        self.signal.set()


class SimLibrary:
    """A `Library` without a disk: remembers what was fetched."""

    blobs = Path("blobs")
    overfull = False

    def __init__(self, session: Session) -> None:
        self._session = session
        self._functions: set[str] = set()
        self._blobs: set[str] = set()

    def function(self, digest: str) -> Path:
        if digest not in self._functions:
            self._get(f"functions/{digest}")
            self._functions.add(digest)
        return Path(digest)

    def path(self, archives: dict[str, str]) -> tuple[str, ...]:
        return ()

    def missing(self, function: str, call: bytes = b"") -> list[str]:
        blob = msgspec.json.decode(call, type=Work).blob if call else ""
        return [blob] if blob and blob not in self._blobs else []

    def fetch(self, blobs: Iterable[str]) -> None:
        for digest in blobs:
            self._get(f"blobs/{digest}")
            self._blobs.add(digest)

    def evict(self, in_use: Iterable[tuple[str, bytes]]) -> None:
        raise AssertionError("it has room for everything")

    def _get(self, name: str) -> None:
        try:
            self._session.store.get(self._session.key(name))
        except ObjectNotFound as error:
            raise DamagedObject(f"{name} is gone") from error


class SimWorker:
    """One worker process: does what `poller.serve` does."""

    def __init__(self, world: World, worker_id: str, *, delay: float) -> None:
        self.id = worker_id
        self.staff: Autoscaler | None = None
        self.world = world
        self.runtime = SimRuntime(world.sim, worker_id, skew=world.skew())
        self.session = Session(world.store, SESSION_ID, self.runtime)
        self.worker: Worker | None = None
        self.reason = ""
        self.taken_away = False  # as its launcher would know
        self.born_at = world.sim.now
        self.actor = world.sim.spawn(worker_id, self._serve, delay=delay)

    @property
    def dead(self) -> bool:
        """Whether its process has ended, however it ended."""
        return self.actor.ended or self.actor.dying

    @property
    def working(self) -> Worker:
        """The worker within the process, which must have begun."""
        assert self.worker is not None
        return self.worker

    def crash(self) -> None:
        """End it as `kill -9` does."""
        if not self.dead:
            self.world.sim.kill(self.actor)

    def stop(self, reason: str) -> None:
        """What SIGTERM does; before the handler is installed it simply ends."""
        if self.worker is None:
            self.crash()
        elif not self.dead:
            self.worker.stop(reason)

    def _serve(self) -> None:
        try:
            manifest = self.session.patiently(self.session.check_open)
            worker = self._make(manifest)
            self.session.patiently(worker.heartbeats.beat)
            self.worker = worker
        except (StoreError, SessionError, MemoryError) as error:
            self.reason = f"it could not begin: {error}"
            return
        self.world.sim.spawn(f"{self.id}/beat", worker.heartbeats.run, of=self.actor)
        if self.staff is not None:
            self.world.sim.spawn(f"{self.id}/staff", self.staff.run, of=self.actor)
        try:
            self.reason = worker.run()
        except MemoryError as error:
            self.reason = repr(error)
        self.world.sim.note(self.id, "left:", self.reason)
        self.world.sim.kill(self.actor)  # with all threads that it still has

    def _make(self, manifest: Manifest) -> Worker:
        numbers = itertools.count()

        def aside(call: Callable[[], None]) -> object:
            name = f"{self.id}/aside-{next(numbers)}"
            return self.world.sim.spawn(name, call, of=self.actor)

        slots = SimSlots(self.world, self, manifest.spec.slots)
        if self.world.settings.workers_launch:
            self.staff = _sim_staff(
                self.world, self.session, manifest, self._broken, slots.signal.set
            )
        return Worker(
            self.session,
            self.id,
            slots,
            SimLibrary(self.session),
            aside,
            manifest,
            Heartbeat(worker=self.id, slots=manifest.spec.slots),
            self.staff,
        )

    def _broken(self, error: Exception) -> None:
        self.world.sim.note(self.id, "starts no more workers:", error)
        assert self.staff is not None
        self.staff.close()


def _sim_staff(
    world: World,
    session: Session,
    manifest: Manifest,
    broken: Callable[[Exception], None],
    news: Callable[[], None],
) -> Autoscaler:
    staff = Autoscaler(session, SimView(world), manifest, broken, news)
    staff._lock = SimLock(world.sim)  # type: ignore[assignment]
    return staff


class SimLauncher:
    """Starts workers; one for all clients, as a cluster is.

    Args:
        world: Where.
        knows: Whether it can tell which workers live and which have ended.
        delay: Seconds until a worker begins, from and to.
        lag: Seconds until a start shows to others than who asked for it, and an end to anybody.
    """

    name = "simulated"

    def __init__(
        self,
        world: World,
        *,
        knows: bool = True,
        delay: tuple[float, float] = (0.3, 2),
        lag: float = 0.0,
    ) -> None:
        self._world = world
        self.knows = knows
        self.lag = lag
        self._delay = delay
        self._random = world.sim.random_for("launcher")

    def launch(self, session_url: str, count: int) -> list[str]:
        return [
            self._world.start_worker(delay=self._random.uniform(*self._delay)).id
            for _ in range(count)
        ]

    def live(self, session_url: str) -> set[str] | None:
        return self.seen_alive() if self.knows else None

    def seen_alive(self, own: Collection[str] = ()) -> set[str]:
        """The workers that seem to be alive, to whoever started `own`."""
        then = self._world.sim.now - self.lag
        return {
            worker.id
            for worker in self._world.workers.values()
            if worker.actor.died_at > then and (worker.born_at <= then or worker.id in own)
        }

    def ended(self, session_url: str) -> set[str]:
        if not self.knows:
            return set()
        then = self._world.sim.now - self.lag
        return {w.id for w in self._world.workers.values() if w.actor.died_at <= then}

    def stop(
        self,
        session_url: str,
        worker_ids: Collection[str] | None = None,
        *,
        grace: float,
    ) -> None:
        workers = [
            worker
            for worker in self._world.workers.values()
            if not worker.dead and (worker_ids is None or worker.id in worker_ids)
        ]
        if not self.knows:
            return
        for worker in workers:
            worker.stop("it got SIGTERM")
        end = self._world.sim.now + grace
        while self._world.sim.now < end and not all(w.dead for w in workers):
            self._world.sim.sleep(0.1)
        for worker in workers:
            worker.crash()

    def forget(self, session_url: str) -> None:
        pass

    def platform(self) -> str:
        return "linux-x86_64"

    def log_tail(self, session_url: str, worker_id: str) -> str:
        return self._world.workers[worker_id].reason

    def taken_away(self, session_url: str, worker_id: str) -> bool:
        return self._world.workers[worker_id].taken_away

    def shortage(self, session_url: str) -> str:
        return ""

    def halt(self) -> None:
        """One process's wish; see `SimView`."""


class SimView:
    """The launcher as one process has it: halted for that process alone."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._halted = False
        self._own: set[str] = set()

    def launch(self, session_url: str, count: int) -> list[str]:
        if self._halted:
            return []
        started = self._world.launcher.launch(session_url, count)
        self._own.update(started)
        return started

    def live(self, session_url: str) -> set[str] | None:
        launcher = self._world.launcher
        if not launcher.knows or not launcher.lag:
            return launcher.live(session_url)
        return launcher.seen_alive(self._own)

    def halt(self) -> None:
        self._halted = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world.launcher, name)


# --- the client's side -------------------------------------------------------------


class SimLock:
    """What stands for a lock that is held across store calls; may be taken again by its holder."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._holder: Actor | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = self._sim.enter()
        while self._holder not in (None, me):
            self._sim.sleep(0.001)
        self._holder = me
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None


Script = Callable[["SimClient"], None]


class SimClient:
    """One client process: what `StarburstExecutor` does, with the same parts.

    Args:
        world: Where.
        name: The process's name.
        script: What it does.
        delay: Seconds until it begins.
    """

    def __init__(self, world: World, name: str, script: Script, *, delay: float = 0.0) -> None:
        self.world = world
        self.name = name
        self.runtime = SimRuntime(world.sim, name, skew=world.skew())
        self.session = Session(world.store, SESSION_ID, self.runtime)
        self.futures: list[TaskFuture[Any]] = []
        self.submitted = 0
        self.error: Exception | None = None
        self.opened = self.left = False
        self.lane: int | None = None
        self.actor = world.sim.spawn(name, partial(script, self), delay=delay)

    @property
    def dead(self) -> bool:
        """Whether its process has ended."""
        return self.actor.ended or self.actor.dying

    def create(self) -> None:
        """Make the session and open it."""
        manifest = self.world.new_manifest(self.runtime)
        now = self.session.store.list(self.session.prefix, limit=1).now
        manifest = replace(manifest, created=now, deadline=now + manifest.limits.absolute_timeout)
        Session.create(self.session.store, manifest, self.runtime)
        self._open(manifest)
        self._take_lane(0, 0)

    def attach(self) -> None:
        """Open a session that exists, with the futures of all that is stored."""
        self._open(self.patiently(self.session.load))
        self.patiently(self.roster.take_in_others)
        self.futures += self.patiently(self.roster.all)

    def patiently(self, call: Callable[[], Any]) -> Any:
        """Do it again while the store gives no plain answer, as a user would."""
        while True:
            try:
                return call()
            except StoreError:
                self.runtime.signal().wait(self.runtime.random.uniform(0.5, 2))

    def _open(self, manifest: Manifest) -> None:
        world = self.world
        self.manifest = manifest
        outcomes = ResultReader(self.session, _open_outcome)
        self.staff = _sim_staff(
            world, self.session, manifest, self._break, lambda: self.watcher.hurry()
        )
        queue = self.session.queue()
        queue.learn(manifest.lanes)
        self.watcher = Watcher(
            self.session,
            manifest,
            queue,
            outcomes,
            self.staff.ask_need,
            lambda: self.staff.ended,
            self._break,
        )
        self.roster = FutureRegistry(self.session, outcomes, self.watcher, self._cancel_one)
        self.roster._lock = SimLock(world.sim)  # type: ignore[assignment]
        self.submitter = Submitter(
            self.session,
            lambda: self.manifest.workers * manifest.spec.slots,
            lambda: self.watcher.unfinished,
            self.roster.stored,
            self._break,
        )
        parts = (
            ("submit", self.submitter.run),
            ("watch", self.watcher.run),
            ("staff", self.staff.run),
        )
        for part, run in parts:
            world.sim.spawn(f"{self.name}/{part}", run, of=self.actor)
        self.opened = True

    def submit(self, works: Iterable[Work]) -> list[TaskFuture[Any]]:
        """Queue tasks."""
        if self.lane is None:
            manifest, lane = lanes.take(self.session)
            self._take_lane(lane, manifest.lanes[lane].number)
        assert self.lane is not None
        digest = digest_of(FUNCTION)
        self.submitter.add_function(digest, FUNCTION)
        futures = []
        for work in works:
            future = self.roster.new(self.lane, next(self._numbers))
            data = msgspec.json.encode(work)
            self.submitter.add(QueuedTask(future, digest, data, not work.blob, _NO_MODULES))
            futures.append(future)
        self.futures += futures
        self.submitted += len(futures)
        return futures

    def wait(self) -> None:
        """Return when everything submitted here, or found here, has ended."""
        self.submitter.wait_until_idle()
        self.watcher.wait_until_idle()

    def cancel(self, futures: list[TaskFuture[Any]], *, running: bool) -> None:
        """Cancel tasks, with one write for each batch."""
        left = [f for f in futures if not f.done() and not self.submitter.withdraw(f)]
        if left:
            self.submitter.wait_until_idle()
        batches: dict[Batch, list[int]] = {}
        for future in left:
            if future.batch is not None:
                position = future.number - future.batch.number
                batches.setdefault(future.batch, []).append(position)
        for batch, positions in batches.items():
            known = self.session.cancel(batch, positions, running=running)
            self.watcher.learn(batch, known)

    def detach(self) -> None:
        """Leave the session to its workers."""
        self.submitter.flush()
        self.patiently(partial(self.staff.need, self.watcher.unfinished))
        self.stop_threads()
        self._give_back_lane(SessionState.OPEN)
        self._leave(SessionDetached("detached"))

    def close(self) -> None:
        """Wait for everything, and keep the session's objects."""
        self.wait()
        self.stop_threads()
        self._give_back_lane(SessionState.CLOSED)

    def delete_session(self) -> None:
        """Delete the session; again, where the store gives no plain answer."""
        self.patiently(partial(administration.delete, self.session, self.world.launcher))

    def stop_threads(self) -> None:
        """Have the submitting and the watching thread end."""
        self.staff.close()
        self.submitter.close()
        self.watcher.close()

    def exit(self) -> None:
        """End the process, with whatever threads it still has."""
        self.world.sim.kill(self.actor)

    def _leave(self, error: Exception) -> None:
        self.left = True
        self.watcher.abandon(error)
        self.submitter.abandon(error)

    def _break(self, error: Exception) -> None:
        self.error = self.error or error
        self.watcher.abandon(error)
        self.submitter.abandon(error)
        self.staff.close()

    def _cancel_one(self, future: TaskFuture[Any]) -> bool:
        self.cancel([future], running=False)
        return future.cancelled()

    def _take_lane(self, lane: int, number: int) -> None:
        self.lane = lane
        self._numbers = itertools.count(number)
        self.submitter.begin(lane, number)

    def _give_back_lane(self, state: SessionState) -> None:
        lane = self.lane if self.submitter.certain else None
        finished = self.watcher.queue.finished
        lanes.give_back(self.session, lane, self.submitter.number, state, finished)


_NO_MODULES: dict[str, str] = {}


def _open_outcome(batch: Batch, position: int, task: Task, data: bytes, name: str = "") -> Settled:
    outcome = decode_outcome(data)
    if outcome.failure is not None:
        return False, RuntimeError(outcome.failure.type)
    return True, outcome.value


# --- everything --------------------------------------------------------------------


@dataclass(kw_only=True)
class Settings:
    """What a world is like."""

    workers: int = 2
    min_workers: int = 0
    workers_launch: bool = True  # whether workers start others
    slots: int = 1
    limits: Limits = field(default_factory=Limits)
    intervals: Intervals = field(default_factory=Intervals)
    faults: FaultPlan | None = None
    latency: Latency = s3_latency
    knows: bool = True
    delay: tuple[float, float] = (0.3, 2)
    lag: float = 0.0  # seconds by which the launcher's view is late
    skew: float = 0.0  # clocks are off by up to so many seconds
    checked: bool = True
    trace: int = 400


class World:
    """One session and all who are at it; use as a context manager.

    Args:
        seed: Where every choice comes from.
        settings: What it is like.
    """

    def __init__(self, seed: int = 0, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.sim = Simulation(seed, trace=self.settings.trace)
        self._random = self.sim.random_for("world")
        self.ledger = Ledger(self.sim, checked=self.settings.checked)
        self.ledger.queues = self.queues
        self.ledger.max_attempts = self.settings.limits.max_attempts
        self.store = SimStore(self.sim, self.ledger, self.settings.latency, self.settings.faults)
        self.launcher = SimLauncher(
            self,
            knows=self.settings.knows,
            delay=self.settings.delay,
            lag=self.settings.lag,
        )
        self.ledger.writer = lambda: self.store.writer
        self.ledger.workers = lambda: {w.id: not w.dead for w in self.workers.values()}
        self.ledger.half_lease = self.settings.intervals.lease / 2
        self.workers: dict[str, SimWorker] = {}
        self.clients: list[SimClient] = []
        self.bodies: list[Body] = []
        self.on_began: Callable[[Body], None] = self.bodies.append

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.sim.close()

    def skew(self) -> float:
        """By how much the next process's clock is off."""
        return self._random.uniform(-1, 1) * self.settings.skew

    def new_manifest(self, runtime: SimRuntime) -> Manifest:
        """The manifest of the session, but for its times."""
        settings = self.settings
        return Manifest(
            session_id=SESSION_ID,
            python="3.11",
            package="0",
            created=0,
            deadline=0,
            workers=settings.workers,
            min_workers=settings.min_workers,
            spec=WorkerSpec(slots=settings.slots),
            limits=settings.limits,
            intervals=settings.intervals,
            lanes=(Lane(client=runtime.new_id(8)),),
        )

    def client(self, name: str, script: Script, *, delay: float = 0.0) -> SimClient:
        """Start a client."""
        client = SimClient(self, name, script, delay=delay)
        self.clients.append(client)
        return client

    def start_worker(self, worker_id: str = "", *, delay: float = 0.0) -> SimWorker:
        """Start a worker, with an id of one's own or a random one."""
        name = worker_id or f"w-{self._random.randrange(36**6):06x}-{len(self.workers)}"
        worker = self.workers[name] = SimWorker(self, name, delay=delay)
        return worker

    def began(self, body: Body) -> None:
        """A task body begins."""
        self.sim.note(body.worker, "begins", body.label, "attempt", body.key.attempt)
        if self.settings.checked:
            self.ledger.check_execution(body.key, body.worker)
        self.on_began(body)

    def queues(self) -> Iterable[tuple[str, QueueReader]]:
        """What all that live know of the queue."""
        for worker in self.workers.values():
            if worker.worker is not None and not worker.dead:
                yield worker.id, worker.worker.batches.queue
        for client in self.clients:
            if client.opened and not client.dead:
                yield client.name, client.watcher.queue
                yield f"{client.name}'s roster", client.roster._queue

    def run(self, until: float | Actor) -> None:
        """Let things happen up to a virtual time, or until an actor ended."""
        if not isinstance(until, Actor):
            # That nobody has anything to do any more is no deadlock.
            self.sim.at(until + 1, lambda: None)
        self.sim.run(until)

    def run_until(self, reached: Callable[[], bool], limit: float) -> None:
        """Let things happen until something is so, looking every virtual second.

        Raises:
            BrokenRule: it is not so by the virtual time `limit`.
        """
        while not reached():
            if self.sim.now >= limit:
                raise BrokenRule(f"not so after {limit} s: {self.unfinished()}")
            self.run(min(self.sim.now + 1, limit))

    def unfinished(self) -> dict[tuple[int, int], Task]:
        """Every stored task that is not final."""
        return {name: task for name, task in self.tasks().items() if not task.state.final}

    def live_workers(self) -> list[SimWorker]:
        """Those whose process has not ended."""
        return [worker for worker in self.workers.values() if not worker.dead]

    def tasks(self) -> dict[tuple[int, int], Task]:
        """Every stored task, by lane and number."""
        return {
            (batch.lane, batch.number + position): task
            for batch in self.ledger.batches()
            for position, task in enumerate(self.ledger.state(batch).tasks)
        }

    def count(self, state: State) -> int:
        """How many stored tasks are in a state."""
        return sum(task.state is state for task in self.tasks().values())

    @property
    def finished(self) -> bool:
        """Whether every stored task is final."""
        return not self.unfinished()

    # --- what must hold in the end

    def check(self, *, clean: bool = False) -> None:
        """Raise `BrokenRule` for whatever is not as the protocol promises, at this moment.

        Args:
            clean: Whether nothing went wrong on the way.
        """
        self.ledger.check_left(clean=clean)
        self._check_cursors()
        self._check_markers()
        for client in self.clients:
            self._check_futures(client)

    def _check_cursors(self) -> None:
        for who, queue in self.queues():
            for batch in self.ledger.batches():
                progress = queue._lanes.get(batch.lane)
                if progress is None or progress.end_of_run(batch.number) < batch.end:
                    continue
                if not self.ledger.state(batch).finished:
                    raise BrokenRule(f"unfinished {batch} is behind a cursor of {who}")

    def _check_markers(self) -> None:
        for batch in self.ledger.batches():
            for marker in self.ledger.markers(batch):
                self.ledger._check_marker(batch, marker, self.ledger.record(batch))

    def _check_futures(self, client: SimClient) -> None:
        """A future that has ended says what the record says, unless its client had left."""
        if client.error is not None or client.left:
            return
        tasks = self.tasks()
        for future in client.futures:
            if future.done() and future.batch is not None:
                said = self._said(future)
                stored = self._stored(tasks[future.lane, future.number], future)
                if said != stored:
                    raise BrokenRule(f"{future.task_id}: {said!r}, but {stored!r} stored")

    def _said(self, future: TaskFuture[Any]) -> object:
        if future.cancelled():
            return State.CANCELLED
        if future._fetch is not None:
            return "not fetched"
        error = future.exception()
        return str(error) if error is not None else future.result()

    def _stored(self, task: Task, future: TaskFuture[Any]) -> object:
        if task.state is State.CANCELLED:
            return State.CANCELLED
        if future._fetch is not None:
            return "not fetched" if task.state.final else task.state
        if task.outcome is None or future.batch is None:
            return task.state
        data = self.ledger.piece(future.batch, task.outcome)
        good, value = _open_outcome(future.batch, 0, task, data)
        return value if good else str(value)


# --- scale -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What a run at scale came to."""

    workers: int
    tasks: int
    makespan: (
        float  # virtual seconds from the first body's begin to the last end seen by the client
    )
    efficiency: float  # ideal time / makespan
    requests: int
    requests_per_task: float
    peak_writes_per_second: int
    counts: dict[str, int]
    real_seconds: float


def run_scale(
    workers: int = 1000,
    tasks: int = 100_000,
    seconds: float = 1.0,
    seed: int = 0,
    *,
    slots: int = 1,
) -> Scale:
    """One client and many workers, there from the start, at equal tasks, all submitted at once."""
    began = time.perf_counter()
    settings = Settings(workers=workers, slots=slots, checked=False, delay=(1.0, 3.0))
    with World(seed, settings) as world:
        world.on_began = lambda body: None  # a hundred thousand are too many to keep

        def script(client: SimClient) -> None:
            client.create()
            client.submitter.announce(tasks)
            for _ in range(tasks):
                client.submit([Work(seconds=seconds)])
                client.submitter.announce(-1)
            client.wait()

        client = world.client("client", script)
        for _ in range(workers):
            world.start_worker(delay=world._random.uniform(1.0, 2.0))
        world.sim.run(until=client.actor)
        makespan = world.sim.now - 1.0
        requests = sum(world.store.counts.values())
        return Scale(
            workers=workers,
            tasks=tasks,
            makespan=makespan,
            efficiency=tasks * seconds / (workers * slots) / makespan,
            requests=requests,
            requests_per_task=requests / tasks,
            peak_writes_per_second=world.store.peak_writes(),
            counts=dict(world.store.counts),
            real_seconds=time.perf_counter() - began,
        )

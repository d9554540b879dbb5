"""Plays random schedules of the whole protocol, and says what must hold in the end."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from starburst_executor.errors import SessionError, StarburstError, StoreError
from starburst_executor.inspection import status
from starburst_executor.protocol.manifest import Limits
from tests.simulation.kernel import APPLIES, Call, Fault, FaultPlan, random_faults
from tests.simulation.ledger import BrokenRule
from tests.simulation.schedule import Kind, Round, Schedule, Trouble, Visit, What
from tests.simulation.world import Settings, SimClient, SimWorker, World

__all__ = ["Chaos"]

LATEST = 400.0  # seconds after its call at which a late write has taken effect, with a margin
PATIENCE = 2 * 3600.0  # seconds from the last trouble, in which everything must come to rest

_DEADLY = (Fault.KILLED_BEFORE, Fault.KILLED_AFTER)


class Chaos:
    """One schedule.

    Args:
        schedule: What happens.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.fired: list[tuple[str, int, Fault]] = []  # the faults that struck
        settings = Settings(
            workers=schedule.workers,
            slots=schedule.slots,
            limits=Limits(
                max_attempts=schedule.max_attempts,
                idle_timeout=schedule.idle_timeout,
                task_timeout=schedule.task_timeout,
            ),
            faults=self._recorded(
                self._by_chance() if schedule.struck is None else self._as_told(schedule.struck)
            ),
            knows=schedule.knows,
            lag=schedule.lag,
            skew=schedule.skew,
        )
        self.world = World(schedule.seed, settings)
        self.stalled_until = 0.0
        self.stopped: set[str] = set()
        self.broken: set[str] = set()  # clients that broke, as they may
        self.spared = True  # no worker was taken away that others could do without

    def as_played(self) -> Schedule:
        """The same schedule, with the faults that struck instead of their chances."""
        return replace(self.schedule, chances=(), struck=tuple(self.fired))

    # --- what goes wrong

    def _by_chance(self) -> FaultPlan:
        rng = random.Random(f"faults/{self.schedule.kind}/{self.schedule.seed}")
        plan = random_faults(dict(self.schedule.chances))
        deaths = self.schedule.deaths

        def strike(call: Call, _: random.Random) -> Fault | None:
            nonlocal deaths
            if self.world.sim.now > self.schedule.quiet_at:
                return None
            fault = plan(call, rng)
            if fault in _DEADLY:
                deaths -= 1
                return fault if deaths >= 0 else None
            return fault

        return strike

    def _as_told(self, struck: tuple[tuple[str, int, Fault], ...]) -> FaultPlan:
        faults = {(process, number): fault for process, number, fault in struck}

        def strike(call: Call, _: random.Random) -> Fault | None:
            fault = faults.get((call.process, call.number))
            return fault if fault in APPLIES[call.op] else None

        return strike

    def _recorded(self, plan: FaultPlan) -> FaultPlan:
        def strike(call: Call, rng: random.Random) -> Fault | None:
            fault = plan(call, rng)
            if fault is not None:
                self.fired.append((call.process, call.number, fault))
            return fault

        return strike

    def _befall(self, trouble: Trouble) -> None:
        sim, which, seconds = self.world.sim, trouble.which, trouble.seconds
        workers = self.world.live_workers()
        clients = [client for client in self.world.clients if not client.dead]
        there: list[SimWorker | SimClient] = [*workers, *clients]
        match trouble.what:
            case What.STOP:
                self._stop_worker(which)
            case What.JUMP if there:
                there[which % len(there)].runtime.jump(seconds)
            case What.STALL_WORKER if workers:
                self._stall(workers[which % len(workers)], seconds)
            case What.STALL_CLIENT if clients:
                self._stall(clients[which % len(clients)], seconds)
            case What.SLEEP:
                rng = random.Random(which)
                for one in there:
                    self._stall(one, seconds + rng.choice([0.0, 0.0, 0.1, 10.0]))
            case What.CRASH_SPARE:
                self._crash_spare(which)
            case What.CRASH_WORKER if workers:
                workers[which % len(workers)].crash()
            case What.CRASH_CLIENT if clients:
                sim.kill(clients[which % len(clients)].actor)

    def _stop_worker(self, which: int) -> None:
        """SIGTERM; but where nobody attaches, never to the last: then pending tasks just wait."""
        live = [w for w in self.world.live_workers() if w.id not in self.stopped]
        if len(live) > (self.schedule.kind is Kind.UNWATCHED):
            worker = live[which % len(live)]
            self.stopped.add(worker.id)
            worker.stop("it got SIGTERM")

    def _crash_spare(self, which: int) -> None:
        """Kill one worker, once, if two others are well: one of them stays."""
        well = [
            worker
            for worker in self.world.live_workers()
            if worker.id not in self.stopped
            and worker.worker is not None
            and worker.actor.stalled_until <= self.world.sim.now
            and worker.working.heartbeats.silent() < 30
        ]
        if len(well) > 2 and self.spared:
            self.spared = False
            well[which % len(well)].crash()

    def _stall(self, one: SimWorker | SimClient, seconds: float) -> None:
        self.world.sim.stall(one.actor, seconds)
        self.stalled_until = max(self.stalled_until, self.world.sim.now + seconds)

    # --- what is done

    def _script(self, client: SimClient, visit: Visit, *, first: bool) -> None:
        """What a user's program does; the errors of the library end it, as they would."""
        try:
            if first:
                client.create()
            else:
                self._attach(client)
            for one in visit.rounds:
                self._submit(client, one)
            if visit.detaches:
                client.detach()
            else:
                client.wait()
                client.stop_threads()
        except (StarburstError, MemoryError) as error:
            self.world.sim.note(client.name, "ends with", repr(error))
            self.broken.add(client.name)
            if not self._may_fail(client, error):
                raise
            if isinstance(error, MemoryError):
                client.exit()

    def _submit(self, client: SimClient, one: Round) -> None:
        futures = client.submit(one.works)
        client.runtime.signal().wait(one.pause)
        if one.cancelled:
            chosen = [futures[number] for number in one.cancelled]
            client.patiently(partial(client.cancel, chosen, running=one.running))

    def _may_fail(self, client: SimClient, error: Exception) -> bool:
        if isinstance(error, SessionError):
            return self.schedule.kind is Kind.DELETED
        return isinstance(error, StoreError | MemoryError) or self._short_of_memory(client.name)

    def _short_of_memory(self, process: str) -> bool:
        return any(who == process and fault is Fault.NO_MEMORY for who, _, fault in self.fired)

    def _attach(self, client: SimClient) -> None:
        """As soon as there is a session."""
        while True:
            try:
                client.attach()
                return
            except SessionError:
                if self.schedule.kind is Kind.DELETED and self.world.ledger.terminated_at:
                    raise
                client.runtime.signal().wait(1)

    def _finish(self, client: SimClient) -> None:
        """Somebody comes back, waits for everything, and finds it in order."""
        self._attach(client)
        client.wait()
        now = client.patiently(partial(status.read_status, client.session))
        total = len(self.world.tasks())
        if now.total != total or now.finished != total:
            raise BrokenRule(f"{total} tasks are stored, but the status is {now}")
        if len(client.futures) != total:
            raise BrokenRule(f"{total} tasks, {len(client.futures)} futures")
        client.stop_threads()

    # --- the run

    def play(self) -> None:
        """Run it all, and let the world go.

        Raises:
            BrokenRule: something is not as the protocol promises.
        """
        with self.world:
            self._run()

    def _run(self) -> None:
        world, schedule = self.world, self.schedule
        for number, visit in enumerate(schedule.visits):
            script = partial(self._script, visit=visit, first=not number)
            world.client(f"c{number}", script, delay=visit.at)
        for trouble in schedule.troubles:
            world.sim.at(trouble.at, partial(self._befall, trouble))
        world.run(schedule.quiet_at)
        if not world.ledger.keys("session.json"):
            return  # its creator died before
        ends: dict[Kind, Callable[[], None]] = {
            Kind.ATTENDED: self._attend,
            Kind.WATCHED: self._watch,
            Kind.UNWATCHED: self._leave_alone,
            Kind.DELETED: self._delete,
        }
        ends[schedule.kind]()

    def _attend(self) -> None:
        """Whoever is still there dies; what they sent lands; then somebody comes back."""
        world = self.world
        for client in world.clients:
            if not client.dead:
                world.sim.kill(client.actor)
        world.run(max(world.sim.now, self.stalled_until) + LATEST)
        end = world.client("finisher", self._finish)
        self._must_come_to_rest(lambda: end.dead)
        self._must_be_finished()
        world.run(world.sim.now + LATEST)
        world.check(clean=self._clean)
        self._delete_all()

    def _watch(self) -> None:
        """Nobody waits for ever; and if no client broke, everything is done."""
        world = self.world
        self._must_come_to_rest(lambda: all(client.dead for client in world.clients))
        if not self.broken and not any(client.error for client in world.clients):
            self._must_be_finished()
        world.check(clean=self._clean)

    def _leave_alone(self) -> None:
        world = self.world
        self._must_come_to_rest(
            lambda: world.finished and all(client.dead for client in world.clients)
        )
        self._must_be_finished()
        world.check(clean=self._clean)

    @property
    def _clean(self) -> bool:
        """Whether nothing went wrong."""
        works = [
            work for visit in self.schedule.visits for one in visit.rounds for work in one.works
        ]
        return not (self.fired or self.schedule.troubles or any(work.poison for work in works))

    def _must_come_to_rest(self, reached: Callable[[], bool]) -> None:
        world = self.world
        end = max(world.sim.now, self.stalled_until) + PATIENCE
        while not reached():
            if world.sim.now >= end:
                waiting = [client.name for client in world.clients if not client.dead]
                there = [worker.id for worker in world.live_workers()]
                raise BrokenRule(
                    f"not at rest after {world.sim.now:.0f} s: there are {waiting} and {there}, "
                    f"and unfinished are {world.unfinished()}"
                )
            world.run(world.sim.now + 60)

    def _must_be_finished(self) -> None:
        world = self.world
        if open_ := world.unfinished():
            raise BrokenRule(f"not finished after {world.sim.now:.0f} s: {open_}")

    def _delete(self) -> None:
        """Another client deletes the session while the others are at it.

        A request that was on its way for minutes may land after that. What it leaves is found and
        removed by deleting again, as `prune` does with whatever lies about.
        """
        self.world.run(self.stalled_until)
        for name in ("remover", "pruner"):
            self._remove(name)
        self._must_be_gone()

    def _delete_all(self) -> None:
        self._remove("remover")
        self._must_be_gone()

    def _remove(self, name: str) -> None:
        remover = self.world.client(name, SimClient.delete_session)
        self.world.run(self.world.sim.now + LATEST + 600)
        if not remover.dead:
            raise BrokenRule("the deletion has not ended")

    def _must_be_gone(self) -> None:
        if left := self.world.ledger.keys():
            raise BrokenRule(f"after the deletion there is left: {left}")

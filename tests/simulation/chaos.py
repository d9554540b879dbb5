"""Random schedules of the whole protocol, each from one seed; and what must hold in the end."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from starburst_executor.errors import SessionError, StarburstError, StoreError
from starburst_executor.inspection import status
from starburst_executor.protocol.manifest import Limits
from tests.simulation.kernel import (
    Call,
    Fault,
    FaultPlan,
    random_faults,
)
from tests.simulation.ledger import BrokenRule
from tests.simulation.world import (
    Settings,
    SimClient,
    SimWorker,
    Work,
    World,
)

LATEST = 400.0  # seconds after its call at which a late write has taken effect, with a margin
PATIENCE = 6 * 3600.0  # virtual seconds in which everything must have come to rest

_GENTLE = (
    Fault.UNAVAILABLE,
    Fault.LOST,
    Fault.RETRIED,
    Fault.REFUSED,
    Fault.TORN,
    Fault.LATE,
)
_DEADLY = (Fault.KILLED_BEFORE, Fault.KILLED_AFTER)


KINDS = ("attended", "unwatched", "deleted")


class Chaos:
    """One random schedule.

    Args:
        seed: Where every choice comes from.
        kind: "attended": somebody attaches in the end; "unwatched": nobody does, and the workers
            must finish by themselves everything that was stored; "deleted": a client deletes the
            session in the middle of it all.
    """

    def __init__(self, seed: int, kind: str = "attended") -> None:
        self.rng = random.Random(f"chaos/{seed}")
        self.attended = kind != "unwatched"
        self.cleanup = kind == "deleted"
        rng = self.rng
        self.quiet_at = rng.choice([20.0, 60.0, 200.0])  # the faults stop
        settings = Settings(
            workers=rng.randint(2, 5),
            slots=rng.choice([1, 1, 1, 2]),
            limits=Limits(
                max_attempts=rng.choice([1, 2, 3]),
                idle_timeout=rng.choice([30.0, 300.0]),
                task_timeout=rng.choice([None, None, 20.0]),
            ),
            faults=self._faults(),
            knows=rng.random() < 0.6,
            skew=rng.choice([0.0, 0.0, 5.0, 3600.0]),
        )
        self.world = World(seed, settings)
        self.deaths = rng.randint(0, 4) if self.attended else 0
        self.stalled_until = 0.0
        self.stopped: set[str] = set()
        self.terminated_at: float | None = None
        self.problem = ""

    # --- what goes wrong

    def _faults(self) -> FaultPlan:
        rng = self.rng
        kinds = rng.sample(_GENTLE, rng.randint(0, len(_GENTLE)))
        if not self.attended and Fault.LATE in kinds:
            kinds.remove(Fault.LATE)
        chances = {kind: rng.choice([0.003, 0.02, 0.05]) for kind in kinds}
        if self.attended:
            chances |= dict.fromkeys(_DEADLY, rng.choice([0.0, 0.002]))
        plan = random_faults(chances)

        def until_quiet(call: Call, source: random.Random) -> Fault | None:
            if self.world.sim.now > self.quiet_at:
                return None
            fault = plan(call, source)
            if fault in _DEADLY:
                if self.deaths <= 0:
                    return None
                self.deaths -= 1
            return fault

        return until_quiet

    def _plan_events(self) -> None:
        rng, sim = self.rng, self.world.sim
        events: list[Callable[[], None]] = [self._stop_worker, self._jump, self._stall]
        if self.attended:
            events += [self._sleep, self._crash_worker, self._crash_client]
        for _ in range(rng.randint(0, 5)):
            sim.at(rng.uniform(1, self.quiet_at), rng.choice(events))

    def _worker(self) -> SimWorker | None:
        live = self.world.live_workers()
        return self.rng.choice(live) if live else None

    def _stop_worker(self) -> None:
        """SIGTERM; but where nobody attaches, never to the last: then pending tasks just wait."""
        live = [w for w in self.world.live_workers() if w.id not in self.stopped]
        if len(live) > (0 if self.attended else 1):
            worker = self.rng.choice(live)
            self.stopped.add(worker.id)
            worker.stop("it got SIGTERM")

    def _crash_worker(self) -> None:
        if worker := self._worker():
            worker.crash()

    def _crash_client(self) -> None:
        self.world.sim.kill(self.rng.choice(self.world.clients).actor)

    def _jump(self) -> None:
        everybody = [w.runtime for w in self.world.live_workers()]
        everybody += [c.runtime for c in self.world.clients]
        self.rng.choice(everybody).jump(self.rng.choice([-4000.0, -3.0, 3.0, 4000.0]))

    def _stall(self) -> None:
        if worker := self._worker():
            seconds = self.rng.choice([1.0, 30.0, 100.0])
            self.world.sim.stall(worker.actor, seconds)
            self._note_stall(seconds)

    def _sleep(self) -> None:
        """The laptop's lid: clients and workers all sleep."""
        seconds = self.rng.choice([50.0, 130.0, 3600.0])
        everybody: list[SimWorker | SimClient] = [
            *self.world.live_workers(),
            *self.world.clients,
        ]
        for one in everybody:
            if not one.dead:
                self.world.sim.stall(one.actor, seconds)
        self._note_stall(seconds)

    def _note_stall(self, seconds: float) -> None:
        self.stalled_until = max(self.stalled_until, self.world.sim.now + seconds)

    # --- what is done

    def _work(self) -> Work:
        rng = self.rng
        seconds = rng.choice([0.01, 0.1, 0.1, 1.0, 3.0, 3.0, 30.0])
        return Work(
            seconds=seconds,
            raises=rng.random() < 0.1,
            poison=self.attended and rng.random() < 0.01,
            size=rng.choice([0, 0, 300, 20_000]),
        )

    def _submit_some(self, client: SimClient) -> None:
        rng = self.rng
        for _ in range(rng.randint(1, 3)):
            works = [self._work() for _ in range(rng.randint(1, 12))]
            futures = client.submit(works)
            client.runtime.signal().wait(rng.choice([0.0, 0.03, 1.0, 10.0]))
            if rng.random() < 0.3:
                chosen = rng.sample(futures, rng.randint(1, len(futures)))
                client.cancel(chosen, running=rng.random() < 0.5)

    def _script(self, client: SimClient, *, first: bool) -> None:
        """What a user's program does; the errors of the library end it, as they would."""
        try:
            if first:
                client.create()
            else:
                self._attach(client)
            if first or self.rng.random() < 0.7:
                self._submit_some(client)
            if self.rng.random() < (0.4 if self.attended else 1.0):
                client.detach()
            else:
                client.wait()
                client.stop_threads()
        except StarburstError as error:
            self.world.sim.note(client.name, "ends with", repr(error))
            if not self._may_fail(error):
                raise

    def _may_fail(self, error: StarburstError) -> bool:
        if isinstance(error, SessionError):
            return self.cleanup
        return isinstance(error, StoreError)

    def _attach(self, client: SimClient) -> None:
        """As soon as there is a session."""
        while True:
            try:
                client.attach()
                return
            except SessionError:
                if self.terminated_at is not None:
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
            self.run()

    def run(self) -> None:
        """Run it all.

        Raises:
            BrokenRule: something is not as the protocol promises.
        """
        world, rng = self.world, self.rng
        world.client("c0", partial(self._script, first=True))
        for number in range(1, rng.randint(1, 3)):
            delay = rng.uniform(0, self.quiet_at)
            world.client(f"c{number}", partial(self._script, first=False), delay=delay)
        self._plan_events()
        world.run(self.quiet_at)
        if not self._begun():
            return
        if self.cleanup:
            self._delete()
        elif self.attended:
            self._attend()
        else:
            self._leave_alone()

    def _begun(self) -> bool:
        """Whether there is a session at all: its creator may have died before."""
        return bool(self.world.ledger.keys("session.json"))

    def _attend(self) -> None:
        """Whoever is still there dies; what they sent lands; then somebody comes back."""
        world = self.world
        for client in world.clients:
            if not client.dead:
                world.sim.kill(client.actor)
        world.run(max(world.sim.now, self.stalled_until) + LATEST)
        end = world.client("finisher", self._finish)
        world.sim.at(world.sim.now + PATIENCE, lambda: None)
        while not end.dead and world.sim.now < PATIENCE:
            world.run(world.sim.now + 60)
        self._must_be_finished()
        world.run(world.sim.now + LATEST)
        world.check()
        self._delete_all(end)

    def _leave_alone(self) -> None:
        world = self.world
        while world.sim.now < PATIENCE and not (
            world.finished and all(c.dead for c in world.clients)
        ):
            world.run(world.sim.now + 60)
        self._must_be_finished()
        world.check()

    def _must_be_finished(self) -> None:
        world = self.world
        open_ = {k: t.state for k, t in world.tasks().items() if not t.state.final}
        if open_:
            raise BrokenRule(f"not finished after {world.sim.now:.0f} s: {open_}")

    def _delete(self) -> None:
        """Another client deletes the session while the others are at it.

        A request that was on its way for minutes may land after that. What it leaves is found and
        removed by deleting again, as `prune` does with whatever lies about.
        """
        world = self.world
        world.run(self.stalled_until)
        for name in ("remover", "pruner"):
            remover = world.client(name, SimClient.delete_session)
            world.run(world.sim.now + LATEST + 300)
            if not remover.dead:
                raise BrokenRule("the deletion has not ended")
        self._must_be_gone()

    def _delete_all(self, client: SimClient) -> None:
        world = self.world
        remover = world.client("remover", SimClient.delete_session)
        world.run(world.sim.now + 1000)
        if not remover.dead:
            raise BrokenRule("the deletion has not ended")
        self._must_be_gone()

    def _must_be_gone(self) -> None:
        left = self.world.ledger.keys()
        if left:
            raise BrokenRule(f"after the deletion there is left: {left}")

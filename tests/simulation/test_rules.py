"""One forced schedule for each rule that random ones seldom show to be missing.

`mutants` names for each rule the test, here or in `test_protocol`, that fails without it.
"""

from __future__ import annotations

from functools import partial

import pytest

from starburst_executor.coordination import administration
from starburst_executor.protocol import lanes
from starburst_executor.protocol.manifest import Intervals, Limits, SessionState
from starburst_executor.protocol.payload import digest_of
from starburst_executor.protocol.records import State
from tests.simulation.forced import (
    a_world,
    once,
    only_task,
    outlasting,
    striking,
    submitting,
    without_launcher,
)
from tests.simulation.kernel import Call, Fault
from tests.simulation.world import SimClient, SimWorker, Work, World

HALF = Intervals().lease / 2


def begins(world: World, attempt: int) -> list[float]:
    return [body.began for body in world.bodies if body.key.attempt == attempt]


# --- outcomes ----------------------------------------------------------------------


def test_an_end_is_refused_though_the_same_worker_holds_a_later_attempt() -> None:
    # Its end meets a record in which the task is pending again, so the same write claims it anew;
    # and since the reply to that is lost, the write is made once more.
    stalled: list[str] = []

    def strike(call: Call) -> Fault | None:
        if call.process == "w-a" and "/results/" in call.key and not stalled:
            stalled.append(call.key)
            world.sim.stall(world.workers["w-a"].actor, 400)
        if call.process == "w-b" and call.op == "replace" and world.sim.now > HALF:
            return Fault.KILLED_AFTER  # it has sent back what the other one held
        if call.process == "w-a" and call.op == "replace" and stalled:
            return replies.pop() if replies else None
        return None

    replies: list[Fault | None] = [Fault.LOST, None]
    with a_world(striking(strike), knows=False, workers=1) as world:
        without_launcher(world)
        works = [Work(seconds=3, size=100_000), *[Work(seconds=1000)] * 15]
        world.client("c", submitting(*works, then=SimClient.detach))
        world.start_worker("w-a", delay=0.5)
        world.start_worker("w-b", delay=10)
        world.run(410)
        assert world.workers["w-b"].dead
        assert not replies
        world.run_until(lambda: world.tasks()[0, 0].state is State.COMPLETED, 2000)


def test_an_end_that_comes_after_the_deletion_is_not_stored() -> None:
    with a_world(knows=False, workers=1) as world:
        without_launcher(world)
        world.client("c", submitting(Work(seconds=10), then=SimClient.detach))
        worker = world.start_worker("w-a", delay=0.5)
        world.run(5)  # before it reads again what it holds
        world.ledger.delete([world.ledger.prefix + key for key in world.ledger.keys("queue/")])
        world.run_until(lambda: worker.dead, 200)
        assert world.ledger.keys("queue/") == []


def test_an_outcome_that_could_not_be_had_is_asked_for_again_while_its_batch_goes_on() -> None:
    away = striking(
        lambda call: (
            Fault.UNAVAILABLE
            if "/results/" in call.key and call.op == "get" and world.sim.now < 30
            else None
        )
    )
    with a_world(away, workers=1) as world:
        works = [Work(size=100_000), *[Work(seconds=1000)] * 7]
        client = world.client("c", submitting(*works, then=outlasting))
        world.run(60)
        assert world.ledger.batches()[0].size == 2
        first, second = client.futures[:2]
        assert first.done()
        assert not second.done()


# --- claims ------------------------------------------------------------------------


def test_what_waits_in_a_child_does_not_begin_while_no_heartbeat_gets_through() -> None:
    muted: list[float] = []
    mute = striking(
        lambda call: (
            Fault.UNAVAILABLE if muted and "/workers/" in call.key and call.op == "put" else None
        )
    )
    with a_world(mute, workers=1) as world:
        without_launcher(world)
        works = [Work(seconds=0.1)] * 40
        works[20] = Work(seconds=3)
        world.client("c", submitting(*works, then=outlasting))
        worker = world.start_worker("w-a", delay=0.5)
        world.run_until(lambda: any(body.label == "0-20" for body in world.bodies), 60)
        assert worker.working._pool._queue, "nothing waits behind the long task"  # type: ignore[attr-defined]
        muted.append(world.sim.now)
        worker.working.heartbeats.last -= 2 * HALF
        begun = len(world.bodies)
        world.run(world.sim.now + 30)
        assert len(world.bodies) == begun
        assert not world.finished


# --- losses ------------------------------------------------------------------------


def asleep(world: World, sleepers: dict[SimWorker | SimClient, float]) -> None:
    """Each wakes at a time of its own."""
    for one, until in sleepers.items():
        world.sim.stall(one.actor, until - world.sim.now)


def test_one_look_gives_nobody_up_when_a_laptop_wakes_before_its_workers() -> None:
    with a_world(knows=False, workers=1) as world:
        without_launcher(world)
        client = world.client("c", submitting(Work(seconds=300), then=outlasting))
        worker = world.start_worker("w-a", delay=0.5)
        world.run(50)
        asleep(world, {client: 3600, worker: 3610})
        world.run_until(lambda: world.finished, 5000)
        assert only_task(world).attempt == 1


def suspected(world: World) -> tuple[SimClient, SimWorker]:
    """A client that has just found a worker stale, since another one ended at that moment."""
    without_launcher(world)
    client = world.client("c", submitting(Work(seconds=300), then=outlasting))
    worker = world.start_worker("w-a", delay=0.5)
    others = [world.start_worker(f"w-{name}", delay=3) for name in "bc"]
    world.run(50)
    asleep(world, {worker: 50 + HALF + 15})
    world.run(50 + HALF + 1)
    others[0].crash()
    leases = client.watcher._repair.leases
    world.run_until(lambda: "w-a" in leases._watched, 50 + HALF + 5)
    return client, worker


def test_two_looks_in_quick_succession_give_nobody_up() -> None:
    with a_world(workers=3) as world:
        suspected(world)
        world.workers["w-c"].crash()
        world.run_until(lambda: world.finished, 1000)
        assert only_task(world).attempt == 1


def test_what_was_suspected_before_a_sleep_is_not_held_against_anybody_after_it() -> None:
    with a_world(workers=3) as world:
        client, worker = suspected(world)
        asleep(world, {client: 4000, worker: 4010, world.workers["w-c"]: 4010})
        world.run_until(lambda: world.finished, 6000)
        assert only_task(world).attempt == 1


def test_a_heartbeat_between_two_looks_clears_a_worker() -> None:
    # It is stale at both looks, but was alive between them.
    with a_world(workers=3) as world:
        client, worker = suspected(world)
        world.run(50 + HALF + 17)  # it woke, and was heard
        asleep(world, {worker: world.sim.now + HALF + 30, client: world.sim.now + HALF + 5})
        world.run_until(lambda: world.finished, 1000)
        assert only_task(world).attempt == 1


def test_what_an_ended_worker_held_begins_again_within_seconds() -> None:
    with a_world(workers=2) as world:
        world.client("c", submitting(*[Work(seconds=100)] * 2, then=outlasting))
        world.run(30)
        world.live_workers()[0].crash()
        world.run(30 + 10)
        assert len(begins(world, 2)) == 1


def test_a_heartbeat_outlives_what_its_worker_held_though_the_repairer_dies() -> None:
    dies = once(Fault.KILLED_AFTER, "delete", "workers/w-a")
    with a_world(dies, knows=False, workers=3) as world:
        without_launcher(world)
        world.client("c", submitting(Work(seconds=1000), then=SimClient.detach))
        holder = world.start_worker("w-a", delay=0.5)
        repairer = world.start_worker("w-b", delay=3)
        world.run(20)
        holder.crash()
        world.run_until(lambda: repairer.dead, 600)
        assert only_task(world).lost == 1


def test_what_was_requeued_is_claimed_with_the_next_look() -> None:
    with a_world(knows=False, workers=2) as world:
        without_launcher(world)
        world.client("c", submitting(Work(seconds=1000), then=SimClient.detach))
        holder = world.start_worker("w-a", delay=0.5)
        world.start_worker("w-b", delay=3)
        world.run(20)
        holder.crash()
        world.run_until(lambda: only_task(world).lost == 1, 600)
        world.run(world.sim.now + 1.5 * Intervals().poll_last)
        assert len(begins(world, 2)) == 1


def test_what_was_handed_back_is_claimed_with_the_next_look() -> None:
    with a_world(knows=False, workers=2) as world:
        without_launcher(world)
        world.client("c", submitting(Work(seconds=1000), then=SimClient.detach))
        holder = world.start_worker("w-a", delay=0.5)
        world.start_worker("w-b", delay=3)
        world.run(20)
        holder.stop("it got SIGTERM")
        world.run(20 + 1.5 * Intervals().poll_last)
        assert len(begins(world, 2)) == 1


def test_only_what_ran_counts_as_lost_with_its_worker() -> None:
    with a_world(knows=False, workers=1, slots=2, limits=Limits(max_attempts=1)) as world:
        without_launcher(world)
        works = [Work(seconds=0.1)] * 40
        world.client("c", submitting(*works, then=SimClient.detach))
        holder = world.start_worker("w-a", delay=0.5)
        world.run_until(lambda: world.count(State.CLAIMED) >= 3, 20)
        running = world.count(State.RUNNING)
        holder.crash()
        world.start_worker("w-b", delay=3)
        world.run_until(lambda: world.finished, 600)
        assert world.count(State.FAILED) == running <= 2


def poisoned(world: World, client: SimClient) -> None:
    """Takes down one of two workers; the other has a slot free, and a task until about 65 s."""
    nap = client.runtime.signal().wait
    client.create()
    client.submit([Work(seconds=8, poison=True), Work(seconds=8)])
    nap(5)
    client.submit([Work(seconds=60)])
    while not any(body.key.attempt == 2 for body in world.bodies):
        nap(1)
    client.submit([Work(seconds=3)])
    client.wait()
    client.exit()


def test_a_task_at_its_last_chance_is_held_alone() -> None:
    with a_world(workers=2, slots=2, limits=Limits(max_attempts=2)) as world:
        without_launcher(world)
        client = world.client("c", partial(poisoned, world))
        world.start_worker("w-a", delay=0.5)
        world.start_worker("w-b", delay=4)
        world.run(50)
        assert not any(body.key.attempt == 2 for body in world.bodies)
        world.start_worker("w-c", delay=60)
        world.run_until(lambda: client.dead, 1000)
        states = [task.state for _, task in sorted(world.tasks().items())]
        assert states == [State.FAILED, *[State.COMPLETED] * 3]


def test_what_ended_and_is_not_written_is_not_held_beside_a_last_chance() -> None:
    # It ends while its worker looks for more, which takes so long here.
    with a_world(workers=2, slots=2, limits=Limits(max_attempts=2)) as world:
        without_launcher(world)
        client = world.client("c", partial(poisoned, world))
        world.start_worker("w-a", delay=0.5)
        world.start_worker("w-b", delay=4)
        world.run(30)
        world.store._latency = lambda op, rng: 40 if op == "list" else 0.02
        world.start_worker("w-c", delay=300)
        world.run_until(lambda: client.dead, 3000)


def test_a_poison_task_whose_blob_must_be_fetched_is_blamed() -> None:
    with a_world(workers=1) as world:

        def script(client: SimClient) -> None:
            client.create()
            blob = digest_of(b"large")
            client.session.put_blob(blob, memoryview(b"large"))
            client.submit([Work(seconds=0.5, blob=blob, poison=True)] * 2)
            client.wait()
            client.exit()

        client = world.client("c", script)
        world.run_until(lambda: client.dead, 100)
        assert world.count(State.FAILED) == 2


# --- who is there ------------------------------------------------------------------


def slow_puts(world: World, seconds: float) -> None:
    """Those that are asked for from now on."""
    world.store._latency = lambda op, rng: seconds if op == "put" else 0.02


def test_no_heartbeat_lands_after_the_goodbye() -> None:
    with a_world(knows=False, workers=1) as world:
        without_launcher(world)
        world.client("c", SimClient.create)
        worker = world.start_worker("w-a", delay=0.5)
        world.run(10)
        slow_puts(world, 5)
        worker.working.heartbeats._wake.set()
        world.sim.at(10.1, partial(slow_puts, world, 0.02))
        world.sim.at(10.2, partial(worker.stop, "it got SIGTERM"))
        world.run_until(lambda: worker.dead, 60)
        world.run(world.sim.now + 10)
        assert world.ledger.keys("workers/") == []


def test_a_worker_between_its_heartbeat_and_its_goodbye_is_not_taken_for_a_young_one() -> None:
    with a_world(workers=1, workers_launch=False) as world:

        def attach(client: SimClient) -> None:  # which has not counted that worker before
            client.attach()
            client.staff.need(1)
            client.exit()

        world.client("c", SimClient.create)
        worker = world.start_worker("w-a", delay=0.5)
        world.run(10)
        slow_puts(world, 20)
        worker.stop("it got SIGTERM")
        world.run(15)
        seen = bool(world.ledger.keys("workers/"))
        client = world.client("d", attach, delay=0 if not seen else 15)
        world.run_until(lambda: client.dead, 60)
        assert len(world.workers) == 2


def test_a_worker_that_never_gets_to_its_first_heartbeat_is_replaced() -> None:
    with a_world(workers=1) as world:
        ready = world.launcher.launch
        world.launcher.launch = lambda session_url, count: stuck(world)  # type: ignore[method-assign]
        world.client("c", submitting(Work(seconds=1), then=outlasting))
        world.run(10)
        assert len(world.workers) == 1
        world.launcher.launch = ready  # type: ignore[method-assign]
        world.run_until(lambda: world.finished, 900)


def stuck(world: World) -> list[str]:
    return [world.start_worker(delay=10**6).id]


def test_a_worker_that_was_stopped_for_ever_is_replaced() -> None:
    with a_world(workers=1) as world:
        world.client("c", submitting(*[Work(seconds=20)] * 2, then=outlasting))
        world.run(25)
        (worker,) = world.live_workers()
        asleep(world, {worker: 10**6})
        world.run_until(lambda: world.finished, 25 + 5 * 2 * HALF)


def lacking_workers(world: World, count: int) -> None:
    """A session whose tasks wait, and nobody is there."""
    ready = world.launcher.launch
    without_launcher(world)
    world.client("c", submitting(*[Work(seconds=100)] * count, then=SimClient.detach))
    world.run(30)  # the turn of that client is over, too
    world.launcher.launch = ready  # type: ignore[method-assign]


def attending(client: SimClient) -> None:
    client.attach()
    client.wait()
    client.exit()


@pytest.mark.parametrize("lag", [0.0, 5.0])
def test_two_clients_that_see_the_same_lack_start_its_workers_once(lag: float) -> None:
    with a_world(workers=4, lag=lag) as world:
        lacking_workers(world, 4)
        for name in "de":
            world.client(name, attending)
        world.run(60)
        assert len(world.workers) == 4


def test_a_client_held_up_between_count_and_turn_starts_none_beside_those_of_another() -> None:
    held: list[str] = []

    def strike(call: Call) -> Fault | None:
        if call.process == "e" and call.key.endswith("/session.json"):
            held.append(call.key)
            if len(held) == 2:  # it counted, and is about to take the turn
                world.sim.stall(late.actor, 3)
        return None

    with a_world(striking(strike), workers=4) as world:
        lacking_workers(world, 4)
        world.client("d", attending, delay=1)
        late = world.client("e", attending)
        world.run(60)
        assert len(held) >= 2
        assert len(world.workers) == 4


def test_the_turn_of_a_process_that_died_ends_by_itself() -> None:
    dies = once(Fault.KILLED_AFTER, "create", "launching")
    with a_world(dies, workers=2) as world:
        world.client("c", submitting(*[Work(seconds=10)] * 2, then=outlasting))
        world.run(10)
        assert not world.workers
        world.client("d", attending)
        world.run_until(lambda: world.finished, 100)


@pytest.mark.parametrize("fault", [Fault.RETRIED, Fault.LOST, Fault.LATE])
def test_a_client_that_detaches_makes_sure_of_workers_though_its_turn_was_in_doubt(
    fault: Fault,
) -> None:
    with a_world(once(fault, "create", "launching"), workers=1) as world:

        def detach(client: SimClient) -> None:
            client.create()
            client.submit([Work()])
            client.detach()
            client.exit()

        client = world.client("c", detach)
        world.run_until(lambda: client.dead, 300)
        world.run_until(lambda: world.finished, world.sim.now + 60)


def test_a_client_that_detaches_waits_until_the_turn_of_another_is_over() -> None:
    dies = once(Fault.KILLED_AFTER, "create", "launching")
    with a_world(dies, workers=1) as world:
        world.client("c", submitting(Work(), then=outlasting))

        def detach(client: SimClient) -> None:
            client.attach()
            client.submit([Work()])
            client.detach()
            client.exit()

        client = world.client("d", detach, delay=3)
        world.run_until(lambda: client.dead, 60)
        world.run_until(lambda: world.finished, 120)


def test_a_worker_that_shows_only_after_it_has_left_is_not_taken_for_a_new_one() -> None:
    # It becomes known to the launcher just between a client's count and its turn.
    shown: list[str] = []

    def strike(call: Call) -> Fault | None:
        if call.process == "d" and call.key.endswith("/launching") and not shown:
            shown.append("w-a")
            world.workers["w-a"].born_at = -world.launcher.lag
        return None

    with a_world(striking(strike), workers=1, lag=60.0, workers_launch=False) as world:
        world.client("c", SimClient.create)
        worker = world.start_worker("w-a", delay=0.5)
        world.run(20)
        worker.stop("it got SIGTERM")
        world.run_until(lambda: worker.dead, 30)

        def detach(client: SimClient) -> None:
            client.attach()
            client.submit([Work()])
            client.detach()
            client.exit()

        world.client("d", detach)
        world.run_until(lambda: bool(world.tasks()) and world.finished, 60)
        assert shown


# --- ends --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_deletion_that_dies_leaves_a_session_that_can_be_deleted(number: int) -> None:
    deletions: list[str] = []

    def strike(call: Call) -> Fault | None:
        if call.process != "remover" or call.op != "delete":
            return None
        deletions.append(call.key)
        return Fault.KILLED_AFTER if len(deletions) == number else None

    with a_world(striking(strike), workers=1) as world:
        client = world.client("c", submitting(*[Work(seconds=0.1)] * 5))
        world.run_until(lambda: client.dead, 60)
        remover = world.client("remover", SimClient.delete_session)
        world.run_until(lambda: remover.dead, 600)
        left = world.ledger.keys()
        assert not left or left[-1] == "session.json" or "session.json" in left
        pruner = world.client("pruner", SimClient.delete_session)
        world.run_until(lambda: pruner.dead, 1200)
        assert world.ledger.keys() == []


def test_what_lands_during_a_deletion_is_deleted_too() -> None:
    late = ["results/0000-00000000.1/late"]

    def strike(call: Call) -> Fault | None:
        if call.process == "remover" and call.op == "delete" and late:
            world.ledger.put(world.ledger.prefix + late.pop(), b"x")
        return None

    with a_world(striking(strike), workers=1) as world:
        client = world.client("c", submitting(Work()))
        world.run_until(lambda: client.dead, 60)
        remover = world.client("remover", SimClient.delete_session)
        world.run_until(lambda: remover.dead, 600)
        assert not late
        assert world.ledger.keys() == []


def test_a_deletion_waits_for_workers_that_nobody_can_stop() -> None:
    with a_world(knows=False, workers=1) as world:
        without_launcher(world)
        works = [Work(seconds=12, size=100_000)] * 100
        world.client("c", submitting(*works, then=SimClient.detach))
        worker = world.start_worker("w-a", delay=0.5)
        world.run(5)
        remover = world.client("remover", SimClient.delete_session)
        world.run_until(lambda: remover.dead, 300)
        world.run_until(lambda: worker.dead, 300)
        world.run(world.sim.now + 60)
        assert world.ledger.keys() == []


def test_nothing_begins_a_minute_after_its_session_was_terminated() -> None:
    with a_world(knows=False, workers=1) as world:
        without_launcher(world)
        world.client("c", submitting(*[Work(seconds=3)] * 100, then=SimClient.detach))
        worker = world.start_worker("w-a", delay=0.5)
        world.run(20)
        terminate = partial(_terminate, world)
        world.client("remover", terminate)
        world.run_until(lambda: worker.dead, 400)
        assert max(body.began for body in world.bodies) <= 20 + Intervals().session_check + 1


def _terminate(world: World, client: SimClient) -> None:
    administration.terminate(client.session, world.launcher)


def test_no_worker_is_started_for_a_session_terminated_meanwhile() -> None:
    # Between the client's last reading of the manifest and its next count of the workers.
    with a_world(workers=1) as world:
        world.client("c", submitting(Work(seconds=500), then=outlasting))
        world.run(10)
        started = len(world.workers)
        world.client("remover", partial(_terminate, world))
        world.run(10 + Intervals().session_check / 2)
        assert not world.live_workers()
        assert len(world.workers) == started


def test_a_lane_in_doubt_is_never_taken_again() -> None:
    away = striking(lambda call: Fault.NO_MEMORY if call.key.endswith("/tasks") else None)
    with a_world(away) as world:

        def script(client: SimClient) -> None:
            client.create()
            client.submit([Work()])
            client.submitter.wait_until_idle()
            client._give_back_lane(SessionState.OPEN)
            client.exit()

        first = world.client("c", script)
        world.run_until(lambda: first.dead, 3000)
        taken: list[int] = []
        world.client("d", lambda client: taken.append(lanes.take(client.session)[1]))
        world.run(world.sim.now + 10)
        assert taken == [1]

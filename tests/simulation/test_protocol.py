"""The protocol under attack: the real code of clients and workers, in virtual time.

Every schedule follows from a seed. A random one that fails is shrunk, and printed with the command
that plays it again:

    python -m tests.simulation.soak --kind watched --first 1234 --schedules 1
"""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace

from starburst_executor.coordination import administration
from starburst_executor.coordination.autoscaler import Autoscaler
from starburst_executor.errors import DamagedObject, SessionTerminated
from starburst_executor.protocol import codec, keys, lanes, tasks_object
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.listing import QueueReader
from starburst_executor.protocol.manifest import Intervals, Limits, Manifest
from starburst_executor.protocol.payload import digest_of
from starburst_executor.protocol.records import Record, State
from starburst_executor.protocol.tasks_object import Queued
from tests.simulation import world as simulated
from tests.simulation.chaos import Chaos
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
from tests.simulation.schedule import Kind, Schedule, drawn
from tests.simulation.shrink import failure_of, shrink
from tests.simulation.world import SimClient, Work, World

# --- random schedules --------------------------------------------------------------


def play(kind: Kind, seeds: range) -> None:
    """Play random schedules; a failure says how to play it again."""
    for seed in seeds:
        error, chaos = failure_of(drawn(seed, kind))
        if error is not None:
            again = f"python -m tests.simulation.soak --kind {kind} --first {seed} --schedules 1"
            small = shrink(drawn(seed, kind))
            pytest.fail(f"{error!r}\n\n{again}\n\n{small}\n\n{chaos.world.sim.report()}")


@pytest.mark.parametrize("first", range(0, 500, 100))
def test_attended_schedules_come_to_rest_with_one_outcome_for_each_task(
    first: int,
) -> None:
    play(Kind.ATTENDED, range(first, first + 100))


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_nobody_waits_for_ever_in_watched_schedules(first: int) -> None:
    play(Kind.WATCHED, range(first, first + 100))


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_workers_finish_by_themselves_what_was_detached_in_unwatched_schedules(
    first: int,
) -> None:
    play(Kind.UNWATCHED, range(first, first + 100))


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_nothing_is_left_of_a_session_that_was_deleted_in_mid_schedule(
    first: int,
) -> None:
    play(Kind.DELETED, range(first, first + 100))


def test_a_schedule_is_the_same_each_time_it_is_played() -> None:
    def played(schedule: Schedule) -> tuple[list[tuple[object, ...]], Schedule]:
        chaos = Chaos(schedule)
        chaos.play()
        return list(chaos.world.sim.trace), chaos.as_played()

    trace, told = played(drawn(17, Kind.ATTENDED))
    assert told.struck
    assert played(drawn(17, Kind.ATTENDED)) == (trace, told)
    assert played(told) == (trace, told)


# --- A: tasks that could be lost ---------------------------------------------------


def test_a_batch_whose_put_is_slow_in_mid_flush_is_still_found() -> None:
    slow = once(Fault.LATE, "create", "queue/0000-00000004.2/tasks")
    with a_world(slow) as world:
        client = world.client("c", submitting(*[Work()] * 12))
        world.run_until(lambda: world.count(State.COMPLETED) == 10, 25)
        assert Batch(0, 4, 2) not in world.ledger.batches()
        world.run_until(lambda: client.dead, 200)
        world.check()
        assert world.count(State.COMPLETED) == 12


def test_a_batch_that_is_refused_once_as_being_written_is_stored_all_the_same() -> None:
    with a_world(once(Fault.REFUSED, "create", "00000000.1/tasks")) as world:
        client = world.client("c", submitting(Work()))
        world.run_until(lambda: client.dead, 60)
        assert only_task(world).state is State.COMPLETED


def test_a_batch_done_before_its_put_was_answered_is_not_waited_for_in_vain() -> None:
    # The reply is lost, and its repetition comes after all is done and a look has passed by.
    lost = once(Fault.LOST, "create", "00000000.1/tasks")
    with a_world(lost) as world:
        client = world.client("c", submitting(Work(seconds=0.01)))
        slow = client.session.runtime.random
        slow.uniform = lambda a, b: 9.0 if b < 0.1 else b  # type: ignore[method-assign]
        without_launcher(world)
        world.start_worker("w-a", delay=0.5)
        world.run_until(lambda: world.finished and bool(world.tasks()), 8)
        assert not client.dead
        client.watcher.queue.look = partial(_look_late, client)  # type: ignore[method-assign]
        world.run_until(lambda: client.dead, 60)


def _look_late(client: SimClient) -> list[Any]:
    """A look of another reader of the same client had seen it before."""
    queue = client.session.queue()
    sights = queue.look()
    client.watcher.queue._lanes = queue._lanes
    return [sight for sight in sights if sight.done is None]


def test_a_hand_back_that_dies_between_record_and_marker_is_found() -> None:
    dies = once(Fault.KILLED_BEFORE, "put", "requeued.1", process="w-a")
    with a_world(dies, knows=False) as world:
        without_launcher(world)
        world.client("c", submitting(Work(seconds=50), then=SimClient.detach))
        first = world.start_worker("w-a", delay=0.5)
        world.run(5)
        first.stop("it got SIGTERM")
        world.start_worker("w-b", delay=5)
        world.run(10)
        assert only_task(world).state is State.PENDING
        assert world.ledger.markers(Batch(0, 0, 1)) == set()
        world.run_until(lambda: world.finished, 600)
        assert {"requeued.1", "done.1.0.0"} <= world.ledger.markers(Batch(0, 0, 1))


def test_torn_listings_hide_no_task_that_was_sent_back_meanwhile() -> None:
    torn = striking(lambda call: Fault.TORN if call.op == "list" else None)
    with a_world(torn, workers=7, knows=False) as world:
        without_launcher(world)
        works = [Work(seconds=7)] * 6
        world.client("c", submitting(*works, then=SimClient.detach))
        for number in range(6):  # each hands back while others look
            worker = world.start_worker(f"w-{number}", delay=0.5 + number)
            world.sim.at(3.0 + number * 1.01, partial(worker.stop, "it got SIGTERM"))
        world.start_worker("w-z", delay=5)
        world.run_until(lambda: world.finished and world.sim.now > 20, 600)
        world.check()


def test_what_a_worker_claimed_since_its_last_beat_is_sent_back_when_it_dies() -> None:
    dies = once(Fault.KILLED_AFTER, "create", "record", process="w-a")
    with a_world(dies, knows=False) as world:
        without_launcher(world)
        world.client("c", submitting(Work(), then=SimClient.detach))
        world.start_worker("w-a", delay=0.5)
        world.start_worker("w-b", delay=5)
        world.run(5)
        assert only_task(world).attempt == 1
        world.run_until(lambda: world.finished, 600)
        assert only_task(world).attempt == 2
        assert "workers/w-a" not in world.ledger.keys("workers/")


def test_a_claim_whose_reply_was_lost_is_found_though_another_wrote_on_top() -> None:
    lost = once(Fault.LOST, "create", "record", process="w-a")
    with a_world(lost, workers=1, knows=False) as world:
        without_launcher(world)
        world.client("c", submitting(*[Work(seconds=5)] * 5, then=SimClient.detach))
        world.start_worker("w-a", delay=0.5)
        world.start_worker("w-b", delay=0.5)
        world.run_until(lambda: bool(world.tasks()) and world.finished, 60)
        assert {task.attempt for task in world.tasks().values()} == {1}


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.UNAVAILABLE])
def test_a_claim_is_not_forgotten_when_its_conflict_cannot_be_looked_into(
    fault: Fault,
) -> None:
    retried = once(Fault.RETRIED, "create", "record", process="w-a")
    unread = once(fault, "get", "record", process="w-a")
    both = [retried, unread]

    def plan(call: Call, rng: random.Random) -> Fault | None:
        return next((f for one in both if (f := one(call, rng))), None)

    with a_world(plan, knows=False) as world:
        without_launcher(world)
        world.client("c", submitting(Work(), then=SimClient.detach))
        world.start_worker("w-a", delay=0.5)
        world.run_until(lambda: bool(world.tasks()) and world.finished, 60)
        assert only_task(world).attempt == 1


def test_a_claim_that_lands_long_after_its_worker_went_elsewhere_is_found() -> None:
    late: list[str] = []

    def strike(call: Call) -> Fault | None:
        if call.process != "w-a" or call.op != "create" or call.key[-6:] != "record":
            return None
        if not late:
            late.append(call.key)
            return Fault.LATE
        return Fault.REFUSED if call.key in late else None

    with a_world(striking(strike), knows=False) as world:
        without_launcher(world)
        works = [Work(seconds=1000)] * 2
        world.client("c", submitting(*works, then=SimClient.detach))
        world.start_worker("w-a", delay=0.5)
        # One is claimed late, the other after that was given up.
        world.run_until(lambda: [task.attempt for task in world.tasks().values()] == [1, 1], 300)
        world.start_worker("w-b")
        world.run_until(lambda: len(world.bodies) == 2, world.sim.now + 60)
        assert {body.worker for body in world.bodies} == {"w-a", "w-b"}
        world.run_until(lambda: world.finished, 2000)


@pytest.mark.parametrize("offset", range(0, 60, 3))
def test_an_idle_worker_that_leaves_does_not_miss_what_is_submitted_and_left(
    offset: int,
) -> None:
    # Wherever between its last look, its last beat and its leaving that falls.
    limits = Limits(idle_timeout=30)
    with a_world(limits=limits, knows=False, workers=1) as world:

        def script(client: SimClient) -> None:
            client.create()
            client.runtime.signal().wait(leaves + offset * 0.01 - client.runtime.monotonic())
            client.submit([Work()])
            client.detach()
            client.exit()

        leaves = _leaving_time(limits) - 0.3
        world.client("c", script)
        world.start_worker("w-a", delay=0.5)
        world.run(leaves + 300)
        assert only_task(world).state is State.COMPLETED


@pytest.mark.parametrize("lag", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("offset", range(0, 60, 6))
def test_a_worker_whose_process_outlives_its_goodbye_is_not_counted_on(
    offset: int, lag: float
) -> None:
    # On ECS half a minute goes by from a worker's last look to its task's end.
    limits = Limits(idle_timeout=30)
    with a_world(limits=limits, workers=1, workers_launch=False, lag=lag) as world:

        def script(client: SimClient) -> None:
            client.create()
            client.submit([Work()])
            client.runtime.signal().wait(leaves + offset * 0.01 - client.runtime.monotonic())
            client.submit([Work()])
            client.detach()
            client.exit()

        leaves = _leaving_time(limits) - 0.3
        world.client("c", script)
        world.start_worker("w-a", delay=0.5).born_at -= lag  # its launcher knows it by now
        world.run(leaves + 100)
        assert world.count(State.COMPLETED) == 2


def _leaving_time(limits: Limits) -> float:
    """When the worker of the test above would leave if nothing were submitted."""
    with a_world(limits=limits, knows=False, workers=1) as world:
        world.client("c", SimClient.create)
        worker = world.start_worker("w-a", delay=0.5)
        world.sim.run(worker.actor)
        return world.sim.now


def test_the_first_two_workers_stay_while_a_long_task_runs_and_finish_it_if_lost() -> None:
    limits = Limits(idle_timeout=60)
    with a_world(limits=limits, knows=False, workers=50) as world:
        without_launcher(world)
        world.client("c", submitting(Work(seconds=5000), then=SimClient.detach))
        last = world.start_worker("w-z", delay=0.5)
        for number in range(49):
            world.start_worker(f"w-{number:02}", delay=3)
        world.run(1000)
        assert {w.id for w in world.live_workers()} == {"w-00", "w-01", "w-z"}
        last.crash()
        world.run_until(lambda: len(world.bodies) == 2, 1000 + 600)
        world.run_until(lambda: world.finished, 8000)


def test_a_worker_that_starts_in_mid_deletion_runs_nothing_again() -> None:
    with a_world(workers=1, knows=False) as world:
        without_launcher(world)
        works = [Work(seconds=0.01)] * 30
        client = world.client("c", submitting(*works, then=outlasting))
        worker = world.start_worker("w-a", delay=0.5)
        world.run_until(lambda: len(world.tasks()) == 30 and world.finished, 30)
        worker.stop("it got SIGTERM")
        world.run(32)
        assert len(world.bodies) == 30
        world.sim.kill(client.actor)
        remover = world.client("remover", lambda client: client.delete_session())
        for number in range(80):
            world.start_worker(f"w-{number}", delay=number * 0.005)
        world.run_until(lambda: remover.dead, 600)
        world.run(world.sim.now + 300)
        assert len(world.bodies) == 30
        assert not world.ledger.keys()


def test_a_record_that_vanished_is_not_taken_for_one_that_was_never_there() -> None:
    # A worker lists, and reads the tasks of, a batch that is deleted before it reads the record.
    def strike(call: Call) -> Fault | None:
        if call.process == "w-b" and call.op == "get" and call.key.endswith("/record"):
            world.ledger.delete([call.key, call.key.replace("/record", "/tasks")])
        return None

    with a_world(striking(strike), workers=1, knows=False) as world:
        without_launcher(world)
        works = [Work(seconds=0.5)] * 20
        world.client("c", submitting(*works, then=SimClient.detach))
        first = world.start_worker("w-a", delay=0.5)
        world.run_until(lambda: world.count(State.COMPLETED) in (6, 7, 8), 30)
        first.crash()
        ended = {name for name, task in world.tasks().items() if task.state.final}
        world.start_worker("w-b")
        world.run(world.sim.now + 10)
        again = [body for body in world.bodies if body.worker == "w-b"]
        assert again
        assert not {keys.parse_task_id(body.label) for body in again} & ended


# --- B: second outcomes, stale writers ---------------------------------------------


def test_a_result_stored_by_an_attempt_that_was_given_up_is_never_taken() -> None:
    def strike(call: Call) -> Fault | None:
        if call.process == "w-a" and "/results/" in call.key:
            world.sim.stall(world.workers["w-a"].actor, 400)
        return None

    with a_world(striking(strike), knows=False) as world:
        without_launcher(world)
        work = Work(seconds=3, size=100_000)
        client = world.client("c", submitting(work, then=outlasting))
        world.start_worker("w-a", delay=0.5)
        world.start_worker("w-b", delay=10)
        world.run(1000)
        assert len(world.ledger.keys("results/")) == 2
        assert client.futures[0].result().startswith(b"0-0 attempt 2 by w-b")
        world.check()


def test_an_older_program_leaves_a_record_with_unknown_fields_alone() -> None:
    newer = b'{"schema":2,"nonce":"n","tasks":[{"mood":"new"},{"state":"pending"}]}'
    with a_world(knows=False) as world:
        without_launcher(world)
        world.client("c", submitting(*[Work()] * 16, then=SimClient.detach))
        world.run(1)
        world.ledger._checked = False
        key = world.ledger.prefix + Batch(0, 2, 2).record_key
        world.ledger.put(key, newer)
        worker = world.start_worker("w-a")
        world.run(100)
        assert worker.dead
        assert "too old" in worker.reason
        assert world.ledger._data[key] == newer
    with pytest.raises(DamagedObject):
        codec.decode(newer.replace(b'"schema":2', b'"schema":1'), Record, "record")


# --- C: leases ---------------------------------------------------------------------


def test_nobody_is_given_up_when_all_sleep_for_an_hour() -> None:
    with a_world(knows=False) as world:
        client = world.client("c", submitting(*[Work(seconds=200)] * 4))
        world.run(50)
        for actor in [client.actor, *(w.actor for w in world.live_workers())]:
            world.sim.stall(actor, 3600)
        world.run_until(lambda: client.dead, 6000)
        assert {task.attempt for task in world.tasks().values()} == {1}


def test_running_tasks_go_on_while_the_store_is_away_for_a_minute() -> None:
    away = striking(lambda _: Fault.UNAVAILABLE if 20 < world.sim.now < 80 else None)
    with a_world(away, knows=False) as world:
        client = world.client("c", submitting(*[Work(seconds=100)] * 2))
        world.run_until(lambda: client.dead, 120)
        assert len(world.bodies) == 2
        assert world.count(State.COMPLETED) == 2


def test_a_worker_that_cannot_beat_begins_nothing_new_until_it_can() -> None:
    mute = striking(
        lambda call: (
            Fault.UNAVAILABLE
            if "/workers/" in call.key and call.op == "put" and 10 < world.sim.now < 200
            else None
        )
    )
    with a_world(mute, knows=False, workers=1) as world:
        without_launcher(world)
        world.client("c", submitting(*[Work(seconds=9)] * 30, then=outlasting))
        world.start_worker("w-a", delay=0.5)
        world.run(200)
        assert max(body.began for body in world.bodies) < 10 + 60 + 20
        world.run_until(lambda: world.finished, 600)


def test_a_poison_task_fails_alone() -> None:
    with a_world(workers=1) as world:
        works = [Work(seconds=0.01)] * 20
        works[7] = Work(seconds=0.01, poison=True)
        client = world.client("c", submitting(*works))
        world.run_until(lambda: client.dead, 3000)
        states = [task.state for _, task in sorted(world.tasks().items())]
        assert states == [State.FAILED if n == 7 else State.COMPLETED for n in range(20)]
        assert world.tasks()[0, 7].losses == Limits().max_attempts


def test_a_poison_task_with_large_arguments_is_found_out_too() -> None:
    with a_world(workers=1) as world:

        def script(client: SimClient) -> None:
            client.create()
            blob = digest_of(b"large")
            client.session.put_blob(blob, memoryview(b"large"))
            works = [Work(seconds=0.5, blob=blob)] * 8
            works[3] = Work(seconds=0.5, blob=blob, poison=True)
            client.submit(works)
            client.wait()
            client.exit()

        client = world.client("c", script)
        world.run_until(lambda: client.dead, 3000)
        assert world.count(State.COMPLETED) == 7
        assert world.tasks()[0, 3].losses == Limits().max_attempts


def test_hand_backs_never_fail_a_task() -> None:
    with a_world(workers=1) as world:
        client = world.client("c", submitting(Work(seconds=20)))
        for number in range(8):
            world.run(10 * (number + 1))
            for worker in world.live_workers():
                worker.stop("its Spot capacity is reclaimed")
        world.run_until(lambda: client.dead, 200)
        task = only_task(world)
        assert task.state is State.COMPLETED
        assert task.attempt > Limits().max_attempts
        assert (task.lost, task.losses) == (0, 0)


def test_the_cancel_of_a_running_task_is_seen_at_the_next_beat() -> None:
    with a_world(workers=1) as world:

        def script(client: SimClient) -> None:
            client.create()
            first, _ = client.submit([Work(seconds=1000), Work(seconds=1)])
            client.runtime.signal().wait(10)
            client.cancel([first], running=True)
            client.wait()
            client.exit()

        client = world.client("c", script)
        world.run_until(lambda: client.dead, 10 + Intervals().heartbeat + 10)
        assert world.tasks()[0, 0].state is State.CANCELLED
        assert world.tasks()[0, 1].state is State.COMPLETED


# --- D: cost and latency -----------------------------------------------------------


def test_what_waits_behind_a_task_that_turned_out_long_is_handed_back() -> None:
    with a_world(workers=1) as world:
        without_launcher(world)
        works = [Work(seconds=0.1)] * 40
        works[20] = Work(seconds=3600)
        world.client("c", submitting(*works, then=outlasting))
        world.start_worker("w-a", delay=0.5)
        world.run_until(lambda: any(b.label == "0-20" for b in world.bodies), 60)
        begun = world.sim.now
        world.start_worker("w-b")
        world.run_until(lambda: world.count(State.COMPLETED) == 39, begun + 12)
        assert max(task.losses for task in world.tasks().values()) == 0


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.LOST, Fault.NO_MEMORY])
def test_what_could_not_be_handed_back_at_once_is_handed_back_later(fault: Fault) -> None:
    struck: list[float] = []

    def strike(call: Call) -> Fault | None:
        long = any(body.label == "0-20" for body in world.bodies)
        if long and call.process == "w-a" and call.op == "replace" and len(struck) < 2:
            struck.append(world.sim.now)
            return fault
        return None

    with a_world(striking(strike), workers=1) as world:
        without_launcher(world)
        works = [Work(seconds=0.1)] * 40
        works[20] = Work(seconds=3600)
        world.client("c", submitting(*works, then=outlasting))
        world.start_worker("w-a", delay=0.5)
        world.run_until(lambda: any(b.label == "0-20" for b in world.bodies), 60)
        world.start_worker("w-b")
        world.run_until(lambda: world.count(State.COMPLETED) == 39, world.sim.now + 60)
        assert len(struck) == 2
        assert max(task.losses for task in world.tasks().values()) == 0


def test_a_straggler_before_thousands_of_finished_batches_costs_a_short_listing() -> None:
    with a_world() as world:
        ledger = world.ledger
        ledger._checked = False
        for number in range(4000):
            batch = Batch(0, number, 1)
            names = [batch.tasks_key, batch.record_key]
            names += [batch.marker_key("done.1.0.0")] if number else []
            for name in names:
                ledger.put(ledger.prefix + name, b"")
        queue = QueueReader(world.store, ledger.prefix)
        looks: list[tuple[int, float]] = []

        def look() -> None:
            for _ in range(3):
                before = world.store.counts["list"], world.sim.enter().cpu
                queue.look()
                after = world.store.counts["list"], world.sim.enter().cpu
                looks.append((after[0] - before[0], after[1] - before[1]))

        world.sim.spawn("reader", look)
        world.run(60)
        assert looks[0][0] > 10
        assert [count for count, _ in looks[1:]] == [2, 2]  # the straggler, and the end
        assert all(cpu < 0.01 for _, cpu in looks[1:])


def test_a_missing_marker_is_written_by_the_next_reader() -> None:
    dies = once(Fault.KILLED_BEFORE, "put", "drained.0", process="w-a")
    with a_world(dies, workers=1, knows=False) as world:
        without_launcher(world)
        works = [Work(seconds=3)] * 8
        world.client("c", submitting(*works, then=SimClient.detach))
        writer = world.start_worker("w-a", delay=0.5)
        world.run_until(lambda: writer.dead, 60)
        ledger = world.ledger
        missing = [b for b in ledger.batches() if ledger.record(b)]
        missing = [b for b in missing if not ledger.markers(b)]
        assert missing
        reader = world.start_worker("w-b")
        world.run(world.sim.now + 40)
        assert all(world.ledger.markers(b) for b in missing)
        assert not reader.dead


# --- E: several clients, many cancels, ranks ---------------------------------------


def test_many_cancels_cost_one_write_for_each_batch() -> None:
    with a_world(workers=1) as world:
        world.launcher.live = lambda session_url: {"w-elsewhere"}  # type: ignore[method-assign]

        def script(client: SimClient) -> None:
            client.create()
            futures = client.submit([Work()] * 2000)
            client.submitter.flush()
            before = Counter(world.store.counts)
            client.cancel(futures, running=False)
            spent.update(world.store.counts - before)
            client.exit()

        spent: Counter[str] = Counter()
        client = world.client("c", script)
        world.run_until(lambda: client.dead, 60)
        batches = len(world.ledger.batches())
        assert batches < 20
        assert spent["create"] == batches
        assert spent["replace"] == 0
        assert all(future.cancelled() for future in client.futures)
        assert world.count(State.CANCELLED) == 2000


def test_a_lane_given_back_twice_is_not_taken_from_who_has_it_now() -> None:
    # The first try took effect, its reply was lost, and another client took the lane before the
    # second.
    taken: list[int] = []

    def strike(call: Call) -> Fault | None:
        if call.process == "a" and call.op == "replace" and not taken:
            taken.append(-1)
            world.client("b", take)
            return Fault.LOST
        # Which leaves the other client time.
        return Fault.UNAVAILABLE if call.process == "a" and taken == [-1] else None

    def take(client: SimClient) -> None:
        client.runtime.signal().wait(0.1)
        taken[0] = lanes.take(client.session)[1]

    def give_back(client: SimClient) -> None:
        client.create()
        client.session.runtime.random.uniform = lambda a, b: 3.0  # type: ignore[method-assign]
        lanes.give_back(client.session, 0, 7)

    with a_world(striking(strike)) as world:
        world.client("a", give_back)
        world.run(30)
        assert taken == [0]
        lane = world.ledger.manifest().lanes[0]
        assert (lane.taken, lane.number) == (True, 7)


def test_workers_beyond_the_wanted_number_leave_when_idle() -> None:
    with a_world(workers=3, limits=Limits(idle_timeout=10_000)) as world:
        world.client("c", submitting(*[Work(seconds=30)] * 8, then=outlasting))
        for number in range(5):
            world.start_worker(f"w-{number}", delay=0.5 + 0.3 * number)
        world.run(20)
        assert len(world.live_workers()) >= 5
        world.run(1000)
        assert world.finished
        assert len(world.live_workers()) == 3

        def scale(manifest: Manifest) -> Manifest:
            return replace(manifest, workers=1)

        def amend(client: SimClient) -> None:
            client.session.amend(scale)

        world.client("scaler", amend)
        world.run(1500)
        assert len(world.live_workers()) == 1


# --- watching, staff, ends ---------------------------------------------------------


def test_a_watcher_survives_that_the_store_fails_while_workers_are_counted() -> None:
    fails = once(Fault.UNAVAILABLE, "list", "workers/", process="c")
    with a_world(fails) as world:
        client = world.client("c", submitting(Work()))
        world.run_until(lambda: client.dead, 60)
        assert client.error is None
        assert only_task(world).state is State.COMPLETED


def test_an_outcome_that_cannot_be_had_for_a_moment_is_no_outcome() -> None:
    away = striking(
        lambda call: (
            Fault.UNAVAILABLE
            if "/results/" in call.key and call.op == "get" and world.sim.now < 30
            else None
        )
    )
    with a_world(away) as world:
        client = world.client("c", submitting(*[Work(size=100_000)] * 3))
        world.run(29)
        assert not any(future.done() for future in client.futures)
        world.run_until(lambda: client.dead, 60)
        world.check()
        assert all(future.exception() is None for future in client.futures)


def test_no_worker_is_started_for_a_session_that_was_terminated() -> None:
    with a_world(workers=1, knows=True) as world:
        client = world.client("c", submitting(Work(seconds=5000), then=outlasting))
        world.run(20)
        started = len(world.workers)
        world.client("remover", lambda c: administration.terminate(c.session, world.launcher))
        world.run(200)
        assert len(world.workers) == started
        assert isinstance(client.error, SessionTerminated)


def test_workers_that_never_get_to_work_break_their_client_instead_of_hanging_it() -> None:
    errors: list[Exception] = []

    def broken(error: Exception) -> None:
        errors.append(error)
        staff.close()

    with a_world() as world:
        world.launcher.launch = lambda session_url, count: _stillborn(world)  # type: ignore[method-assign]
        client = world.client("c", submitting(Work(), then=outlasting))
        world.run(0.2)
        staff = Autoscaler(client.session, world.launcher, client.manifest, broken)
        assert type(staff._lock) is not type(client.staff._lock)
        world.run(60)
        assert "before they started work" in str(client.error)


def _stillborn(world: World) -> list[str]:
    worker = world.start_worker()
    worker.crash()
    return [worker.id]


def test_tasks_cancelled_before_a_client_died_in_storing_them_are_finished() -> None:
    dies = once(Fault.KILLED_AFTER, "create", "00000000.1/tasks")
    with a_world(dies) as world:

        def script(client: SimClient) -> None:
            client.create()
            (future,) = client.submit([Work()])
            client.submitter.withdraw(future)
            client.wait()

        world.client("c", script)
        world.run(5)
        assert world.ledger.keys("queue/") == [Batch(0, 0, 1).tasks_key]

        def attach(client: SimClient) -> None:
            client.attach()
            client.wait()
            client.exit()

        late = world.client("late", attach)
        world.run_until(lambda: late.dead, 60)
        assert late.futures[0].cancelled()
        assert only_task(world).state is State.CANCELLED


def test_the_one_worker_left_takes_what_was_sent_back_in_the_batch_it_stays_with() -> None:
    with a_world(workers=1, knows=False) as world:
        without_launcher(world)
        world.client("c", submitting(*[Work(seconds=3)] * 6, then=SimClient.detach))
        world.start_worker("w-a", delay=0.5)
        other = world.start_worker("w-b", delay=0.5)
        world.run_until(lambda: sum(t.worker == "w-b" for t in world.tasks().values()) > 0, 10)
        other.crash()
        world.run_until(lambda: world.finished, 600)


def test_a_lane_that_appears_below_one_that_was_seen_is_listed() -> None:
    with a_world() as world:
        world.ledger._checked = False
        queue = QueueReader(world.store, world.ledger.prefix)
        seen: list[list[Batch]] = []

        def look() -> None:
            for lane in (2, 1):
                data = tasks_object.encode_tasks([Queued("f", b"")], {})
                key = world.ledger.prefix + Batch(lane, 0, 1).tasks_key
                world.store.create(key, data)
                seen.append([sight.batch for sight in queue.look()])

        world.sim.spawn("reader", look)
        world.run(10)
        assert seen == [[Batch(2, 0, 1)], [Batch(1, 0, 1), Batch(2, 0, 1)]]


# --- costs -------------------------------------------------------------------------


@pytest.mark.parametrize("unfinished", [False, True])
def test_an_idle_worker_makes_at_most_six_requests_a_minute(unfinished: bool) -> None:
    with a_world(workers=2, limits=Limits(idle_timeout=10_000)) as world:
        without_launcher(world)
        seconds = 5000 if unfinished else 1
        world.client("c", submitting(Work(seconds=seconds), then=SimClient.detach))
        world.start_worker("w-a", delay=0.5)
        idle = world.start_worker("w-b", delay=3)
        world.run(200)
        before = idle.actor.requests
        world.run(200 + 600)
        assert idle.actor.requests - before <= 60


def test_a_client_that_waits_for_a_long_task_makes_at_most_twenty_requests_a_minute() -> None:
    with a_world(workers=1) as world:
        client = world.client("c", submitting(Work(seconds=5000), then=outlasting))
        world.run(100)
        before = client.actor.requests
        world.run(100 + 600)
        assert client.actor.requests - before <= 200


def test_an_isolated_long_task_costs_five_writes() -> None:
    with a_world(workers=1, limits=Limits(idle_timeout=10_000)) as world:
        writes: Counter[str] = Counter()

        def strike(call: Call) -> Fault | None:
            if call.op in ("put", "create", "replace") and "/queue/" in call.key:
                writes[call.op] += 1
            return None

        world.store.faults = striking(strike)
        client = world.client("c", submitting(Work(seconds=30)))
        world.run_until(lambda: client.dead, 100)
        # tasks; the claim, which says that it runs; the end; done.
        assert writes == {"create": 2, "replace": 1, "put": 1}


def test_a_hundred_workers_are_kept_busy_with_few_requests() -> None:
    scale = simulated.run_scale(workers=100, tasks=10_000)
    assert scale.efficiency >= 0.90, scale
    assert scale.requests_per_task <= 5, scale
    assert scale.peak_writes_per_second <= 3500, scale


def test_tiny_tasks_cost_a_fraction_of_a_request() -> None:
    scale = simulated.run_scale(workers=8, tasks=10_000, seconds=0.01)
    assert scale.requests_per_task <= 0.25, scale
    assert scale.efficiency >= 0.80, scale

"""How many workers a session has, with nobody attached: in virtual time, then for real."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from starburst_executor import (
    ExecutorBroken,
    Intervals,
    SessionNotFound,
    StarburstExecutor,
)
from starburst_executor.coordination import administration
from starburst_executor.coordination.launch_lease import LaunchLease
from starburst_executor.inspection import status
from starburst_executor.protocol.manifest import Limits
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import Session
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.url import open_store
from tests.simulation.forced import a_world, once, outlasting, submitting
from tests.simulation.kernel import Fault
from tests.simulation.world import SimClient, SimWorker, Work, World
from tests.support.fakes import MemoryStore
from tests.support.sessions import QUICK, is_alive, live_workers, worker_pids
from tests.support.tasks import Gate, double, until


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Formatting the warnings of hundreds of lost workers takes longer than losing them."""
    logger = logging.getLogger("starburst_executor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


# --- in virtual time: strength is restored ------------------------------------------


def detached(count: int, seconds: float) -> Callable[[SimClient], None]:
    return submitting(*[Work(seconds=seconds)] * count, then=SimClient.detach)


def crash(workers: list[SimWorker]) -> None:
    for worker in workers:
        worker.crash()


def by_id(world: World) -> list[SimWorker]:
    return sorted(world.live_workers(), key=lambda worker: worker.id)


@pytest.mark.parametrize("knows", [True, False])
def test_a_detached_session_that_loses_half_of_a_hundred_workers_has_them_again_in_minutes(
    knows: bool,
) -> None:
    # Half a lease until it shows who is the first now, a session check until that one looks, and
    # the start. Where no launcher tells who ended, it is found by its lease.
    within = 60 + 60 + 5 if knows else 1.5 * 120 + 60 + 5
    with a_world(workers=100, knows=knows) as world:
        client = world.client("c", detached(1200, 60.0))
        world.run(200)
        assert client.dead
        assert len(world.live_workers()) == 100
        before = len(world.workers)
        lost = {worker.id for worker in by_id(world)[:50]}  # the first among them
        crash(by_id(world)[:50])
        lost_at = world.sim.now
        world.run_until(lambda: len(world.live_workers()) >= 100, lost_at + within)
        if knows:  # and what they held is sent back at once
            world.run(world.sim.now + 10)
            assert not lost & {task.worker for task in world.unfinished().values()}
        world.run(lost_at + within + 120)
        assert len(world.workers) - before <= 52
        assert len(world.live_workers()) >= 100
        world.check()


def test_a_detached_session_grows_to_what_waits_and_no_further() -> None:
    with a_world(workers=10) as world:
        world.client("c", detached(4, 100.0))
        world.run(30)
        assert len(world.live_workers()) == 4

        def more(client: SimClient) -> None:
            client.attach()
            client.submit([Work(seconds=100.0)] * 3)
            client.submitter.flush()
            client.exit()  # without a look at workers

        world.client("late", more)
        world.run(30 + 70)
        assert len(world.live_workers()) == 7
        world.run_until(lambda: world.finished, 400)
        assert len(world.workers) == 7


def test_what_merely_runs_on_starts_no_workers() -> None:
    with a_world(workers=8, limits=Limits(idle_timeout=30)) as world:
        works = [*[Work(seconds=20)] * 7, Work(seconds=2000)]
        world.client("c", submitting(*works, then=SimClient.detach))
        world.run(30)
        world.run_until(lambda: world.finished, 2200)
        assert len(world.workers) == 8


def test_the_one_that_is_left_starts_the_others_again() -> None:
    with a_world(workers=5) as world:
        world.client("c", detached(100, 30.0))
        world.run(40)
        crash(by_id(world)[:4])
        world.run(40 + 60 + 60 + 5)
        assert len(world.live_workers()) == 5
        world.run_until(lambda: world.finished, 1000)
        assert len(world.workers) <= 10


def test_workers_that_were_told_to_end_are_replaced() -> None:
    with a_world(workers=6) as world:
        world.client("c", detached(100, 30.0))
        world.run(40)
        for worker in by_id(world)[1:5]:
            worker.stop("its Spot capacity is reclaimed")
        world.run(40 + 70)
        assert len(world.live_workers()) == 6
        assert max(task.losses for task in world.tasks().values()) == 0


def test_a_client_and_a_worker_that_look_at_once_start_no_more_than_lack() -> None:
    every_second = Intervals(session_check=1)
    with a_world(workers=20, intervals=every_second) as world:
        works = [Work(seconds=40.0)] * 200
        world.client("c", submitting(*works, then=outlasting))
        world.run(30)
        for _ in range(4):
            crash(by_id(world)[1::2])
            world.run(world.sim.now + 10)
            assert len(world.live_workers()) == 20
        assert len(world.workers) == 20 + 4 * 10


def test_whoever_dies_in_its_turn_to_start_workers_holds_others_up_for_seconds() -> None:
    dies = once(Fault.KILLED_AFTER, "create", "/launching", process="c")
    with a_world(dies, workers=3) as world:
        world.client("c", submitting(*[Work(seconds=5)] * 9, then=outlasting))
        world.run(5)
        assert not world.workers

        def attach(client: SimClient) -> None:
            client.attach()
            client.wait()
            client.exit()

        late = world.client("late", attach)
        world.run(5 + 25)
        assert len(world.live_workers()) == 3
        world.run_until(lambda: late.dead, 100)


def test_a_session_past_its_deadline_starts_nothing() -> None:
    limits = Limits(absolute_timeout=100)
    with a_world(workers=4, limits=limits) as world:
        world.client("c", detached(100, 30.0))
        world.run(90)
        started = len(world.workers)
        world.run(98)
        crash(by_id(world)[1:])
        world.run(1000)
        assert len(world.workers) == started
        assert not world.live_workers()
        assert world.count(State.PENDING) > 80

        def try_to_start(client: SimClient) -> None:
            client.attach()
            client.staff.need(5)
            client.staff.grow(0)

        world.client("late", try_to_start)
        world.run(1010)
        assert len(world.workers) == started


def test_a_worker_that_cannot_start_others_goes_on_by_itself() -> None:
    with a_world(workers=3) as world:
        world.client("c", detached(9, 20.0))
        world.run(10)
        started = len(world.workers)

        def refuse(session_url: str, count: int) -> list[str]:
            raise OSError("no more processes")

        world.launcher.launch = refuse  # type: ignore[method-assign]
        crash(by_id(world)[1:])
        world.run_until(lambda: world.finished, 1000)
        assert len(world.workers) == started


def test_a_full_disk_delays_the_start_of_workers_and_breaks_nothing() -> None:
    with a_world(workers=2) as world:
        launch, refusals = world.launcher.launch, iter(range(3))

        def refuse_at_first(session_url: str, count: int) -> list[str]:
            if next(refusals, None) is None:
                return launch(session_url, count)
            raise OSError(errno.ENOSPC, "No space left on device", "/home/u/workers/w-1.log")

        world.launcher.launch = refuse_at_first  # type: ignore[method-assign]
        client = world.client("c", submitting(*[Work(seconds=5)] * 4, then=SimClient.wait))
        world.run_until(lambda: world.finished, 1000)
        world.run_until(lambda: client.dead, 1000)
        assert world.count(State.COMPLETED) == 4
        assert next(refusals, None) is None
        assert client.error is None


def test_new_work_brings_workers_again_after_all_have_left_for_idleness() -> None:
    with a_world(workers=3, limits=Limits(idle_timeout=20)) as world:
        world.client("c", detached(6, 5.0))
        world.run(100)
        assert world.finished
        assert not world.live_workers()

        def again(client: SimClient) -> None:
            client.attach()
            client.submit([Work(seconds=5)] * 6)
            client.detach()
            client.exit()

        world.client("late", again)
        world.run(200)
        assert world.finished
        assert world.count(State.COMPLETED) == 12
        assert len(world.workers) == 6


# --- in virtual time: whose turn it is -----------------------------------------------


class Clock(SystemRuntime):
    """A machine on which time passes when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def test_one_at_a_time_has_the_turn_and_the_next_may_once_it_is_over() -> None:
    runtime = Clock()
    session = Session(MemoryStore(runtime), "s", runtime)
    one, two = LaunchLease(session), LaunchLease(session)
    assert one.take(20)
    assert not two.take(20)
    assert one.take(10)  # still its own
    runtime.advance(21)
    assert two.take(20)
    assert not one.take(20)
    two.give_back(3)
    assert not one.take(20)
    runtime.advance(3)
    assert one.take(20)


def test_who_was_held_up_in_its_turn_takes_nobody_elses_away_by_giving_it_back() -> None:
    runtime = Clock()
    session = Session(MemoryStore(runtime), "s", runtime)
    one, two = LaunchLease(session), LaunchLease(session)
    assert one.take(20)
    runtime.advance(100)
    assert two.take(20)
    one.give_back(0)
    assert not one.take(20)


def test_a_turn_whose_answer_was_lost_is_not_lost_itself() -> None:
    lost = once(Fault.LOST, "create", "/launching")
    with a_world(lost) as world:
        client = world.client("c", submitting(Work()))
        world.run_until(lambda: client.dead, 15)


# --- in virtual time: fewer, and never fewer than ------------------------------------


def amend(world: World, workers: int | None) -> None:
    def scale(client: SimClient) -> None:
        administration.scale(client.session, workers)

    world.client("scaler", scale)


def test_after_a_scale_down_surplus_workers_are_gone_within_a_session_check() -> None:
    with a_world(workers=10) as world:
        world.client("c", submitting(*[Work(seconds=3)] * 900, then=outlasting))
        world.run(30)
        assert len(world.live_workers()) == 10
        amend(world, 4)
        world.run(30 + 60 + 5)
        assert len(world.live_workers()) == 4
        world.run(200)
        assert len(world.live_workers()) == 4
        assert max(task.attempt for task in world.tasks().values()) <= 2
        amend(world, None)
        world.run(200 + 70)
        assert len(world.live_workers()) == 10
        world.run_until(lambda: world.finished, 2000)
        world.check()


def test_a_surplus_worker_hands_back_what_has_not_begun() -> None:
    often = Intervals(session_check=5)
    with a_world(workers=4, intervals=often) as world:
        world.client("c", submitting(*[Work(seconds=0.05)] * 3000, then=outlasting))
        world.run(10)
        amend(world, 2)
        world.run(10 + 5 + 2)
        assert len(world.live_workers()) == 2
        pasts = [past for task in world.tasks().values() for past in task.past]
        assert pasts
        assert {past.how for past in pasts} == {"handed back"}
        world.run_until(lambda: world.finished, 400)


def test_a_surplus_worker_ends_what_it_runs_and_begins_nothing_more() -> None:
    with a_world(workers=6) as world:
        world.client("c", detached(40, 90.0))
        world.run(20)
        amend(world, 3)
        world.run(20 + 65)
        began = len(world.bodies)
        world.run(110)
        assert len(world.live_workers()) == 3
        late = {body.worker for body in world.bodies[began:]}
        assert late <= {worker.id for worker in world.live_workers()}
        world.run_until(lambda: world.finished, 3000)
        assert {task.attempt for task in world.tasks().values()} == {1}


def test_a_worker_that_is_no_longer_surplus_when_others_are_lost_works_on() -> None:
    with a_world(workers=4) as world:
        world.client("c", detached(60, 150.0))
        world.run(20)
        amend(world, 2)
        world.run(20 + 65)
        crash(by_id(world)[:2])
        world.run_until(lambda: world.finished, 6000)


def test_min_workers_stay_until_the_session_times_out() -> None:
    limits = Limits(idle_timeout=30, session_timeout=1000)
    with a_world(workers=5, min_workers=2, limits=limits) as world:
        world.client("c", detached(10, 3.0))
        world.run(120)
        assert len(world.live_workers()) == 2
        world.run(900)
        assert len(world.live_workers()) == 2
        world.run(1200)
        assert not world.live_workers()
        assert len(world.workers) == 5


def test_min_workers_that_are_lost_are_replaced_though_nothing_waits() -> None:
    limits = Limits(idle_timeout=30, session_timeout=5000)
    with a_world(workers=5, min_workers=3, limits=limits) as world:
        world.client("c", detached(1, 1.0))
        world.run(130)
        assert len(world.live_workers()) == 3
        crash(by_id(world)[1:])
        world.run(130 + 200)
        assert len(world.live_workers()) == 3


# --- in virtual time: workers that never began ---------------------------------------


@pytest.mark.parametrize("taken_away", [True, False])
def test_only_workers_that_ended_by_themselves_before_they_began_break_the_session(
    taken_away: bool,
) -> None:
    with a_world(workers=1) as world:
        launch = world.launcher.launch
        left = [5]

        def reclaimed(session_url: str, count: int) -> list[str]:
            if not left[0]:
                return launch(session_url, count)
            left[0] -= 1
            worker = world.start_worker()
            worker.crash()
            worker.taken_away = taken_away
            return [worker.id]

        world.launcher.launch = reclaimed  # type: ignore[method-assign]
        client = world.client("c", submitting(Work(), then=outlasting))
        world.run(60)
        if taken_away:
            assert world.finished
            assert client.error is None
        else:
            assert isinstance(client.error, ExecutorBroken)


def test_results_settle_while_hundreds_of_workers_are_being_started() -> None:
    with a_world(workers=2) as world:
        launch = world.launcher.launch

        def slowly(session_url: str, count: int) -> list[str]:
            started = launch(session_url, 1)
            world.sim.sleep(100)  # paced, as for 2,000
            return started

        world.launcher.launch = slowly  # type: ignore[method-assign]
        client = world.client("c", submitting(*[Work()] * 20, then=outlasting))
        world.run(50)
        assert all(future.done() for future in client.futures)


# --- with real processes ------------------------------------------------------------

Make = Callable[..., StarburstExecutor]


@pytest.fixture
def opened() -> Iterator[list[StarburstExecutor]]:
    """Executors of a test, which are taken down whatever happens."""
    executors: list[StarburstExecutor] = []
    yield executors
    for one in executors:
        with contextlib.suppress(SessionNotFound):
            one.cleanup(force=True)


@pytest.fixture
def make(opened: list[StarburstExecutor], directory_url: str) -> Make:
    def make_one(max_workers: int, **options: Any) -> StarburstExecutor:
        options = {"store": directory_url, "intervals": QUICK, **options}
        opened.append(StarburstExecutor(max_workers, **options))
        return opened[-1]

    return make_one


@pytest.fixture
def attach(opened: list[StarburstExecutor], directory_url: str) -> Make:
    def attach_one(session_id: str, **options: Any) -> StarburstExecutor:
        opened.append(StarburstExecutor.attach(session_id, store=directory_url, **options))
        return opened[-1]

    return attach_one


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


_CLIENT = """
    import os, signal, sys
    from starburst_executor import StarburstExecutor
    from tests.support.sessions import QUICK
    from tests.support.tasks import Gate

    gate, how = Gate(__import__("pathlib").Path(sys.argv[2])), sys.argv[3]
    executor = StarburstExecutor(4, store=sys.argv[1], intervals=QUICK)
    for number in range(12):
        executor.submit(gate.hold, number)
    executor.detach() if how == "detached" else executor.flush()
    gate.await_arrivals(4)
    print(executor.session_id, flush=True)
    os._exit(0) if how == "detached" else os.kill(os.getpid(), signal.SIGKILL)
"""


def left_behind(tmp_path: Path, store: str, gate: Gate, how: str) -> str:
    """Id of the session of a client that has ended; its four workers hold tasks at the gate."""
    script = tmp_path / "client.py"
    script.write_text(textwrap.dedent(_CLIENT))
    done = subprocess.run(
        [sys.executable, str(script), store, str(gate.folder), how],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == (0 if how == "detached" else -signal.SIGKILL), done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def looking_at(store_url: str, session_id: str) -> Iterator[Session]:
    """The session, without a client that would start workers."""
    runtime = SystemRuntime()
    store = open_store(store_url)
    yield Session(store, session_id, runtime)
    store.close()
    runtime.close()


def pids(session: Session) -> dict[str, int]:
    """Process ids of the workers that live, by worker id."""
    beats = {worker: session.heartbeat(worker) for worker in session.beats().entries}
    found = {worker: beat.pid for worker, beat in beats.items() if beat is not None}
    return {worker: pid for worker, pid in found.items() if is_alive(pid)}


@pytest.mark.parametrize("how", ["detached", "killed"])
def test_workers_that_are_killed_with_nobody_there_are_replaced_by_one_that_is_left(
    how: str, directory_url: str, tmp_path: Path, gate: Gate, attach: Make
) -> None:
    session_id = left_behind(tmp_path, directory_url, gate, how)
    with looking_at(directory_url, session_id) as session:
        until(lambda: len(pids(session)) == 4, "four workers")
        first = pids(session)
        killed = sorted(first)[:3]
        for worker in killed:
            os.kill(first[worker], signal.SIGKILL)
        until(lambda: len(pids(session).keys() - first.keys()) == 3, "three new ones")
        until(lambda: len(pids(session)) == 4, "four workers again")
        gate.open()
        until(lambda: status.read_status(session).completed == 12, "all is done")
    one = attach(session_id)
    assert [future.result(60) for future in one.futures] == list(range(12))
    outcomes = one.collect()
    assert len(outcomes) == 12
    assert {outcome.worker for outcome in outcomes}.isdisjoint(killed)


def test_a_detached_session_whose_workers_left_has_new_ones_for_new_work(
    make: Make, attach: Make
) -> None:
    one = make(2, idle_timeout=0.3)
    one.submit(double, 1)
    session_id = one.detach()
    until(lambda: not live_workers(one), "all left")
    two = attach(session_id)
    futures = [two.submit(double, number) for number in range(6)]
    two.detach()
    assert all(future.exception(0) for future in futures)
    until(lambda: two.status().completed == 7, "the new ones are done")
    three = attach(session_id)
    assert [f.result(60) for f in three.futures] == [2, *(2 * n for n in range(6))]


def test_scale_up_down_and_auto(make: Make, gate: Gate) -> None:
    one = make(2)
    futures = [one.submit(gate.hold, number) for number in range(8)]
    gate.await_arrivals(2)
    one.scale(5)
    gate.await_arrivals(5)
    assert len(live_workers(one)) == 5
    assert one.status().workers_wanted == 5
    one.scale("auto")
    assert one.status().workers_wanted == 2
    gate.open()
    until(lambda: len(live_workers(one)) == 2, "three leave")
    assert [future.result(60) for future in futures] == list(range(8))
    assert {outcome.attempt for outcome in one.collect()} == {1}


def test_surplus_workers_leave_soon_though_tasks_wait(make: Make, gate: Gate) -> None:
    one = make(4)
    futures = [one.submit(_nap, gate) for _ in range(1000)]
    until(lambda: len(worker_pids(one)) == 4, "four work")
    one.scale(2)
    until(lambda: len(live_workers(one)) == 2, "two leave")
    assert any(not future.done() for future in futures)
    gate.open()
    assert not any(future.exception(60) for future in futures)


def _nap(gate: Gate) -> None:
    """Take a while, unless the gate is open."""
    import time

    if not gate.is_open():
        time.sleep(0.2)


def test_min_workers_are_there_before_any_task_and_stay_without_one(
    make: Make,
) -> None:
    one = make(3, min_workers=2, idle_timeout=0.2)
    until(lambda: len(worker_pids(one)) == 2, "two are there")
    assert list(one.map(double, range(20))) == [2 * n for n in range(20)]
    until(lambda: len(live_workers(one)) == 2, "the third leaves")
    first = worker_pids(one)
    os.kill(max(first.items())[1], signal.SIGKILL)
    until(
        lambda: len(now := worker_pids(one)) >= 2 and len(live_workers(one)) == 2 and now != first,
        "another takes its place",
    )


@pytest.mark.parametrize("wrong", [-1, 4, True, "1", 1.0])
def test_min_workers_beyond_reason_are_refused(wrong: Any, directory_url: str) -> None:
    with pytest.raises((ValueError, TypeError), match="min_workers"):
        StarburstExecutor(3, min_workers=wrong, store=directory_url)
    assert not Path(directory_url).exists()

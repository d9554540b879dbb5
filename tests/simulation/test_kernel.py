"""The simulator's own laws: what it promises to the protocol's tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from starburst_executor.errors import Conflict, LocalDiskError, ObjectNotFound, StoreUnavailable
from starburst_executor.runtime import Runtime
from starburst_executor.storage.base import ListingPage, Store
from tests.simulation import kernel as simulator
from tests.simulation.kernel import (
    Actor,
    Deadlock,
    Fault,
    FaultPlan,
    Livelock,
    SimRuntime,
    SimStore,
    Simulation,
    SimulationFailed,
    fault_at,
    random_faults,
    s3_latency,
)
from tests.support.fakes import MemoryStore


def one_second(op: str, rng: random.Random) -> float:
    return 1.0


def store_of(
    sim: Simulation,
    faults: FaultPlan | None = None,
    latency: simulator.Latency = one_second,
) -> SimStore:
    return SimStore(sim, MemoryStore(SimRuntime(sim, "clock")), latency, faults)


def run_alone(
    fn: Callable[[SimStore], object], fault: Fault | None = None, number: int = 1
) -> tuple[SimStore, Actor, Simulation]:
    """Run one actor, with one fault at its n-th call, until nothing is left to happen."""
    with Simulation(7) as sim:
        faults = None if fault is None else fault_at("w", number, fault)
        store = store_of(sim, faults)
        actor = sim.spawn("w", lambda: fn(store))
        sim.run()
        return store, actor, sim


def content(store: SimStore, key: str) -> bytes | None:
    try:
        got = store.backing.get(key)
    except ObjectNotFound:
        return None
    assert got is not None
    return got.data


def outcome(call: Callable[[], object]) -> object:
    try:
        return call()
    except (Conflict, ObjectNotFound, StoreUnavailable) as e:
        return type(e)


# -- order and time


def test_actors_take_turns_in_order_of_virtual_time() -> None:
    seen: list[tuple[float, str]] = []
    with Simulation() as sim:

        def step(name: str, *pauses: float) -> None:
            for pause in pauses:
                sim.sleep(pause)
                seen.append((sim.now, name))

        sim.spawn("a", partial(step, "a", 3, 3))
        sim.spawn("b", partial(step, "b", 2, 2), delay=0.5)
        sim.run()
    assert seen == [(2.5, "b"), (3.0, "a"), (4.5, "b"), (6.0, "a")]


def test_what_happens_at_one_instant_happens_in_the_order_it_was_asked_for() -> None:
    seen: list[str] = []
    with Simulation() as sim:

        def step(name: str) -> None:
            sim.sleep(1)
            seen.append(name)

        for name in "abc":
            sim.spawn(name, partial(step, name))
        sim.at(1.0, lambda: seen.append("callback"))
        sim.run()
    assert seen == ["callback", "a", "b", "c"]


def busy(seed: int, trace: int = 100_000) -> list[tuple[object, ...]]:
    """A run in which much goes on: contention, faults, a death, a stall, threads."""
    plan = random_faults(dict.fromkeys([Fault.LOST, Fault.RETRIED, Fault.LATE], 0.05))
    with Simulation(seed, trace=trace) as sim:
        store = store_of(sim, plan, s3_latency)
        store.backing.create("counter", b"0")

        def count(name: str) -> None:
            runtime = SimRuntime(sim, name)
            for _ in range(20):
                got = store.backing.get("counter")
                assert got is not None
                text = f"{name} {runtime.new_id(5)}".encode()
                outcome(partial(store.replace, "counter", text, got.version))
                put = [partial(store.put, f"{name}/{n}", b"") for n in range(3)]
                outcome(partial(runtime.gather, put))
                runtime.signal().wait(runtime.random.random())

        actors = [sim.spawn(f"w{n}", partial(count, f"w{n}")) for n in range(4)]
        sim.at(2.0, lambda: sim.kill(actors[0]))
        sim.at(3.0, lambda: sim.stall(actors[1], 5))
        sim.run()
        return list(sim.trace)


def test_same_seed_is_the_same_run_event_for_event() -> None:
    first = busy(1)
    assert len(first) > 200
    assert busy(1) == first
    assert busy(2) != first


def test_trace_is_bounded() -> None:
    assert busy(1, trace=10) == busy(1)[-10:]


def test_run_stops_at_a_time_and_goes_on_from_there() -> None:
    seen: list[float] = []
    with Simulation() as sim:

        def tick() -> None:
            for _ in range(5):
                sim.sleep(1)
                seen.append(sim.now)

        sim.spawn("w", tick)
        sim.run(until=2.5)
        assert (sim.now, seen) == (2.5, [1, 2])
        sim.run()
        assert (sim.now, seen) == (5, [1, 2, 3, 4, 5])


def test_run_stops_when_an_actor_has_ended() -> None:
    with Simulation() as sim:

        def poll_for_ever() -> None:
            while True:
                sim.sleep(1)

        def answer() -> str:
            sim.sleep(3.5)
            return "answer"

        sim.spawn("poller", poll_for_ever)
        client = sim.spawn("client", answer)
        sim.run(until=client)
        assert (sim.now, client.result) == (3.5, "answer")


# -- clocks and randomness


def test_wall_clock_is_skewed_and_jumps_but_monotonic_time_does_not() -> None:
    with Simulation() as sim:
        true = SimRuntime(sim, "store")
        wrong = SimRuntime(sim, "laptop", skew=-60)

        def look() -> None:
            assert wrong.time() == true.time() - 60
            sim.sleep(5)
            assert wrong.monotonic() == 5
            wrong.jump(3600)
            assert wrong.time() == true.time() + 3540
            assert wrong.monotonic() == 5

        sim.spawn("laptop", look)
        sim.run()


def test_cpu_time_is_charged_by_request_and_by_listed_key() -> None:
    with Simulation() as sim:
        runtime = SimRuntime(sim, "w")
        store = store_of(sim)
        for n in range(10):
            store.backing.put(f"{n}", b"")

        def spend() -> list[float]:
            spent = [runtime.thread_time()]
            for call in (store.get, store.list):
                call("1" if call == store.get else "")
                spent.append(runtime.thread_time())
            return spent

        actor = sim.spawn("w", spend)
        sim.run()
    request, key = simulator.REQUEST_CPU, simulator.KEY_CPU
    assert actor.result == [0, request, request * 2 + key * 10]


def test_randomness_follows_from_seed_and_name() -> None:
    def ids(seed: int, name: str) -> tuple[str, float]:
        runtime: Runtime = SimRuntime(Simulation(seed), name)
        return runtime.new_id(10), runtime.random.random()

    assert ids(1, "a") == ids(1, "a")
    assert len({ids(1, "a"), ids(1, "b"), ids(2, "a")}) == 3


# -- signals


def test_wait_ends_when_the_signal_is_set() -> None:
    with Simulation() as sim:
        signal = SimRuntime(sim, "w").signal()
        waiter = sim.spawn("waiter", lambda: (signal.wait(10), sim.now))
        sim.at(4.0, signal.set)
        sim.run()
    assert waiter.result == (True, 4.0)


def test_wait_ends_at_its_time_out_and_is_forgotten() -> None:
    with Simulation() as sim:
        signal = SimRuntime(sim, "w").signal()

        def wait() -> list[tuple[bool, float]]:
            first = (signal.wait(2), sim.now)
            sim.sleep(10)  # is not cut short by the signal of a wait that is over
            return [first, (signal.wait(0), sim.now)]

        waiter = sim.spawn("waiter", wait)
        sim.at(3.0, signal.set)
        sim.at(4.0, signal.clear)
        sim.run()
    assert waiter.result == [(False, 2.0), (False, 12.0)]


def test_signal_wakes_all_who_wait_even_if_it_is_cleared_at_once() -> None:
    with Simulation() as sim:
        signal = SimRuntime(sim, "w").signal()
        waiters = [sim.spawn(f"w{n}", lambda: signal.wait(9)) for n in range(3)]
        sim.at(1.0, signal.set)
        sim.at(1.0, signal.clear)
        sim.run()
        assert [w.result for w in waiters] == [True] * 3
        assert not signal.is_set()


def test_wait_for_what_is_set_lets_others_have_their_turn() -> None:
    seen: list[str] = []
    with Simulation() as sim:
        signal = SimRuntime(sim, "w").signal()
        signal.set()

        def wait() -> None:
            signal.wait()
            seen.append("a")

        sim.spawn("a", wait)
        sim.spawn("b", lambda: seen.append("b"))
        sim.run()
    assert seen == ["b", "a"]


# -- gather


def test_gather_makes_calls_side_by_side_and_keeps_their_order() -> None:
    with Simulation() as sim:
        runtime = SimRuntime(sim, "w")

        def call(seconds: float) -> float:
            sim.sleep(seconds)
            return seconds

        calls = [partial(call, seconds) for seconds in (3, 1, 2)]
        actor = sim.spawn("w", lambda: runtime.gather(calls))
        nothing = sim.spawn("n", lambda: runtime.gather([]))
        sim.run()
        assert (actor.result, nothing.result, sim.now) == ([3, 1, 2], [], 3)


def test_gather_raises_the_first_error_once_all_have_ended() -> None:
    ended: list[int] = []
    with Simulation() as sim:
        runtime = SimRuntime(sim, "w")

        def call(number: int) -> None:
            sim.sleep(number)
            ended.append(number)
            if number in (2, 3):
                raise KeyError(number)

        def gather() -> str:
            with pytest.raises(KeyError, match="3"):
                runtime.gather([partial(call, number) for number in (3, 2, 4)])
            return f"at {sim.now:.0f}"

        actor = sim.spawn("w", gather)
        sim.run()
    assert ended == [2, 3, 4]
    assert actor.result == "at 4"


# -- death and stalls


def test_killed_actor_does_nothing_more_whatever_its_code_tries() -> None:
    seen: list[str] = []
    with Simulation() as sim:
        store = store_of(sim)

        def cling_to_life() -> None:
            try:
                sim.sleep(10)
                seen.append("slept")
            except BaseException:
                seen.append("unwound")
                store.put("a", b"")
                seen.append("put")
            finally:
                SimRuntime(sim, "w").signal().wait(1)
                seen.append("waited")

        actor = sim.spawn("w", cling_to_life)
        sim.at(1.0, lambda: sim.kill(actor))
        sim.run()
    assert actor.ended
    assert seen == ["unwound"]
    assert not store.counts


def test_what_an_actor_raises_while_it_is_killed_is_ignored() -> None:
    with Simulation() as sim:

        def fail_to_clean_up() -> None:
            try:
                sim.sleep(10)
            finally:
                raise KeyError

        actor = sim.spawn("w", fail_to_clean_up)
        sim.at(1.0, lambda: sim.kill(actor))
        sim.run()
    assert actor.ended


def test_actor_killed_before_its_first_turn_never_runs() -> None:
    seen: list[str] = []
    with Simulation() as sim:
        actor = sim.spawn("w", lambda: seen.append("ran"), delay=5)
        sim.kill(actor)
        sim.run()
    assert actor.ended
    assert seen == []


def test_actor_can_kill_itself() -> None:
    seen: list[str] = []
    with Simulation() as sim:

        def end_it() -> None:
            sim.kill(actor)
            seen.append("on")

        actor = sim.spawn("w", end_it)
        sim.run()
    assert actor.ended
    assert seen == []


def test_process_dies_with_all_its_threads_and_leaves_others_alone() -> None:
    seen: list[str] = []
    with Simulation() as sim:
        runtime = SimRuntime(sim, "w")

        def live(name: str) -> None:
            sim.sleep(2)
            seen.append(name)

        def main() -> None:
            sim.spawn("heartbeat", partial(live, "heartbeat"), of=worker)
            runtime.gather([partial(live, "first"), partial(live, "second")])
            seen.append("gathered")

        worker = sim.spawn("w", main)
        sim.spawn("other", partial(live, "other"))
        sim.at(1.0, lambda: sim.kill(worker))
        sim.run()
    assert seen == ["other"]


def test_request_lands_though_its_sender_was_killed_on_the_way() -> None:
    with Simulation() as sim:
        store = store_of(sim)
        actor = sim.spawn("w", lambda: store.put("a", b"1"))
        sim.at(0.25, lambda: sim.kill(actor))
        sim.run()
    assert content(store, "a") == b"1"


def test_stalled_process_goes_on_later_but_its_requests_land_on_time() -> None:
    seen: list[tuple[str, float]] = []
    with Simulation() as sim:
        store = store_of(sim)

        def beat() -> None:
            sim.sleep(1)
            seen.append(("thread", sim.now))

        def main() -> None:
            sim.spawn("beat", beat, of=worker)
            store.put("a", b"1")
            seen.append(("main", sim.now))

        worker = sim.spawn("w", main)
        sim.at(0.25, lambda: sim.stall(worker, 100))
        sim.run(until=0.75)
        assert content(store, "a") == b"1"
        sim.run()
    assert sorted(seen) == [("main", 100.25), ("thread", 100.25)]


def test_stalled_process_can_be_killed_at_once() -> None:
    with Simulation() as sim:
        actor = sim.spawn("w", lambda: sim.sleep(1))
        sim.at(0.5, lambda: sim.stall(actor, 1000))
        sim.at(0.5, lambda: sim.kill(actor))
        sim.run(until=0.6)
        assert actor.ended


# -- runs that fail


def test_exception_of_an_actor_fails_the_run_with_name_seed_and_last_events() -> None:
    with Simulation(42) as sim:
        store = store_of(sim)

        def fail() -> None:
            store.put("a/key", b"")
            raise KeyError("my bug")

        sim.spawn("careless", fail)
        bystander = sim.spawn("bystander", lambda: sim.sleep(100))
        with pytest.raises(SimulationFailed) as failure:
            sim.run()
    assert "careless raised KeyError('my bug'); seed 42, at 1.0" in str(failure.value)
    assert "0.500000  careless put a/key ok" in str(failure.value)
    assert isinstance(failure.value.__cause__, KeyError)
    assert bystander.ended


def test_deadlock_names_who_waits_for_what() -> None:
    with Simulation() as sim:
        runtime = SimRuntime(sim, "w")
        sim.spawn("idle", lambda: runtime.signal().wait())
        sim.spawn("done", lambda: sim.sleep(1))
        with pytest.raises(Deadlock, match=r"these wait: idle \(waits for a signal\);"):
            sim.run()


def test_livelock_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "LIVELOCK_EVENTS", 100)
    with Simulation() as sim:
        signal = SimRuntime(sim, "w").signal()
        signal.set()

        def spin() -> None:
            while True:
                signal.wait(5)

        sim.spawn("spinner", spin)
        with pytest.raises(Livelock, match="without time passing"):
            sim.run()


def test_waiting_outside_of_an_actor_is_refused() -> None:
    with Simulation() as sim:
        with pytest.raises(RuntimeError, match="only an actor can"):
            store_of(sim).put("a", b"")
        with pytest.raises(RuntimeError, match="only an actor can"):
            SimRuntime(sim, "w").signal().wait(1)


def test_leaving_the_simulation_unwinds_what_still_runs() -> None:
    seen: list[str] = []
    with Simulation() as sim:

        def run() -> None:
            try:
                sim.sleep(1000)
            finally:
                seen.append("unwound")

        sim.spawn("w", run)
        sim.spawn("never began", run, delay=50)
        sim.run(until=1)
    assert seen == ["unwound"]


# -- the store


def test_store_call_takes_effect_half_way() -> None:
    with Simulation() as sim:
        store = store_of(sim)
        actor = sim.spawn("w", lambda: (store.create("a", b"1"), sim.now))
        sim.run(until=0.49)
        assert content(store, "a") is None
        sim.run(until=0.51)
        assert content(store, "a") == b"1"
        sim.run()
    got = store.backing.get("a")
    assert got is not None
    assert actor.result == (got.version, 1.0)


def test_store_answers_as_the_backing_store_does(tmp_path: Path) -> None:
    def use(sim_store: SimStore) -> list[object]:
        store: Store = sim_store
        version = store.create("a/1", b"one")
        store.put("a/2", b"two")
        store.upload("b/3", b"three")
        store.download("b/3", tmp_path / "three")
        ranged = store.get("a/1", start=1, stop=2)
        assert ranged is not None
        answers: list[object] = [
            ranged.data,
            store.get("a/1", unless=version),
            outcome(lambda: store.create("a/1", b"")),
            outcome(lambda: store.replace("a/2", b"", "no version")),
            outcome(lambda: store.get("nothing")),
            [entry.key for entry in store.list("a/", after="a/1").entries],
            store.list("", delimiter="/").prefixes,
            [entry.key for entry in store.list("", limit=2).entries],
        ]
        store.replace("a/1", b"1", version)
        store.delete(iter(["a/2", "b/3"]))
        return answers

    store, actor, _ = run_alone(use)
    assert actor.result == [
        b"n",
        None,
        Conflict,
        Conflict,
        ObjectNotFound,
        ["a/2"],
        ["a/", "b/"],
        ["a/1", "a/2"],
    ]
    assert (tmp_path / "three").read_bytes() == b"three"
    assert [e.key for e in store.backing.list("").entries] == ["a/1"]
    assert store.url == store.backing.url
    assert store.counts == {
        "create": 2,
        "put": 1,
        "upload": 1,
        "download": 1,
        "get": 3,
        "replace": 2,
        "list": 3,
        "delete": 1,
    }


def test_error_that_is_no_store_error_reaches_the_caller() -> None:
    with Simulation() as sim:
        store = store_of(sim)
        sim.spawn("w", lambda: store.upload("a", Path("/no/such/file")))
        with pytest.raises(SimulationFailed) as failure:
            sim.run()
    assert isinstance(failure.value.__cause__, LocalDiskError)


def test_writes_are_counted_per_prefix_and_window() -> None:
    with Simulation() as sim:
        store = store_of(sim)

        def write(prefix: str, count: int, pause: float) -> None:
            for n in range(count):
                sim.spawn(f"{prefix}{n}", partial(store.put, f"{prefix}/{n}", b""))
                sim.sleep(pause)

        sim.spawn("fast", partial(write, "fast", 40, 0.125))
        sim.spawn("slow", partial(write, "slow", 10, 2.0))
        sim.run()
    assert store.peak_writes("fast/") == 8
    assert store.peak_writes("slow/") == 1
    assert store.peak_writes() == 9
    assert store.peak_writes("none/") == 0
    assert store.peak_writes("slow/", seconds=5) == 3


# -- faults


def create(store: SimStore) -> object:
    return outcome(lambda: store.create("a", b"1"))


@pytest.mark.parametrize(
    ("fault", "answer", "stored"),
    [
        (Fault.UNAVAILABLE, StoreUnavailable, None),
        (Fault.LOST, StoreUnavailable, b"1"),
        (Fault.LATE, StoreUnavailable, b"1"),
        (Fault.RETRIED, Conflict, b"1"),
        (Fault.REFUSED, Conflict, None),
        (Fault.KILLED_BEFORE, None, None),
        (Fault.KILLED_AFTER, None, b"1"),
    ],
)
def test_faulty_create(fault: Fault, answer: object, stored: bytes | None) -> None:
    store, actor, _ = run_alone(create, fault)
    assert actor.result == answer
    assert actor.ended
    assert content(store, "a") == stored


def test_replace_repeated_by_the_sdk_conflicts_with_itself() -> None:
    def replace(store: SimStore) -> object:
        version = store.create("a", b"1")
        return outcome(lambda: store.replace("a", b"2", version))

    store, actor, _ = run_alone(replace, Fault.RETRIED, number=2)
    assert actor.result == Conflict
    assert content(store, "a") == b"2"
    assert store.counts["replace"] == 2


def test_late_write_lands_after_its_sender_has_looked_and_gone_on() -> None:
    def write_and_look(store: SimStore) -> list[object]:
        gave_up = outcome(lambda: store.create("a", b"late"))
        return [gave_up, outcome(lambda: store.get("a"))]

    store, actor, sim = run_alone(write_and_look, Fault.LATE)
    assert actor.result == [StoreUnavailable, ObjectNotFound]
    assert content(store, "a") == b"late"
    assert sim.now > simulator.READ_TIMEOUT


def test_late_write_that_finds_the_world_changed_is_refused_unheard() -> None:
    def write_again(store: SimStore) -> object:
        outcome(lambda: store.create("a", b"late"))
        return outcome(lambda: store.create("a", b"second") and "created")

    store, actor, sim = run_alone(write_again, Fault.LATE)
    assert actor.result == "created"
    assert content(store, "a") == b"second"
    assert sim.trace[-1][1:] == ("w", "create", "a", "Conflict")


def test_bug_in_an_effect_that_nobody_hears_of_fails_the_run() -> None:
    with pytest.raises(LocalDiskError):
        run_alone(lambda store: store.upload("a", Path("/no/such/file")), Fault.LOST)


def torn_listing(*, limit: int = 1000, delimiter: str = "") -> tuple[list[str], bool]:
    """List b, d, f, h while c and g appear and f goes, between the two moments."""
    with Simulation() as sim:
        store = store_of(sim, fault_at("reader", 1, Fault.TORN))
        for key in "bdfh":
            store.backing.put(f"q/{key}/x", b"")
        if delimiter:
            store.backing.put("q/y", b"")
            store.backing.put("q/z", b"")

        def change() -> None:
            for key in "cg":
                store.backing.put(f"q/{key}/x", b"")
            store.backing.delete(["q/f/x"])

        actor = sim.spawn("reader", lambda: store.list("q/", limit=limit, delimiter=delimiter))
        sim.at(0.75, change)
        sim.run()
    page = actor.result
    assert isinstance(page, ListingPage)
    names = page.prefixes or [entry.key for entry in page.entries]
    return [name[2] for name in names], page.truncated


def test_torn_listing_shows_two_moments() -> None:
    # c lies in the first half, which had been read; g and f in the second, which had not
    assert torn_listing() == (list("bdgh"), False)


def test_torn_listing_keeps_to_its_limit() -> None:
    assert torn_listing(limit=3) == (list("bcd"), True)


def test_torn_listing_with_a_delimiter_is_of_one_moment() -> None:
    assert torn_listing(delimiter="/") == (list("bcdgh"), False)


def test_fault_that_does_not_apply_is_an_error_of_the_plan() -> None:
    with pytest.raises(SimulationFailed, match="does not apply") as failure:
        run_alone(lambda store: store.get("a"), Fault.REFUSED)
    assert isinstance(failure.value.__cause__, ValueError)


@pytest.mark.parametrize("fault", [Fault.KILLED_BEFORE, Fault.KILLED_AFTER])
def test_process_can_be_killed_at_each_of_its_calls_in_turn(fault: Fault) -> None:
    def write(store: SimStore) -> None:
        for n in range(4):
            store.put(f"{n}", b"")

    written = []
    for number in range(1, 5):
        store, actor, _ = run_alone(write, fault, number)
        assert actor.ended
        written.append(len(store.backing.list("").entries))
    after = fault is Fault.KILLED_AFTER
    assert written == [n + after for n in range(4)]


def test_calls_of_threads_count_as_their_process_s_own() -> None:
    with Simulation() as sim:
        store = store_of(sim, fault_at("w", 2, Fault.KILLED_BEFORE))
        puts = [partial(store.put, f"{n}", b"") for n in range(3)]
        worker = sim.spawn("w", partial(SimRuntime(sim, "w").gather, puts))
        sim.run()
    assert worker.ended
    assert [entry.key for entry in store.backing.list("").entries] == ["0"]


def test_random_faults_come_as_often_as_they_should_and_only_where_they_apply() -> None:
    plan = random_faults({Fault.LOST: 0.1, Fault.REFUSED: 0.2})
    rng = random.Random(1)
    gets = [plan(simulator.Call("w", 1, "get", "a"), rng) for _ in range(10_000)]
    creates = [plan(simulator.Call("w", 1, "create", "a"), rng) for _ in range(10_000)]
    assert set(gets) == {None, Fault.LOST}
    assert gets.count(Fault.LOST) == pytest.approx(1000, rel=0.15)
    assert creates.count(Fault.LOST) == pytest.approx(1000, rel=0.15)
    assert creates.count(Fault.REFUSED) == pytest.approx(2000, rel=0.15)

"""A deterministic discrete-event kernel: plain synchronous code, run in virtual time.

Actors are greenlets. One that waits, or calls a `SimStore`, gives way to whatever comes next in
virtual time; nothing else lets another actor in. Every choice comes from one seed, so that a seed
is a schedule: the same seed gives the same run, event for event.

    actor ── store.replace(...) ──> request travels ──> effect on the backing store
    actor <── reply travels <───────────────────────────┘

Only the hub applies effects. So a request that was sent lands whatever becomes of its sender, who
may be stalled or dead by then, as on a real network.

A *process* is an actor with its threads (what it spawned with `of=`, and its `gather` calls). It is
killed and stalled as a whole.

Code under simulation must not hold a `threading.Lock` across a store call or a wait: the thread
is everybody's.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from greenlet import (  # type: ignore[import-untyped]
    GreenletExit,
    getcurrent,
    greenlet,
)

from starburst_executor.errors import Conflict, StoreError, StoreUnavailable
from starburst_executor.storage.base import Bytes, ListedObject, ListingPage, Store, StoredObject

T = TypeVar("T")

EPOCH = 1_750_000_000.0  # what all clocks show at the beginning, skew apart
LIVELOCK_EVENTS = 200_000  # at one instant; a run of 1,000 actors needs some thousands

_ID_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"


class SimulationFailed(Exception):
    """An actor raised, or the run cannot go on; the message ends with the last events."""


class Deadlock(SimulationFailed):
    """Nothing is going to happen any more, and somebody waits for it."""


class Livelock(SimulationFailed):
    """Things go on happening, but time does not."""


class Actor:
    """One thread of control; made by `Simulation.spawn`."""

    __slots__ = (
        "cpu",
        "died_at",
        "dying",
        "ended",
        "error",
        "fn",
        "greenlet",
        "name",
        "process",
        "refusal",
        "reply",
        "requests",
        "result",
        "stalled_until",
        "threads",
        "turn",
        "waits_for",
    )

    def __init__(self, name: str, fn: Callable[[], object], process: Actor | None) -> None:
        self.name = name
        self.fn = fn
        self.process = process or self
        self.greenlet: greenlet | None = None  # until its first turn
        self.threads: dict[Actor, None] = {}  # of a process, itself included
        self.turn = 1  # counts up with each turn; an event for an earlier one is void
        self.waits_for = "its first turn"
        self.reply: object = None
        self.refusal: Exception | None = None
        self.stalled_until = 0.0  # the process, threads included
        self.dying = False
        self.died_at = math.inf  # of a process: when it ended
        self.ended = False
        self.result: object = None
        self.error: BaseException | None = None
        self.requests = 0  # store calls made so far by the process
        self.cpu = 0.0  # seconds charged to it

    def __repr__(self) -> str:
        return f"<Actor {self.name}>"


# When, order among equals, and either an actor with the turn it is woken for, or a callback and 0.
_Event: TypeAlias = tuple[float, int, Any, int]


class Simulation:
    """A virtual world: its clock, its actors and what is going to happen.

    Use it as a context manager: leaving it unwinds the actors that are left, so that none is torn
    down by the garbage collector at some other time.

    Args:
        seed: Where every choice comes from.
        trace: How many of the last events to keep.
    """

    def __init__(self, seed: int = 0, *, trace: int = 200) -> None:
        self.seed = seed
        self.now = 0.0  # virtual seconds since the beginning
        self.trace: deque[tuple[object, ...]] = deque(maxlen=trace)
        self._heap: list[_Event] = []
        self._sequence = 0
        self._actors: dict[Actor, None] = {}  # that have not ended
        self._current: Actor | None = None
        self._hub: greenlet | None = None

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def random_for(self, name: str) -> random.Random:
        """A source of randomness of its own for `name`, derived from the seed."""
        return random.Random(f"{self.seed}/{name}")

    def spawn(
        self,
        name: str,
        fn: Callable[[], object],
        *,
        delay: float = 0.0,
        of: Actor | None = None,
    ) -> Actor:
        """Run `fn` as an actor from `delay` seconds on.

        It is a process of its own, or a thread of `of`'s process.
        """
        actor = Actor(name, fn, None if of is None else of.process)
        actor.process.threads[actor] = None
        self._actors[actor] = None
        self._wake(actor, actor.turn, self.now + delay)
        return actor

    def at(self, when: float, callback: Callable[[], object]) -> None:
        """Call `callback` at a virtual time; it must neither wait nor call a `SimStore`."""
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, callback, 0))

    def sleep(self, seconds: float) -> None:
        """Let the current actor wait."""
        actor = self.enter()
        self._wake(actor, actor.turn, self.now + seconds)
        self.give_way(actor, "time to pass")

    def kill(self, actor: Actor) -> None:
        """End the actor's process as `kill -9` does: no code of it goes on.

        Greenlets can only be ended by an exception, `GreenletExit`. It is raised where each thread
        waits, and again from whatever call a `finally` makes; what such a block raises is ignored.
        Requests under way land all the same.
        """
        process = actor.process
        self.note("killed", process.name)
        process.stalled_until = 0.0
        process.died_at = min(process.died_at, self.now)
        for thread in list(process.threads):
            thread.dying = True
            if thread is not self._current:
                self._wake(thread, thread.turn, self.now)
        if self._current is not None and self._current.dying:
            raise GreenletExit

    def stall(self, actor: Actor, seconds: float) -> None:
        """Let the actor's process do nothing for a while, as by SIGSTOP; requests sent land."""
        process = actor.process
        self.note("stalled", process.name, seconds)
        process.stalled_until = self.now + seconds

    def note(self, *what: object) -> None:
        """Add a line to the trace."""
        self.trace.append((self.now, *what))

    def report(self, lines: int = 40) -> str:
        """The last events, for a failure's message."""
        last = list(self.trace)[-lines:]
        body = "\n".join(f"  {event[0]:12.6f}  {' '.join(map(str, event[1:]))}" for event in last)
        return f"seed {self.seed}, at {self.now:.6f} s; last {len(last)} events:\n{body}"

    def run(self, until: float | Actor | None = None) -> None:
        """Let things happen: all of them, or up to a virtual time, or until an actor ended.

        Raises:
            SimulationFailed: an actor raised; its exception is the cause.
            Deadlock: actors wait, and nothing is going to happen.
            Livelock: too much happens at one instant.
        """
        if self._current is not None:
            raise RuntimeError("an actor cannot run the simulation it is part of")
        self._hub = getcurrent()
        awaited = until if isinstance(until, Actor) else None
        limit = until if isinstance(until, int | float) else math.inf
        self._loop(limit, awaited)

    def close(self) -> None:
        """Kill and unwind whatever has not ended."""
        while self._actors:
            actor = next(iter(self._actors))
            actor.dying = True
            self._resume(actor)
        self._heap.clear()

    # -- for SimRuntime and SimStore

    def enter(self) -> Actor:
        """The current actor, unless it is being killed."""
        actor = self._current
        if actor is None:
            raise RuntimeError("only an actor can wait or call a SimStore: use Simulation.spawn")
        if actor.dying:
            raise GreenletExit
        return actor

    def give_way(self, actor: Actor, waits_for: str) -> None:
        """Let others have their turn, until this one is woken for its next."""
        actor.waits_for = waits_for
        assert self._hub is not None
        self._hub.switch()
        if actor.dying:
            raise GreenletExit

    def _wake(self, actor: Actor, turn: int, when: float) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, actor, turn))

    # -- the hub

    def _loop(self, limit: float, awaited: Actor | None) -> None:
        heap, pop = self._heap, heapq.heappop
        at_once = 0
        while heap:
            if awaited is not None and awaited.ended:
                return
            event = pop(heap)
            when, sequence, target, turn = event
            if when > limit:
                heapq.heappush(heap, event)
                self.now = limit
                return
            if turn:
                if target.turn != turn:
                    continue
                stalled_until = target.process.stalled_until
                if stalled_until > when:
                    heapq.heappush(heap, (stalled_until, sequence, target, turn))
                    continue
            at_once = at_once + 1 if when == self.now else 0
            if at_once > LIVELOCK_EVENTS:
                raise Livelock(f"{at_once:,} events without time passing; {self.report()}")
            self.now = when
            if turn:
                self._resume(target)
            else:
                target()
        if self._actors and not (awaited is not None and awaited.ended):
            raise self._deadlock()
        if limit != math.inf:
            self.now = limit

    def _resume(self, actor: Actor) -> None:
        actor.turn += 1
        self._current = actor
        try:
            if actor.greenlet is None:
                actor.greenlet = greenlet(self._life, parent=getcurrent())
                actor.greenlet.switch(actor)
            elif actor.dying:
                actor.greenlet.throw(GreenletExit)
            else:
                actor.greenlet.switch()
        finally:
            self._current = None
        if actor.ended:
            self._settle(actor)

    def _life(self, actor: Actor) -> None:
        try:
            if not actor.dying:
                actor.result = actor.fn()
        except GreenletExit:
            pass  # killed
        except BaseException as e:
            actor.error = e
        actor.ended = True

    def _settle(self, actor: Actor) -> None:
        self._actors.pop(actor, None)
        actor.process.threads.pop(actor, None)
        actor.greenlet = None
        actor.died_at = min(actor.died_at, self.now)
        error = actor.error
        if error is None or actor.dying:
            return
        if isinstance(error, MemoryError):
            self.note(actor.name, "dies of", repr(error))  # a thread that others may wait for
            return
        if not isinstance(error, Exception):
            raise error  # Ctrl-C, pytest's own
        raise SimulationFailed(f"{actor.name} raised {error!r}; {self.report()}") from error

    def _deadlock(self) -> Deadlock:
        waiting = ", ".join(f"{actor.name} (waits for {actor.waits_for})" for actor in self._actors)
        return Deadlock(
            f"nothing is going to happen, but these wait: {waiting or '-'}; {self.report()}"
        )


class SimRuntime:
    """The `Runtime` of one simulated process: its wall clock, its randomness.

    Args:
        sim: The world.
        name: Whose it is; its randomness is derived from this and the seed.
        skew: Seconds by which its wall clock is ahead of the store's.
    """

    def __init__(self, sim: Simulation, name: str, *, skew: float = 0.0) -> None:
        self._sim = sim
        self._skew = skew
        self.random = sim.random_for(name)

    def time(self) -> float:
        """The process's wall clock, skewed and jumpy as it may be."""
        return EPOCH + self._sim.now + self._skew

    def monotonic(self) -> float:
        """Virtual seconds, which no jump touches."""
        return self._sim.now

    def thread_time(self) -> float:
        """What the current actor's store calls would have cost; nothing else is charged."""
        return self._sim.enter().cpu

    def signal(self) -> SimSignal:
        return SimSignal(self._sim)

    def gather(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Make each call as a thread of the current actor's process."""
        if len(calls) <= 1:
            return [call() for call in calls]
        parent = self._sim.enter()
        results: list[T | None] = [None] * len(calls)
        errors: list[Exception | None] = [None] * len(calls)
        left = len(calls)
        ended = self.signal()

        def make(position: int) -> None:
            nonlocal left
            try:
                results[position] = calls[position]()
            except Exception as e:
                errors[position] = e
            left -= 1
            if not left:
                ended.set()

        for position in range(len(calls)):
            self._sim.spawn(f"{parent.name}/{position}", partial(make, position), of=parent)
        ended.wait()
        for error in errors:
            if error is not None:
                raise error
        return results  # type: ignore[return-value]

    def new_id(self, length: int) -> str:
        return "".join(self.random.choices(_ID_ALPHABET, k=length))

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward, or back."""
        self._sim.note("clock jumps by", seconds)
        self._skew += seconds


class SimSignal:
    """A `Signal` whose `wait` gives way to the other actors, even if it is over at once."""

    __slots__ = ("_is_set", "_sim", "_waiting")

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._is_set = False
        self._waiting: dict[Actor, int] = {}  # with the turn for which each waits

    def set(self) -> None:
        self._is_set = True
        waiting, self._waiting = self._waiting, {}
        for actor, turn in waiting.items():
            self._sim._wake(actor, turn, self._sim.now)

    def clear(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        """As `threading.Event.wait`: True if set by then, even if it was cleared since."""
        sim = self._sim
        actor = sim.enter()
        if self._is_set:
            sim._wake(actor, actor.turn, sim.now)
            sim.give_way(actor, "its turn")
            return True
        self._waiting[actor] = actor.turn
        if timeout is not None:
            sim._wake(actor, actor.turn, sim.now + max(timeout, 0.0))
        sim.give_way(actor, "a signal")
        return self._waiting.pop(actor, None) is None


# -- the store


class Fault(Enum):
    """What goes wrong with one store call."""

    UNAVAILABLE = "unavailable"  # no effect, StoreUnavailable
    LOST = "lost"  # takes effect, but the reply is lost: StoreUnavailable
    LATE = "late"  # StoreUnavailable after a time-out; takes effect later still
    RETRIED = "retried"  # takes effect, then the SDK repeats it and returns what the repetition got
    REFUSED = "refused"  # 409: Conflict, no effect
    TORN = "torn"  # the second half of a listing is as of a later moment
    NO_MEMORY = "no memory"  # MemoryError, before the request leaves
    KILLED_BEFORE = "killed before"  # the caller's process dies before the request leaves
    KILLED_AFTER = "killed after"  # the caller's process dies when the request takes effect


_EVERYWHERE = frozenset(
    {
        Fault.UNAVAILABLE,
        Fault.LOST,
        Fault.NO_MEMORY,
        Fault.KILLED_BEFORE,
        Fault.KILLED_AFTER,
    }
)
APPLIES = {
    "get": _EVERYWHERE,
    "list": _EVERYWHERE | {Fault.TORN},
    "put": _EVERYWHERE | {Fault.LATE, Fault.RETRIED},
    "create": _EVERYWHERE | {Fault.LATE, Fault.RETRIED, Fault.REFUSED},
    "replace": _EVERYWHERE | {Fault.LATE, Fault.RETRIED, Fault.REFUSED},
    "delete": _EVERYWHERE | {Fault.LATE, Fault.RETRIED},
    "upload": _EVERYWHERE,
    "download": _EVERYWHERE,
}
_WRITES = frozenset({"put", "create", "replace", "delete", "upload"})

READ_TIMEOUT = 30.0  # seconds after which a LATE call gives up
LATE_BY = 120.0  # at most so many seconds after that does it take effect
REQUEST_CPU = 0.0015  # seconds, as boto3 was measured to take them
KEY_CPU = 0.00007  # for each key of a listing, likewise
RETRY_WITHIN = 1.0  # the SDK waits up to so many seconds before it repeats


class Call(NamedTuple):
    """One store call, as a fault plan sees it."""

    process: str
    number: int  # among the process's calls, from 1
    op: str
    key: str  # a prefix if it lists, the first key if it deletes


FaultPlan: TypeAlias = Callable[[Call, random.Random], "Fault | None"]
Latency: TypeAlias = Callable[[str, random.Random], float]


def random_faults(chances: Mapping[Fault, float]) -> FaultPlan:
    """A fault plan: how probable each fault is for a call to which it applies."""
    total = sum(chances.values())

    def plan(call: Call, rng: random.Random) -> Fault | None:
        point = rng.random()
        if point >= total:
            return None
        for fault, chance in chances.items():
            point -= chance
            if point < 0:
                return fault if fault in APPLIES[call.op] else None
        return None

    return plan


def fault_at(process: str, number: int, fault: Fault) -> FaultPlan:
    """A fault plan that strikes once, at the n-th call of a process: for trying every n in turn."""

    def plan(call: Call, _: random.Random) -> Fault | None:
        return fault if call.process == process and call.number == number else None

    return plan


def s3_latency(op: str, rng: random.Random) -> float:
    """Seconds as S3 takes them: log-normal around 25 ms to write, 15 ms to read, 30 ms to list."""
    return _MEDIAN.get(op, 0.025) * rng.lognormvariate(0.0, 0.3)


_MEDIAN = {"get": 0.015, "download": 0.015, "list": 0.030}


class SimStore:
    """A `Store` in front of another, with latencies, faults and counts.

    Each effect is atomic and takes no time of its own, so the backing store must neither wait nor
    use threads.

    Args:
        sim: The world.
        backing: Where effects go.
        latency: Seconds from call to reply; the effect is half-way.
        faults: What goes wrong, if anything.
    """

    def __init__(
        self,
        sim: Simulation,
        backing: Store,
        latency: Latency = s3_latency,
        faults: FaultPlan | None = None,
    ) -> None:
        self.url = backing.url
        self.tally = backing.tally
        self.backing = backing
        self.faults = faults
        self.writer = ""  # the process whose request took effect last
        self.counts: Counter[str] = Counter()  # requests by operation, each repetition included
        self._sim = sim
        self._latency = latency
        self._random = sim.random_for("store")
        self._writes: list[tuple[float, str]] = []

    def get(
        self,
        key: str,
        *,
        start: int = 0,
        stop: int | None = None,
        unless: str | None = None,
    ) -> StoredObject | None:
        return self._call(
            "get",
            key,
            lambda: self.backing.get(key, start=start, stop=stop, unless=unless),
        )

    def put(self, key: str, data: Bytes) -> None:
        return self._call("put", key, lambda: self.backing.put(key, data))

    def create(self, key: str, data: Bytes) -> str:
        return self._call("create", key, lambda: self.backing.create(key, data))

    def replace(self, key: str, data: Bytes, version: str) -> str:
        return self._call("replace", key, lambda: self.backing.replace(key, data, version))

    def list(
        self, prefix: str, *, after: str = "", limit: int = 1000, delimiter: str = ""
    ) -> ListingPage:
        look = partial(self.backing.list, prefix, limit=limit, delimiter=delimiter)
        page = self._call("list", prefix, _Listing(look, after))
        self._sim.enter().cpu += KEY_CPU * len(page.entries)
        return page

    def delete(self, keys: Iterable[str]) -> None:
        doomed = list(keys)
        if doomed:
            self._call("delete", doomed[0], lambda: self.backing.delete(doomed))

    def upload(self, key: str, source: Path | Bytes) -> None:
        return self._call("upload", key, lambda: self.backing.upload(key, source))

    def download(self, key: str, target: Path) -> None:
        return self._call("download", key, lambda: self.backing.download(key, target))

    def close(self) -> None:
        """Nothing: the backing store may serve others."""

    def peak_writes(self, prefix: str = "", seconds: float = 1.0) -> int:
        """The most writes below `prefix`, with refused ones, in any window of so many seconds."""
        times = [when for when, key in self._writes if key.startswith(prefix)]
        return max(
            (
                position + 1 - bisect_right(times, when - seconds)
                for position, when in enumerate(times)
            ),
            default=0,
        )

    def _call(self, op: str, key: str, effect: Callable[[], T]) -> T:
        sim = self._sim
        actor = sim.enter()
        actor.process.requests += 1
        actor.cpu += REQUEST_CPU
        self.counts[op] += 1
        half = self._latency(op, self._random) / 2
        request = _Request(self, actor, op, key, effect, half)
        fault = None if self.faults is None else self._fault(request)
        if fault is None:
            sim.at(sim.now + request.half, request.land)
        else:
            sim.note(actor.name, op, key, fault.value)
            request.suffer(fault)
        sim.give_way(actor, op)
        value, error = actor.reply, actor.refusal
        actor.reply = actor.refusal = None
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def _fault(self, request: _Request) -> Fault | None:
        assert self.faults is not None
        process = request.actor.process
        call = Call(process.name, process.requests, request.op, request.key)
        fault = self.faults(call, self._random)
        if fault is not None and fault not in APPLIES[request.op]:
            raise ValueError(f"{fault} does not apply to {call}")
        return fault


class _Listing:
    """The effect of a listing, which may be had in two halves."""

    __slots__ = ("_after", "_begun", "_look")

    def __init__(self, look: partial[ListingPage], after: str) -> None:
        self._look = look
        self._after = after
        self._begun: list[ListedObject] = []

    def begin(self) -> None:
        """Fix the first half as of now; not with prefixes, which may fold keys of both halves."""
        page = self._look(after=self._after)
        if not page.prefixes:
            self._begun = page.entries[: len(page.entries) // 2]

    def __call__(self) -> ListingPage:
        begun = self._begun
        if not begun:
            return self._look(after=self._after)
        room = self._look.keywords["limit"] - len(begun)
        page = self._look(after=begun[-1].key, limit=room)
        return replace(page, entries=begun + page.entries)


class _Request:
    """One store call on its way."""

    __slots__ = ("actor", "effect", "half", "key", "op", "store", "turn")

    def __init__(
        self,
        store: SimStore,
        actor: Actor,
        op: str,
        key: str,
        effect: Callable[[], object],
        half: float,
    ) -> None:
        self.store = store
        self.actor = actor
        self.turn = actor.turn
        self.op = op
        self.key = key
        self.effect = effect
        self.half = half

    def land(self) -> None:
        """Take effect, and send the reply."""
        self.answer(*self.apply())

    def apply(self) -> tuple[object, Exception | None]:
        sim = self.store._sim
        value, error = None, None
        self.store.writer = self.actor.process.name
        try:
            value = self.effect()
        except AssertionError:
            raise  # a rule is broken: the run ends here, whatever its actors would make of it
        except Exception as e:
            error = e
        outcome = "ok" if error is None else type(error).__name__
        sim.trace.append((sim.now, self.actor.name, self.op, self.key, outcome))
        if self.op in _WRITES:
            self.store._writes.append((sim.now, self.key))
        return value, error

    def apply_unheard(self) -> None:
        """Take effect, though nobody learns how that went."""
        _, error = self.apply()
        if error is not None and not isinstance(error, StoreError):
            raise error

    def answer(self, value: object, error: Exception | None) -> None:
        actor = self.actor
        if actor.turn == self.turn:
            actor.reply, actor.refusal = value, error
            sim = self.store._sim
            sim._wake(actor, self.turn, sim.now + self.half)

    def suffer(self, fault: Fault) -> None:
        """Go on as `fault` has it."""
        getattr(self, f"_{fault.name.lower()}")()

    def _later(self, seconds: float, step: Callable[[], object]) -> None:
        sim = self.store._sim
        sim.at(sim.now + seconds, step)

    def _no_answer(self) -> None:
        message = f"{self.op} of {self.key}: no plain answer (simulated)"
        self.answer(None, StoreUnavailable(message))

    def _no_memory(self) -> None:
        self.answer(None, MemoryError(f"{self.op} of {self.key} (simulated)"))

    def _unavailable(self) -> None:
        self._later(self.half, self._no_answer)

    def _refused(self) -> None:
        conflict = Conflict(f"{self.op} of {self.key}: 409 (simulated)")
        self._later(self.half, partial(self.answer, None, conflict))

    def _lost(self) -> None:
        self._later(self.half, self.apply_unheard)
        self._later(self.half, self._no_answer)

    def _late(self) -> None:
        late_by = LATE_BY * self.store._random.random()
        self._later(READ_TIMEOUT, self._no_answer)
        self._later(READ_TIMEOUT + self.half + late_by, self.apply_unheard)

    def _retried(self) -> None:
        pause = RETRY_WITHIN * self.store._random.random()
        self.store.counts[self.op] += 1
        self._later(self.half, self.apply_unheard)
        self._later(self.half + pause, self.land)

    def _torn(self) -> None:
        assert isinstance(self.effect, _Listing)
        self._later(self.half, self.effect.begin)
        self._later(2 * self.half, self.land)

    def _killed_before(self) -> None:
        self.store._sim.kill(self.actor)

    def _killed_after(self) -> None:
        self._later(self.half, self.apply_unheard)
        self._later(self.half, partial(self.store._sim.kill, self.actor))

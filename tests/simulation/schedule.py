"""Random schedules as plain data, drawn from a seed, so that what is in one can be taken out."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from enum import StrEnum

from tests.simulation.kernel import Fault
from tests.simulation.world import Work

__all__ = ["Kind", "Round", "Schedule", "Trouble", "Visit", "What", "drawn"]


class Kind(StrEnum):
    """How a schedule ends.

    `attended`: everybody dies, and somebody comes back. `watched`: the clients stay until all is
    done. `unwatched`: they all detach, and the workers must finish by themselves. `deleted`: a
    client deletes the session in the middle of it all.
    """

    ATTENDED = "attended"
    WATCHED = "watched"
    UNWATCHED = "unwatched"
    DELETED = "deleted"


class What(StrEnum):
    """What befalls a process, or several."""

    STOP = "a worker gets SIGTERM"
    JUMP = "a wall clock jumps"
    STALL_WORKER = "a worker gets SIGSTOP"
    STALL_CLIENT = "a client gets SIGSTOP"
    SLEEP = "all sleep, and wake one by one"
    CRASH_SPARE = "a worker dies that others can do without"
    CRASH_WORKER = "a worker dies"
    CRASH_CLIENT = "a client dies"


_ANYWHERE = (What.STOP, What.JUMP, What.STALL_WORKER, What.STALL_CLIENT, What.SLEEP)
_TROUBLES = {
    Kind.ATTENDED: (*_ANYWHERE, What.CRASH_WORKER, What.CRASH_CLIENT),
    Kind.WATCHED: (*_ANYWHERE, What.CRASH_WORKER),
    Kind.UNWATCHED: (*_ANYWHERE, What.CRASH_SPARE),
    Kind.DELETED: (*_ANYWHERE, What.CRASH_WORKER, What.CRASH_CLIENT),
}
_GENTLE = (
    Fault.UNAVAILABLE,
    Fault.LOST,
    Fault.RETRIED,
    Fault.REFUSED,
    Fault.TORN,
    Fault.LATE,
    Fault.NO_MEMORY,
)
_DEADLY = (Fault.KILLED_BEFORE, Fault.KILLED_AFTER)
_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Something that happens to processes at a time.

    Attributes:
        at: When.
        what: What.
        which: To whom: a number that is taken modulo those there are then.
        seconds: For how long, or by how much.
    """

    at: float
    what: What
    which: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Tasks submitted together, and what becomes of them."""

    works: tuple[Work, ...]
    pause: float = 0.0  # seconds after it
    cancelled: tuple[int, ...] = ()  # by position
    running: bool = False  # cancelled even if they run


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One client."""

    at: float = 0.0
    rounds: tuple[Round, ...] = ()
    detaches: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Everything that happens, but for what the seed decides: latencies, delays, jitter.

    Attributes:
        chances: How probable each fault is for a call of the store.
        deaths: How many of the deadly ones there are at most.
        struck: The faults instead: process, number of its call, fault.
    """

    seed: int
    kind: Kind
    quiet_at: float = 60.0  # the faults and troubles stop
    workers: int = 2
    slots: int = 1
    max_attempts: int = 3
    idle_timeout: float = 300.0
    task_timeout: float | None = None
    knows: bool = True
    lag: float = 0.0
    skew: float = 0.0
    visits: tuple[Visit, ...] = (Visit(),)
    troubles: tuple[Trouble, ...] = ()
    chances: tuple[tuple[Fault, float], ...] = ()
    deaths: int = 0
    struck: tuple[tuple[str, int, Fault], ...] | None = None

    def __str__(self) -> str:
        """As Python has it."""
        text = re.sub(r"<(Fault|What|Kind)\.(\w+): [^>]*>", r"\1.\2", repr(self))
        return text.replace("Schedule(", "Schedule(\n    ", 1)


def drawn(seed: int, kind: Kind) -> Schedule:
    """The schedule that follows from a seed."""
    rng = random.Random(f"schedule/{kind}/{seed}")
    quiet_at = rng.choice([20.0, 60.0, 200.0])
    crashes = kind in (Kind.ATTENDED, Kind.DELETED)
    knows = rng.random() < 0.6
    return Schedule(
        seed=seed,
        kind=kind,
        quiet_at=quiet_at,
        workers=rng.randint(2, 5),
        slots=rng.choice([1, 1, 1, 2]),
        max_attempts=rng.choice([1, 2, 3]),
        idle_timeout=rng.choice([30.0, 300.0]),
        task_timeout=rng.choice([None, None, 20.0]),
        knows=knows,
        lag=rng.choice([0.0, 0.0, 1.0, 30.0, 60.0]) if knows else 0.0,
        skew=rng.choice([0.0, 0.0, 5.0, _HOUR]),
        visits=_visits(rng, kind, quiet_at),
        troubles=tuple(_trouble(rng, kind, quiet_at) for _ in range(rng.randint(0, 5))),
        chances=_chances(rng, kind),
        deaths=rng.randint(0, 4) if crashes else 0,
    )


def _chances(rng: random.Random, kind: Kind) -> tuple[tuple[Fault, float], ...]:
    kinds = rng.sample(_GENTLE, rng.randint(0, len(_GENTLE)))
    unwanted = {Fault.LATE, Fault.NO_MEMORY} if kind is Kind.UNWATCHED else set()
    chances = {fault: rng.choice([0.003, 0.02, 0.05]) for fault in kinds if fault not in unwanted}
    if Fault.NO_MEMORY in chances:
        chances[Fault.NO_MEMORY] = 0.001
    if kind in (Kind.ATTENDED, Kind.DELETED):
        chances |= dict.fromkeys(_DEADLY, rng.choice([0.0, 0.002]))
    return tuple(chances.items())


def _trouble(rng: random.Random, kind: Kind, quiet_at: float) -> Trouble:
    what = rng.choice(_TROUBLES[kind])
    seconds = 0.0
    if what is What.JUMP:
        seconds = rng.choice([-4000.0, -3.0, 3.0, 4000.0])
    elif what in (What.STALL_WORKER, What.STALL_CLIENT):
        seconds = rng.choice([1.0, 30.0, 70.0, 100.0, 400.0, _HOUR, 3 * _HOUR])
    elif what is What.SLEEP:
        seconds = rng.choice([50.0, 130.0, _HOUR])
    return Trouble(at=rng.uniform(1, quiet_at), what=what, which=rng.randrange(60), seconds=seconds)


def _visits(rng: random.Random, kind: Kind, quiet_at: float) -> tuple[Visit, ...]:
    visits = []
    for number in range(rng.randint(1, 3)):
        submits = number == 0 or rng.random() < 0.7
        detaches = rng.random() < {Kind.WATCHED: 0.0, Kind.UNWATCHED: 1.0}.get(kind, 0.4)
        poison = kind is not Kind.UNWATCHED
        rounds = tuple(_round(rng, poison) for _ in range(rng.randint(1, 3) if submits else 0))
        at = rng.uniform(0, quiet_at) if number else 0.0
        visits.append(Visit(at=at, rounds=rounds, detaches=detaches))
    return tuple(visits)


def _round(rng: random.Random, poison: bool) -> Round:
    works = tuple(_work(rng, poison) for _ in range(rng.randint(1, 12)))
    cancelled: tuple[int, ...] = ()
    if rng.random() < 0.3:
        cancelled = tuple(rng.sample(range(len(works)), rng.randint(1, len(works))))
    return Round(
        works=works,
        pause=rng.choice([0.0, 0.03, 1.0, 10.0]),
        cancelled=cancelled,
        running=rng.random() < 0.5,
    )


def _work(rng: random.Random, poison: bool) -> Work:
    return Work(
        seconds=rng.choice([0.01, 0.1, 0.1, 1.0, 3.0, 3.0, 30.0]),
        raises=rng.random() < 0.1,
        poison=poison and rng.random() < 0.01,
        size=rng.choice([0, 0, 300, 20_000]),
    )

"""Takes out of a failing schedule whatever it fails without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from tests.simulation.chaos import Chaos
from tests.simulation.schedule import Schedule, Visit

__all__ = ["failure_of", "shrink"]

T = TypeVar("T")


def failure_of(schedule: Schedule) -> tuple[Exception | None, Chaos]:
    """How a schedule fails; None if it does not."""
    chaos = Chaos(schedule)
    try:
        chaos.play()
    except Exception as error:
        return error, chaos
    return None, chaos


def shrink(schedule: Schedule, *, tries: int = 400) -> Schedule:
    """A smaller schedule that fails with the same kind of error, after at most so many tries."""
    error, chaos = failure_of(schedule)
    assert error is not None, "it does not fail"
    kind = type(error)

    def fails(smaller: Schedule) -> bool:
        return type(failure_of(smaller)[0]) is kind

    told = chaos.as_played()
    if not fails(told):
        return schedule
    smallest, going = told, True
    while going:
        going = False
        for smaller in _smaller(smallest):
            if not tries:
                return smallest
            tries -= 1
            if fails(smaller):
                smallest, going = smaller, True
                break
    return smallest


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    """Schedules with something less; the largest pieces first."""
    for struck in _parts(schedule.struck or ()):
        yield replace(schedule, struck=struck)
    for troubles in _parts(schedule.troubles):
        yield replace(schedule, troubles=troubles)
    for visits in _parts(schedule.visits[1:]):
        yield replace(schedule, visits=(schedule.visits[0], *visits))
    for number, visit in enumerate(schedule.visits):
        for less in _smaller_visits(visit):
            visits = (*schedule.visits[:number], less, *schedule.visits[number + 1 :])
            yield replace(schedule, visits=visits)
    for name, plain in _plain(schedule):
        if getattr(schedule, name) != plain:
            yield replace(schedule, **{name: plain})


def _smaller_visits(visit: Visit) -> Iterator[Visit]:
    for rounds in _parts(visit.rounds):
        yield replace(visit, rounds=rounds)
    for number, one in enumerate(visit.rounds):
        before, after = visit.rounds[:number], visit.rounds[number + 1 :]
        if one.cancelled:
            yield replace(visit, rounds=(*before, replace(one, cancelled=()), *after))
        for count in (len(one.works) // 2, len(one.works) - 1):
            if 0 < count < len(one.works):
                kept = tuple(position for position in one.cancelled if position < count)
                less = replace(one, works=one.works[:count], cancelled=kept)
                yield replace(visit, rounds=(*before, less, *after))


def _parts(whole: Sequence[T]) -> Iterator[tuple[T, ...]]:
    """The whole without its halves, quarters and so on, in turn."""
    size = len(whole)
    while size:
        for start in range(0, len(whole), size):
            yield (*whole[:start], *whole[start + size :])
        size //= 2


def _plain(schedule: Schedule) -> list[tuple[str, Any]]:
    names = ("lag", "skew", "slots", "task_timeout", "workers", "max_attempts")
    return [(one.name, one.default) for one in fields(schedule) if one.name in names]

"""What is left of a failing schedule."""

from __future__ import annotations

from dataclasses import replace

from tests.simulation.kernel import Fault
from tests.simulation.mutants import MUTANTS
from tests.simulation.schedule import Kind, Round, Schedule, Trouble, Visit, What, drawn
from tests.simulation.shrink import failure_of, shrink
from tests.simulation.world import Work


def test_only_what_makes_a_schedule_fail_is_left_of_it() -> None:
    (mutant,) = (one for one in MUTANTS if one.name == "a hand-back counts as a loss")
    long = Round(works=(Work(seconds=30), Work(seconds=3), Work()))
    schedule = Schedule(
        seed=1,
        kind=Kind.UNWATCHED,
        slots=2,
        skew=5.0,
        visits=(Visit(rounds=(long, long), detaches=True), Visit(at=5, detaches=True)),
        troubles=(
            Trouble(at=8, what=What.JUMP, seconds=3),
            Trouble(at=10, what=What.STOP),
            Trouble(at=12, what=What.STALL_CLIENT, seconds=10),
        ),
        chances=((Fault.LOST, 0.02),),
    )
    assert failure_of(schedule)[0] is None
    with mutant.applied():
        small = shrink(schedule)
        assert failure_of(small)[0] is not None
    assert [trouble.what for trouble in small.troubles] == [What.STOP]
    assert not small.struck
    assert len(small.visits) == 1
    assert (small.slots, small.skew) == (1, 0.0)


def test_a_schedule_is_printed_as_what_makes_it_again() -> None:
    for kind in Kind:
        schedule = replace(drawn(3, kind), struck=(("c0", 7, Fault.LATE),))
        assert eval(str(schedule), globals()) == schedule

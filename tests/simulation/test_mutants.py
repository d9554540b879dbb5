"""Every rule of the protocol has a test that fails without it."""

from __future__ import annotations

import pytest

from starburst_executor.protocol import transitions
from tests.simulation.mutants import MUTANTS
from tests.simulation.mutation import Edit, Mutant, StaleMutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_the_suite_notices_that_a_rule_is_missing(mutant: Mutant) -> None:
    verdict = mutant.judge()
    assert verdict.killed, f"{mutant.killer} passes without the rule"


def test_a_mutant_whose_rule_was_reworded_says_so() -> None:
    edit = Edit("protocol.transitions:_holds", "what is not there", "")
    with pytest.raises(StaleMutant, match="0 times"), edit.applied():
        pass
    with pytest.raises(StaleMutant, match="there is no"), Edit("protocol.no:x", "", "").applied():
        pass


def test_nothing_is_left_of_a_mutant_afterwards() -> None:
    before = [getattr(transitions, name).__code__ for name in ("_holds", "_choose", "_back")]
    for mutant in MUTANTS:
        with mutant.applied():
            pass
    after = [getattr(transitions, name).__code__ for name in ("_holds", "_choose", "_back")]
    assert after == before

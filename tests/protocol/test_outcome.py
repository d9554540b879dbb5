"""The outcomes of tasks as they are stored."""

from __future__ import annotations

import pytest

from starburst_executor.errors import DamagedObject
from starburst_executor.protocol.outcome import Failure, Outcome, decode_outcome, encode_outcome


def test_an_outcome_survives_the_round_trip() -> None:
    for outcome in (
        Outcome(value=b"cargo"),
        Outcome(failure=Failure(kind="crashed", exit_code=1, stderr="\N{SNOWMAN}")),
    ):
        assert decode_outcome(encode_outcome(outcome)) == outcome


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"junk", encode_outcome(Outcome(value=b"x" * 50))[:-1]]
)
def test_a_damaged_outcome_is_recognised(data: bytes) -> None:
    with pytest.raises(DamagedObject, match="outcome of a task"):
        decode_outcome(data)


def test_an_outcome_is_never_both_and_never_neither() -> None:
    with pytest.raises(ValueError, match="either a value or a failure"):
        Outcome()
    with pytest.raises(ValueError, match="either a value or a failure"):
        Outcome(value=b"", failure=Failure(kind="lost"))

"""How a task ended: its value, or why it has none.

A *failure* is what remains of a task that ended without a value; an *outcome* is either of the two.
Reading an outcome unpickles nothing.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from starburst_executor.errors import (
    DamagedObject,
)
from starburst_executor.protocol.payload import ENCODER, Data

__all__ = ["Failure", "Outcome", "decode_outcome", "encode_outcome"]


FailureKind: TypeAlias = Literal[
    "raised",
    "crashed",
    "timeout",
    "lost",
    "initializer",
    "unserializable",
    "damaged",
]


class Failure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a task has no value, with everything needed to raise it on the client."""

    kind: FailureKind
    type: str = ""  # qualified name of the exception's class
    message: str = ""
    traceback: str = ""
    cargo: bytes | None = None  # the exception; None if it cannot travel
    exit_code: int | None = None
    signal: int | None = None
    stderr: str = ""  # the last lines that the task's process wrote


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a task ended: the cargo of its value, or a failure."""

    value: bytes | None = None
    failure: Failure | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.failure is None):
            raise ValueError("an outcome is either a value or a failure")


_outcomes = msgspec.msgpack.Decoder(Outcome)


def encode_outcome(outcome: Outcome) -> bytes:
    """Encode an outcome as bytes."""
    return ENCODER.encode(outcome)


def decode_outcome(data: Data) -> Outcome:
    """Decode what `encode_outcome` encoded; unpickles nothing.

    Raises:
        DamagedObject: the bytes are something else.
    """
    try:
        return _outcomes.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedObject(
            f"{len(data)} bytes that should be the outcome of a task are truncated or "
            f"something else ({error})"
        ) from error

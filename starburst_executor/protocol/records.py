"""The state of every task of a batch."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Self

from starburst_executor.protocol.codec import SCHEMA, Stored, decodable

__all__ = ["PastAttempt", "Piece", "Record", "State", "Task"]


class State(StrEnum):
    """State of a task.

    `claimed` means only that a worker has promised to look at it; `running`, that its start was
    recorded, which for a task of a second or two happens together with its end.
    """

    PENDING = "pending"
    CLAIMED = "claimed"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing can change it any more."""
        return self in _FINAL

    @property
    def held(self) -> bool:
        """Whether a worker has it."""
        return self is State.CLAIMED or self is State.RUNNING


_FINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED})


class Piece(Stored, frozen=True, kw_only=True):
    """Some bytes of a task: in the record itself, or a part of a pack of results."""

    inline: bytes = b""
    pack: str = ""
    start: int = 0
    size: int = 0


class PastAttempt(Stored, frozen=True, kw_only=True):
    """An attempt that did not end the task."""

    attempt: int
    worker: str
    claimed: float
    started: float = 0
    ended: float
    how: str  # "lost" or "handed back"


class Task(Stored, frozen=True, kw_only=True):
    """State of one task. Times are UTC seconds by the clock of whoever made the step."""

    state: State = State.PENDING
    attempt: int = 0  # claims so far
    lost: int = 0  # times its worker was lost, at whatever state
    losses: int = 0  # of these, while running: the ones that count
    worker: str = ""
    claimed: float = 0
    started: float = 0
    ended: float = 0
    past: tuple[PastAttempt, ...] = ()
    outcome: Piece | None = None
    stdout: Piece | None = None
    stderr: Piece | None = None


@decodable
class Record(Stored, frozen=True, kw_only=True):
    """State of every task of a batch. `nonce` makes the bytes of each write unlike all others."""

    schema: int = SCHEMA
    nonce: str = ""
    round: int = 0  # how often tasks of it went back to pending
    tasks: tuple[Task, ...]

    @classmethod
    def fresh(cls, count: int, withdrawn: Collection[int] = ()) -> Self:
        """The record of a batch that nobody has touched: all pending, but for the withdrawn."""
        tasks = (_WITHDRAWN if i in withdrawn else _PENDING for i in range(count))
        return cls(tasks=tuple(tasks))

    def count(self, state: State) -> int:
        """How many tasks are in that state."""
        return sum(task.state is state for task in self.tasks)

    @property
    def finished(self) -> bool:
        """Whether every task is final."""
        return all(task.state in _FINAL for task in self.tasks)


_PENDING = Task()

_WITHDRAWN = Task(state=State.CANCELLED)

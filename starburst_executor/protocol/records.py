"""The state of every task of a batch."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Self

from starburst_executor.protocol.bounds import Count, Moment
from starburst_executor.protocol.codec import SCHEMA, Stored, decodable

__all__ = ["Interruption", "PastAttempt", "Piece", "Record", "State", "Task"]


class State(StrEnum):
    """State of a task.

    `claimed` means only that a worker has reserved it; `running` that its start was recorded,
    which for a task of a second or two happens in the same write as its end.
    """

    PENDING = "pending"
    CLAIMED = "claimed"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether it can never change again."""
        return self in _FINAL

    @property
    def held(self) -> bool:
        """Whether a worker holds it."""
        return self is State.CLAIMED or self is State.RUNNING


_FINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED})


class Piece(Stored, frozen=True, kw_only=True):
    """Some bytes of a task: inline in the record, or a range of a pack of results."""

    inline: bytes = b""
    pack: str = ""
    start: Count = 0
    size: Count = 0


class Interruption(StrEnum):
    """Why an attempt stopped before its task was final."""

    LOST = "lost"
    HANDED_BACK = "handed back"


class PastAttempt(Stored, frozen=True, kw_only=True):
    """An attempt that was interrupted, so that the task went back to pending."""

    attempt: Count
    worker: str
    claimed: Moment
    started: Moment = 0
    ended: Moment
    how: Interruption


class Task(Stored, frozen=True, kw_only=True):
    """State of one task. Times are UTC seconds by the clock of the process that made the change."""

    state: State = State.PENDING
    attempt: Count = 0  # claims so far
    lost: Count = 0  # times its worker was lost, in any state
    losses: Count = 0  # of these, while running: only these count toward the limit
    worker: str = ""
    claimed: Moment = 0
    started: Moment = 0
    ended: Moment = 0
    past: tuple[PastAttempt, ...] = ()
    outcome: Piece | None = None
    stdout: Piece | None = None
    stderr: Piece | None = None


@decodable
class Record(Stored, frozen=True, kw_only=True):
    """State of every task of a batch. `nonce` makes the bytes of each write unique."""

    schema: int = SCHEMA
    nonce: str = ""
    round: Count = 0  # how many times any of its tasks went back to pending
    tasks: tuple[Task, ...]

    @classmethod
    def fresh(cls, count: int, withdrawn: Collection[int] = ()) -> Self:
        """The record of an untouched batch: every task pending, except those withdrawn."""
        tasks = (_WITHDRAWN if i in withdrawn else _PENDING for i in range(count))
        return cls(tasks=tuple(tasks))

    def count(self, state: State) -> int:
        """How many tasks are in a state."""
        return sum(task.state is state for task in self.tasks)

    @property
    def finished(self) -> bool:
        """Whether every task is final."""
        return all(task.state in _FINAL for task in self.tasks)


_PENDING = Task()

_WITHDRAWN = Task(state=State.CANCELLED)

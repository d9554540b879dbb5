"""The names of a session's objects, and of batches and tasks.

A *batch* is the tasks stored by one write. Its name, `{lane}-{number}.{size}`, says which lane and
numbers it holds, so that a listing shows the size of a session and whether anything is missing.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Self

__all__ = ["MAX_BATCH_TASKS", "Batch", "before", "lane_prefix", "parse_task_id", "task_id"]


# A larger batch would make each compare-and-swap of its record slow; a smaller one would
# spend a request on fewer tasks.
MAX_BATCH_TASKS = 256


class Batch(NamedTuple):
    """The tasks written by one PUT: numbers `number` to `number + size - 1` of a lane."""

    lane: int
    number: int
    size: int

    def __str__(self) -> str:
        return f"{self.lane:04d}-{self.number:08d}.{self.size}"

    @property
    def end(self) -> int:
        """The number after the last."""
        return self.number + self.size

    @property
    def tasks_key(self) -> str:
        """Header and arguments; created once. Sorts after every other key of the batch."""
        return f"queue/{self}/tasks"

    @property
    def record_key(self) -> str:
        """State of every task; changed only by compare-and-swap."""
        return f"queue/{self}/record"

    def marker_key(self, marker: str) -> str:
        """An empty object whose name is a fact about the record."""
        return f"queue/{self}/{marker}"

    def pack_key(self, nonce: str) -> str:
        """Outcomes of one write that were too large for the record."""
        return f"results/{self}/{nonce}"

    def live_log_key(self, position: int, attempt: int) -> str:
        """What a running task has printed so far."""
        return f"logs/{self}/{position}.{attempt}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The batch with that name, or None if it is not a batch's name."""
        match = _BATCH_NAME.fullmatch(name)
        batch = cls(*map(int, match.groups())) if match else None
        return batch if batch and batch.size <= MAX_BATCH_TASKS else None


_BATCH_NAME = re.compile(r"([0-9]{4})-([0-9]{8})\.([1-9][0-9]{0,2})")
_TASK_ID = re.compile(r"([0-9]{1,4})-([0-9]{1,8})")


def task_id(lane: int, number: int) -> str:
    """The public id of a task, such as `0-17`; unique within its session."""
    return f"{lane}-{number}"


def parse_task_id(text: str) -> tuple[int, int]:
    """Lane and number of a task id.

    Raises:
        ValueError: it is not a task id.
    """
    match = _TASK_ID.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a task id; one looks like '0-17' (lane 0, task 17)")
    return int(match[1]), int(match[2])


def lane_prefix(lane: int) -> str:
    """The prefix of all keys of a lane."""
    return f"queue/{lane:04d}-"


def before(lane: int, number: int) -> str:
    """A key just before those of the batch that starts at `number`."""
    return f"queue/{lane:04d}-{number:08d}"

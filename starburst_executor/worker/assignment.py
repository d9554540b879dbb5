"""What a worker holds of one batch, from the claim until its end is written.

    waiting ------> dispatched ------> uploading ------> ended ------> written
    claimed         to a slot          large results     not yet
                                       on their way      written

A worker holds what the record says it holds, whether or not a reply said so; tasks that the record
no longer assigns to it were cancelled or taken over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from starburst_executor.protocol import transitions
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.records import Piece, State, Task
from starburst_executor.protocol.session import TasksObject, VersionedRecord
from starburst_executor.protocol.transitions import AttemptEnd

__all__ = ["Assignment", "AttemptKey", "packed"]

_PACKED_FROM = 256  # bytes; smaller pieces are as cheap in the record


class AttemptKey(NamedTuple):
    """One attempt, as the child pool knows it."""

    batch: Batch
    position: int
    attempt: int


@dataclass(slots=True)
class Assignment:
    """A batch of which this worker holds, last held, or may unknowingly have claimed tasks."""

    batch: Batch
    tasks: TasksObject
    known: VersionedRecord
    marked: set[str]
    waiting: dict[int, AttemptKey] = field(default_factory=dict)
    dispatched: dict[int, AttemptKey] = field(default_factory=dict)
    uploading: dict[int, AttemptKey] = field(default_factory=dict)
    ended: dict[int, AttemptEnd] = field(default_factory=dict)
    claimed_at: dict[int, float] = field(default_factory=dict)  # monotonic
    committed_at: float = 0.0  # monotonic time of the last write
    # Versions seen since a write of claims had no plain answer; None: none is in doubt.
    doubt: set[str | None] | None = None

    @property
    def busy(self) -> bool:
        """Whether anything of it is unfinished or unwritten."""
        return bool(self.waiting or self.dispatched or self.uploading or self.ended)

    @property
    def settled(self) -> bool:
        """Whether the worker holds nothing of it for certain."""
        return not self.busy and self.doubt is None

    @property
    def queued(self) -> list[AttemptKey]:
        """What is yet to run, or is running."""
        return [*self.waiting.values(), *self.dispatched.values()]

    def task(self, key: AttemptKey) -> Task:
        """A task as the record has it."""
        return self.known.record.tasks[key.position]

    def claimed(self, key: AttemptKey) -> bool:
        """Whether the record does not say yet that it is running."""
        return self.task(key).state is State.CLAIMED

    def function(self, position: int) -> str:
        """Digest of the callable of a task."""
        header = self.tasks.header
        return header.functions[header.calls[position].function]

    def accept(self, known: VersionedRecord, worker: str, now: float) -> list[AttemptKey]:
        """Hold what the record says the worker holds.

        Args:
            known: The record as it is now.
            worker: This worker's id.
            now: Seconds on the monotonic clock.

        Returns:
            What is no longer the worker's and is forgotten here: it must not run, or be stopped.
        """
        self.known = known
        self._settle_doubt()
        held = transitions.held_by(known.record, worker)
        gone = [
            key
            for part in (self.waiting, self.dispatched, self.uploading)
            for key in part.values()
            if held.get(key.position) != key.attempt
        ]
        for key in gone:
            for part in (self.waiting, self.dispatched, self.uploading):
                part.pop(key.position, None)
        for position, finish in list(self.ended.items()):
            if held.get(position) != finish.attempt:
                del self.ended[position]
        mine = {*self.waiting, *self.dispatched, *self.uploading, *self.ended}
        for position in sorted(held.keys() - mine):
            self.waiting[position] = AttemptKey(self.batch, position, held[position])
            self.claimed_at[position] = now
        return gone

    def _settle_doubt(self) -> None:
        """A write that had no answer can no longer land once the version has changed."""
        if self.doubt is not None:
            self.doubt.add(self.known.version)
            if len(self.doubt) > 1 or self.known.record.finished:
                self.doubt = None


def packed(finishes: Iterable[AttemptEnd], nonce: str) -> tuple[list[AttemptEnd], bytes]:
    """The ends with their larger pieces moved into a pack of that name, and the pack."""
    pack: list[bytes] = []
    offset = 0

    def place(piece: Piece | None) -> Piece | None:
        nonlocal offset
        if piece is None or len(piece.inline) < _PACKED_FROM:
            return piece
        pack.append(piece.inline)
        placed = Piece(pack=nonce, start=offset, size=len(piece.inline))
        offset += placed.size
        return placed

    moved = [
        finish._replace(
            outcome=place(finish.outcome) or finish.outcome,
            stdout=place(finish.stdout),
            stderr=place(finish.stderr),
        )
        for finish in finishes
    ]
    return moved, b"".join(pack)

"""What a worker holds of one batch, from the claim until its end is said.

    waiting ------> given ------> uploading ------> ended ------> said
    claimed         to a slot     large results     not yet
                                  on the way        written

A worker holds what the record says that it holds, whether or not a reply told it so; what the
record no longer names it for was cancelled or taken.
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

_PACKED_FROM = 256  # bytes; what is smaller is as cheap in the record


class AttemptKey(NamedTuple):
    """One attempt, as the slots know it."""

    batch: Batch
    position: int
    attempt: int


@dataclass(slots=True)
class Assignment:
    """A batch of which this worker holds tasks, held the last, or may have claimed some unawares."""

    batch: Batch
    tasks: TasksObject
    known: VersionedRecord
    marked: set[str]
    waiting: dict[int, AttemptKey] = field(default_factory=dict)
    given: dict[int, AttemptKey] = field(default_factory=dict)
    uploading: dict[int, AttemptKey] = field(default_factory=dict)
    ended: dict[int, AttemptEnd] = field(default_factory=dict)
    claimed_at: dict[int, float] = field(default_factory=dict)  # monotonic
    said_at: float = 0.0  # monotonic time of the last write
    # Versions seen since a write of claims had no plain answer; None: none is in doubt.
    doubt: set[str | None] | None = None

    @property
    def busy(self) -> bool:
        """Whether anything of it is unfinished or unsaid."""
        return bool(self.waiting or self.given or self.uploading or self.ended)

    @property
    def queued(self) -> list[AttemptKey]:
        """What is still to be run, or runs."""
        return [*self.waiting.values(), *self.given.values()]

    def task(self, key: AttemptKey) -> Task:
        """What the record says of a task."""
        return self.known.record.tasks[key.position]

    def claimed(self, key: AttemptKey) -> bool:
        """Whether the record does not say yet that it runs."""
        return self.task(key).state is State.CLAIMED

    def function(self, position: int) -> str:
        """Digest of the callable of a task."""
        header = self.tasks.header
        return header.functions[header.calls[position].function]

    def accept(self, known: VersionedRecord, worker: str, now: float) -> list[AttemptKey]:
        """Take over what the record says that the worker holds.

        Args:
            known: The record as it is now.
            worker: This worker's id.
            now: Seconds on the monotonic clock.

        Returns:
            What is no longer the worker's, and is forgotten here: not to be run, or to be stopped.
        """
        self.known = known
        self._settle_doubt()
        held = transitions.held_by(known.record, worker)
        gone = [
            key
            for part in (self.waiting, self.given, self.uploading)
            for key in part.values()
            if held.get(key.position) != key.attempt
        ]
        for key in gone:
            for part in (self.waiting, self.given, self.uploading):
                part.pop(key.position, None)
        for position, finish in list(self.ended.items()):
            if held.get(position) != finish.attempt:
                del self.ended[position]
        mine = {*self.waiting, *self.given, *self.uploading, *self.ended}
        for position in sorted(held.keys() - mine):
            self.waiting[position] = AttemptKey(self.batch, position, held[position])
            self.claimed_at[position] = now
        return gone

    def _settle_doubt(self) -> None:
        """A write that had no answer can land no more once the version has moved since."""
        if self.doubt is not None:
            self.doubt.add(self.known.version)
            if len(self.doubt) > 1 or self.known.record.finished:
                self.doubt = None


def packed(finishes: Iterable[AttemptEnd], nonce: str) -> tuple[list[AttemptEnd], bytes]:
    """The same ends with their larger pieces in a pack of that name, and the pack."""
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

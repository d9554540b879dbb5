"""How finished tasks ended: their outcomes, brought from the store and opened."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

from starburst_executor.client.future import Settled
from starburst_executor.errors import DamagedObject, StoreError
from starburst_executor.protocol import transitions
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.patience import Consequence, consequence
from starburst_executor.protocol.records import Piece, Record, Task
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.vanished import remains

__all__ = ["ResultReader"]


class ResultReader:
    """Brings outcomes from the store and opens them.

    Args:
        session: Where from.
        open_outcome: Batch, position, task, the outcome's bytes and the task's name -> how the task
            ended.
    """

    def __init__(
        self,
        session: Session,
        open_outcome: Callable[[Batch, int, Task, bytes, str], Settled],
    ) -> None:
        self._session = session
        self._open = open_outcome
        self._records: OrderedDict[Batch, Record] = OrderedDict()
        self._lock = threading.Lock()

    def settled(self, batch: Batch, position: int, task: Task, name: str = "") -> Settled:
        """How a final task ended; one whose outcome is damaged has failed.

        Raises:
            StoreError: the store is away, so that the outcome is not known yet.
        """
        assert task.outcome is not None
        try:
            data = self._session.get_piece(batch, task.outcome)
            return self._open(batch, position, task, data, name)
        except StoreError as error:
            if consequence(error) is Consequence.WAIT:
                raise
            return False, error

    def in_few_reads(self, batch: Batch, record: Record, ended: Iterable[int]) -> dict[int, Task]:
        """The tasks with packed outcomes made inline: one read for each pack, not for each task."""
        tasks = {position: record.tasks[position] for position in ended}
        packs: dict[str, list[int]] = {}
        for position, task in tasks.items():
            if task.outcome is not None and task.outcome.pack:
                packs.setdefault(task.outcome.pack, []).append(position)
        for pack, positions in packs.items():
            if len(positions) > 1:
                tasks |= self._read_pack(batch, pack, {p: tasks[p] for p in positions})
        return tasks

    def _read_pack(self, batch: Batch, pack: str, tasks: dict[int, Task]) -> dict[int, Task]:
        places = {p: task.outcome for p, task in tasks.items() if task.outcome is not None}
        start = min(piece.start for piece in places.values())
        stop = max(piece.start + piece.size for piece in places.values())
        try:
            data = self._session.get_piece(batch, Piece(pack=pack, start=start, size=stop - start))
        except DamagedObject:
            return {}  # each task's own read tells which of them can still be had
        return {
            p: transitions.inlined(
                tasks[p], data[piece.start - start : piece.start + piece.size - start]
            )
            for p, piece in places.items()
        }

    def later(self, batch: Batch, position: int) -> Settled:
        """How a task of a batch that is finished or gone ended; its record may be read now."""

        def once() -> Settled:
            task = self.record(batch).tasks[position]
            return self.settled(batch, position, task)

        return self._session.patiently(once)

    def record(self, batch: Batch) -> Record:
        """The record of a batch that is finished or gone; the last few are kept."""
        with self._lock:
            record = self._records.get(batch)
        if record is None:
            record = remains(self._session, batch, done=True)
            with self._lock:
                self._records[batch] = record
                while len(self._records) > 16:
                    self._records.popitem(last=False)
        return record

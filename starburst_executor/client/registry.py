"""One client's view of a session's futures.

Futures are held weakly: a finished task costs no memory until it is asked for.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from starburst_executor.client.future import TaskFuture
from starburst_executor.client.results import ResultReader
from starburst_executor.client.watcher import Watcher
from starburst_executor.protocol.keys import Batch, parse_task_id
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.task_names import NO_NAME, Name
from starburst_executor.protocol.vanished import lost, remains

__all__ = ["FutureRegistry"]


class FutureRegistry:
    """Creates futures, and finds existing ones.

    Args:
        session: The session.
        outcomes: Fetches the outcomes of finished tasks.
        watcher: Settles the futures of unfinished ones.
        cancel: Called by a future's `cancel`.
    """

    def __init__(
        self,
        session: Session,
        outcomes: ResultReader,
        watcher: Watcher,
        cancel: Callable[[TaskFuture[Any]], bool],
    ) -> None:
        self._session = session
        self._outcomes = outcomes
        self._watcher = watcher
        self._cancel = cancel
        self._queue = session.queue()
        self._lock = threading.RLock()
        self._next_index = 0
        self._first: dict[Batch, int] = {}  # index of a batch's first task
        self._done: dict[Batch, int] = {}  # finished batches: how many tasks were cancelled
        self._lost: set[Batch] = set()
        self._futures: weakref.WeakValueDictionary[tuple[int, int], TaskFuture[Any]] = (
            weakref.WeakValueDictionary()
        )

    def new(self, lane: int, number: int, name: Name = NO_NAME) -> TaskFuture[Any]:
        """The future of a task being submitted."""
        with self._lock:
            future = self._make(lane, number, self._next_index, name)
            self._next_index += 1
            return future

    def stored(self, batch: Batch, futures: dict[int, TaskFuture[Any]]) -> None:
        """Register a batch of this client's that has just been stored."""
        with self._lock:
            for position, future in futures.items():
                self._first.setdefault(batch, future.index - position)
        # Tasks cancelled before they were stored have already ended.
        watched = {p: f for p, f in futures.items() if not f.cancelled()}
        self._watcher.add(batch, watched)

    def take_in_others(self) -> None:
        """Register stored batches not known yet, and have unfinished ones watched.

        Batches that have lost their `tasks` since, or all their objects, are among them.
        """
        with self._lock:
            sights = {sight.batch: sight for sight in self._queue.look()}
            lanes = self._watcher.manifest.lanes
            self._lost = lost(self._queue, sights.keys(), lanes, self._first.keys())
            for batch in sorted({*sights, *self._lost}):
                known = batch in self._first
                if not known:
                    self._first[batch] = self._next_index
                    self._next_index += batch.size
                sight = sights.get(batch)
                if sight is not None and sight.done is not None:
                    self._done[batch] = sight.done[2]
                elif not known:
                    if sight is None and not self._held(batch):
                        self._done[batch] = batch.size  # how many were cancelled, its record tells
                    self._of(batch)

    def _held(self, batch: Batch) -> bool:
        return any(task.state.held for task in remains(self._session, batch).tasks)

    def lost(self, batch: Batch) -> bool:
        """Whether objects of a batch were gone at the last look, so that it is not listed."""
        return batch in self._lost

    def all(self) -> list[TaskFuture[Any]]:
        """The futures of all stored tasks, in submission order."""
        with self._lock:
            self.take_in_others()
            return [future for batch in self.batches() for future in self._of(batch)]

    def of(self, names: Collection[str]) -> list[TaskFuture[Any]]:
        """The futures of stored tasks, by their ids, in submission order."""
        wanted = [parse_task_id(name) for name in names]
        with self._lock:
            self.take_in_others()
            batches = [
                batch
                for batch in self.batches()
                if any(
                    lane == batch.lane and batch.number <= number < batch.end
                    for lane, number in wanted
                )
            ]
            futures = [future for batch in batches for future in self._of(batch)]
        return [future for future in futures if future.task_id in set(names)]

    def batches(self) -> list[Batch]:
        """The batches known to be stored, in submission order."""
        with self._lock:
            return sorted(self._first, key=lambda batch: self._first[batch])

    def first_index(self, batch: Batch) -> int:
        """Index of the first task of a known batch."""
        return self._first[batch]

    def living(self) -> list[TaskFuture[Any]]:
        """The futures that are still referenced."""
        with self._lock:
            return sorted(self._futures.values(), key=lambda future: future.index)

    def _of(self, batch: Batch) -> list[TaskFuture[Any]]:
        futures: list[TaskFuture[Any]] = []
        lost: dict[int, TaskFuture[Any]] = {}
        for position in range(batch.size):
            number = batch.number + position
            future = self._futures.get((batch.lane, number))
            if future is None:
                future = self._make(batch.lane, number, self._first[batch] + position)
                future.batch = batch
                lost[position] = future
            futures.append(future)
        if batch in self._done:
            self._settle_later(batch, lost)
        elif lost:
            self._watcher.add(batch, lost)
        return futures

    def _settle_later(self, batch: Batch, futures: dict[int, TaskFuture[Any]]) -> None:
        record = self._outcomes.record(batch) if self._done[batch] else None
        for position, future in futures.items():
            if record is not None and record.tasks[position].state is State.CANCELLED:
                future.settle_cancelled()
            else:
                future.settle_later(partial(self._outcomes.later, batch, position))

    def _make(self, lane: int, number: int, index: int, name: Name = NO_NAME) -> TaskFuture[Any]:
        future: TaskFuture[Any] = TaskFuture(
            self._session.id, lane, number, index, self._cancel, name
        )
        self._futures[lane, number] = future
        return future

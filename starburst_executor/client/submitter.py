"""The submitting half of a client: packs queued tasks into batches and stores them.

`submit` queues and returns. One thread packs what has accumulated and writes the batches in
parallel, so the number of requests depends on how long a request takes, not on the number of
tasks. The first task of an idle session is stored at once.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from starburst_executor.client.future import TaskFuture
from starburst_executor.errors import ExecutorBroken, StarburstError
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.task_names import NO_NAME, Name
from starburst_executor.protocol.tasks_object import (
    MAX_BATCH_BYTES,
    MAX_BATCH_TASKS,
    Queued,
    encode_tasks,
)

__all__ = ["QueuedTask", "Submitter"]

log = logging.getLogger(__name__)

_SIDE_BY_SIDE = 8  # batches written at once


@dataclass(slots=True)
class QueuedTask:
    """A queued task that is not stored yet."""

    future: TaskFuture[Any]
    function: str
    arguments: bytes | None  # None once it was cancelled
    light: bool  # the arguments reference no blob
    modules: Mapping[str, str]
    name: Name = NO_NAME


class Submitter:
    """Stores what one client submits, in its own lane.

    Args:
        session: The session.
        width: How many tasks can run at once when all workers are up.
        backlog: How many stored tasks have not started.
        stored: Called with a batch and its futures, by position, once it is stored.
        failed: Called with the error when storing is given up.
    """

    def __init__(
        self,
        session: Session,
        width: Callable[[], int],
        backlog: Callable[[], int],
        stored: Callable[[Batch, dict[int, TaskFuture[Any]]], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._session = session
        self._width = width
        self._backlog = backlog
        self._stored = stored
        self._failed = failed
        self._lock = threading.Lock()
        self._queue: deque[QueuedTask] = deque()
        self._storing: list[QueuedTask] = []  # taken from the queue, and not known to be stored
        self._functions: dict[str, bytes] = {}  # not stored yet
        self._known: set[str] = set()  # digests of callables that are stored, or will be shortly
        self._announced = 0  # tasks of a map that are still to come
        self._next = 0  # number of the next task to be packed
        self._wake = session.runtime.signal()
        self._idle = session.runtime.signal()
        self._idle.set()
        self._closed = False
        self._abandoned = session.runtime.signal()
        self._error: Exception | None = None
        self.certain = True  # no batch of the lane is in doubt, or being written
        self.lane = -1

    def begin(self, lane: int, number: int) -> None:
        """Submit into this lane, starting at this number."""
        self.lane = lane
        self._next = number

    @property
    def number(self) -> int:
        """The number after the last one packed."""
        return self._next

    def announce(self, count: int) -> None:
        """Expect this many more tasks to be added (or, if negative, fewer)."""
        with self._lock:
            self._announced += count
        self._wake.set()

    def add_function(self, digest: str, cargo: bytes) -> None:
        """Store a callable before any tasks added from now on."""
        with self._lock:
            if digest not in self._known:
                self._known.add(digest)
                self._functions[digest] = cargo

    def add(self, item: QueuedTask, *, announced: bool = False) -> None:
        """Queue a task."""
        with self._lock:
            if self._error is not None:
                raise self._error
            self._queue.append(item)
            self._announced -= announced
            self._idle.clear()
        self._wake.set()

    def withdraw(self, future: TaskFuture[Any]) -> bool:
        """Cancel a task that is still queued here; False if it no longer is."""
        with self._lock:
            # The queue holds consecutive numbers of the lane, starting at the next one.
            position = future.number - self._next
            if not 0 <= position < len(self._queue):
                return False
            item = self._queue[position]
            if item.future is not future:  # of another lane
                return False
            item.arguments = None
        future.settle_cancelled()
        return True

    def withdraw_all(self) -> None:
        """Cancel everything still queued here."""
        with self._lock:
            for item in self._queue:
                item.arguments = None
            futures = [item.future for item in self._queue]
        for future in futures:
            future.settle_cancelled()

    def flush(self) -> None:
        """Wait until everything added is stored.

        Raises:
            StoreError: it could not be.
        """
        self._wake.set()
        self._idle.wait()
        if self._error is not None:
            raise self._error

    @property
    def idle(self) -> bool:
        """Whether everything added is stored or was given up."""
        return self._idle.is_set()

    def wait_until_idle(self) -> None:
        """Wait until `idle`."""
        self._wake.set()
        self._idle.wait()

    def abandon(self, error: Exception) -> None:
        """Fail everything queued here or being written with an error, and refuse more.

        Tasks that were being written may still be stored and run, but without a future here.
        """
        with self._lock:
            self._error = self._error or error
            items = [*self._queue, *self._storing]
            self._queue.clear()
            self._idle.set()
        self._abandoned.set()
        for item in items:
            item.future.settle((False, error))
        self._wake.set()

    def close(self) -> None:
        """Have `run` return once everything is stored."""
        self._closed = True
        self._wake.set()

    def run(self) -> None:
        """Store what is queued until `close`; however it ends, waiters are released."""
        try:
            self._store_until_closed()
        except BaseException as error:
            self.abandon(_broken(self._session.id, error))
            raise
        finally:
            self._idle.set()

    def _store_until_closed(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while group := self._pack_group():
                self._store_group(group)
            with self._lock:
                if self._queue:
                    continue
                self._idle.set()
            if self._closed:
                return

    def _pack_group(self) -> list[tuple[Batch, list[QueuedTask]]]:
        with self._lock:
            size = self._batch_size()
            group: list[tuple[Batch, list[QueuedTask]]] = []
            while self._queue and len(group) < _SIDE_BY_SIDE and self._error is None:
                if len(self._queue) < min(size, self._announced):
                    break  # the rest of a map is still to come
                items = self._take(size)
                self._storing += items
                group.append((Batch(self.lane, self._next, len(items)), items))
                self._next += len(items)
            return group

    def _batch_size(self) -> int:
        """A quarter of each slot's share of all tasks not yet started, stored or not."""
        backlog = len(self._queue) + self._announced + self._backlog()
        return min(MAX_BATCH_TASKS, -(-backlog // (4 * max(1, self._width()))) or 1)

    def _take(self, size: int) -> list[QueuedTask]:
        items: list[QueuedTask] = []
        weight = 0
        while self._queue and len(items) < size:
            item = self._queue[0]
            weight += len(item.arguments or b"")
            if items and (weight > MAX_BATCH_BYTES or item.modules is not items[0].modules):
                break
            items.append(self._queue.popleft())
        return items

    def _store_group(self, group: list[tuple[Batch, list[QueuedTask]]]) -> None:
        self.certain = False
        try:
            self._store_functions()
            self._session.runtime.gather([partial(self._store, *one) for one in group])
        except StarburstError as error:
            self._give_up(error)
        except BaseException as error:  # e.g. out of memory, or of threads
            self._give_up(_broken(self._session.id, error))
        else:
            self.certain = True
        with self._lock:
            self._storing.clear()

    def _store(self, batch: Batch, items: list[QueuedTask]) -> None:
        calls = [Queued(i.function, i.arguments, i.name) for i in items]
        light = all(item.light for item in items)
        data = encode_tasks(calls, items[0].modules, light=light)
        self._outlast(partial(self._session.put_batch, batch, data))
        withdrawn = {i for i, call in enumerate(calls) if call.arguments is None}
        if withdrawn:
            self._outlast(partial(self._session.withdraw, batch, withdrawn))
        for item in items:
            item.future.batch = batch
        self._stored(batch, {i: item.future for i, item in enumerate(items)})

    def _store_functions(self) -> None:
        """Store callables before the tasks that reference them."""
        with self._lock:
            new, self._functions = self._functions, {}
        put = partial(self._session.put_content, "functions")
        puts = [partial(self._outlast, partial(put, cargo)) for cargo in new.values()]
        self._session.runtime.gather(puts)

    def _outlast(self, put: Callable[[], object]) -> None:
        """Repeat a write, same key and same bytes, through whatever may pass."""
        self._session.outlast(put, stop=self._abandoned)

    def _give_up(self, error: StarburstError) -> None:
        """End the lane here: its next number may or may not appear, so nothing may follow it."""
        if self._abandoned.is_set():
            return  # whoever abandoned it has said why
        log.error("session %s: tasks could not be stored: %s", self._session.id, error)
        self.abandon(error)
        self._failed(error)


def _broken(session_id: str, error: BaseException) -> ExecutorBroken:
    broken = ExecutorBroken(
        f"tasks of session {session_id} could not be stored because of an error in this process: "
        f"{error!r}. What was stored before is safe: "
        f"StarburstExecutor.attach({session_id!r}) picks it up."
    )
    broken.__cause__ = error
    return broken

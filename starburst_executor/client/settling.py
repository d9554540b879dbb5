"""The futures of stored tasks, settled from records as polls find them changed.

    batch -> futures by position, the record as last read, the listing as last seen

A future leaves the table once it is settled. A record whose outcomes could not all be read is read
again, so an outage of the store only delays them. A stored batch that whole listings no longer show
has lost its `tasks`: its record still settles futures, and those that no worker can end any more
fail.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starburst_executor.client.future import TaskFuture
from starburst_executor.client.results import ResultReader
from starburst_executor.errors import InitializerFailed, StarburstError
from starburst_executor.protocol import vanished
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.listing import BatchListing, QueueReader
from starburst_executor.protocol.patience import Consequence, consequence
from starburst_executor.protocol.records import Record, State, Task
from starburst_executor.protocol.session import Session, VersionedRecord
from starburst_executor.storage.base import ListedObject

__all__ = ["Settling"]

# A batch that is stored while a listing is being taken may be missing in that one.
_GONE_AFTER = 2  # listings


@dataclass(slots=True)
class _Waited:
    """A stored batch with futures that have not ended."""

    futures: dict[int, TaskFuture[Any]]
    known: VersionedRecord
    listing: BatchListing | None = None
    missed: int = 0  # successive whole listings that did not show it

    @property
    def gone(self) -> bool:
        """Whether it seems to have lost its `tasks`."""
        return self.missed >= _GONE_AFTER


class Settling:
    """Settles the futures of one client.

    Args:
        session: The session.
        queue: The known state of its queue.
        outcomes: Decodes outcomes.
        grace: Seconds until a record that newly appeared is read, unless its batch is done.
        broken: Called with a fatal error: an initializer failed.

    Attributes:
        run_time: Moving average of task run times in seconds; None until one has ended.
        unread: Why something could not be read at the last poll; None if all could.
    """

    def __init__(
        self,
        session: Session,
        queue: QueueReader,
        outcomes: ResultReader,
        grace: float,
        broken: Callable[[Exception], None],
    ) -> None:
        self._session = session
        self._queue = queue
        self._outcomes = outcomes
        self._grace = grace
        self._broken = broken
        self._runtime = session.runtime
        self._lock = threading.Lock()
        self._waited: dict[Batch, _Waited] = {}
        self._unfinished = 0
        self._idle = self._runtime.signal()
        self._idle.set()
        self._abandoned: BaseException | None = None  # why nothing is watched any more
        self.run_time: float | None = None
        self.unread: StarburstError | None = None

    @property
    def unfinished(self) -> int:
        """How many futures have not ended."""
        return self._unfinished

    def add(self, batch: Batch, futures: dict[int, TaskFuture[Any]]) -> None:
        """Add the futures of a stored batch; abandoned at once if all others were."""
        fresh = VersionedRecord(Record.fresh(batch.size), None)
        with self._lock:
            abandoned = self._abandoned
            if abandoned is None:
                self._watch(batch, futures, fresh)
        if abandoned is not None:
            _end(futures, abandoned)

    def _watch(
        self, batch: Batch, futures: dict[int, TaskFuture[Any]], fresh: VersionedRecord
    ) -> None:
        waited = self._waited.setdefault(batch, _Waited({}, fresh))
        self._unfinished += len(futures.keys() - waited.futures.keys())
        self._idle.clear()
        waited.futures.update(futures)
        waited.known = fresh  # read again: it may already settle these futures

    def pending_positions(self) -> dict[Batch, list[int]]:
        """Positions, by batch, of the futures not known to be running."""
        with self._lock:
            return {
                batch: [p for p, f in waited.futures.items() if not f.running()]
                for batch, waited in self._waited.items()
            }

    def learn(self, batch: Batch, known: VersionedRecord) -> None:
        """Use a record that was read or written elsewhere in this client."""
        with self._lock:
            waited = self._waited.get(batch)
        if waited is not None:
            self._take_in(batch, waited, known)

    def abandon(self, error: BaseException) -> None:
        """Fail every future with an error, including those added later."""
        with self._lock:
            self._abandoned = self._abandoned or error
            waited, self._waited = self._waited, {}
            self._unfinished = 0
        for one in waited.values():
            _end(one.futures, error)
        self._idle.set()

    def wait_until_idle(self) -> None:
        """Wait until every future has ended."""
        self._idle.wait()

    def records_seen(self) -> list[ListedObject]:
        """The records of unfinished batches, as last listed."""
        with self._lock:
            listings = [waited.listing for waited in self._waited.values()]
        return [listing.record for listing in listings if listing and listing.record]

    def gone(self) -> list[BatchListing]:
        """Batches that are not listed any more and whose records may name workers, as if listed."""
        with self._lock:
            known = {batch: waited.known for batch, waited in self._waited.items() if waited.gone}
        return [
            BatchListing(
                batch,
                record=ListedObject(
                    key=batch.record_key,
                    size=record.size,
                    version=record.version,
                    modified=self._queue.now,
                ),
            )
            for batch, record in known.items()
            if record.version is not None
        ]

    def read_changed(self, listings: dict[Batch, BatchListing]) -> bool:
        """Read records that changed, and settle ended tasks; whether there were any.

        Args:
            listings: What a whole listing showed.
        """
        self.unread = None
        with self._lock:
            changed = []
            for batch, waited in self._waited.items():
                listing = listings.get(batch) or waited.listing
                waited.listing = listing
                shown = batch in listings or self._queue.done(batch)
                waited.missed = 0 if shown else waited.missed + 1
                if waited.gone or self._worth_reading(batch, listing, waited.known):
                    changed.append((batch, waited))
        calls = [partial(self._read, batch, waited.known) for batch, waited in changed]
        reads = self._runtime.gather(calls)
        progress = False
        for (batch, waited), known in zip(changed, reads, strict=True):
            if known is not None:
                progress = self._take_in(batch, waited, known) or progress
                progress = self._fail_gone(batch, waited, known.record) or progress
        return progress

    def _worth_reading(
        self, batch: Batch, listing: BatchListing | None, known: VersionedRecord
    ) -> bool:
        """Whether to read its record; not yet if most likely its tasks were only just claimed."""
        if self._queue.done(batch):
            # Listings need not show a done batch; perhaps none has since its futures were added.
            return True
        if not listing or not listing.record or listing.record.version == known.version:
            return False
        age = self._queue.now - listing.record.modified
        return known.version is not None or age >= self._grace

    def _read(self, batch: Batch, known: VersionedRecord) -> VersionedRecord | None:
        try:
            return vanished.read_again(self._session, batch, known)
        except StarburstError as error:
            if consequence(error) is Consequence.END:
                raise
            if consequence(error) is Consequence.WAIT:
                self.unread = error
                return None
            # Nothing of it is left, or nothing that can be read.
            return VersionedRecord(Record.fresh(batch.size), None)

    def _fail_gone(self, batch: Batch, waited: _Waited, record: Record) -> bool:
        """Fail what can never end because objects were removed; whether there was any."""
        done = self._queue.done(batch)
        if not done and not (waited.gone and self._is_gone(batch)):
            return False
        lost = {
            position: future
            for position, future in list(waited.futures.items())
            if not record.tasks[position].state.final
            and (done or not record.tasks[position].state.held)
        }
        for future in lost.values():
            future.settle((False, vanished.gone(self._session, batch)))
        self._remove(batch, waited, list(lost))
        return bool(lost)

    def _is_gone(self, batch: Batch) -> bool:
        try:
            return vanished.is_gone(self._session, batch)
        except StarburstError as error:
            if consequence(error) is not Consequence.WAIT:
                raise
            self.unread = error
            return False

    def _take_in(self, batch: Batch, waited: _Waited, known: VersionedRecord) -> bool:
        """Settle ended tasks; whether there were any."""
        with self._lock:
            futures = dict(waited.futures)
        ended: dict[int, TaskFuture[Any]] = {}
        for position, future in futures.items():
            task = known.record.tasks[position]
            if task.state.final:
                ended[position] = future
            elif task.state is State.RUNNING:
                future.note_running()
        settled = self._settle_all(batch, known.record, ended)
        if len(settled) == len(ended):
            waited.known = known  # else it is read again, and the rest settled then
        self._remove(batch, waited, settled)
        return bool(settled)

    def _remove(self, batch: Batch, waited: _Waited, positions: list[int]) -> None:
        with self._lock:
            for position in positions:
                if waited.futures.pop(position, None) and batch in self._waited:
                    self._unfinished -= 1
            if not waited.futures:
                self._waited.pop(batch, None)
            if not self._unfinished:
                self._idle.set()

    def _settle_all(
        self, batch: Batch, record: Record, ended: dict[int, TaskFuture[Any]]
    ) -> list[int]:
        """Settle the futures of ended tasks; the positions whose outcome could be read."""
        settled: list[int] = []
        try:
            tasks = self._outcomes.in_few_reads(batch, record, ended)
            for position, future in ended.items():
                self._settle(batch, position, tasks[position], future)
                settled.append(position)
        except StarburstError as error:
            if consequence(error) is not Consequence.WAIT:
                raise
            self.unread = error
        return settled

    def _settle(self, batch: Batch, position: int, task: Task, future: TaskFuture[Any]) -> None:
        if task.state is State.CANCELLED:
            future.settle_cancelled()
            return
        if task.started:
            seconds = task.ended - task.started
            self.run_time = (
                seconds if self.run_time is None else 0.9 * self.run_time + 0.1 * seconds
            )
        settled = self._outcomes.settled(batch, position, task, future.name)
        future.settle(settled)
        if isinstance(settled[1], InitializerFailed):
            self._broken(settled[1])


def _end(futures: dict[int, TaskFuture[Any]], error: BaseException) -> None:
    for future in futures.values():
        future.settle((False, error))

"""The protocol: every exchange between clients and workers, both halves in one place.

    client                        the session's objects                      worker
    ------                        ---------------------                      ------
    create, amend  ------------>  session.json  <--------------------------  load
    put_batch      ------------>  queue/<batch>/tasks  <-------------------  header, arguments
    cancel         ------------>  queue/<batch>/record  <----------------->  change
    read           <------------                                 (claim, start, finish, hand back)
    mark           ------------>  queue/<batch>/drained, requeued, done  <-  mark
    heartbeats     <------------  workers/<id>  <--------------------------  beat, leave

* The record is the source of truth; markers are facts that are only ever added. Any reader of a
  record that calls for an unlisted marker writes it, so a writer may die between the two.
* Every change is a pure, repeatable function of the record, applied by compare-and-swap. After a
  conflict or an ambiguous answer the record is read again and the function reapplied: if the change
  had taken effect after all, this changes nothing.
* Each write carries a fresh nonce: equal bytes have equal versions on S3, so without it
  A -> B -> A would go unnoticed.
* Nothing relies on a conditional delete.

Nothing here unpickles: it only moves bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import NamedTuple, Self

from msgspec.structs import replace

from starburst_executor.errors import (
    Conflict,
    DamagedObject,
    NewerSchema,
    ObjectNotFound,
    SessionNotFound,
    SessionTerminated,
    StoreUnavailable,
)
from starburst_executor.protocol import codec, records, tasks_object, transitions
from starburst_executor.protocol.bounds import LARGEST
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.listing import QueueReader
from starburst_executor.protocol.manifest import Heartbeat, Manifest, SessionState
from starburst_executor.protocol.outcome import Failure, Outcome, encode_outcome
from starburst_executor.protocol.records import Record
from starburst_executor.protocol.session_objects import SessionObjects
from starburst_executor.protocol.task_names import Name, decode_names
from starburst_executor.protocol.tasks_object import Header
from starburst_executor.runtime import Runtime
from starburst_executor.storage.base import ListedObject, Store

__all__ = ["HeartbeatListing", "Session", "TasksObject", "VersionedRecord"]

# A header of 256 tasks takes about 8 KB; with small arguments one read gets the whole object.
_FIRST_READ = 256 << 10
_HEADER_READ = 16 << 10


class VersionedRecord(NamedTuple):
    """A record as last read or written; version None: not stored yet."""

    record: Record
    version: str | None
    size: int = 0  # bytes as stored


class TasksObject(NamedTuple):
    """The header of a batch's tasks object, with the arguments that the same read returned."""

    header: Header
    body: int  # offset of the arguments in the object
    data: bytes  # the first bytes of the object


class HeartbeatListing(NamedTuple):
    """Heartbeats as of one listing."""

    entries: dict[str, ListedObject]
    now: float


class Session(SessionObjects):
    """One session in one store.

    Args:
        store: The store.
        session_id: The session's id.
        runtime: Time, waiting and randomness.
    """

    # --- the session as a whole -----------------------------------------------------

    @classmethod
    def create(cls, store: Store, manifest: Manifest, runtime: Runtime) -> Self:
        """Write the manifest of a new session.

        Raises:
            Conflict: there is a different session with that id.
        """
        session = cls(store, manifest.session_id, runtime)
        data = codec.encode(manifest)

        def once() -> None:
            try:
                store.create(session.key("session.json"), data)
            except Conflict as conflict:
                if session.get_refused("session.json", conflict) != data:
                    raise

        session.patiently(once)
        return session

    def load(self) -> Manifest:
        """The manifest.

        Raises:
            SessionNotFound: there is no such session.
        """
        return self._load()[0]

    def amend(self, edit: Callable[[Manifest], Manifest]) -> Manifest:
        """Apply a repeatable edit to the manifest by compare-and-swap; returns the result."""

        def once() -> Manifest:
            manifest, version = self._load()
            edited = edit(manifest)
            if edited == manifest:
                return manifest
            edited = replace(edited, nonce=self.runtime.new_id(8))
            self.store.replace(self.key("session.json"), codec.encode(edited), version)
            return edited

        try:
            return self.through_conflicts(once)
        except ObjectNotFound as error:
            raise self._not_found(error) from error

    def _load(self) -> tuple[Manifest, str]:
        key = "session.json"
        try:
            got = self.store.get(self.key(key), stop=LARGEST)
        except ObjectNotFound as error:
            raise self._not_found(error) from error
        assert got is not None
        return codec.decode(got.data, Manifest, key), got.version

    def _not_found(self, error: ObjectNotFound) -> SessionNotFound:
        return SessionNotFound(
            f"there is no session {self.id!r} in {self.store.url}. It may have been cleaned up, or "
            "be in another store or region: `starburst-executor list --store URL` shows what is in "
            f"a store. ({error})"
        )

    def check_open(self) -> Manifest:
        """The manifest of a session that has not been terminated.

        Raises:
            SessionTerminated: it was terminated, or is gone.
        """
        try:
            manifest = self.load()
        except SessionNotFound as error:
            raise SessionTerminated(f"session {self.id} was deleted") from error
        if manifest.state is SessionState.TERMINATED:
            raise SessionTerminated(f"session {self.id} was terminated")
        return manifest

    # --- batches --------------------------------------------------------------------

    def queue(self) -> QueueReader:
        """A new reader of the queue."""
        return QueueReader(self.store, self.prefix)

    def put_batch(self, batch: Batch, data: bytes) -> None:
        """Store the tasks of a batch, retrying with the same key and bytes until it succeeds.

        The lane is this client's alone, so an object already there is from an earlier attempt.
        """
        self.create_once(batch.tasks_key, data)

    def tasks(self, batch: Batch) -> TasksObject:
        """Header of a batch, including the arguments if they are small.

        Raises:
            DamagedObject: it cannot be read.
            ObjectNotFound: it is gone: the session is being deleted.
        """
        return self._tasks(batch, _FIRST_READ)

    def untouched(self, batch: Batch) -> VersionedRecord:
        """The record of a batch that has none stored yet, as implied by its header.

        Its tasks are pending, except those that were cancelled before the batch was stored.

        Raises:
            DamagedObject: the header cannot be read.
            ObjectNotFound: it is gone: the session is being deleted.
        """
        return VersionedRecord(self._tasks(batch, _HEADER_READ).header.fresh_record(), None)

    def _tasks(self, batch: Batch, first: int) -> TasksObject:
        """Header of a batch and whatever else the first `first` bytes contain."""
        key = batch.tasks_key
        data = self.get(key, 0, first)
        head = tasks_object.read_header(data, key)
        if isinstance(head, int):
            data = self.get(key, 0, head)
            head = tasks_object.read_header(data, key)
            if isinstance(head, int):
                raise DamagedObject(
                    f"{key} is truncated: {len(data)} of {head} bytes of its header"
                )
        header, body = head
        if len(header.calls) != batch.size:
            raise DamagedObject(f"{key} holds {len(header.calls)} tasks, not {batch.size}")
        return TasksObject(header, body, data)

    def arguments(self, batch: Batch, tasks: TasksObject, position: int) -> bytes:
        """The pickled arguments of one task.

        Raises:
            DamagedObject: the object ends before them.
        """
        call = tasks.header.calls[position]
        start = tasks.body + call.start
        stop = start + call.size
        if stop <= len(tasks.data):
            return tasks.data[start:stop]
        data = self.get(batch.tasks_key, start, stop)
        if len(data) < call.size:
            raise DamagedObject(
                f"{batch.tasks_key} is truncated: "
                f"the arguments of task {position} end at byte {stop}"
            )
        return data

    def names(self, batch: Batch, tasks: TasksObject | None = None) -> list[Name]:
        """The names of a batch's tasks.

        Raises:
            DamagedObject: it cannot be read.
            ObjectNotFound: it is gone: the session is being deleted.
        """
        tasks = tasks or self.tasks(batch)
        key = batch.tasks_key
        start = tasks.body + tasks.header.arguments_size
        whole = len(tasks.data) < _FIRST_READ
        # Start one byte early: there may be no names, and a read cannot start at an object's end.
        data = tasks.data[start:] if whole else self.get(key, start - 1)[1:]
        try:
            return decode_names(data, batch.size)
        except ValueError as error:
            raise DamagedObject(f"{key}: {error}") from error

    def read(self, batch: Batch, known: VersionedRecord | None = None) -> VersionedRecord:
        """The current record; `known` itself if it has not changed.

        If nothing is known and no record is stored, it is that of an untouched batch.

        An unreadable record is replaced by one in which every task failed, so that the rest of the
        session can continue.

        Raises:
            NewerSchema: a newer version of this package wrote it; it is left alone.
            SessionTerminated: it existed and is gone.
        """
        try:
            version = known.version if known else None
            got = self.store.get(self.key(batch.record_key), stop=LARGEST, unless=version)
        except ObjectNotFound as error:
            if known is None:
                return self.untouched(batch)
            if known.version is None:
                return known
            raise SessionTerminated(f"session {self.id} is being deleted") from error
        if got is None:
            assert known is not None
            return known
        try:
            return VersionedRecord(self._decode_record(batch, got.data), got.version, len(got.data))
        except NewerSchema:
            raise
        except DamagedObject as error:
            return self._replace_damaged(batch, got.version, error)

    def _decode_record(self, batch: Batch, data: bytes) -> Record:
        record = codec.decode(data, Record, batch.record_key)
        if len(record.tasks) != batch.size:
            raise DamagedObject(
                f"{batch.record_key} has {len(record.tasks)} tasks, not {batch.size}"
            )
        return record

    def _replace_damaged(self, batch: Batch, version: str, error: DamagedObject) -> VersionedRecord:
        record = transitions.fail_all(Record.fresh(batch.size), self.runtime.time(), damage(error))
        try:
            return self._write(batch, record, version)
        except Conflict:
            raise StoreUnavailable(f"{batch.record_key} changed while it was read") from error

    def change(
        self, batch: Batch, known: VersionedRecord, edit: Callable[[Record], Record]
    ) -> VersionedRecord:
        """Apply a repeatable edit to the record by compare-and-swap; returns the result.

        Raises:
            SessionTerminated: the batch is being deleted.
            StoreUnavailable: no clear answer for about five minutes. The write may still land:
                read again before deciding anything.
        """
        fresh = True

        def once() -> VersionedRecord:
            nonlocal known, fresh
            if not fresh:
                known = self.read(batch, known)
            fresh = False
            edited = edit(known.record)
            if edited == known.record:
                return known
            return self._write(batch, edited, known.version)

        return self.through_conflicts(once)

    def change_once(
        self, batch: Batch, known: VersionedRecord, edit: Callable[[Record], Record]
    ) -> VersionedRecord:
        """Like `change`, but raises on a conflict or error: better to claim elsewhere."""
        edited = edit(known.record)
        if edited == known.record:
            return known
        return self._write(batch, edited, known.version)

    def _write(self, batch: Batch, record: Record, version: str | None) -> VersionedRecord:
        record = replace(record, nonce=self.runtime.new_id(8))
        key, data = self.key(batch.record_key), codec.encode(record)
        if version is None:
            return VersionedRecord(record, self.store.create(key, data), len(data))
        try:
            return VersionedRecord(record, self.store.replace(key, data, version), len(data))
        except ObjectNotFound as error:
            # Must not be recreated: the session is being deleted.
            raise SessionTerminated(f"session {self.id} is being deleted") from error

    def mark(self, batch: Batch, record: Record, listed: Iterable[str] = ()) -> tuple[str, ...]:
        """Write the markers that the record calls for and `listed` lacks; returns those written."""
        due = tuple(m for m in transitions.due_markers(record) if m not in set(listed))
        for marker in due:
            key = self.key(batch.marker_key(marker))
            self.patiently(partial(self.store.put, key, b""))
        return due

    def withdraw(self, batch: Batch, positions: Collection[int]) -> None:
        """Record tasks cancelled before their batch was stored; its header lists them too."""
        record = Record.fresh(batch.size, positions)

        def once() -> None:
            try:
                self._write(batch, record, None)
            except Conflict as conflict:
                # Else a worker was faster, and started from the header.
                self.get_refused(batch.record_key, conflict, 1)

        self.patiently(once)
        self.mark(batch, record)

    def cancel(self, batch: Batch, positions: Iterable[int], *, running: bool) -> VersionedRecord:
        """Cancel tasks of one batch with one compare-and-swap; returns the resulting record."""
        wanted = tuple(positions)
        known = VersionedRecord(self.tasks(batch).header.fresh_record(), None)
        known = self.read(batch, known)
        known = self.change(
            batch,
            known,
            lambda record: transitions.cancel(record, wanted, self.runtime.time(), running=running),
        )
        self.mark(batch, known.record)
        return known

    def requeue(
        self, batch: Batch, known: VersionedRecord, lost: Mapping[str, str], max_attempts: int
    ) -> VersionedRecord:
        """Requeue tasks held by lost workers.

        Args:
            batch: The batch.
            known: Its record.
            lost: Worker -> why it is believed lost.
            max_attempts: Fail a task after this many losses while running.
        """

        def outcome(position: int, task: records.Task) -> bytes:
            return self._lost_outcome(batch, position, task, lost[task.worker])

        return self.change(
            batch,
            known,
            lambda record: transitions.requeue_lost(
                record, lost, self.runtime.time(), max_attempts, outcome
            ),
        )

    def _lost_outcome(self, batch: Batch, position: int, task: records.Task, why: str) -> bytes:
        tried = [f"attempt {p.attempt} on {p.worker} ({p.how})" for p in task.past]
        tried.append(f"attempt {task.attempt} on {task.worker} ({why})")
        failure = Failure(
            kind="lost",
            type="WorkerLost",
            message=f"it was running when its worker was lost: {'; '.join(tried)}",
            stderr=self.live_log(batch, position, task.attempt)[1][-2000:],
        )
        return encode_outcome(Outcome(failure=failure))

    # --- workers --------------------------------------------------------------------

    def beat(self, heartbeat: Heartbeat) -> None:
        """Write a worker's heartbeat."""
        self.store.put(self.key(f"workers/{heartbeat.worker}"), codec.encode(heartbeat))

    def beats(self) -> HeartbeatListing:
        """All heartbeats, by worker id, without their content."""
        prefix = self.key("workers/")
        entries, now = self.list_all(prefix)
        return HeartbeatListing({e.key[len(prefix) :]: e for e in entries}, now)

    def heartbeat(self, worker: str, folder: str = "workers") -> Heartbeat | None:
        """A worker's last heartbeat; None if it left, which moves it to `folder` "ended"."""
        key = f"{folder}/{worker}"
        try:
            return codec.decode(self.get(key, 0, LARGEST), Heartbeat, key)
        except ObjectNotFound:
            return None

    def bury(self, heartbeat: Heartbeat) -> None:
        """Archive a worker's last heartbeat, then remove it from those of live workers."""
        self.store.put(self.key(f"ended/{heartbeat.worker}"), codec.encode(heartbeat))
        self.store.delete([self.key(f"workers/{heartbeat.worker}")])

    def buried(self) -> set[str]:
        """Workers that left or were lost; archived before their heartbeat is deleted."""
        prefix = self.key("ended/")
        return {entry.key[len(prefix) :] for entry in self.list_all(prefix)[0]}

    def forget(self, worker: str) -> None:
        """Delete a worker's heartbeat without archiving it: the session is being deleted."""
        self.store.delete([self.key(f"workers/{worker}")])


def damage(error: Exception) -> bytes:
    """The outcome of a task that cannot be run because of a damaged object."""
    return encode_outcome(
        Outcome(failure=Failure(kind="damaged", type=type(error).__name__, message=str(error)))
    )

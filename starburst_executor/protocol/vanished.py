"""Batches of which somebody else, such as a lifecycle rule, has removed objects.

A batch without its `tasks` is not listed: no worker will claim what is pending in it. Its record
still tells how its tasks ended, and those that a worker holds may yet end. The numbers of a lane
have no gaps, so even a batch of which nothing is left is missed once its lane was given back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from starburst_executor.errors import DamagedObject, ObjectNotFound, SessionTerminated
from starburst_executor.protocol.keys import Batch, task_id
from starburst_executor.protocol.listing import QueueReader
from starburst_executor.protocol.manifest import Lane
from starburst_executor.protocol.records import Record
from starburst_executor.protocol.session import Session, VersionedRecord

__all__ = ["gone", "is_gone", "lost", "read_again", "remains"]


def is_gone(session: Session, batch: Batch) -> bool:
    """Whether the tasks of a stored batch were removed, although the session is open.

    Raises:
        SessionTerminated: the session is being deleted, and they with it.
    """
    try:
        session.tasks(batch)
    except ObjectNotFound:
        session.check_open()
        return True
    except DamagedObject:  # a worker says so
        return False
    return False


def gone(session: Session, batch: Batch, position: int) -> DamagedObject:
    """The error of a task that can never end."""
    return DamagedObject(
        f"task {task_id(batch.lane, batch.number + position)} of session {session.id} can never "
        f"end: objects of its batch ({session.key(f'queue/{batch}/')}) are gone from "
        f"{session.store.url}. Most likely somebody or a lifecycle rule removed them. Other tasks "
        "are not affected: submit this one again."
    )


def remains(session: Session, batch: Batch) -> Record:
    """The record of a batch that may be gone; all pending if nothing of it is left."""
    try:
        return session.read(batch).record
    except ObjectNotFound:
        return Record.fresh(batch.size)


def read_again(session: Session, batch: Batch, known: VersionedRecord | None) -> VersionedRecord:
    """Like `Session.read`, but once the record was removed, the batch is untouched again.

    That is how workers see it.

    Raises:
        ObjectNotFound: nothing of the batch is left, although the session is open.
        SessionTerminated: the session is being deleted.
    """
    try:
        return session.read(batch, known)
    except SessionTerminated:
        session.check_open()
        return session.read(batch)


def lost(
    queue: QueueReader,
    shown: Collection[Batch],
    lanes: Sequence[Lane],
    known: Collection[Batch] = (),
) -> set[Batch]:
    """The batches that were stored and that a whole listing does not show.

    Args:
        queue: What listed them.
        shown: What it showed.
        lanes: The manifest's lanes; only those that were given back have an end to judge by.
        known: Batches known to be stored.
    """
    torn = {listing.batch for listing in queue.remains}
    missing = {batch for batch in known if batch not in shown and not queue.done(batch)}
    found = torn | missing
    for number, lane in enumerate(lanes):
        if not lane.taken:
            listed = [(b.number, b.end) for b in {*shown, *found, *known} if b.lane == number]
            covered = sorted([*listed, *queue.done_runs(number), (lane.number, lane.number)])
            found.update(_between(number, covered, lane.number))
    return found


def _between(lane: int, covered: list[tuple[int, int]], end: int) -> Iterator[Batch]:
    reached = 0
    for start, stop in covered:
        if reached < min(start, end):
            yield Batch(lane, reached, min(start, end) - reached)
        reached = max(reached, stop)

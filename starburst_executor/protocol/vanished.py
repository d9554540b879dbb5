"""Batches of which somebody else, such as a lifecycle rule, has removed objects.

A batch without its `tasks` is not listed: no worker will claim what is pending in it. Its record
still tells how its tasks ended, and those that a worker holds may yet end. The numbers of a lane
have no gaps, so even a batch of which nothing is left is missed once its client gave the lane back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from msgspec.structs import replace

from starburst_executor.errors import DamagedObject, ObjectNotFound, SessionTerminated
from starburst_executor.protocol.keys import Batch, task_id
from starburst_executor.protocol.listing import QueueReader
from starburst_executor.protocol.manifest import Lane
from starburst_executor.protocol.records import Piece, Record, State
from starburst_executor.protocol.session import Session, VersionedRecord, damage

__all__ = ["gaps", "gone", "is_gone", "lost", "read_again", "remains"]


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


def gone(session: Session, batch: Batch) -> DamagedObject:
    """The error of tasks that can never end."""
    first, last = task_id(batch.lane, batch.number), task_id(batch.lane, batch.end - 1)
    tasks = f"task {first}" if batch.size == 1 else f"tasks {first} to {last}"
    return DamagedObject(
        f"objects of {tasks} of session {session.id} are gone from {session.store.url}, so those "
        "that had not ended never will. Most likely somebody or a lifecycle rule removed them. "
        "Other tasks are not affected; submit these again."
    )


def remains(session: Session, batch: Batch, *, done: bool = False) -> Record:
    """What is known of a batch that has lost objects: tasks that can never end have failed.

    Args:
        session: The session.
        batch: The batch.
        done: Whether all its tasks have ended, so that no worker holds any.
    """
    try:
        record = session.read(batch).record
    except ObjectNotFound:
        record = Record.fresh(batch.size)
    lost = Piece(inline=damage(gone(session, batch)))
    tasks = (
        task
        if task.state.final or (task.state.held and not done)
        else replace(task, state=State.FAILED, outcome=lost)
        for task in record.tasks
    )
    return replace(record, tasks=tuple(tasks))


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
        lanes: The manifest's lanes.
        known: Batches known to be stored.
    """
    torn = {listing.batch for listing in queue.remains}
    missing = {batch for batch in known if batch not in shown and not queue.done(batch)}
    found = torn | missing
    return found | set(gaps({*shown, *found, *known}, lanes, queue.done_runs))


def gaps(
    shown: Collection[Batch],
    lanes: Sequence[Lane],
    done_runs: Callable[[int], list[tuple[int, int]]] = lambda lane: [],
) -> Iterator[Batch]:
    """The numbers that were stored and of which nothing is left.

    Args:
        shown: The batches that are known or listed.
        lanes: The manifest's lanes; up to the number that each has reached all were stored.
        done_runs: Numbers of a lane that were seen done, and that listings may leave out.
    """
    for number, lane in enumerate(lanes):
        listed = [(batch.number, batch.end) for batch in shown if batch.lane == number]
        covered = sorted([*listed, *done_runs(number), (lane.number, lane.number)])
        yield from _between(number, covered, lane.number)


def _between(lane: int, covered: list[tuple[int, int]], end: int) -> Iterator[Batch]:
    reached = 0
    for start, stop in covered:
        if reached < min(start, end):
            yield Batch(lane, reached, min(start, end) - reached)
        reached = max(reached, stop)

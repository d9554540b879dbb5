"""What tasks have printed."""

from __future__ import annotations

from starburst_executor.protocol.keys import Batch, before, lane_prefix, parse_task_id, task_id
from starburst_executor.protocol.records import Record, Task
from starburst_executor.protocol.session import Session, VersionedRecord
from starburst_executor.protocol.tasks_object import MAX_BATCH_TASKS

__all__ = ["all_logs", "find_task", "task_log"]


def task_log(session: Session, name: str) -> str:
    """What a task has printed so far: stdout, then stderr.

    Raises:
        ValueError: `name` is not a task id.
        LookupError: the session has no such task.
    """
    batch, position = find_task(session, name)
    record = _record_of(session, batch)
    return _log_of(session, batch, position, record.tasks[position])


def all_logs(session: Session) -> str:
    """What all tasks have printed so far, each under a line with its id."""
    parts: list[str] = []
    for listing in session.queue().look():
        batch = listing.batch
        record = _record_of(session, batch)
        for position, task in enumerate(record.tasks):
            text = _log_of(session, batch, position, task)
            if text:
                name = task_id(batch.lane, batch.number + position)
                parts.append(f"--- task {name} ({task.state})\n{text}")
    return "".join(part if part.endswith("\n") else f"{part}\n" for part in parts)


def find_task(session: Session, name: str) -> tuple[Batch, int]:
    """A task's batch and its position there; lists only a few keys.

    Raises:
        ValueError: `name` is not a task id.
        LookupError: the session has no such task.
    """
    lane, number = parse_task_id(name)
    after = session.key(before(lane, max(0, number - MAX_BATCH_TASKS + 1)))
    while True:
        page = session.store.list(session.key(lane_prefix(lane)), after=after)
        for entry in page.entries:
            batch = Batch.parse(entry.key.rsplit("/", 2)[1])
            if batch and batch.number <= number < batch.end:
                return batch, number - batch.number
            if batch and batch.number > number:
                raise LookupError(f"session {session.id} has no task {name}")
        if not page.truncated:
            raise LookupError(f"session {session.id} has no task {name}")
        after = page.entries[-1].key


def _record_of(session: Session, batch: Batch) -> Record:
    fresh = session.tasks(batch).header.fresh_record()
    return session.read(batch, VersionedRecord(fresh, None)).record


def _log_of(session: Session, batch: Batch, position: int, task: Task) -> str:
    if task.state.held:
        return "".join(session.live_log(batch, position, task.attempt))
    pieces = [piece for piece in (task.stdout, task.stderr) if piece is not None]
    return "".join(session.get_piece(batch, p).decode(errors="replace") for p in pieces)

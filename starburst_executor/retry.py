"""Trying finished tasks again: the same calls, submitted as new tasks.

Nothing final ever changes, so a retried task stays as it ended. Its callable, arguments and modules are
stored bytes, which are copied as they are: any version of Python may retry tasks of any other.
What was retried is noted under `retries/`, so that nobody retries it twice by mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from starburst_executor import lanes, records
from starburst_executor.history import Found
from starburst_executor.records import (
    MAX_BATCH_BYTES,
    MAX_BATCH_TASKS,
    Batch,
    Queued,
    encode_tasks,
    task_id,
)
from starburst_executor.session import Session, Tasks

__all__ = ["retried", "retry"]


@records.decodable
class _Retries(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`retries/<nonce>`: what one call of `retry` submitted again."""

    schema: int = 1
    tasks: dict[str, str]  # id of the task -> id of the task that retries it


class _Copy(NamedTuple):
    """One call as it is stored, and what has to be the same throughout a batch."""

    name: str
    queued: Queued
    modules: dict[str, str]
    light: bool


def retried(session: Session) -> dict[str, str]:
    """Task id -> id of the task that retries it, for all tasks of a session that were retried."""
    found: dict[str, str] = {}
    entries, _ = session.list_all(session.key("retries/"))
    for entry in entries:
        got = session.store.get(entry.key)
        assert got is not None
        found |= records.decode(got.data, _Retries, entry.key).tasks
    return found


def retry(session: Session, tasks: Iterable[Found]) -> dict[str, str]:
    """Submit calls again, as new tasks; returns the new task's id for each old one's.

    Args:
        session: The session, which is open again afterwards if it was shut down.
        tasks: Whose calls. One that was cancelled before it was stored has none and is left out.

    Raises:
        SessionTerminated: the session was ended, so that no worker would ever take them.
    """
    chosen = list(tasks)
    if not chosen:
        return {}
    manifest, lane = lanes.take(session)
    number = manifest.lanes[lane].number
    places = max(1, manifest.workers * manifest.spec.slots)
    size = min(MAX_BATCH_TASKS, -(-len(chosen) // (4 * places)))
    made: dict[str, str] = {}
    # An error on the way leaves the lane taken: a batch in doubt may still appear in it.
    for copies in _pack(_copies(session, chosen), size):
        data = encode_tasks(
            [copy.queued for copy in copies], copies[0].modules, light=copies[0].light
        )
        session.put_batch(Batch(lane, number, len(copies)), data)
        for copy in copies:
            made[copy.name] = task_id(lane, number)
            number += 1
    if made:
        _note(session, made)
    lanes.give_back(session, lane, number)
    return made


def _copies(session: Session, chosen: list[Found]) -> Iterator[_Copy]:
    batch: Batch | None = None
    tasks: Tasks | None = None
    for found in chosen:
        if tasks is None or found.batch != batch:
            batch, tasks = found.batch, session.tasks(found.batch)
        header = tasks.header
        call = header.calls[found.position]
        if call.size >= 0:
            arguments = session.arguments(found.batch, tasks, found.position)
            queued = Queued(header.functions[call.function], arguments)
            yield _Copy(found.task_id, queued, header.modules, header.light)


def _pack(copies: Iterable[_Copy], size: int) -> Iterator[list[_Copy]]:
    """Batches of at most `size` calls that need the same modules, and not too heavy."""
    group: list[_Copy] = []
    weight = 0
    for copy in copies:
        weight += len(copy.queued.arguments or b"")
        if group and (
            len(group) >= size
            or weight > MAX_BATCH_BYTES
            or (copy.modules, copy.light) != (group[0].modules, group[0].light)
        ):
            yield group
            group, weight = [], len(copy.queued.arguments or b"")
        group.append(copy)
    if group:
        yield group


def _note(session: Session, made: dict[str, str]) -> None:
    key = session.key(f"retries/{session.runtime.new_id(12)}")
    session.store.put(key, records.encode(_Retries(tasks=made)))

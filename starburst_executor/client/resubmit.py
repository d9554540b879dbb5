"""Retrying finished tasks: the same calls, submitted as new tasks.

A final state never changes, so a retried task stays as it ended. Its callable, arguments and
modules are stored bytes that are copied unchanged: any Python version can retry another's tasks.
Retries are recorded under `retries/`, so that no task is retried twice by mistake, and the outcome
of the last retry can stand for the task.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from starburst_executor.client.outcomes import TaskOutcome
from starburst_executor.errors import ObjectNotFound
from starburst_executor.inspection.tasks import Found, find
from starburst_executor.protocol import codec, lanes
from starburst_executor.protocol.bounds import LARGEST
from starburst_executor.protocol.keys import Batch, parse_task_id, task_id
from starburst_executor.protocol.patience import CALL_SECONDS
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import Session, TasksObject
from starburst_executor.protocol.task_names import Name
from starburst_executor.protocol.tasks_object import (
    MAX_BATCH_BYTES,
    MAX_BATCH_TASKS,
    Queued,
    encode_tasks,
)
from starburst_executor.protocol.vanished import gone

__all__ = ["Retries", "healed", "named", "retried", "retry", "unhealed"]

log = logging.getLogger(__name__)


@codec.decodable
class _Retries(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`retries/<nonce>`: the tasks that one call of `retry` resubmitted."""

    schema: int = 1
    tasks: dict[str, str]  # id of the task -> id of the task that retries it


class _Copy(NamedTuple):
    """One call as stored, and what all tasks of a batch must have in common."""

    name: str
    queued: Queued
    modules: dict[str, str]
    light: bool


class Retries(NamedTuple):
    """The retries in a session.

    Attributes:
        after: Task id -> id of the task that retries it; the last one if there are several.
        made: Ids of all tasks that retry others.
    """

    after: dict[str, str]
    made: frozenset[str]

    def chain(self, name: str) -> list[str]:
        """A task followed by its retry, the retry of that, and so on."""
        names = {name: None}
        while (name := self.after.get(name, "")) and name not in names:
            names[name] = None
        return list(names)


def retried(session: Session) -> Retries:
    """The session's retries."""
    after: dict[str, str] = {}
    made: set[str] = set()
    entries, _ = session.list_all(session.key("retries/"))
    for entry in sorted(entries, key=lambda entry: entry.modified):
        got = session.store.get(entry.key, stop=LARGEST)
        assert got is not None
        tasks = codec.decode(got.data, _Retries, entry.key).tasks
        after |= tasks
        made.update(tasks.values())
    return Retries(after, frozenset(made))


def healed(outcomes: Iterable[TaskOutcome], retries: Retries) -> list[TaskOutcome]:
    """One outcome per original task: that of its last finished attempt or retry."""
    known = {one.task_id: one for one in outcomes}
    return [_last(one, retries, known) for one in known.values() if one.task_id not in retries.made]


def _last(outcome: TaskOutcome, retries: Retries, known: Mapping[str, TaskOutcome]) -> TaskOutcome:
    tries = [name for name in retries.chain(outcome.task_id) if name in known]
    if len(tries) == 1:
        return outcome
    return dataclasses.replace(
        known[tries[-1]],
        index=outcome.index,
        task_id=outcome.task_id,
        retried_as=tries[-1],
    )


def unhealed(session: Session, states: Collection[State]) -> list[Found]:
    """Tasks in the given final states that were not retried."""
    after = retried(session).after
    return [found for found in find(session, states) if found.task_id not in after]


def named(session: Session, names: Iterable[str]) -> list[Found]:
    """The finished tasks with these ids, in submission order.

    Raises:
        ValueError: an id is malformed, or its task has not finished.
        LookupError: the session has no such task.
    """
    wanted = {task_id(*parse_task_id(name)) for name in names}
    found = [one for one in find(session) if one.task_id in wanted]
    lacking = wanted - {one.task_id for one in found}
    if lacking:
        raise LookupError(f"session {session.id} has no task {', '.join(sorted(lacking))}")
    for one in found:
        if not one.task.state.final:
            raise ValueError(
                f"task {one.task_id} is {one.task.state}: "
                "only finished tasks can be retried; cancel it first"
            )
    return found


def retry(session: Session, tasks: Iterable[Found]) -> dict[str, str]:
    """Submit calls again as new tasks; returns a mapping of old task id to new.

    Args:
        session: The session; reopened if it was shut down.
        tasks: Tasks to retry. One cancelled before it was stored has no call, nor has one whose
            objects were removed from the store: they are skipped.

    Raises:
        SessionTerminated: the session was terminated; no worker would ever run them.
    """
    chosen = list(tasks)
    if not chosen:
        return {}
    manifest, lane = lanes.take(session)
    number = manifest.lanes[lane].number
    places = max(1, manifest.workers * manifest.spec.slots)
    size = min(MAX_BATCH_TASKS, -(-len(chosen) // (4 * places)))
    made: dict[str, str] = {}
    # After an error the lane stays taken: a batch whose write is in doubt may still appear in it.
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
    tasks: TasksObject | None = None
    names: list[Name] = []
    for found in chosen:
        if found.batch != batch:
            batch, tasks = found.batch, _tasks(session, found.batch)
            names = session.names(batch, tasks) if tasks else []
        if tasks is None:
            continue
        header = tasks.header
        call = header.calls[found.position]
        if call.size >= 0:
            arguments = session.arguments(found.batch, tasks, found.position)
            name = names[found.position]
            queued = Queued(header.functions[call.function], arguments, name)
            yield _Copy(found.task_id, queued, header.modules, header.light)


def _tasks(session: Session, batch: Batch) -> TasksObject | None:
    try:
        return session.tasks(batch)
    except ObjectNotFound:
        log.warning("not submitted again: %s", gone(session, batch))
        return None


def _pack(copies: Iterable[_Copy], size: int) -> Iterator[list[_Copy]]:
    """Batches of at most `size` calls that need the same modules, limited in bytes."""
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
    data = codec.encode(_Retries(tasks=made))
    # The tasks are stored: without this note, the next call would submit them once more.
    session.outlast(lambda: session.store.put(key, data), CALL_SECONDS)

"""Outcomes of a session's finished tasks, each downloaded once; others may still be running."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

from starburst_executor.client.codec import PayloadCodec
from starburst_executor.errors import StoreError
from starburst_executor.protocol.keys import Batch, task_id
from starburst_executor.protocol.outcome import Failure, decode_outcome
from starburst_executor.protocol.patience import Consequence, consequence
from starburst_executor.protocol.records import Record, State, Task
from starburst_executor.protocol.session import Session, VersionedRecord
from starburst_executor.protocol.vanished import read_again, remains

__all__ = ["Collector", "FinalStateName", "TaskOutcome"]


FinalStateName = Literal["completed", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOutcome:
    """How one task ended, with enough detail to act on it.

    Attributes:
        index: The task's position in submission order.
        task_id: Id of the task within the session.
        state: "completed", "failed" or "cancelled".
        value: The return value; None unless completed.
        error: The exception, as it was raised; None unless failed.
        type: Qualified name of the exception's class; "" unless failed.
        message: Text of the exception.
        traceback: The remote traceback.
        worker: Id of the worker that ran it.
        attempt: Which attempt this was, from 1.
        seconds: How long it ran.
        retried_as: Id of its last retry, whose outcome this is; "" if it was not retried.
    """

    index: int
    task_id: str
    state: FinalStateName
    value: Any = None
    error: BaseException | None = None
    type: str = ""
    message: str = ""
    traceback: str = ""
    worker: str = ""
    attempt: int = 0
    seconds: float = 0.0
    retried_as: str = ""

    def _repr_html_(self) -> str:
        from starburst_executor.inspection.notebook import outcome_html

        return outcome_html(self)

    @property
    def ok(self) -> bool:
        """Whether there is a value."""
        return self.state == "completed"


class Collector:
    """Reads outcomes and caches them.

    Args:
        session: The session.
        packer: Decodes outcomes.
    """

    def __init__(self, session: Session, packer: PayloadCodec) -> None:
        self._session = session
        self._packer = packer
        self._known: dict[Batch, VersionedRecord] = {}
        self._outcomes: dict[tuple[Batch, int], TaskOutcome] = {}

    def collect(self, batch: Batch, first_index: int, *, gone: bool = False) -> list[TaskOutcome]:
        """The outcomes of the finished tasks of one batch, in order.

        Args:
            batch: The batch.
            first_index: Index of its first task.
            gone: Whether objects of it were removed: then what is pending has failed.

        Raises:
            StoreError: an outcome cannot be read for now; call again.
        """
        record = remains(self._session, batch) if gone else self._record(batch)
        ended = [(i, task) for i, task in enumerate(record.tasks) if task.state.final]
        found = [self._outcome(batch, i, task, first_index) for i, task in ended]
        if gone:  # a batch that is listed again may still end otherwise
            self._forget(batch)
        return found

    def _forget(self, batch: Batch) -> None:
        self._outcomes = {key: one for key, one in self._outcomes.items() if key[0] != batch}

    def _record(self, batch: Batch) -> Record:
        known = self._known.get(batch)
        if known is None or not known.record.finished or known.version is None:
            known = self._known[batch] = read_again(self._session, batch, known)
        return known.record

    def _outcome(self, batch: Batch, position: int, task: Task, first: int) -> TaskOutcome:
        outcome = self._outcomes.get((batch, position))
        if outcome is None:
            # What the store does not give for now is no outcome: nothing is kept of it.
            read = partial(self._read, batch, position, task, first + position)
            outcome = self._outcomes[batch, position] = self._session.patiently(read)
        return outcome

    def _read(self, batch: Batch, position: int, task: Task, index: int) -> TaskOutcome:
        value: Any = None
        error: BaseException | None = None
        failure: Failure | None = None
        if task.outcome is not None:
            try:
                data = self._session.get_piece(batch, task.outcome)
                failure = decode_outcome(data).failure
                good, opened = self._packer.open_outcome(batch, position, task, data)
            except StoreError as damage:
                if consequence(damage) is Consequence.WAIT:
                    raise
                good, opened = False, damage
            value, error = (opened, None) if good else (None, opened)
        if error is not None and failure is None:
            failure = Failure(kind="damaged", type=type(error).__qualname__, message=str(error))
        return TaskOutcome(
            index=index,
            task_id=task_id(batch.lane, batch.number + position),
            state=cast(
                FinalStateName,
                (State.FAILED if error is not None else task.state).value,
            ),
            value=value,
            error=error,
            type=failure.type if failure else "",
            message=failure.message if failure else "",
            traceback=failure.traceback if failure else "",
            worker=task.worker,
            attempt=task.attempt,
            seconds=max(0.0, task.ended - task.started) if task.started else 0.0,
        )

"""Outcomes of a session's finished tasks, each downloaded once; others may still be running."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

from starburst_executor.client.codec import PayloadCodec
from starburst_executor.client.future import Settled
from starburst_executor.errors import StoreError
from starburst_executor.protocol import vanished
from starburst_executor.protocol.keys import Batch, task_id
from starburst_executor.protocol.outcome import Failure, decode_outcome
from starburst_executor.protocol.patience import Consequence, consequence
from starburst_executor.protocol.records import Record, State, Task
from starburst_executor.protocol.session import Session, VersionedRecord

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
        record = self._record(batch, gone=gone)
        outcomes: list[TaskOutcome] = []
        for position, task in enumerate(record.tasks):
            if task.state.final:
                outcomes.append(self._outcome(batch, position, task, first_index))
            elif gone and not task.state.held:
                error = vanished.gone(self._session, batch, position)
                outcomes.append(_outcome_of(batch, position, task, first_index, (False, error)))
        return outcomes

    def _record(self, batch: Batch, *, gone: bool) -> Record:
        if gone:
            return vanished.remains(self._session, batch)
        known = self._known.get(batch)
        if known is None or not known.record.finished or known.version is None:
            known = self._known[batch] = vanished.read_again(self._session, batch, known)
        return known.record

    def _outcome(self, batch: Batch, position: int, task: Task, first: int) -> TaskOutcome:
        outcome = self._outcomes.get((batch, position))
        if outcome is None:
            # What the store does not give for now is no outcome: nothing is kept of it.
            read = partial(self._read, batch, position, task)
            settled, failure = self._session.patiently(read)
            outcome = _outcome_of(batch, position, task, first, settled, failure)
            self._outcomes[batch, position] = outcome
        return outcome

    def _read(self, batch: Batch, position: int, task: Task) -> tuple[Settled, Failure | None]:
        if task.outcome is None:
            return (True, None), None
        try:
            data = self._session.get_piece(batch, task.outcome)
            failure = decode_outcome(data).failure
            return self._packer.open_outcome(batch, position, task, data), failure
        except StoreError as error:
            if consequence(error) is Consequence.WAIT:
                raise
            return (False, error), None


def _outcome_of(
    batch: Batch,
    position: int,
    task: Task,
    first: int,
    settled: Settled,
    failure: Failure | None = None,
) -> TaskOutcome:
    good, found = settled
    value, error = (found, None) if good else (None, found)
    if error is not None and failure is None:
        failure = Failure(kind="damaged", type=type(error).__qualname__, message=str(error))
    return TaskOutcome(
        index=first + position,
        task_id=task_id(batch.lane, batch.number + position),
        state=cast(FinalStateName, (State.FAILED if error is not None else task.state).value),
        value=value,
        error=error,
        type=failure.type if failure else "",
        message=failure.message if failure else "",
        traceback=failure.traceback if failure else "",
        worker=task.worker,
        attempt=task.attempt,
        seconds=max(0.0, task.ended - task.started) if task.started else 0.0,
    )

"""A `concurrent.futures.Future` that knows which task it stands for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from starburst_executor.protocol.keys import Batch, task_id
from starburst_executor.protocol.task_names import NO_NAME, Name
from starburst_executor.serialization.exception_state import is_interrupt

__all__ = ["Settled", "TaskFuture"]

log = logging.getLogger(__name__)

T = TypeVar("T")

log = logging.getLogger(__name__)

# `Future` has no public way to mark a running future as cancelled, which cancelling a running
# task requires; its state names have been the same since Python 3.2.
_PENDING = "PENDING"
_FINISHED = "FINISHED"

Settled = tuple[bool, Any]
"""How a task ended: whether it returned, and its value or exception."""


class TaskFuture(Future[T]):
    """The future of one task of a session.

    `cancel()` asks the store and so takes a round trip or two. `running()` becomes true when the
    record says that a worker has started the task; for one that takes only a couple of seconds
    that may never happen.

    Attributes:
        session_id: The session.
        task_id: Id of the task within the session, such as "0-17".
        index: Its place in submission order, fixed when this client first saw it.
        name: The task's label, else its call abbreviated; "" if another client submitted it.
    """

    def __init__(
        self,
        session_id: str,
        lane: int,
        number: int,
        index: int,
        canceller: Callable[[TaskFuture[Any]], bool],
        name: Name = NO_NAME,
    ) -> None:
        super().__init__()
        self.session_id = session_id
        self.lane = lane
        self.number = number
        self.index = index
        self.batch: Batch | None = None  # once it is stored
        self._name = name
        self._canceller = canceller
        self._fetch: Callable[[], Settled] | None = None
        self._ending = False  # only the thread that set this ends the future

    @property
    def task_id(self) -> str:
        """Id of the task within the session."""
        return task_id(self.lane, self.number)

    @property
    def name(self) -> str:
        """The task's name."""
        return str(self._name)

    def __repr__(self) -> str:
        called = f" {self._name}" if any(self._name) else ""
        return (
            f"<{type(self).__name__} {self.task_id}{called} of session {self.session_id}, "
            f"{self._how()}>"
        )

    def _how(self) -> str:
        with self._condition:
            if self.cancelled():
                return "cancelled"
            if self._state != _FINISHED or self._fetch is not None:
                return self._state.lower()
            if self._exception is not None:
                return f"raised {type(self._exception).__name__}"
            return f"returned {type(self._result).__name__}"

    def cancel(self) -> bool:
        """Cancel the task unless a worker has it; blocks until the store has answered.

        asyncio calls this on the event loop's thread when the awaiting task is cancelled, which
        blocks the loop. To cancel many, first `await asyncio.to_thread(executor.cancel, futures)`:
        it writes once per batch and does not block the loop.
        """
        if self.done() or self.running():
            return self.cancelled()
        return self._canceller(self)

    def result(self, timeout: float | None = None) -> T:
        """The task's value; waits up to `timeout` seconds, and fetches it if necessary."""
        self._fetch_now()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The task's exception, or None; waits and fetches like `result`."""
        self._fetch_now()
        return super().exception(timeout)

    def settle(self, settled: Settled) -> None:
        """End with a value or an exception; does nothing if it has already ended."""
        if not self._claim_end("RUNNING"):
            return
        good, value = settled
        if good:
            self.set_result(value)
        else:
            self.set_exception(value)

    def _invoke_callbacks(self) -> None:
        # In the base class a callback may kill the thread, which settles all other futures too.
        for callback in self._done_callbacks:  # type: ignore[attr-defined]
            try:
                callback(self)
            except BaseException as error:
                if is_interrupt(error):
                    raise
                log.exception("exception calling callback for %r", self)

    def settle_later(self, fetch: Callable[[], Settled]) -> None:
        """End now, but fetch the value or exception only when it is first asked for.

        Only for a future that has not been handed out yet.
        """
        self._fetch = fetch
        self._state = _FINISHED

    def note_running(self) -> None:
        """A worker has started the task."""
        with self._condition:
            if self._state == _PENDING and not self._ending:
                self.set_running_or_notify_cancel()

    def settle_cancelled(self) -> None:
        """End as cancelled, even if it was running."""
        if not self._claim_end(_PENDING):
            return
        if super().cancel():
            # Without this, `wait` and `as_completed` would never wake up for it.
            self.set_running_or_notify_cancel()

    def _claim_end(self, state: str) -> bool:
        """Whether the caller may end it from that state; callbacks run without the lock."""
        with self._condition:
            if self.done() or self._ending:
                return False
            self._ending = True
            self._state = state
            return True

    def _fetch_now(self) -> None:
        fetch = self._fetch
        if fetch is None:
            return
        good, value = fetch()
        with self._condition:
            if self._fetch is not None:
                if good:
                    self._result = value
                else:
                    self._exception = value
                self._fetch = None

"""A `concurrent.futures.Future` that knows which task it stands for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from starburst_executor.records import Batch, task_id

__all__ = ["Settled", "TaskFuture"]

T = TypeVar("T")

# `Future` has no public way to end a running future as cancelled, which is what cancelling a
# running task on its worker must do; its state names have been the same since Python 3.2.
_PENDING = "PENDING"
_FINISHED = "FINISHED"

Settled = tuple[bool, Any]
"""How a task ended: whether it returned, and its value or its exception."""


class TaskFuture(Future[T]):
    """The future of one task of a session.

    `cancel()` asks the store and so takes a round trip or two. `running()` becomes true when the
    record says that a worker has begun the task, which for one that ends within a couple of
    seconds may be never.

    Attributes:
        session_id: The session.
        task_id: Id of the task within the session, such as "0-17".
        index: Its place in submission order, fixed when this client first saw it.
    """

    def __init__(
        self,
        session_id: str,
        lane: int,
        number: int,
        index: int,
        canceller: Callable[[TaskFuture[Any]], bool],
    ) -> None:
        super().__init__()
        self.session_id = session_id
        self.lane = lane
        self.number = number
        self.index = index
        self.batch: Batch | None = None  # once it is stored
        self._canceller = canceller
        self._fetch: Callable[[], Settled] | None = None
        self._ending = False  # whoever set this ends the future, and nobody else

    @property
    def task_id(self) -> str:
        """Id of the task within the session."""
        return task_id(self.lane, self.number)

    def cancel(self) -> bool:
        """Cancel the task unless a worker has it; blocks for the store's answer, without which it cannot tell.

        asyncio calls this on the event loop's thread when what awaits the future is cancelled, and holds the
        loop up for so long. Where many are to be cancelled, `await asyncio.to_thread(executor.cancel, futures)`
        first: it writes once for each batch and leaves the loop free.
        """
        if self.done() or self.running():
            return self.cancelled()
        return self._canceller(self)

    def result(self, timeout: float | None = None) -> T:
        """The task's value; waits for it up to `timeout` seconds, and fetches it if need be."""
        self._fetch_now()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The task's exception, or None; waits and fetches like `result`."""
        self._fetch_now()
        return super().exception(timeout)

    def settle(self, settled: Settled) -> None:
        """End with a value or an exception; nothing happens if it has ended already."""
        if not self._claim_end("RUNNING"):
            return
        good, value = settled
        if good:
            self.set_result(value)
        else:
            self.set_exception(value)

    def settle_later(self, fetch: Callable[[], Settled]) -> None:
        """End now, and get value or exception when first asked for it.

        For a future that nobody has seen yet.
        """
        self._fetch = fetch
        self._state = _FINISHED

    def note_running(self) -> None:
        """A worker has begun the task."""
        with self._condition:
            if self._state == _PENDING and not self._ending:
                self.set_running_or_notify_cancel()

    def settle_cancelled(self) -> None:
        """End as cancelled, even if it was running."""
        if not self._claim_end(_PENDING):
            return
        if super().cancel():
            # Without this `wait` and `as_completed` would never wake for it.
            self.set_running_or_notify_cancel()

    def _claim_end(self, state: str) -> bool:
        """Whether the caller is to end it, from that state; not under the lock, for callbacks are called then."""
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

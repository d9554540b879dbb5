"""The manifest as a worker last read it, and whether the session goes on."""

from __future__ import annotations

from starburst_executor.errors import SessionNotFound, SessionTerminated
from starburst_executor.protocol.manifest import Manifest, SessionState
from starburst_executor.protocol.session import Session
from starburst_executor.worker.open_batches import OpenBatches
from starburst_executor.worker.timers import Timers

__all__ = ["SessionCheck"]


class SessionCheck:
    """Reads the manifest once a session check.

    Args:
        session: The session.
        manifest: The manifest as read at start.
        batches: Learns how far each lane is finished, and knows the store's time.
        timers: When to read again.
    """

    def __init__(
        self, session: Session, manifest: Manifest, batches: OpenBatches, timers: Timers
    ) -> None:
        self._session = session
        self._batches = batches
        self._timers = timers
        self.manifest = manifest

    @property
    def overdue(self) -> bool:
        """Whether the session may have ended since the manifest was last read."""
        return self._timers.now >= self._timers.check

    def check(self) -> str | None:
        """Read the manifest if that is due; a reason if the worker should leave.

        Raises:
            SessionTerminated: the session was deleted.
        """
        if self.overdue:
            self._read()
        if self.manifest.state is SessionState.TERMINATED:
            return "the session was terminated"
        return self.time_is_up()

    def time_is_up(self) -> str | None:
        """A reason to leave once the session's time limit is reached; makes no request."""
        if self._batches.store_now >= self.manifest.deadline:
            return "the session's absolute time limit is reached; extend and attach go on from here"
        return None

    def _read(self) -> None:
        before = self.manifest
        try:
            self.manifest = self._session.load()
        except SessionNotFound as error:
            raise SessionTerminated(f"session {self._session.id} was deleted") from error
        now = self._timers.now
        if self.manifest.workers != before.workers:
            self._timers.count = now
        self._timers.check = now + self.manifest.intervals.session_check
        self._batches.queue.learn(self.manifest.lanes)

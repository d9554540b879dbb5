"""A worker's heartbeats, on a thread of their own: its loop may be held up by a slow request."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from starburst_executor.errors import StoreError
from starburst_executor.protocol.manifest import Heartbeat
from starburst_executor.protocol.session import Session

__all__ = ["HeartbeatThread"]

log = logging.getLogger(__name__)


class HeartbeatThread:
    """Writes heartbeats.

    Args:
        session: Where to.
        interval: Seconds between beats while the worker holds anything.
        content: Makes the heartbeat.
        holding: Whether the worker holds anything. Both are called on the beater's thread.
    """

    def __init__(
        self,
        session: Session,
        interval: float,
        content: Callable[[], Heartbeat],
        holding: Callable[[], bool],
    ) -> None:
        self._session = session
        self._interval = interval
        self._content = content
        self._holding = holding
        self._wake = session.runtime.signal()
        # Set: no beat is in flight, and none will be begun.
        self._quiet = session.runtime.signal()
        self._paused = self._closed = False
        self.last = -math.inf  # monotonic time of the last beat that was answered

    def beat(self) -> None:
        """Beat now; raises what the store raises."""
        self._session.beat(self._content())
        self.last = self._session.runtime.monotonic()

    def run(self) -> None:
        """Beat until `close`."""
        while not self._closed:
            poked = self._wake.wait(self._interval)
            self._wake.clear()
            if self._paused:
                self._quiet.set()
            elif poked or self._holding():
                self._try()

    def silent(self) -> float:
        """Seconds since the last beat that was answered."""
        return self._session.runtime.monotonic() - self.last

    def poke(self) -> None:
        """Have it beat soon, if the last beat is an interval old."""
        if self.silent() >= self._interval:
            self._wake.set()

    def pause(self) -> None:
        """Return when no beat is in flight; none follows until `resume`."""
        self._quiet.clear()
        self._paused = True
        self._wake.set()
        self._quiet.wait()

    def resume(self) -> None:
        """Beat again, at once; raises what the store raises."""
        self.beat()
        self._paused = False

    def close(self) -> None:
        """Have `run` return; after `pause`."""
        self._closed = True
        self._wake.set()

    def _try(self) -> None:
        try:
            self.beat()
        except StoreError as error:
            log.warning("heartbeat failed: %s", error)
        except Exception:  # whatever it is: without this thread the worker is taken for lost
            log.exception("heartbeat failed")

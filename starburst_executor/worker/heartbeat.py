"""A worker's heartbeats, on a thread of their own, since a slow request may hold up its loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from starburst_executor.errors import StoreError
from starburst_executor.protocol.manifest import Heartbeat
from starburst_executor.protocol.session import Session
from starburst_executor.worker.pool import JobResult
from starburst_executor.worker.pulse import Pulse

__all__ = ["HeartbeatThread", "WorkTally"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class WorkTally:
    """What a worker has done so far."""

    completed: int = 0
    failed: int = 0
    busy: float = 0.0  # seconds of task time, all slots together

    def add(self, result: JobResult) -> None:
        """Count one task that ended."""
        self.busy += max(0.0, result.ended - result.began)
        if result.ok:
            self.completed += 1
        else:
            self.failed += 1


class HeartbeatThread:
    """Writes heartbeats.

    Args:
        session: Where they are stored.
        interval: Seconds between heartbeats while the worker holds anything.
        content: Makes the heartbeat.
        holding: Whether the worker holds anything. Both are called on this thread.
        pulse: Whether the worker's loop goes on; without it there is no heartbeat.
    """

    def __init__(
        self,
        session: Session,
        interval: float,
        content: Callable[[], Heartbeat],
        holding: Callable[[], bool],
        pulse: Pulse,
    ) -> None:
        self._session = session
        self._interval = interval
        self._content = content
        self._holding = holding
        self._pulse = pulse
        self._wake = session.runtime.signal()
        # Set: no heartbeat is in flight, and none will be sent.
        self._quiet = session.runtime.signal()
        self._paused = self._closed = False
        self.last = -math.inf  # monotonic time of the last acknowledged heartbeat

    def beat(self) -> None:
        """Send a heartbeat now; raises what the store raises."""
        self._session.beat(self._content())
        self.last = self._session.runtime.monotonic()

    def run(self) -> None:
        """Send heartbeats until `close`."""
        while not self._closed:
            poked = self._wake.wait(self._interval)
            self._wake.clear()
            if self._paused:
                self._quiet.set()
            elif poked or self._holding():
                self._try()

    def silent(self) -> float:
        """Seconds since the last acknowledged heartbeat."""
        return self._session.runtime.monotonic() - self.last

    def poke(self) -> None:
        """Send a heartbeat soon, if the last one is an interval old."""
        if self.silent() >= self._interval:
            self._wake.set()

    def pause(self) -> None:
        """Return once no heartbeat is in flight; none follows until `resume`."""
        self._quiet.clear()
        self._paused = True
        self._wake.set()
        self._quiet.wait()

    def resume(self) -> None:
        """Send heartbeats again, one at once; raises what the store raises."""
        self.beat()
        self._paused = False

    def close(self) -> None:
        """Make `run` return; call it after `pause`."""
        self._closed = True
        self._wake.set()

    def _try(self) -> None:
        if stopped := self._pulse.stopped:
            log.error("no heartbeat: the worker's loop has not gone on %s", stopped)
            return
        try:
            self.beat()
        except StoreError as error:
            log.warning("heartbeat failed: %s", error)
        except Exception:  # without this thread the worker would be taken for lost
            log.exception("heartbeat failed")

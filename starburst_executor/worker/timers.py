"""When a worker's periodic work is due, on its own monotonic clock."""

from __future__ import annotations

from starburst_executor.protocol.manifest import Intervals
from starburst_executor.runtime import Runtime

__all__ = ["Timers"]


class Timers:
    """When things are due. Makes no requests.

    Args:
        intervals: The session's intervals.
        runtime: The clock, and the source of jitter.

    Attributes:
        look: When to look for open batches again.
        refresh: When to read the records that name this worker.
        check: When to read the manifest.
        count: When to count the live workers.
        repair: When to look for lost workers.
        grow: From when on this worker starts others; whoever started it has just counted.
        idle_since: Since when there has been nothing to do.
    """

    def __init__(self, intervals: Intervals, runtime: Runtime) -> None:
        self._intervals = intervals
        self._runtime = runtime
        now = self.now
        self._poll = intervals.poll_first
        self.look = self.count = self.idle_since = now
        self.refresh = now + intervals.heartbeat
        self.check = self.grow = now + intervals.session_check
        self.repair = now  # set by whoever knows how many workers share the repairs

    @property
    def now(self) -> float:
        """Seconds on the monotonic clock."""
        return self._runtime.monotonic()

    @property
    def polled_in_vain(self) -> bool:
        """Whether several looks in a row found nothing to do."""
        return self._poll > self._intervals.poll_first

    def reset_poll(self) -> None:
        """There is work: the next pauses are short again."""
        self._poll = self._intervals.poll_first

    def back_off(self) -> float:
        """The next pause between looks; doubles up to a limit, with jitter."""
        pause = self._poll * self._runtime.random.uniform(0.8, 1.2)
        # An idle worker sends its heartbeats with its looks, so leases limit the pause too.
        longest = min(self._intervals.poll_last, self._intervals.lease / 4)
        self._poll = min(self._poll * 2, longest)
        return pause

    def repair_interval(self, live: int) -> float:
        """Seconds between this worker's repairs: about four per lease among all live workers."""
        leases = max(1.0, live / 4)
        return self._intervals.lease * leases * self._runtime.random.uniform(0.75, 1.25)

"""Which workers are alive, going by the age of their heartbeats on the store's clock.

A live worker sends a heartbeat at least every quarter of a lease, so

    up to half a lease     it is live: counted upon, by whoever starts workers, decides to stay
                           or tells people how many there are
    up to a whole lease    it may be live: it may still write, and may still cost something
    older                  it is not live; whether it is *lost* takes a second look, see
                           `coordination.recovery`
"""

from __future__ import annotations

import math
from collections.abc import Collection

from starburst_executor.protocol.manifest import Intervals
from starburst_executor.protocol.session import HeartbeatListing

__all__ = ["heartbeat_age", "live_workers", "possibly_live_workers"]


def heartbeat_age(beats: HeartbeatListing, worker: str) -> float:
    """Seconds since a worker's last heartbeat; infinite if it has none."""
    entry = beats.entries.get(worker)
    return beats.now - entry.modified if entry else math.inf


def live_workers(beats: HeartbeatListing, intervals: Intervals) -> set[str]:
    """The workers that are live."""
    return _heard_within(beats, intervals.lease / 2)


def possibly_live_workers(
    beats: HeartbeatListing, intervals: Intervals, ended: Collection[str] = ()
) -> set[str]:
    """The workers that may be live.

    Args:
        beats: A listing of the heartbeats.
        intervals: The session's intervals.
        ended: Workers that are known to have ended, whatever their heartbeats say.
    """
    return _heard_within(beats, intervals.lease).difference(ended)


def _heard_within(beats: HeartbeatListing, seconds: float) -> set[str]:
    return {worker for worker in beats.entries if heartbeat_age(beats, worker) <= seconds}

"""What a session has cost so far.

    each worker     its heartbeat: when it began, its requests to the store, its market
                    `workers/<id>` while it lives, `ended/<id>` for good
    a client        its requests, added to its lane when it gives the lane back
    session.json    the prices of the day on which the session was created, and the limits
       |
       v
    CostTracker.look     a CostSummary

A worker's seconds are measured by its own clock, from its start to its last heartbeat, and by the
store's clock from there on while it lives: the clocks of two machines are never compared. A lost
worker is billed up to its last heartbeat, at most some 20 seconds too little. This is an estimate,
known at once; what AWS charges is on the account's bill.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from starburst_executor.costs import prices
from starburst_executor.errors import DamagedObject
from starburst_executor.formatting import dollars, duration
from starburst_executor.protocol.liveness import possibly_live_workers
from starburst_executor.protocol.manifest import Heartbeat, Lane, Manifest
from starburst_executor.protocol.session import HeartbeatListing, Session
from starburst_executor.storage.base import ListedObject
from starburst_executor.tables import counted

__all__ = ["CostSummary", "CostTracker", "WorkerLifetime", "summarize"]

log = logging.getLogger(__name__)

_READ_AT_ONCE = 128  # heartbeats per look: a third of a second on S3, whatever the session's size

# A live worker's request counts are read again after 10 seconds, or later: at most 8 reads a
# second.
_READ_AGAIN = 10.0
_READS_A_SECOND = 8


class WorkerLifetime(NamedTuple):
    """A worker's lifetime in seconds, and its requests to the store."""

    seconds: float
    writes: int = 0
    reads: int = 0
    market: str = ""
    live: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSummary:
    """The cost of a session so far, in US dollars, excluding storage, logs, traffic and taxes.

    Attributes:
        total: Workers plus requests.
        compute: Workers as billed: whole seconds, at least a minute each.
        requests: Requests counted so far.
        hourly: Cost per hour of the workers that are alive.
        worker_seconds: Total worker seconds.
        vcpu_seconds: Worker seconds times vCPUs; 0 for workers that are free.
        gb_seconds: Worker seconds times GB of memory.
        workers: Number of workers.
        unread: How many of these have not been read yet and are assumed to be like the others.
        writes: PUT, COPY, POST and LIST requests.
        reads: GET and HEAD requests.
        clients_out: Clients whose requests are not included: still at work, or ended without
            leaving.
        max_hourly_cost: The session's limit in dollars per hour.
        cost_alert: Dollars at which to warn.
        alert: Whether that amount was reached.
        prices: Which prices, their source and their date.
    """

    total: float
    compute: float
    requests: float
    hourly: float
    worker_seconds: float
    vcpu_seconds: float
    gb_seconds: float
    workers: int
    unread: int
    writes: int
    reads: int
    clients_out: int
    max_hourly_cost: float | None
    cost_alert: float | None
    alert: bool
    prices: str

    def __str__(self) -> str:
        about = "about " if self.unread else ""
        return f"{about}{dollars(self.total)}"

    def lines(self) -> list[tuple[str, str]]:
        """The summary as labelled lines."""
        parts = [f"requests {dollars(self.requests)} ({self.writes} writes, {self.reads} reads)"]
        if self.vcpu_seconds:
            size = f"{duration(self.worker_seconds)} of {counted(self.workers, 'worker')}"
            parts.insert(0, f"workers {dollars(self.compute)} ({size})")
        lines = [("Cost", f"{self} so far: {', '.join(parts)}")]
        if self.hourly:
            lines.append(("Now", f"{dollars(self.hourly)} an hour"))
        if self.max_hourly_cost is not None:
            lines.append(("Limit", f"{dollars(self.max_hourly_cost)} an hour"))
        if self.cost_alert is not None:
            passed = "passed" if self.alert else "not reached"
            lines.append(("Alert", f"at {dollars(self.cost_alert)}, {passed}"))
        return [*lines, ("Prices", self.prices)]


def summarize(
    manifest: Manifest,
    lives: Sequence[WorkerLifetime],
    *,
    unread: int = 0,
    writes: float = 0,
    reads: float = 0,
    clients_out: int = 0,
) -> CostSummary | None:
    """Cost of workers and requests; None if everything is free, or the price is unknown.

    Args:
        manifest: The session's manifest, with its prices.
        lives: Its workers.
        unread: Workers known only to have existed.
        writes: PUT, COPY, POST and LIST requests of clients.
        reads: GET and HEAD requests of clients.
        clients_out: Clients whose requests are unknown.
    """
    rate, spec = manifest.rate, manifest.spec
    if rate is None:
        return None
    share = (len(lives) + unread) / len(lives) if lives else 1.0
    paid = spec.launcher != "local"
    seconds = [prices.billed_seconds(life.seconds) if paid else life.seconds for life in lives]
    each = zip(lives, seconds, strict=True)
    compute = share * math.fsum(s / 3600 * rate.hour(life.market) for life, s in each)
    worker_seconds = share * math.fsum(seconds)
    writes += share * sum(life.writes for life in lives)
    reads += share * sum(life.reads for life in lives)
    requests = writes * rate.write + reads * rate.read
    alert = manifest.cost_alert
    return CostSummary(
        total=compute + requests,
        compute=compute,
        requests=requests,
        hourly=math.fsum(rate.hour(life.market) for life in lives if life.live),
        worker_seconds=worker_seconds,
        vcpu_seconds=worker_seconds * spec.cpu if paid else 0.0,
        gb_seconds=worker_seconds * prices.memory_gb(spec) if paid else 0.0,
        workers=len(lives) + unread,
        unread=unread,
        writes=round(writes),
        reads=round(reads),
        clients_out=clients_out,
        max_hourly_cost=manifest.max_hourly_cost,
        cost_alert=alert,
        alert=alert is not None and compute + requests >= alert,
        prices=str(rate),
    )


@dataclass(slots=True)
class _Read:
    """A heartbeat, and the listing entry it was read after."""

    beat: Heartbeat
    entry: ListedObject
    at: float  # the store's clock


class CostTracker:
    """Keeps track of a session's cost, reading little each time.

    Args:
        session: The session.
        client: Whether this process's own requests count. A submitting client's do, and are added
            to its lane only when it leaves; an observer's do not.
    """

    def __init__(self, session: Session, *, client: bool = False) -> None:
        self._session = session
        self._client = client
        self._ended: dict[str, ListedObject] = {}
        self._living: set[str] | None = None
        self._read: dict[str, _Read] = {}

    def look(self, manifest: Manifest, beats: HeartbeatListing) -> CostSummary | None:
        """The cost as of now; None if everything is free, or the price is unknown.

        Args:
            manifest: The session's manifest.
            beats: A listing of the heartbeats.
        """
        if manifest.rate is None:
            return None
        self._list_ended(beats)
        entries = {**self._ended, **beats.entries}
        self._read_some(entries, beats)
        live = possibly_live_workers(beats, manifest.intervals)
        lives = [
            self._life(worker, entry, beats.now, live=worker in live)
            for worker, entry in entries.items()
            if worker in self._read
        ]
        writes, reads, out = self._of_clients(manifest.lanes)
        return summarize(
            manifest,
            lives,
            unread=len(entries) - len(lives),
            writes=writes,
            reads=reads,
            clients_out=out,
        )

    def _list_ended(self, beats: HeartbeatListing) -> None:
        """List ended workers at first, and again whenever a live one is gone."""
        living = set(beats.entries)
        if self._living is not None and not self._living - living:
            self._living |= living
            return
        self._living = living
        prefix = self._session.key("ended/")
        entries, _ = self._session.list_all(prefix)
        self._ended = {entry.key[len(prefix) :]: entry for entry in entries}

    def _read_some(self, entries: dict[str, ListedObject], beats: HeartbeatListing) -> None:
        """Read new workers first, then those read longest ago, up to the limit per look."""
        again = beats.now - max(_READ_AGAIN, len(beats.entries) / _READS_A_SECOND)
        due = [w for w, entry in entries.items() if self._is_due(w, entry, again)]
        due.sort(key=lambda w: self._read[w].at if w in self._read else -math.inf)
        chosen = due[:_READ_AT_ONCE]
        calls = [
            partial(self._heartbeat, w, "workers" if w in beats.entries else "ended")
            for w in chosen
        ]
        read = self._session.runtime.gather(calls)
        for worker, beat in zip(chosen, read, strict=True):
            if beat is not None:
                self._read[worker] = _Read(beat, entries[worker], beats.now)

    def _is_due(self, worker: str, entry: ListedObject, again: float) -> bool:
        read = self._read.get(worker)
        if read is None or read.entry.key != entry.key:
            return True
        return read.entry.version != entry.version and read.at <= again

    def _heartbeat(self, worker: str, folder: str) -> Heartbeat | None:
        try:
            return self._session.heartbeat(worker, folder)
        except DamagedObject as error:
            log.info("the lifetime of worker %s is unknown: %s", worker, error)
            return None

    def _life(self, worker: str, entry: ListedObject, now: float, *, live: bool) -> WorkerLifetime:
        read = self._read[worker]
        beat = read.beat
        last = now if live else entry.modified
        since = 0.0 if read.entry.key != entry.key else last - read.entry.modified
        seconds = max(0.0, beat.written - beat.started) + max(0.0, since)
        return WorkerLifetime(seconds, beat.writes, beat.reads, beat.market, live)

    def _of_clients(self, lanes: Iterable[Lane]) -> tuple[int, int, int]:
        """Writes and reads of clients, and how many clients are not included."""
        given = list(lanes)
        tally = self._session.store.tally
        out = max(0, sum(lane.taken for lane in given) - self._client)
        writes = sum(lane.writes for lane in given) + (tally.writes if self._client else 0)
        reads = sum(lane.reads for lane in given) + (tally.reads if self._client else 0)
        return writes, reads, out

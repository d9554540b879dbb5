"""What a session has cost so far."""

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

_READ_AT_ONCE = (
    128  # heartbeats of one look: a third of a second on S3, whatever the session's size
)

# Seconds after which a live worker's count of requests is read again: at most 8 reads a second, however many.
_READ_AGAIN = 10.0

_READS_A_SECOND = 8


class WorkerLifetime(NamedTuple):
    """How long a worker has lived, in seconds, and what it asked of the store."""

    seconds: float
    writes: int = 0
    reads: int = 0
    market: str = ""
    live: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSummary:
    """What a session has cost so far, in US dollars; without storage, logs, traffic and taxes.

    Attributes:
        total: Workers and requests together.
        compute: The workers, as they are billed: whole seconds, at least a minute each.
        requests: The requests that were counted.
        hourly: What the workers that live cost an hour.
        worker_seconds: Seconds of workers.
        vcpu_seconds: The same times their vCPUs; 0 for workers that cost nothing.
        gb_seconds: The same times their GB of memory.
        workers: How many there were.
        unread: So many of these were not read yet, and are taken to be like the others.
        writes: PUT, COPY, POST and LIST requests.
        reads: GET and HEAD requests.
        clients_out: Clients whose requests are not in it: they are at work, or ended without leaving.
        max_hourly_cost: The session's limit, dollars an hour.
        cost_alert: Dollars from which the session is to be warned of.
        alert: Whether it has come to that.
        prices: Which prices, where they are from, and of which date.
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
        """What there is to say of it, with a label each."""
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
            passed = "passed: it has cost more" if self.alert else "not reached"
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
    """What workers and requests come to; None where nothing costs anything, or the price is not known.

    Args:
        manifest: Of the session, with its prices.
        lives: Its workers.
        unread: Workers of which nothing is known but that they were there.
        writes: PUT, COPY, POST and LIST requests of clients.
        reads: GET and HEAD requests of clients.
        clients_out: Clients of which the requests are not known.
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
    """A heartbeat, and the listing that it was read after."""

    beat: Heartbeat
    entry: ListedObject
    at: float  # the store's clock


class CostTracker:
    """Reckons what a session has cost, again and again, reading little each time.

    Args:
        session: Which.
        client: Whether this process's own requests are the session's: those of a client that submits are,
            and are added to its lane only when it leaves; those of somebody who looks are not.
    """

    def __init__(self, session: Session, *, client: bool = False) -> None:
        self._session = session
        self._client = client
        self._ended: dict[str, ListedObject] = {}
        self._living: set[str] | None = None
        self._read: dict[str, _Read] = {}

    def look(self, manifest: Manifest, beats: HeartbeatListing) -> CostSummary | None:
        """What it has cost now; None where nothing costs anything, or the price is not known.

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
        """Once at first, and then when one of the living is there no longer."""
        living = set(beats.entries)
        if self._living is not None and not self._living - living:
            self._living |= living
            return
        self._living = living
        prefix = self._session.key("ended/")
        entries, _ = self._session.list_all(prefix)
        self._ended = {entry.key[len(prefix) :]: entry for entry in entries}

    def _read_some(self, entries: dict[str, ListedObject], beats: HeartbeatListing) -> None:
        """Read those that are new, then those that were read longest ago; so many at once, and no more."""
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
            log.info("worker %s counts as one of unknown length: %s", worker, error)
            return None

    def _life(self, worker: str, entry: ListedObject, now: float, *, live: bool) -> WorkerLifetime:
        read = self._read[worker]
        beat = read.beat
        last = now if live else entry.modified
        since = 0.0 if read.entry.key != entry.key else last - read.entry.modified
        seconds = max(0.0, beat.written - beat.started) + max(0.0, since)
        return WorkerLifetime(seconds, beat.writes, beat.reads, beat.market, live)

    def _of_clients(self, lanes: Iterable[Lane]) -> tuple[int, int, int]:
        """Writes and reads of clients, and how many clients they leave out."""
        given = list(lanes)
        tally = self._session.store.tally
        out = max(0, sum(lane.taken for lane in given) - self._client)
        writes = sum(lane.writes for lane in given) + (tally.writes if self._client else 0)
        reads = sum(lane.reads for lane in given) + (tally.reads if self._client else 0)
        return writes, reads, out

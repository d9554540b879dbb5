"""What a session has cost so far, and what it may cost.

    every worker    its heartbeat: when it began, its requests to the store, its market
                    `workers/<id>` while it lives, `ended/<id>` for good
    a client        its requests, added to its lane when it gives that back
    session.json    the prices of the day on which the session was made, and the limits
       |
       v
    Ledger.look     a Bill

Seconds of a worker are by its own clock, from its start to its last heartbeat, and on by the store's clock while
it lives: two machines' clocks are never compared. A lost worker is billed up to its last heartbeat, at most
some 20 seconds too little. What AWS bills is on the account's bill; this is reckoned, and known at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from starburst_executor import cost
from starburst_executor.errors import DamagedObject, SessionError, StoreError
from starburst_executor.formatting import dollars, duration
from starburst_executor.protocol.manifest import Heartbeat, Lane, Manifest
from starburst_executor.protocol.session import HeartbeatListing, Session
from starburst_executor.storage.base import ListedObject
from starburst_executor.tables import counted

__all__ = [
    "Alarm",
    "Bill",
    "Ledger",
    "Life",
    "affordable_workers",
    "bill",
    "check_workers",
]

log = logging.getLogger(__name__)

_READ_AT_ONCE = (
    128  # heartbeats of one look: a third of a second on S3, whatever the session's size
)
# Seconds after which a live worker's count of requests is read again: at most 8 reads a second, however many.
_READ_AGAIN = 10.0
_READS_A_SECOND = 8
_ALARM_SECONDS = 60.0  # between looks for the alarm


class Life(NamedTuple):
    """How long a worker has lived, in seconds, and what it asked of the store."""

    seconds: float
    writes: int = 0
    reads: int = 0
    market: str = ""
    live: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
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


# --- limits ------------------------------------------------------------------------


def affordable_workers(manifest: Manifest) -> int:
    """How many of the wanted workers `max_hourly_cost` allows; whoever launches starts no more."""
    most = _most_workers(manifest)
    return manifest.workers if most is None else min(manifest.workers, most)


def _most_workers(manifest: Manifest) -> int | None:
    if manifest.max_hourly_cost is None or manifest.rate is None:
        return None
    return cost.affordable(manifest.max_hourly_cost, _dearest(manifest))


def _dearest(manifest: Manifest) -> float:
    """What a worker may come to cost an hour."""
    if manifest.rate is None:
        return 0.0
    if manifest.spec.spot_fallback:
        return max(manifest.rate.worker_hour, manifest.rate.fallback_hour)
    return manifest.rate.worker_hour


def check_workers(manifest: Manifest) -> None:
    """Refuse a session whose workers would cost more an hour than it allows.

    Raises:
        ValueError: they would, or what they cost is not known; says how many would not.
    """
    limit = manifest.max_hourly_cost
    if limit is None or manifest.spec.launcher == "local":
        return
    if manifest.rate is None:
        raise ValueError(
            f"max_hourly_cost={limit:g} cannot be kept, for what the workers cost is not known: AWS did not tell, "
            "and the built-in table has Fargate alone. Allow pricing:GetProducts (and for Spot on EC2 "
            "ec2:DescribeSpotPriceHistory), or leave max_hourly_cost out."
        )
    cost.check_hourly_cost(limit, manifest.workers, _dearest(manifest), manifest.rate)


# --- the bill ----------------------------------------------------------------------


def bill(
    manifest: Manifest,
    lives: Sequence[Life],
    *,
    unread: int = 0,
    writes: float = 0,
    reads: float = 0,
    clients_out: int = 0,
) -> Bill | None:
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
    seconds = [cost.billed_seconds(life.seconds) if paid else life.seconds for life in lives]
    each = zip(lives, seconds, strict=True)
    compute = share * math.fsum(s / 3600 * rate.hour(life.market) for life, s in each)
    worker_seconds = share * math.fsum(seconds)
    writes += share * sum(life.writes for life in lives)
    reads += share * sum(life.reads for life in lives)
    requests = writes * rate.write + reads * rate.read
    alert = manifest.cost_alert
    return Bill(
        total=compute + requests,
        compute=compute,
        requests=requests,
        hourly=math.fsum(rate.hour(life.market) for life in lives if life.live),
        worker_seconds=worker_seconds,
        vcpu_seconds=worker_seconds * spec.cpu if paid else 0.0,
        gb_seconds=worker_seconds * cost.memory_gb(spec) if paid else 0.0,
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


class Ledger:
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

    def look(self, manifest: Manifest, beats: HeartbeatListing) -> Bill | None:
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
        lease = manifest.intervals.lease
        lives = [
            self._life(worker, entry, beats, lease)
            for worker, entry in entries.items()
            if worker in self._read
        ]
        writes, reads, out = self._of_clients(manifest.lanes)
        return bill(
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

    def _life(
        self, worker: str, entry: ListedObject, beats: HeartbeatListing, lease: float
    ) -> Life:
        read = self._read[worker]
        beat = read.beat
        live = worker in beats.entries and beats.now - entry.modified <= lease
        last = beats.now if live else entry.modified
        since = 0.0 if read.entry.key != entry.key else last - read.entry.modified
        seconds = max(0.0, beat.written - beat.started) + max(0.0, since)
        return Life(seconds, beat.writes, beat.reads, beat.market, live)

    def _of_clients(self, lanes: Iterable[Lane]) -> tuple[int, int, int]:
        """Writes and reads of clients, and how many clients they leave out."""
        given = list(lanes)
        tally = self._session.store.tally
        out = max(0, sum(lane.taken for lane in given) - self._client)
        writes = sum(lane.writes for lane in given) + (tally.writes if self._client else 0)
        reads = sum(lane.reads for lane in given) + (tally.reads if self._client else 0)
        return writes, reads, out


# --- the alarm ---------------------------------------------------------------------


class Alarm:
    """Warns once in the log when a session has cost more than its `cost_alert`.

    Args:
        session: Which.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._ledger = Ledger(session, client=True)
        self._next = -math.inf
        self._rang = False

    def look(self, manifest: Manifest) -> None:
        """Look, if there is anything to look for and the last look is a minute ago."""
        now = self._session.runtime.monotonic()
        if manifest.cost_alert is None or self._rang or now < self._next:
            return
        self._next = now + _ALARM_SECONDS
        try:
            found = self._ledger.look(manifest, self._session.beats())
        except (StoreError, SessionError) as error:
            log.info(
                "what session %s costs cannot be told just now: %s",
                self._session.id,
                error,
            )
            return
        if found is not None and found.alert:
            self._rang = True
            log.warning("%s", warning(self._session.id, found))


def warning(session_id: str, found: Bill) -> str:
    """What is said of a session that has cost more than its `cost_alert`."""
    now = f", now {dollars(found.hourly)} an hour" if found.hourly else ""
    return (
        f"session {session_id} has cost {found}{now}: more than its cost_alert of "
        f"{dollars(found.cost_alert or 0.0)}. That stops nothing; `starburst-executor scale` and `cleanup` do. "
        f"({found.prices})"
    )

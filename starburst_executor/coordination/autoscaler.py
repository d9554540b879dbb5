"""Decides how many workers a session needs, and starts the missing ones.

Two kinds of process do this, each with its own `Autoscaler`:

    an attached client     every second while anything is unfinished: as many workers as the
                           unfinished tasks need
    the live worker with   at each session check, and after its recovery found a lost worker: as
    the first id           many more as *waiting* tasks need; running tasks need no second machine

There are never more than `max_workers` and, while the session is open, never fewer than
`min_workers`. A worker counts as live if its heartbeat is fresh, or if the launcher knows its
process to be alive and its first heartbeat may be yet to come. A worker that has left or fallen
silent does not count, so it never keeps a replacement from being started. Only the holder of the
lease (`launch_lease`) starts workers. Nothing else is written, so a process that dies here leaves a
lease, which expires by itself, and workers, which are as good as any.

A client stores tasks before it checks who is alive; a leaving worker deletes its heartbeat before
it lists the queue. So one of the two sees the other.

Too many workers are started
    by two processes at once: none, unless one is held up while it holds the lease (see
        `launch_lease`): then what was missing, a second time;
    while a launcher cannot tell who is alive: those of the last launch that have no heartbeat after
        half a lease;
    by a worker: as many as other workers have free slots, about to claim the tasks it saw waiting.
Those beyond `max_workers` notice at their next session check and leave; others leave when idle.
"""

from __future__ import annotations

import errno
import logging
import math
import threading
from collections.abc import Callable
from functools import partial

from starburst_executor.coordination.launch_lease import LaunchLease
from starburst_executor.costs.limits import affordable_workers
from starburst_executor.errors import (
    ExecutorBroken,
    LaunchFailed,
    LocalDiskError,
)
from starburst_executor.launchers.base import Launcher
from starburst_executor.protocol.listing import BatchListing, QueueReader
from starburst_executor.protocol.liveness import live_workers, possibly_live_workers
from starburst_executor.protocol.manifest import Heartbeat, Manifest, SessionState, WorkerState
from starburst_executor.protocol.patience import Consequence, consequence
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import HeartbeatListing, Session

__all__ = ["Autoscaler"]

log = logging.getLogger(__name__)

# After this many workers in a row that ended before their first heartbeat, or because no task can
# be run where they are, none will ever work.
_STILLBORN_MAX = 3
_LIKELY_CAUSES = (
    "Most likely they cannot reach the store or import starburst_executor, or have run out of "
    "memory, disk space or processes."
)
# Finding a machine, pulling an image and installing packages take minutes.
_START_SECONDS = 600.0
# Length of a lease: the longest that calls take, plus the pace of Fargate, which launchers keep to.
_LEASE_SECONDS = 20.0
_LAUNCHES_PER_SECOND = 20.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Most records read to count waiting tasks; the next round counts again.
_RECORDS_READ = 200


class Autoscaler:
    """Starts workers for one session on behalf of one process, on its own or the caller's thread.

    Args:
        session: The session.
        launcher: Starts the workers.
        manifest: How many, and of what size.
        broken: Called with an error when no worker can start.
        news: Called when workers were found to have ended, on any thread.

    Attributes:
        ended: The workers known to have ended, as of the last check.
    """

    def __init__(
        self,
        session: Session,
        launcher: Launcher,
        manifest: Manifest,
        broken: Callable[[Exception], None],
        news: Callable[[], None] = lambda: None,
    ) -> None:
        self._session = session
        self._launcher = launcher
        self._broken = broken
        self._news = news
        self._lock = threading.RLock()  # `broken` may close this again
        self._wake = session.runtime.signal()
        self._asked: Callable[[], object] | None = None
        self._lease = LaunchLease(session)
        self._queue: QueueReader | None = None  # used by one thread only
        # Started here, and not yet known to have ended: when, on the monotonic clock.
        self._started: dict[str, float] = {}
        # Known to the launcher but never heard: since when. Once heard: -inf.
        self._unheard: dict[str, float] = {}
        self._next_count = -math.inf
        self._stillborn = 0
        self.ended: frozenset[str] = frozenset()
        self.manifest = manifest
        self.closed = False

    # --- asking -----------------------------------------------------------------------

    def need(self, unfinished: int) -> None:
        """Start the workers missing for `unfinished` tasks before this returns.

        While it is another process's turn to start some, wait until they are there or its turn is
        over: the caller may be about to leave, and that process may have died.
        """
        while not self._needs_no_more(unfinished):
            self._session.runtime.signal().wait(self._session.runtime.random.uniform(0.5, 1.0))

    def _needs_no_more(self, unfinished: int) -> bool:
        with self._lock:
            self._next_count = -math.inf
            return self._keep(unfinished)

    def _keep(self, unfinished: int) -> bool:
        with self._lock:
            manifest = self.manifest
            wanted = -(-unfinished // manifest.spec.slots)
            most = affordable_workers(manifest)
            wanted = min(most, max(wanted, manifest.min_workers))
            return self._fill(wanted, lambda live, starting: wanted - live)

    def grow(self, free: int) -> None:
        """Start the workers missing for waiting tasks before this returns.

        Args:
            free: Tasks that the caller is about to claim itself.
        """
        with self._lock:
            if self.manifest.state is SessionState.OPEN:
                most = affordable_workers(self.manifest)
                self._fill(most, partial(self._lacking, free))

    def ask_need(self, unfinished: int) -> None:
        """Let the thread in `run` do `need`; it seldom counts heartbeats if all processes exist."""
        self._ask(partial(self._keep, unfinished))

    def ask_grow(self, free: int) -> None:
        """Let the thread in `run` do `grow`."""
        self._ask(partial(self.grow, free))

    def _ask(self, call: Callable[[], object]) -> None:
        self._asked = call
        self._wake.set()

    def run(self) -> None:
        """Serve requests until `close`: launching hundreds takes long, and holds nobody up here."""
        while not self.closed:
            self._wake.wait()
            self._wake.clear()
            asked, self._asked = self._asked, None
            if asked is not None and not self.closed and not self._done(asked):
                return

    def _done(self, call: Callable[[], object]) -> bool:
        """Make the call; return False if another would be pointless."""
        try:
            call()
        except Exception as error:
            if consequence(error) is not Consequence.END:
                self._session.warn(error)
                return True
            # Whatever it is (say, the session was terminated): without workers futures would hang.
            log.exception("session %s: no more workers will be started", self._session.id)
            self._broken(error)
            return False
        return True

    def close(self) -> None:
        """Start no more workers; a launch in progress ends soon, and `run` with it."""
        self.closed = True
        self._launcher.halt()
        self._wake.set()

    # --- counting ---------------------------------------------------------------------

    def _fill(self, most: int, lacking: Callable[[int, int], int]) -> bool:
        """Start the missing workers; False if some are missing and it is another's turn.

        Args:
            most: If this many processes are known to be alive, count heartbeats only occasionally.
            lacking: How many workers are missing, given how many are live and, of these, starting.
        """
        if self.closed:
            return True
        url = self._session.url
        ended = self._launcher.ended(url)
        self._check_started(ended)
        self._tell(ended)
        known = self._launcher.live(url)
        now = self._session.runtime.monotonic()
        if known is not None and len(known) >= most and now < self._next_count:
            return True
        self._next_count = now + self.manifest.intervals.lease / 2
        heartbeats = self._session.beats()
        if heartbeats.now >= self.manifest.deadline or self._stillborn >= _STILLBORN_MAX:
            return True
        heard = self._heard(heartbeats, known or set()) - ended
        young = (self._young(ended) if known is None else self._unheard_of(known, heard)) - heard
        if young:
            # Listed after the heartbeats: a leaving worker writes there before it deletes its own.
            young -= self._session.buried()
        live = heard | young
        count = lacking(len(live), len(live - heard))
        mine = count <= 0 or self._launch_with_lease(live | (known or set()), len(live), count)
        self._lease.note_shortage(self._launcher.shortage(url))
        return mine

    def _tell(self, ended: set[str]) -> None:
        fresh = ended - self.ended
        if fresh:
            self.ended |= fresh
            self._news()

    def _heard(self, heartbeats: HeartbeatListing, known: set[str]) -> set[str]:
        """The live workers, and those that may be alive and whose process is known to be."""
        intervals = self.manifest.intervals
        possibly = possibly_live_workers(heartbeats, intervals)
        return live_workers(heartbeats, intervals) | (possibly & known)

    def _young(self, ended: set[str]) -> set[str]:
        """Workers started here so recently that their first heartbeat may be yet to come."""
        since = self._session.runtime.monotonic() - self.manifest.intervals.lease / 2
        return {w for w, at in self._started.items() if at >= since} - ended

    def _unheard_of(self, known: set[str], heard: set[str]) -> set[str]:
        """Workers that the launcher knows to be alive, and whose first heartbeat may still come."""
        now = self._session.runtime.monotonic()
        self._unheard = {
            worker: -math.inf if worker in heard else self._unheard.get(worker, now)
            for worker in known
        }
        since = now - _START_SECONDS
        return {worker for worker, at in self._unheard.items() if at >= since}

    def _lacking(self, free: int, live: int, starting: int) -> int:
        """How many more workers the waiting tasks need, besides those that are starting."""
        manifest = self.manifest
        room = affordable_workers(manifest) - live
        if room <= 0:
            return 0
        slots = manifest.spec.slots
        waiting = self._waiting((room + starting) * slots + free) - free
        lacking = max(-(-waiting // slots) - starting, manifest.min_workers - live)
        return min(room, lacking)

    def _waiting(self, enough: int) -> int:
        """How many tasks are pending, counted up to `enough`."""
        if self._queue is None:
            self._queue = self._session.queue()
        self._queue.learn(self.manifest.lanes)
        listings, _ = self._queue.look_for_open(enough)
        count = reads = 0
        for listing in sorted(listings, key=lambda listing: not listing.untouched):
            if count >= enough or reads >= _RECORDS_READ:
                break
            if listing.untouched:
                count += listing.batch.size
            else:
                count += self._pending(listing)
                reads += 1
        return min(count, enough)

    def _pending(self, listing: BatchListing) -> int:
        return self._session.read(listing.batch).record.count(State.PENDING)

    # --- starting ---------------------------------------------------------------------

    def _launch_with_lease(self, seen: set[str], live: int, count: int) -> bool:
        """Start `count` workers; return whether it was this process's turn.

        Args:
            seen: The processes known before.
            live: How many of them are live.
            count: How many workers are missing.
        """
        # A session terminated meanwhile needs none: they would only find that out themselves.
        self.manifest = self._session.check_open()
        count = min(count, affordable_workers(self.manifest) - live)
        if count <= 0:
            return True
        if not self._lease.take(_LEASE_SECONDS + count / _LAUNCHES_PER_SECOND):
            return False
        known = self._launcher.live(self._session.url)
        others = (known or set()) - seen  # started by somebody else since
        if others:  # or shown late, and gone by now
            others -= self._session.buried()
        if count <= len(others) or self._launch(count - len(others)):
            self._lease.give_back(self._launcher.lag)
        # Otherwise there is no room at the moment, and this process tries again soon.
        return True

    def _launch(self, count: int) -> bool:
        """Start `count` workers; return whether any were started."""
        try:
            started = self._launcher.launch(self._session.url, count)
        except OSError as error:
            text = f"workers of session {self._session.id} cannot be started: {error}"
            if error.errno in _FULL:
                raise LocalDiskError(f"{text}. Free up space on that file system") from error
            broken = ExecutorBroken(text)
            broken.__cause__ = error
            self._broken(broken)
            return False
        except LaunchFailed as error:
            self._broken(error)
            return False
        if not started:  # the launcher says why
            return False
        log.info("session %s: started workers %s", self._session.id, ", ".join(started))
        now = self._session.runtime.monotonic()
        self._started.update(dict.fromkeys(started, now))
        return True

    def _check_started(self, ended: set[str]) -> None:
        """Notice workers that ended before their first heartbeat: no hang may go unexplained."""
        for worker in sorted(self._started.keys() & ended):
            heartbeat = self._last_heartbeat(worker)
            if heartbeat is not None and heartbeat.state is not WorkerState.BROKEN:
                del self._started[worker]
                self._stillborn = 0
                continue
            self._session.check_open()  # else they had a good reason
            del self._started[worker]
            if heartbeat is not None:
                self._count_stillborn(worker, f"left: {heartbeat.reason}")
                continue
            if self._launcher.taken_away(self._session.url, worker):
                log.info("worker %s was taken away before it started work", worker)
                continue
            tail = self._launcher.log_tail(self._session.url, worker)
            self._count_stillborn(worker, f"printed:\n{tail}\n{_LIKELY_CAUSES}")

    def _last_heartbeat(self, worker: str) -> Heartbeat | None:
        session = self._session
        return session.heartbeat(worker) or session.heartbeat(worker, "ended")

    def _count_stillborn(self, worker: str, last: str) -> None:
        self._stillborn += 1
        log.warning("worker %s could not work; it %s", worker, last)
        if self._stillborn == _STILLBORN_MAX:
            self._broken(
                ExecutorBroken(
                    f"{_STILLBORN_MAX} workers of session {self._session.id} in a row ended before "
                    f"they started work, or could work no longer; the last, {worker}, {last}"
                )
            )

"""How many workers there should be, and starting those that lack.

Two kinds of process do it, each with a `Staff` of its own:

    an attached client     each second while anything is unfinished: as many as unfinished tasks take
    the first live worker  each session check, and after its repair found a lost worker: as many more as
    by id                  tasks that *wait* take; what merely runs on needs no machine beside it

never more than `max_workers` and, while the session is open, never fewer than `min_workers`. Both count
as live what has a fresh heartbeat, and what the launcher knows to live if its first heartbeat may be to
come. A process that has said goodbye, or has fallen silent, is no reason to start no other. Only whoever has the
turn (`turns`) starts any. Nothing else is written, so whoever dies here leaves the turn, which ends by
itself, and workers, which are as good as any.

A client stores first and looks who lives after, and a leaving worker deletes its heartbeat first and
lists after: so one of the two sees the other.

Too many are started
    by two at once: none, unless one is held up in its turn (see `turns`): then what lacked, once more;
    while a launcher cannot tell who lives: what of the last launch has no heartbeat after half a lease;
    by a worker: as many as other workers have free slots, which are about to claim what it saw wait.
Those beyond `max_workers` find that out at their next session check and leave; others when idle.
"""

from __future__ import annotations

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
    NewerSchema,
    StoreError,
)
from starburst_executor.launchers.base import Launcher
from starburst_executor.protocol.listing import BatchListing, QueueReader
from starburst_executor.protocol.liveness import live_workers, possibly_live_workers
from starburst_executor.protocol.manifest import Heartbeat, Manifest, SessionState, WorkerState
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import HeartbeatListing, Session

__all__ = ["Autoscaler"]

log = logging.getLogger(__name__)

# So many workers in a row that end before their first heartbeat mean that none ever will work.
_STILLBORN_MAX = 3
# A machine that has to be found, an image that is loaded and packages that are installed take minutes.
_START_SECONDS = 600.0
# A turn: what calls take at most, and the pace of Fargate, which launchers keep to.
_TURN_SECONDS = 20.0
_LAUNCHES_PER_SECOND = 20.0
# More records than this are not read to count what waits; the next look counts again.
_RECORDS_READ = 200


class Autoscaler:
    """Starts workers for one session as one process sees it, on a thread of its own or the caller's.

    Args:
        session: The session.
        launcher: What starts them.
        manifest: How many, and of what size.
        broken: Called with an error when no worker can start.
        news: Called when workers were found to have ended; may be called on any thread.

    Attributes:
        ended: The workers known to have ended, as of the last look.
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
        self._asked: Callable[[], None] | None = None
        self._turn = LaunchLease(session)
        self._queue: QueueReader | None = None  # of this thread alone
        # Started here, and not yet known to have ended: when, on the monotonic clock.
        self._started: dict[str, float] = {}
        # Known to the launcher, and without a heartbeat at every look so far: since when; with one at any: -inf.
        self._unheard: dict[str, float] = {}
        self._next_count = -math.inf
        self._stillborn = 0
        self.ended: frozenset[str] = frozenset()
        self.manifest = manifest
        self.closed = False

    # --- asking -----------------------------------------------------------------------

    def need(self, unfinished: int) -> None:
        """Start, before this returns, as many workers as so many unfinished tasks lack."""
        with self._lock:
            self._next_count = -math.inf
            self._keep(unfinished)

    def _keep(self, unfinished: int) -> None:
        with self._lock:
            manifest = self.manifest
            wanted = -(-unfinished // manifest.spec.slots)
            most = affordable_workers(manifest)
            wanted = min(most, max(wanted, manifest.min_workers))
            self._fill(wanted, lambda live, starting: wanted - live)

    def grow(self, free: int) -> None:
        """Start, before this returns, as many more workers as waiting tasks lack.

        Args:
            free: Tasks that the caller is about to claim itself.
        """
        with self._lock:
            if self.manifest.state is SessionState.OPEN:
                most = affordable_workers(self.manifest)
                self._fill(most, partial(self._lacking, free))

    def ask_need(self, unfinished: int) -> None:
        """Have the thread in `run` do `need`, without counting heartbeats often where all processes are there."""
        self._ask(partial(self._keep, unfinished))

    def ask_grow(self, free: int) -> None:
        """Have the thread in `run` do `grow`."""
        self._ask(partial(self.grow, free))

    def _ask(self, call: Callable[[], None]) -> None:
        self._asked = call
        self._wake.set()

    def run(self) -> None:
        """Do what is asked until `close`: a launch of hundreds takes long, and holds nobody up here."""
        while not self.closed:
            self._wake.wait()
            self._wake.clear()
            asked, self._asked = self._asked, None
            if asked is not None and not self.closed and not self._done(asked):
                return

    def _done(self, call: Callable[[], None]) -> bool:
        """Make the call; False if there is no use in another."""
        try:
            call()
        except NewerSchema as error:
            self._broken(error)
            return False
        except StoreError as error:
            log.warning("session %s: %s", self._session.id, error)
        except Exception as error:
            # Whatever it is (the session was ended, say): without workers every future would wait for ever.
            log.exception("session %s: no more workers are started", self._session.id)
            self._broken(error)
            return False
        return True

    def close(self) -> None:
        """Start no more; a launch under way ends soon, and `run` with it."""
        self.closed = True
        self._launcher.halt()
        self._wake.set()

    # --- counting ---------------------------------------------------------------------

    def _fill(self, most: int, lacking: Callable[[int, int], int]) -> None:
        """Start what lacks.

        Args:
            most: If so many processes are known to live, heartbeats are counted only now and then.
            lacking: How many lack if so many live, of which so many are starting.
        """
        if self.closed:
            return
        url = self._session.url
        ended = self._launcher.ended(url)
        self._check_started(ended)
        self._tell(ended)
        known = self._launcher.live(url)
        now = self._session.runtime.monotonic()
        if known is not None and len(known) >= most and now < self._next_count:
            return
        self._next_count = now + self.manifest.intervals.lease / 2
        beats = self._session.beats()
        if beats.now >= self.manifest.deadline or self._stillborn >= _STILLBORN_MAX:
            return
        heard = self._heard(beats, known or set()) - ended
        young = (self._young(ended) if known is None else self._unheard_of(known, heard)) - heard
        if young:
            # Listed after the heartbeats: a leaving worker writes here before it deletes its own.
            young -= self._session.buried()
        live = heard | young
        count = lacking(len(live), len(live - heard))
        if count > 0:
            self._launch_in_turn(live | (known or set()), len(live), count)

    def _tell(self, ended: set[str]) -> None:
        fresh = ended - self.ended
        if fresh:
            self.ended |= fresh
            self._news()

    def _heard(self, beats: HeartbeatListing, known: set[str]) -> set[str]:
        """The live workers, and those that may be live and whose process is known to be."""
        intervals = self.manifest.intervals
        return live_workers(beats, intervals) | (possibly_live_workers(beats, intervals) & known)

    def _young(self, ended: set[str]) -> set[str]:
        """What was started here so lately that its first heartbeat may be to come."""
        since = self._session.runtime.monotonic() - self.manifest.intervals.lease / 2
        return {w for w, at in self._started.items() if at >= since} - ended

    def _unheard_of(self, known: set[str], heard: set[str]) -> set[str]:
        """Those that the launcher knows to live, were never heard, and may be about to be."""
        now = self._session.runtime.monotonic()
        self._unheard = {
            worker: -math.inf if worker in heard else self._unheard.get(worker, now)
            for worker in known
        }
        since = now - _START_SECONDS
        return {worker for worker, at in self._unheard.items() if at >= since}

    def _lacking(self, free: int, live: int, starting: int) -> int:
        """How many more workers the waiting tasks lack, beside those that are starting."""
        manifest = self.manifest
        room = affordable_workers(manifest) - live
        if room <= 0:
            return 0
        slots = manifest.spec.slots
        waiting = self._waiting((room + starting) * slots + free) - free
        lacking = max(-(-waiting // slots) - starting, manifest.min_workers - live)
        return min(room, lacking)

    def _waiting(self, enough: int) -> int:
        """How many tasks are pending: all, or `enough`."""
        if self._queue is None:
            self._queue = self._session.queue()
        self._queue.learn(self.manifest.lanes)
        sights, _ = self._queue.look_for_open(enough)
        count = reads = 0
        for sight in sorted(sights, key=lambda sight: not sight.untouched):
            if count >= enough or reads >= _RECORDS_READ:
                break
            if sight.untouched:
                count += sight.batch.size
            else:
                count += self._pending(sight)
                reads += 1
        return min(count, enough)

    def _pending(self, sight: BatchListing) -> int:
        return self._session.read(sight.batch).record.count(State.PENDING)

    # --- starting ---------------------------------------------------------------------

    def _launch_in_turn(self, seen: set[str], live: int, count: int) -> None:
        """Start so many; `seen` are processes known before, of which so many count as live."""
        # One that was ended meanwhile needs none: they would only find that out themselves.
        self.manifest = self._session.check_open()
        count = min(count, affordable_workers(self.manifest) - live)
        if count <= 0:
            return
        if not self._turn.take(_TURN_SECONDS + count / _LAUNCHES_PER_SECOND):
            return
        known = self._launcher.live(self._session.url)
        others = (known or set()) - seen  # started by somebody else since
        if count <= len(others) or self._launch(count - len(others)):
            self._turn.give_back(self._launcher.lag)
        # Else there is no room at the moment, and the same process tries again soon.

    def _launch(self, count: int) -> bool:
        """Start so many; whether any were."""
        try:
            started = self._launcher.launch(self._session.url, count)
        except OSError as error:
            broken = ExecutorBroken(
                f"workers of session {self._session.id} cannot be started: {error}"
            )
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
        """Notice workers that ended before their first heartbeat: a hang must not say nothing."""
        for worker in sorted(self._started.keys() & ended):
            beat = self._last_beat(worker)
            if beat is not None and not _never_worked(beat):
                del self._started[worker]
                self._stillborn = 0
                continue
            self._session.check_open()  # else they had a good reason
            del self._started[worker]
            if beat is not None:
                self._count_stillborn(worker, f"left, for {beat.reason}")
                continue
            if self._launcher.taken_away(self._session.url, worker):
                log.info("worker %s was taken away before it began", worker)
                continue
            tail = self._launcher.log_tail(self._session.url, worker)
            self._count_stillborn(worker, f"printed:\n{tail}")

    def _last_beat(self, worker: str) -> Heartbeat | None:
        session = self._session
        return session.heartbeat(worker) or session.heartbeat(worker, "ended")

    def _count_stillborn(self, worker: str, last: str) -> None:
        self._stillborn += 1
        log.warning("worker %s ended before it began to work; it %s", worker, last)
        if self._stillborn == _STILLBORN_MAX:
            self._broken(
                ExecutorBroken(
                    f"{_STILLBORN_MAX} workers of session {self._session.id} in a row ended before "
                    f"they began to work; the last, {worker}, {last}\n"
                    "Most likely they cannot reach the store, cannot import starburst_executor, or have "
                    "no memory, disk or processes left."
                )
            )


def _never_worked(beat: Heartbeat) -> bool:
    """Whether a worker left because no task could be run there, and none had been."""
    return beat.state is WorkerState.BROKEN and not beat.completed + beat.failed

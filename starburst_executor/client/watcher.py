"""The watching half of a client: lists the queue, settles futures, asks for workers.

One thread per executor. A look is one LIST: 50 ms apart while results stream in, backing off to
5 s, and never so often that parsing listings takes more than a tenth of a core.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

from starburst_executor.client.future import TaskFuture
from starburst_executor.client.results import ResultReader
from starburst_executor.client.settling import Settling
from starburst_executor.coordination.recovery import Recovery
from starburst_executor.errors import SessionNotFound, SessionTerminated, StarburstError
from starburst_executor.formatting import duration
from starburst_executor.inspection.stuck import past_limit
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.listing import BatchListing, QueueReader
from starburst_executor.protocol.manifest import Manifest, SessionState
from starburst_executor.protocol.patience import Outage
from starburst_executor.protocol.session import Session, VersionedRecord

__all__ = ["Watcher"]

log = logging.getLogger(__name__)

# Seconds until a record that was not there before is read, unless its batch is done: its first
# version says only who claimed it, and is followed by another when a short task ends.
_CLAIM_GRACE = 2.0

# Where tasks take long, the look after an end need not follow within 50 ms: results may be seen
# late by so much of a task's run time.
_LATE = 0.1

# A session that has finished nothing yet is warned about at most this long before its time limit.
_SOON_SECONDS = 3600.0

_SOON_SHARE = 0.1


class Watcher:
    """Watches one session for one client.

    Args:
        session: The session.
        manifest: Its manifest.
        queue: What is known of its queue already.
        outcomes: Opens outcomes.
        staff: Has workers kept there; called with how many tasks are unfinished.
        ended_workers: Ids of workers that the launcher knows to have ended, as of its last look.
        broken: Called with an error after which nothing can go on: an initializer failed, or the
            session was ended by somebody else.
    """

    def __init__(
        self,
        session: Session,
        manifest: Manifest,
        queue: QueueReader,
        outcomes: ResultReader,
        staff: Callable[[int], None],
        ended_workers: Callable[[], frozenset[str]],
        broken: Callable[[Exception], None],
    ) -> None:
        self.session = session
        self.manifest = manifest
        self.queue = queue
        grace = min(_CLAIM_GRACE, 0.4 * manifest.intervals.look_last)
        self._settling = Settling(session, queue, outcomes, grace, broken)
        self._staff = staff
        self._ended_workers = ended_workers
        self._broken = broken
        self._runtime = session.runtime
        self._intervals = manifest.intervals
        self._repair = Recovery(session, manifest.intervals, manifest.limits.max_attempts)
        self._wake = self._runtime.signal()
        self._nap = self._runtime.signal()  # set once closed
        self._closed = False
        self._pause = self._intervals.look_first
        now = self._runtime.monotonic()
        self._checked_at = now
        self._staffed_at = -math.inf
        self._next_repair = now + self._repair_interval()
        self._ended: set[str] = set()
        self._warned: set[str] = set()
        self._outage = Outage(session)

    # --- called by others ---------------------------------------------------------------

    @property
    def unfinished(self) -> int:
        """How many stored tasks have futures that have not ended."""
        return self._settling.unfinished

    def add(self, batch: Batch, futures: dict[int, TaskFuture[Any]]) -> None:
        """Watch the futures of a batch that is stored; once all were abandoned, these are too."""
        if futures:
            self._settling.add(batch, futures)
            self.hurry()

    def hurry(self) -> None:
        """Look soon."""
        self._pause = self._intervals.look_first
        self._wake.set()

    def stored_pending(self) -> dict[Batch, list[int]]:
        """Positions, by batch, of the watched futures that are not known to run."""
        return self._settling.pending_positions()

    def learn(self, batch: Batch, known: VersionedRecord) -> None:
        """Take over a record that was read or written elsewhere in this client."""
        self._settling.learn(batch, known)

    def abandon(self, error: BaseException) -> None:
        """End every watched future with an error, and every one that is added later."""
        self._settling.abandon(error)

    def wait_until_idle(self) -> None:
        """Return when every watched future has ended."""
        self._settling.wait_until_idle()

    def close(self) -> None:
        """Have `run` return."""
        self._closed = True
        self._nap.set()
        self._wake.set()

    # --- the loop -------------------------------------------------------------------

    def run(self) -> None:
        """Look until `close`, or until it is of no use any more."""
        while not self._closed:
            if not self._wait():
                return
            began = self._runtime.thread_time()
            try:
                progress = self._look_once()
            except StarburstError as error:
                self._broken(error)
                return
            except Exception as error:
                # Whatever it is: without this thread every future would wait for ever.
                log.exception("session %s cannot be watched any more", self.session.id)
                self._broken(error)
                return
            cost = self._runtime.thread_time() - began
            self._pace(progress, cost)

    def _look_once(self) -> bool:
        """One turn, through what may pass; whether any future ended."""
        try:
            progress = self._turn()
        except StarburstError as error:
            self._outage.note(error)
            return False
        self._outage.note(self._settling.unread)
        return progress

    def _wait(self) -> bool:
        """Wait for the next look, or for something to look for; False once closed."""
        if self._wake.wait(self._pause if self.unfinished else None):
            self._wake.clear()
            if self.unfinished and not self._closed:
                self._staffed_at = -math.inf  # there may be more to do for more workers
                self._nap.wait(self._intervals.look_first)
        return not self._closed

    def _pace(self, progress: bool, cost: float) -> None:
        """Look again soon after something ended, and about when the next end is due."""
        first, last = self._intervals.look_first, self._intervals.look_last
        late = min(max(first, _LATE * (self._settling.run_time or 0.0)), last)
        if progress:
            self._pause = late
        else:
            self._pause = min(2 * self._pause, last, self._until_due() + late)
        self._pause = max(self._pause, 10 * cost)

    def _until_due(self) -> float:
        """Seconds until the next end is to be expected, by the run times seen."""
        run_time = self._settling.run_time
        if run_time is None:
            return math.inf
        seen = self._settling.records_seen()
        due = (record.modified + run_time - self.queue.now for record in seen)
        return min((seconds for seconds in due if seconds > 0), default=math.inf)

    def _turn(self) -> bool:
        """One look and what follows from it; whether any future ended."""
        if not self.unfinished:
            return False
        self._check_session()
        sights = {sight.batch: sight for sight in self.queue.look()}
        self._warn_of_deadline()
        progress = self._settling.read_changed(sights)
        self._keep_workers([*sights.values(), *self._settling.gone()])
        return progress

    def _check_session(self) -> None:
        now = self._runtime.monotonic()
        if now - self._checked_at < self._intervals.session_check:
            return
        self._checked_at = now
        try:
            self.manifest = self.session.load()
        except SessionNotFound as error:
            raise SessionTerminated(
                f"session {self.session.id} was deleted while tasks were unfinished"
            ) from error
        if self.manifest.state is SessionState.TERMINATED:
            raise SessionTerminated(
                f"session {self.session.id} was terminated while tasks were unfinished; "
                "cleanup() in another client or on the command line does that"
            )
        self.queue.learn(self.manifest.lanes)

    @property
    def past_limit(self) -> str:
        """Says that the session was past its absolute time limit at the last look, else ""."""
        return past_limit(self.manifest).reason if "past" in self._warned else ""

    def _warn_of_deadline(self) -> None:
        left = self.manifest.deadline - self.queue.now
        if left <= 0 and "past" not in self._warned:
            self._checked_at = -math.inf  # another client may have extended it
            self._check_session()
            left = self.manifest.deadline - self.queue.now
        if left <= 0:
            text = f"session {self.session.id} (unfinished tasks: {self.unfinished}) is"
            self._warn_once("past", f"{text} {past_limit(self.manifest)}")
            return
        self._warned.discard("past")
        soon = min(_SOON_SECONDS, _SOON_SHARE * self.manifest.limits.absolute_timeout)
        slots = max(1, self.manifest.workers * self.manifest.spec.slots)
        need = self.unfinished * (self._settling.run_time or 0.0) / slots
        if need > left or (left <= soon and not self._settling.run_time):
            work = f" and some {duration(need)} of work" if need else ""
            self._warn_once(
                f"before {self.manifest.deadline}",
                f"session {self.session.id} (unfinished tasks: {self.unfinished}) "
                f"has {duration(left)} until its absolute "
                f"time limit{work}: call extend(seconds) in time.",
            )

    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning("%s", text)

    # --- workers --------------------------------------------------------------------

    def _repair_interval(self) -> float:
        return self._intervals.lease * self._runtime.random.uniform(0.75, 1.0)

    def _keep_workers(self, sights: Iterable[BatchListing]) -> None:
        now = self._runtime.monotonic()
        if now - self._staffed_at >= min(1.0, self._intervals.heartbeat / 4):
            self._staffed_at = now
            fresh = self._ended_workers() - self._ended
            self._ended |= fresh
            self._staff(self.unfinished)
            if fresh:
                self._next_repair = now
        if now >= self._next_repair:
            unfinished = [sight for sight in sights if sight.done is None]
            self._repair.look(unfinished, self._ended)
            suspects = self._repair.leases.suspects
            wait = self._intervals.lease / 2 if suspects else self._repair_interval()
            self._next_repair = self._runtime.monotonic() + wait

    @property
    def live_workers(self) -> list[str]:
        """Workers with a heartbeat, as of the last repair look."""
        return self._repair.leases.live

"""The worker's loop: what is due is done, then it waits.

    Worker.run (one thread)                        HeartbeatThread (another)
      claim: look for open batches, claim tasks      a heartbeat every 20 s while anything is
      dispatch: child pool, then what has ended      held, otherwise when the loop asks for one
      commit: ends and new claims in one write

Two more threads move large objects (`transfers`), so that the loop never waits for one. The first
live worker by id starts other workers, on a thread of the `Autoscaler`. Nothing here unpickles:
what the child pool returns is bytes.

    Worker -----> Claimer ----> Membership ----> Dispatcher ----> Committer ----> ClaimPlanner
    step, wait,                                           +-----> Transfers
    leave                                                          large objects
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from starburst_executor.coordination.autoscaler import Autoscaler
from starburst_executor.errors import LocalDiskError, NewerSchema, SessionTerminated, StoreError
from starburst_executor.protocol.manifest import Heartbeat, Manifest, WorkerState
from starburst_executor.protocol.session import Session
from starburst_executor.worker.assignment import AttemptKey
from starburst_executor.worker.cache import ObjectCache
from starburst_executor.worker.claiming import Claimer
from starburst_executor.worker.committing import Committer
from starburst_executor.worker.dispatch import Dispatcher
from starburst_executor.worker.faults import (
    ENDURANCE,
    Consequence,
    consequence,
    reason_to_leave,
)
from starburst_executor.worker.heartbeat import HeartbeatThread, WorkTally
from starburst_executor.worker.membership import Membership
from starburst_executor.worker.open_batches import OpenBatches
from starburst_executor.worker.planner import ClaimPlanner
from starburst_executor.worker.pool import ChildPool, JobResult, SlotsBroken
from starburst_executor.worker.pulse import Pulse, WatchedStore
from starburst_executor.worker.session_check import SessionCheck
from starburst_executor.worker.stop_request import StopRequest
from starburst_executor.worker.timers import Timers
from starburst_executor.worker.transfers import Transfers

__all__ = ["Worker"]

log = logging.getLogger(__name__)


class Worker:
    """One worker process of a session.

    Args:
        session: The session to work for.
        worker_id: This worker's own id, new at each start.
        pool: Runs the tasks; its signal is the one that wakes this worker.
        cache: Keeps callables, blobs and modules.
        aside: Makes a call on another thread; large objects are moved that way.
        manifest: The session's manifest, read at start.
        describe: This process, as its heartbeats describe it.
        autoscaler: Starts other workers; its `run` must be under way on another thread. None:
            this worker cannot start any.
        folder: Its temp folder, for messages; by default the cache's.

    Attributes:
        pulse: Shows whether the loop goes on.
        heartbeats: Sends the heartbeats; its `run` must be under way on another thread.
        batches: The open batches as this worker last saw them.
    """

    def __init__(
        self,
        session: Session,
        worker_id: str,
        pool: ChildPool,
        cache: ObjectCache,
        aside: Callable[[Callable[[], None]], object],
        manifest: Manifest,
        describe: Heartbeat,
        autoscaler: Autoscaler | None = None,
        folder: Path | None = None,
    ) -> None:
        self.id = worker_id
        self.pulse = pulse = Pulse(session.runtime)
        self.heartbeats = HeartbeatThread(
            session,
            manifest.intervals.heartbeat,
            self._heartbeat,
            lambda: self._planner.working,
            pulse,
        )
        self._transfers = transfers = Transfers(
            session, worker_id, cache, aside, pool.signal, self._reaches_store
        )
        # From here on the loop's own, each call of which has a deadline.
        session = Session(WatchedStore(session.store, pulse), session.id, session.runtime)
        self._session = session
        self._runtime = session.runtime
        self._pool = pool
        self._intervals = manifest.intervals
        self._describe = describe
        self._stop = StopRequest(pool.signal)
        self._tally = WorkTally()
        self._timers = timers = Timers(manifest.intervals, session.runtime)
        self._planner = planner = ClaimPlanner(
            pool, session.runtime, manifest.limits.max_attempts - 1
        )
        self.batches = batches = OpenBatches(session, manifest)
        self._check = check = SessionCheck(session, manifest, batches, timers)
        self._committer = committer = Committer(session, worker_id, planner, pool, cache, timers)
        self._folder = folder or cache.blobs.parent
        self._dispatcher = dispatcher = Dispatcher(
            session, planner, pool, cache, committer, transfers,
            self.heartbeats, check, timers, self._stop, self._tally, self._folder,
        )  # fmt: skip
        self._membership = membership = Membership(
            session, worker_id, check, batches, planner, dispatcher, timers, autoscaler
        )
        self._claimer = Claimer(
            session, check, batches, planner, committer, dispatcher, membership, cache,
            self.heartbeats, timers,
        )  # fmt: skip
        self._idle_reason: str | None = None
        self._gone = False  # the session is being deleted: nothing may be written any more
        self._unreachable = False  # it leaves a store that has been away for too long
        self._accident: Exception | None = None
        self._away_since = math.inf  # monotonic: the first of the steps in a row without the store
        self._endured = 0  # steps in a row in which the machine was short of something

    # --- life -----------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """Hand back and leave soon; may be called on any thread."""
        self._stop.make(reason)

    def run(self) -> str:
        """Work until told to stop, or until there is no reason to stay; returns why it left.

        An unexpected error is raised after the worker has handed back and left.

        A worker sends a heartbeat before its first claim: `heartbeats.beat` must have succeeded.
        """
        while True:
            reason = self._work()
            log.info("worker %s leaves: %s", self.id, reason)
            if self._leave(reason):
                if self._accident is not None:
                    raise self._accident
                return reason

    def _work(self) -> str:
        while True:
            reason = self._stop.reason or self.step()
            if reason is not None:
                return reason

    def step(self) -> str | None:
        """Do what is due and wait for more; a reason if the worker should leave."""
        self.pulse.beat()
        self._pool.signal.clear()
        if self._stop.reason:
            return self._stop.reason
        try:
            reason = self._do_what_is_due()
        except SessionTerminated as error:
            self._gone = True
            return str(error)
        except NewerSchema as error:
            return f"this version is too old for the session: {error}"
        except SlotsBroken as error:
            return self._break_off(str(error), error)
        except Exception as error:
            return self._bear(error)
        self._endured = 0
        self._away_since = math.inf
        if reason is None:
            self._wait()
        return reason

    def _bear(self, error: Exception) -> str | None:
        """Do what follows from an error: go on after a pause, or a reason to leave."""
        match consequence(error):
            case Consequence.WAIT | Consequence.FAIL_TASK:  # the latter was about no task
                self._pause_after(error)
                self._away_since = min(self._away_since, self._timers.now)
                away = self._timers.now - self._away_since
                reason = self._check.time_is_up() or self._membership.gives_up(error, away)
                self._unreachable = reason is not None
                return reason
            case Consequence.TRY_AGAIN if self._endured < ENDURANCE - 1:
                self._endured += 1
                self._pause_after(error)
                return None
            case Consequence.TRY_AGAIN | Consequence.LEAVE:
                return self._break_off(reason_to_leave(error, self._folder), error)
        self._accident = error
        return self._break_off(f"an unexpected error: {error!r}", error)

    def _pause_after(self, error: Exception) -> None:
        log.warning("worker %s: %s", self.id, error)
        self._timers.look = self._timers.now + self._timers.back_off()
        self._pool.signal.wait(self._runtime.random.uniform(0.1, 1.0))

    def _break_off(self, reason: str, error: Exception) -> str:
        """No task can be run here: a reason to leave."""
        log.error("worker %s: %s", self.id, error)
        self._stop.broken = True
        if isinstance(error.__cause__, LocalDiskError):
            return reason_to_leave(error, self._folder)
        return reason

    def _reaches_store(self) -> bool:
        return self.heartbeats.silent() <= self._intervals.lease / 2

    def _do_what_is_due(self) -> str | None:
        self._dispatcher.take_ended()
        self._dispatcher.repeat_transfers()
        self._dispatcher.check_lease()
        reason = self._check.check()
        if reason is not None:
            return reason
        self._dispatcher.refresh_held()
        self._dispatcher.dispatch_waiting()
        self._membership.hand_back_stuck()
        self._committer.commit_due(self._intervals.commit, self._claimer.wanted)
        self._claimer.claim_more()
        self._dispatcher.dispatch_waiting()
        self._membership.recover_when_due()
        self._membership.count_when_due()
        self._idle_reason = self._membership.consider_leaving()
        return self._idle_reason

    # --- waiting --------------------------------------------------------------------

    def _wait(self) -> None:
        """Wait until something is due, a slot is free, or another thread has news.

        A task's end alone is no reason to go on: of tiny tasks there are thousands a second.
        """
        until = self._timers.now + self._until_next()
        while (left := until - self._timers.now) > 0:
            self.pulse.beat(left)
            if not self._pool.signal.wait(left):
                return
            self._pool.signal.clear()
            try:
                ended = self._dispatcher.collect()
            except SlotsBroken:
                return  # the next step is told so again
            if self._stop.reason or self._transfers.arrived:
                return
            if self._membership.launcher_knows_more:
                return
            if self._planner.queued - len(ended) < self._pool.size:
                return
            for result in ended:
                until = min(until, self._commit_due_at(result))

    def _commit_due_at(self, result: JobResult) -> float:
        assert isinstance(result.key, AttemptKey)
        assignment = self._planner.assignments.get(result.key.batch)
        return assignment.committed_at + self._intervals.commit if assignment else math.inf

    def _until_next(self) -> float:
        """Seconds until something is due of which no signal tells."""
        if self._dispatcher.paused:
            return self._intervals.heartbeat / 4
        timers, planner = self._timers, self._planner
        now = timers.now
        due = [timers.check, timers.count, self._transfers.due, now + planner.until_due()]
        if self.batches.unfinished:
            due.append(timers.repair)
        for assignment in planner.assignments.values():
            if assignment.ended:
                due.append(assignment.committed_at + self._intervals.commit)
            if not assignment.settled:
                due.append(timers.refresh)
        if not self._membership.surplus:
            due.append(now + planner.until_not_full() if planner.full() else timers.look)
        if not planner.working:
            due.append(timers.idle_since + self._membership.patience())
        return max(0.0, min(due) - now)

    # --- leaving --------------------------------------------------------------------

    def _leave(self, reason: str) -> bool:
        """Hand back and go; False if an idle worker found work at the last moment and stays."""
        with suppress(SlotsBroken):
            self._dispatcher.stop_all()
        if not self._gone and not self._unreachable:
            self._committer.hand_back_all()
        self.heartbeats.pause()
        try:
            if self._gone:
                self._session.forget(self.id)
            elif reason == self._idle_reason:
                return self._leave_idle(reason)
            else:
                self._say_goodbye(reason)
        except StoreError as error:
            log.warning("worker %s could not say goodbye: %s", self.id, error)
        return True

    def _leave_idle(self, reason: str) -> bool:
        """Delete the heartbeat, then look once more; both until the store answers.

        A client first stores and then looks who is alive, so one of the two sees the other.
        """
        self._session.patiently(partial(self._say_goodbye, reason))
        if self._membership.may_leave():
            return True
        self._timers.idle_since = self._timers.look = self._timers.now
        self._session.patiently(self.heartbeats.resume)
        return False

    def _say_goodbye(self, reason: str) -> None:
        state = WorkerState.BROKEN if self._stop.broken else WorkerState.LEFT
        self._session.bury(replace(self._heartbeat(), state=state, reason=reason))

    def _heartbeat(self) -> Heartbeat:
        """What this worker has to say of itself; called on the heartbeats' thread too."""
        now = self._runtime.time()
        holding = self._planner.queued
        requests = self._session.store.tally
        return replace(
            self._describe,
            state=WorkerState.WORKING if holding else WorkerState.IDLE,
            written=now,
            ended=now,
            holding=holding,
            completed=self._tally.completed,
            failed=self._tally.failed,
            busy=round(self._tally.busy, 3),
            writes=requests.writes,
            reads=requests.reads,
        )

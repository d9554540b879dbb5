"""Which workers are alive, and what follows for this one: stay, leave, or start others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from starburst_executor.coordination.autoscaler import Autoscaler
from starburst_executor.coordination.recovery import Recovery
from starburst_executor.protocol.liveness import live_workers
from starburst_executor.protocol.manifest import Manifest, SessionState
from starburst_executor.protocol.session import Session
from starburst_executor.worker.dispatch import Dispatcher
from starburst_executor.worker.open_batches import OpenBatches
from starburst_executor.worker.planner import ClaimPlanner
from starburst_executor.worker.session_check import SessionCheck
from starburst_executor.worker.timers import Timers

__all__ = ["Decision", "Membership", "decide"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What one worker should do, given who else is alive.

    Attributes:
        rank: How many live workers come before it, by id.
        surplus: There are more workers than wanted: it claims nothing more, and leaves when it
            holds nothing.
        kept: It is one of `min_workers`, and stays even if idle.
        attends: It stays even if idle while anything is unfinished, because somebody must be
            there to recover what lost workers held.
        short: Fewer workers are alive than are to stay even if idle.
    """

    rank: int
    surplus: bool
    kept: bool
    attends: bool
    short: bool


def decide(worker: str, live: Collection[str], manifest: Manifest, unfinished: bool) -> Decision:
    """What a worker should do. Every worker decides alike from what it sees, without a vote.

    Args:
        worker: Its id.
        live: Ids of the workers that are alive, whether or not it is among them.
        manifest: The session's manifest.
        unfinished: Whether any task is unfinished.
    """
    rank = sum(other < worker for other in live)
    wanted = max(manifest.workers, 2 if unfinished else 1)
    least = min(manifest.min_workers, manifest.workers)
    return Decision(
        rank=rank,
        surplus=rank >= wanted,
        kept=rank < least,
        attends=unfinished and (rank < 2 or rank < least),
        short=len(live) < least,
    )


class Membership:
    """One worker's place among the workers of its session.

    Args:
        session: The session.
        worker: This worker's id.
        check: Has the manifest.
        batches: Knows whether anything is unfinished.
        planner: What this worker holds.
        dispatcher: Hands back what a surplus worker has not started.
        timers: When to count and to repair.
        autoscaler: Starts other workers; None: this one cannot.
    """

    def __init__(
        self,
        session: Session,
        worker: str,
        check: SessionCheck,
        batches: OpenBatches,
        planner: ClaimPlanner,
        dispatcher: Dispatcher,
        timers: Timers,
        autoscaler: Autoscaler | None,
    ) -> None:
        manifest = check.manifest
        self._session = session
        self._worker = worker
        self._check = check
        self._batches = batches
        self._planner = planner
        self._dispatcher = dispatcher
        self._timers = timers
        self._autoscaler = autoscaler
        self._recovery = Recovery(session, manifest.intervals, manifest.limits.max_attempts)
        self._live = manifest.workers  # as of the last look
        self._ended: frozenset[str] = frozenset()  # workers, as their launcher says
        self._kept = False
        self.surplus = False
        timers.repair += timers.repair_interval(self._live)

    # --- who is alive -----------------------------------------------------------------

    def _live_now(self) -> set[str]:
        return live_workers(self._session.beats(), self._check.manifest.intervals)

    def _decide(self, live: Collection[str]) -> Decision:
        return decide(self._worker, live, self._check.manifest, self._batches.unfinished)

    def _share_repairs(self, live: int) -> None:
        """If other workers have left, look for lost ones sooner than planned."""
        self._live = live
        soon = self._timers.now + self._timers.repair_interval(live)
        self._timers.repair = min(self._timers.repair, soon)

    def _count(self) -> Decision:
        """Count the workers anew, and decide what this one should do."""
        live = self._live_now()
        self._share_repairs(len(live))
        return self._decide(live)

    def count_when_due(self) -> None:
        """Count the workers, once a session check or two, and do what follows."""
        if self._timers.now >= self._timers.count:
            self._follow(self._count())

    def _follow(self, decision: Decision, *, lost: bool = False) -> None:
        """Leave if there are too many workers, start others if there are too few.

        Args:
            decision: What this worker should do.
            lost: Whether some workers were lost just now.
        """
        first = decision.rank == 0
        # An idle worker learns sooner, from its looks for work or from the manifest, that more
        # workers are needed.
        checks = 1 if first or self._planner.working else 2
        self._timers.count = (
            self._timers.now + checks * self._check.manifest.intervals.session_check
        )
        self.surplus, self._kept = decision.surplus, decision.kept
        if self.surplus:
            self.hand_back_stuck()
        # Where the first worker is idle nothing waits, except what was sent back just now.
        full = not self._planner.free or self._planner.full()
        if first and (full or lost or decision.short):
            self._grow(0 if full else self._planner.free)

    def hand_back_stuck(self) -> None:
        """Hand back what has waited too long behind a long task; if surplus, all that waits."""
        found = self._planner.unbegun() if self.surplus else self._planner.stuck()
        self._dispatcher.hand_back(found)

    def _grow(self, free: int) -> None:
        if self._autoscaler is not None and self._timers.now >= self._timers.grow:
            self._autoscaler.manifest = self._check.manifest
            self._autoscaler.ask_grow(free)

    # --- recovery ---------------------------------------------------------------------

    @property
    def launcher_knows_more(self) -> bool:
        """Whether workers have ended that no recovery was told of."""
        return self._autoscaler is not None and self._autoscaler.ended != self._ended

    def recover_when_due(self) -> None:
        """Look for lost workers, and send back what they held."""
        timers = self._timers
        due = timers.now >= timers.repair
        if self._autoscaler is not None and self.launcher_knows_more:
            self._ended = self._autoscaler.ended
            due = True
        if not due or not self._batches.unfinished:
            return
        unfinished = self._batches.list_unfinished()
        if not self._batches.window:
            timers.look = self._batches.listed_at + timers.back_off()  # this was one
        lost = self._recovery.look(unfinished, self._ended)
        leases = self._recovery.leases
        self._live = len(leases.live)
        lease = self._check.manifest.intervals.lease
        wait = lease / 2 if leases.suspects else timers.repair_interval(self._live)
        timers.repair = timers.now + wait
        if lost or not leases.suspects:
            # It is known now who is alive; otherwise heartbeats are counted soon.
            self._follow(self._decide(leases.live), lost=bool(lost))

    # --- leaving ----------------------------------------------------------------------

    def patience(self) -> float:
        """For how many seconds this worker stays idle."""
        manifest = self._check.manifest
        if manifest.state is SessionState.CLOSED and not self._batches.unfinished:
            return 0.0
        if self._kept:
            return manifest.limits.session_timeout
        return min(manifest.limits.idle_timeout, manifest.limits.session_timeout)

    def consider_leaving(self) -> str | None:
        """A reason to leave, if this worker is surplus or has been idle for long enough.

        One that is still needed counts as idle from now on.
        """
        if self._planner.working:
            return None
        if self.surplus:
            return "there are more workers than wanted"
        timers = self._timers
        now = timers.now
        if now < timers.idle_since + self.patience():
            return None
        decision = self._count()
        self._kept = decision.kept
        if decision.attends:
            timers.idle_since = now
            return None
        if now < timers.idle_since + self.patience():
            return None
        return f"idle for {now - timers.idle_since:.0f} s"

    def gives_up(self, error: Exception, away: float) -> str | None:
        """A reason to leave a store that does not come back; makes no request.

        While anything is unfinished, somebody should be there when the store is: so long as the
        session itself would wait for work. What runs is never given up.

        Args:
            error: What the store says.
            away: For how many seconds it has said so.
        """
        if self._planner.running:
            return None
        if self._planner.working or self._batches.unfinished:
            waited, most = away, self._check.manifest.limits.session_timeout
        else:
            waited, most = self._timers.now - self._timers.idle_since, self.patience()
        if waited < most:
            return None
        return f"the store has not been available for {away:.0f} s: {error}"

    def may_leave(self) -> bool:
        """Ask the store, after saying goodbye, whether this idle worker is still not needed."""
        patiently = self._session.patiently
        if self.surplus and patiently(self._count).surplus:
            return True
        self.surplus = False  # others have left meanwhile
        return not patiently(self._batches.any_open)

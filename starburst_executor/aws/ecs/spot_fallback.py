"""The market that workers start on, and what to do while it has no capacity."""

from __future__ import annotations

import logging
from collections.abc import Callable

from starburst_executor.aws.ecs.capacity import market
from starburst_executor.aws.ecs.diagnosis import Diagnosis, Retryability, judge_shortage
from starburst_executor.aws.ecs.placement import Placement
from starburst_executor.aws.ecs.stopping import TaskStopper
from starburst_executor.aws.ecs.tasks import SLOW_START, SessionTasks, Waiting
from starburst_executor.errors import AccountError
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.runtime import Runtime

__all__ = ["SpotFallback"]

log = logging.getLogger(__name__)

_ASK_AGAIN = 30.0  # seconds between queries why a group gets no instance
_SPOT_AGAIN = 600.0  # seconds of on-demand capacity before Spot is tried again


class SpotFallback:
    """Chooses between Spot and on-demand capacity, and finds out why no instances come.

    Args:
        spec: The requested workers.
        placement: Fargate or instances.
        stopper: Stops tasks that wait for Spot in vain.
        runtime: The clock.
        hourly: Returns dollars per worker and hour, Spot or not; None if unknown.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        placement: Placement,
        stopper: TaskStopper,
        runtime: Runtime,
        hourly: Callable[[bool], float | None],
    ) -> None:
        self._spec = spec
        self._placement = placement
        self._stopper = stopper
        self._runtime = runtime
        self._hourly = hourly

    def takes_spot(self, session_tasks: SessionTasks) -> bool:
        """Whether to start workers on Spot now."""
        return self._spec.use_spot and self._runtime.monotonic() >= session_tasks.on_demand_until

    def wanted(self, diagnosis: Diagnosis | None) -> bool:
        """Whether to start on-demand, given that Spot failed with this diagnosis."""
        full = diagnosis is not None and diagnosis.retryability is Retryability.FULL
        return full and self._spec.spot_fallback

    def begin(self, session_tasks: SessionTasks, diagnosis: Diagnosis) -> None:
        """Use on-demand capacity for a while, and log that once."""
        if self.takes_spot(session_tasks):
            log.warning(
                "session %s: Spot has no capacity; starting workers on-demand for the next "
                "%.0f minutes%s. %s",
                session_tasks.session_id,
                _SPOT_AGAIN / 60,
                self._price_difference(),
                diagnosis.text,
            )
        session_tasks.on_demand_until = self._runtime.monotonic() + _SPOT_AGAIN

    def check_waiting(self, session_tasks: SessionTasks, waiting: list[Waiting]) -> None:
        """Find out why tasks have waited a while for instances, and act on it."""
        now = self._runtime.monotonic()
        if now < session_tasks.ask_shortage_at:
            return
        if waiting:
            session_tasks.ask_shortage_at = now + _ASK_AGAIN
        for use_spot in (True, False):
            some = [w for w in waiting if w.task.use_spot is use_spot]
            if some:
                self._check_shortage(session_tasks, some, use_spot=use_spot)

    def _check_shortage(
        self, session_tasks: SessionTasks, waiting: list[Waiting], *, use_spot: bool
    ) -> None:
        since = min(w.created for w in waiting)
        reason = self._placement.shortage(since, use_spot=use_spot)
        longest = max(w.seconds for w in waiting)
        if not reason and longest < SLOW_START:
            return
        reason = reason or f"no instance came within {SLOW_START:.0f} s"
        diagnosis = judge_shortage(reason)
        if diagnosis.retryability is Retryability.NEVER:
            session_tasks.hopeless = diagnosis.text
        elif use_spot and self.wanted(diagnosis):
            self.begin(session_tasks, diagnosis)
        else:
            self._report_shortage(session_tasks, len(waiting), reason, diagnosis, use_spot=use_spot)
            return
        try:
            self._stopper.stop(session_tasks, [w.task for w in waiting])
        except AccountError as error:
            log.warning("session %s: %s", session_tasks.session_id, error)

    def _report_shortage(
        self,
        session_tasks: SessionTasks,
        count: int,
        reason: str,
        diagnosis: Diagnosis,
        *,
        use_spot: bool,
    ) -> None:
        if session_tasks.shortage != reason:
            log.warning(
                "session %s: %d workers wait for %s instances of %s and will start when there are "
                "some. %s",
                session_tasks.session_id,
                count,
                market(use_spot=use_spot),
                self._spec.instance_type,
                diagnosis.text,
            )
        session_tasks.shortage = reason

    def _price_difference(self) -> str:
        spot, full = self._hourly(True), self._hourly(False)
        if spot is None or full is None:
            return ""
        return f"; a worker costs ${full:.3g} an hour instead of ${spot:.3g}"

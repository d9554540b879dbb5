"""Observing the tasks of a session, and reporting what became of them."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from starburst_executor.aws.ecs.api import EcsApi
from starburst_executor.aws.ecs.diagnosis import (
    Diagnosis,
    Retryability,
    Stop,
    judge_shortage,
    judge_start,
)
from starburst_executor.aws.ecs.placement import Placement
from starburst_executor.aws.ecs.requests import RequestRefused
from starburst_executor.aws.ecs.spot_fallback import SpotFallback
from starburst_executor.aws.ecs.task_definition import TaskDefinition
from starburst_executor.aws.ecs.tasks import (
    OVER,
    SLOW_START,
    Phase,
    SessionTasks,
    Task,
    Waiting,
    names_of,
    phase_of,
)
from starburst_executor.runtime import Runtime

if TYPE_CHECKING:
    from mypy_boto3_ecs.type_defs import TaskTypeDef

__all__ = ["LOOK_SECONDS", "TaskObserver"]

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0  # between looks at a session's tasks

_LOOK_AGAIN = 30.0  # after a look without an answer, which may have used up its retries
_STOPPED_PAGES = 10  # the newest 1,000 stopped tasks of this family, from all sessions
_UNSEEN = 60.0  # seconds for which a new task may not be listed or described yet


class TaskObserver:
    """Keeps `SessionTasks` up to date with ECS.

    Args:
        api: The cluster.
        definition: The task definition of the session's workers.
        placement: Fargate or instances.
        fallback: What to do while a market has no capacity.
        runtime: The clock.
    """

    def __init__(
        self,
        api: EcsApi,
        definition: TaskDefinition,
        placement: Placement,
        fallback: SpotFallback,
        runtime: Runtime,
    ) -> None:
        self._api = api
        self._definition = definition
        self._placement = placement
        self._fallback = fallback
        self._runtime = runtime

    def look_if_due(self, session_tasks: SessionTasks) -> None:
        """Look, unless that was just done; if ECS does not answer, the tasks are not `known`."""
        now = self._runtime.monotonic()
        pause = LOOK_SECONDS if session_tasks.known else _LOOK_AGAIN
        if session_tasks.looked_at is not None and now - session_tasks.looked_at < pause:
            return
        try:
            self.look(session_tasks)
        except RequestRefused as refused:
            if session_tasks.known or session_tasks.looked_at is None:
                log.warning(
                    "session %s: ECS does not tell which workers are alive. %s",
                    session_tasks.session_id,
                    refused.diagnosis.text,
                )
            session_tasks.known = False
        session_tasks.looked_at = self._runtime.monotonic()

    def look(self, session_tasks: SessionTasks) -> None:
        """Update the tasks, and log what became of those that are gone.

        Raises:
            RequestRefused: ECS does not answer.
        """
        stopped = [] if session_tasks.known else self._stopped(session_tasks)
        now = self._runtime.monotonic()
        arns = self._api.task_arns(startedBy=session_tasks.session_id)
        listed = set(arns)
        for arn in arns:
            session_tasks.take(arn, now)
        unsure = session_tasks.unsure(listed)
        described = {t["taskArn"]: t for t in self._api.describe([t.arn for t in unsure])}
        over = [
            task
            for task in unsure
            if self._update(session_tasks, task, described.get(task.arn), now)
        ]
        self._fallback.check_waiting(session_tasks, Waiting.among(unsure, described, now))
        for old in stopped:
            self._update(session_tasks, session_tasks.take(old["taskArn"], now), old, now)
        session_tasks.known = True
        self._report(session_tasks, over)

    def _stopped(self, session_tasks: SessionTasks) -> list[TaskTypeDef]:
        """Tasks of the session that ended before this launcher's first look."""
        # ListTasks filters by startedBy or by status, not by both.
        family = self._definition.family
        arns = self._api.task_arns(pages=_STOPPED_PAGES, family=family, desiredStatus="STOPPED")
        tasks = self._api.describe(arns)
        return [task for task in tasks if task.get("startedBy") == session_tasks.session_id]

    def _update(
        self,
        session_tasks: SessionTasks,
        task: Task,
        about: TaskTypeDef | None,
        now: float,
    ) -> bool:
        """Apply what ECS reports of a task; return whether it is now known to be over."""
        if about is None:
            if now - task.since < _UNSEEN:
                return False
            task.phase = Phase.ENDED
            return True
        task.phase = phase_of(about)
        if "capacityProviderName" in about:
            spot = self._placement.provider(use_spot=True)
            task.use_spot = about["capacityProviderName"] == spot
        if task.phase is Phase.RUNNING:
            session_tasks.forget_troubles()
        if task.phase is Phase.STARTING and now - task.since > SLOW_START:
            self._report_slow(session_tasks, task, about)
        if task.phase in OVER:
            task.stop = Stop.of(about)
        return task.phase in OVER

    def _report(self, session_tasks: SessionTasks, over: Iterable[Task]) -> None:
        """Log each fate once for all tasks that share it, and draw conclusions."""
        fates: defaultdict[str, list[Task]] = defaultdict(list)
        for task in over:
            fates[str(task.stop or "")].append(task)
        for fate, tasks in fates.items():
            unborn = [t for t in tasks if t.phase is Phase.UNBORN and t.launch]
            if unborn:
                self._report_unborn(session_tasks, unborn)
            elif tasks[0].stop is None or tasks[0].stop.expected:
                log.info(
                    "session %s: %s: %s",
                    session_tasks.session_id,
                    names_of(tasks),
                    fate,
                )
            else:
                printed = self._api.log_tail(tasks[0].id) if tasks[0].stop.exit_code else ""
                log.warning(
                    "session %s: %s ended: %s%s",
                    session_tasks.session_id,
                    names_of(tasks),
                    fate,
                    f"; it printed:\n{printed}" if printed else "",
                )

    def _report_unborn(self, session_tasks: SessionTasks, tasks: list[Task]) -> None:
        stop = tasks[0].stop
        assert stop is not None
        if stop.code == "UserInitiated":
            return
        diagnosis = self._judge_start(session_tasks, stop)
        for launch in {task.launch for task in tasks}:
            session_tasks.note(diagnosis, launch)
        if session_tasks.is_hopeless(diagnosis):
            session_tasks.hopeless = diagnosis.text
        if tasks[0].use_spot and self._fallback.wanted(diagnosis):
            self._fallback.begin(session_tasks, diagnosis)
        else:
            session_tasks.hold_off(self._runtime.monotonic())
        log.warning(
            "session %s: %s could not be started. %s",
            session_tasks.session_id,
            names_of(tasks),
            diagnosis.text,
        )

    def _judge_start(self, session_tasks: SessionTasks, stop: Stop) -> Diagnosis:
        diagnosis = judge_start(stop)
        if session_tasks.shortage and diagnosis.retryability is Retryability.DOUBTFUL:
            # ECS gave up waiting for an instance, in words that are not in the table.
            return judge_shortage(f"{diagnosis.text} {session_tasks.shortage}")
        return diagnosis

    def _report_slow(self, session_tasks: SessionTasks, task: Task, about: TaskTypeDef) -> None:
        if not task.slow:
            task.slow = True
            log.warning(
                "session %s: worker %s is still %s after %.0f s",
                session_tasks.session_id,
                task.worker,
                about.get("lastStatus", "starting"),
                SLOW_START,
            )

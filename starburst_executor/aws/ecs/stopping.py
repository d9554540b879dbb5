"""Stopping the tasks of a session."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from starburst_executor.aws.ecs.api import EcsApi
from starburst_executor.aws.ecs.requests import RequestRefused, TokenBucket
from starburst_executor.aws.ecs.task_definition import STOP_TIMEOUT
from starburst_executor.aws.ecs.tasks import SessionTasks, Task
from starburst_executor.errors import AccountError
from starburst_executor.runtime import Runtime

__all__ = ["STOP_SECONDS", "TaskStopper"]

STOP_SECONDS = STOP_TIMEOUT + 60.0  # the timeout, plus ECS's delay in reporting it

_STOPS = (
    100,
    40.0,
)  # calls that change tasks: burst, then per second (ECS's own limit)
_AT_ONCE = 8


class TaskStopper:
    """StopTask for many tasks, at the rate that ECS allows."""

    def __init__(self, api: EcsApi, runtime: Runtime) -> None:
        self._api = api
        self._bucket = TokenBucket(runtime, *_STOPS)

    def stop(self, session_tasks: SessionTasks, tasks: Sequence[Task]) -> None:
        """Stop tasks, without waiting for their end.

        Raises:
            AccountError: ECS refused.
        """
        if not tasks:
            return
        with ThreadPoolExecutor(min(_AT_ONCE, len(tasks)), "starburst-stop") as pool:
            for _ in pool.map(lambda task: self._stop(session_tasks, task), tasks):
                pass

    def _stop(self, session_tasks: SessionTasks, task: Task) -> None:
        self._bucket.take(1)
        reason = f"starburst_executor: stopped by session {session_tasks.session_id}"
        try:
            self._api.stop(task.arn, reason)
        except RequestRefused as refused:
            raise AccountError(
                f"worker {task.worker} cannot be stopped. {refused.diagnosis.text}"
            ) from refused

"""Starting the tasks of a session: in groups, paced, on the market that has capacity."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

from starburst_executor.aws.ecs.api import CONTAINER, EcsApi
from starburst_executor.aws.ecs.capacity import market
from starburst_executor.aws.ecs.diagnosis import Diagnosis, Retryability, judge_failure
from starburst_executor.aws.ecs.metadata import ECS_TASK
from starburst_executor.aws.ecs.placement import Placement
from starburst_executor.aws.ecs.requests import RequestRefused, TokenBucket
from starburst_executor.aws.ecs.spot_fallback import SpotFallback
from starburst_executor.aws.ecs.task_definition import TaskDefinition
from starburst_executor.aws.ecs.tasks import THERE, Phase, SessionTasks, Task
from starburst_executor.config import Deployment
from starburst_executor.errors import LaunchFailed
from starburst_executor.protocol.worker_spec import MARKET_VARIABLE, WorkerSpec
from starburst_executor.runtime import Runtime

__all__ = ["TaskStarter"]

log = logging.getLogger(__name__)

_AT_ONCE = 10  # tasks per RunTask: ECS's own limit
_LAUNCHES = (100, 20.0)  # Fargate: burst of tasks, then tasks per second
_TAG_FORBIDDEN = re.compile(r"[^\w +\-=.:/@]")


class TaskStarter:
    """RunTask, as often as it takes.

    Args:
        api: The cluster.
        spec: What a worker should be.
        deployment: Cluster and region, for messages.
        definition: The task definition of the workers.
        placement: Fargate or instances.
        fallback: What to do while Spot has no capacity.
        runtime: Clock, waits and ids.
    """

    def __init__(
        self,
        api: EcsApi,
        spec: WorkerSpec,
        deployment: Deployment,
        definition: TaskDefinition,
        placement: Placement,
        fallback: SpotFallback,
        runtime: Runtime,
    ) -> None:
        self._api = api
        self._spec = spec
        self._deployment = deployment
        self._definition = definition
        self._placement = placement
        self._fallback = fallback
        self._runtime = runtime
        self._bucket = TokenBucket(runtime, *_LAUNCHES)
        self.halted = False  # start no further group

    def start(self, session_tasks: SessionTasks, count: int) -> list[Task]:
        """Start up to `count` tasks; return those that ECS accepted.

        Raises:
            LaunchFailed: none is alive, and none will ever start until something is fixed.
        """
        session_tasks.launches += 1
        session_tasks.hopeless = ""
        use_spot = self._fallback.takes_spot(session_tasks)
        started, diagnosis = self._start_on(session_tasks, count, use_spot=use_spot)
        if use_spot and diagnosis is not None and self._fallback.wanted(diagnosis):
            self._fallback.begin(session_tasks, diagnosis)
            left = count - len(started)
            more, diagnosis = self._start_on(session_tasks, left, use_spot=False)
            started += more
        self._note_launch(session_tasks, count, len(started), diagnosis)
        return started

    def failure(self, session_tasks: SessionTasks, text: str) -> LaunchFailed:
        """The error that no worker can be started; the next launch tries again anyway."""
        session_tasks.hopeless = ""
        session_tasks.doubts.clear()
        return LaunchFailed(
            f"no worker of session {session_tasks.session_id} can be started on ECS "
            f"(cluster {self._deployment.cluster}, {self._deployment.region}): {text}"
        )

    def _start_on(
        self, session_tasks: SessionTasks, count: int, *, use_spot: bool
    ) -> tuple[list[Task], Diagnosis | None]:
        """Start up to `count` tasks on one market; also return why others were not started."""
        started: list[Task] = []
        diagnosis: Diagnosis | None = None
        try:
            definition = self._definition.arn()
            fit, diagnosis = self._fitting(count, use_spot=use_spot)
            for tasks, short in self._groups(session_tasks, definition, fit, use_spot=use_spot):
                started += tasks
                diagnosis = short or diagnosis
        except RequestRefused as refused:
            diagnosis = refused.diagnosis
            self._definition.forget()
        return started, diagnosis

    def _groups(
        self,
        session_tasks: SessionTasks,
        definition: str,
        count: int,
        *,
        use_spot: bool,
    ) -> Iterator[tuple[list[Task], Diagnosis | None]]:
        """Run tasks in groups until there are `count`, or ECS has no more capacity."""
        most, made = _AT_ONCE, False
        while count and not self.halted:
            group = min(most, count)
            self._bucket.take(group)
            try:
                tasks, diagnosis = self._run(session_tasks, definition, group, use_spot=use_spot)
            except RequestRefused as refused:
                if not made and "capacity provider" in refused.diagnosis.text:
                    # The first of its kind, or somebody removed it from the cluster's list.
                    made = self._placement.make_provider(use_spot=use_spot)
                    if made:
                        continue
                if refused.diagnosis.retryability is not Retryability.FULL:
                    raise
                # A group that does not fit is rejected as a whole.
                tasks, diagnosis = [], refused.diagnosis
                if group > 1:
                    most = group // 2
                    continue
            yield tasks, diagnosis
            if diagnosis is not None:
                return
            count -= len(tasks)

    def _run(
        self,
        session_tasks: SessionTasks,
        definition: str,
        count: int,
        *,
        use_spot: bool,
    ) -> tuple[list[Task], Diagnosis | None]:
        """One RunTask: the tasks it started, and why not the others."""
        provider = self._placement.provider(use_spot=use_spot)
        reply = self._api.run(
            taskDefinition=definition,
            count=count,
            clientToken=self._runtime.new_id(32),
            startedBy=session_tasks.session_id,
            capacityProviderStrategy=[{"capacityProvider": provider, "weight": 1}],
            **self._placement.network(),
            overrides=_overrides(session_tasks, use_spot=use_spot),
            enableECSManagedTags=True,
            tags=_tags(session_tasks),
        )
        now = self._runtime.monotonic()
        tasks = [
            session_tasks.take(task["taskArn"], now, session_tasks.launches)
            for task in reply["tasks"]
        ]
        for task in tasks:
            task.use_spot = use_spot
        if len(tasks) >= count:
            return tasks, None
        failures = reply.get("failures", [])
        first: Any = failures[0] if failures else {}
        reason = first.get("reason", "neither a task nor a failure was returned")
        return tasks, judge_failure(reason, first.get("detail", ""))

    def _fitting(self, count: int, *, use_spot: bool) -> tuple[int, Diagnosis | None]:
        """How many of `count` workers fit into the account's quota."""
        vcpus = self._placement.vcpus(use_spot=use_spot)
        if vcpus is None:
            return count, None
        each = self._placement.size.cpu / 1024
        fit = min(count, max(0, int((vcpus.quota - vcpus.used) / each)))
        if fit == count:
            return count, None
        kind = "Fargate Spot" if use_spot else "Fargate"
        falls_back = use_spot and self._spec.spot_fallback
        never = vcpus.quota < each and not falls_back
        return fit, Diagnosis(
            retryability=Retryability.NEVER if never else Retryability.FULL,
            text=f"the account's quota is {vcpus.quota:g} concurrent {kind} vCPUs, of which "
            f"{vcpus.used:g} are in use, and a worker takes {each:g}. `starburst-executor quota` "
            "shows it and can request more.",
        )

    def _note_launch(
        self,
        session_tasks: SessionTasks,
        count: int,
        started: int,
        diagnosis: Diagnosis | None,
    ) -> None:
        if started:
            log.info("session %s: ECS starts %d workers", session_tasks.session_id, started)
        session_tasks.fell_short = diagnosis.text if diagnosis else ""
        if diagnosis is None:
            session_tasks.pause = 0.0
            return
        session_tasks.note(diagnosis, session_tasks.launches)
        hopeless = session_tasks.is_hopeless(diagnosis)
        if hopeless and not session_tasks.having(*THERE, Phase.STOPPING):
            raise self.failure(session_tasks, diagnosis.text)
        pause = session_tasks.hold_off(self._runtime.monotonic())
        log.warning(
            "session %s: ECS starts %d of %d workers; the rest will be tried again in %.0f s. %s",
            session_tasks.session_id,
            started,
            count,
            pause,
            diagnosis.text,
        )


def _overrides(session_tasks: SessionTasks, *, use_spot: bool) -> dict[str, Any]:
    environment = [{"name": MARKET_VARIABLE, "value": market(use_spot=use_spot)}]
    return {
        "containerOverrides": [
            {
                "name": CONTAINER,
                "command": [session_tasks.url, "--id", ECS_TASK],
                "environment": environment,
            }
        ]
    }


def _tags(session_tasks: SessionTasks) -> list[dict[str, str]]:
    values = {
        "Name": f"starburst {session_tasks.session_id}",
        "starburst-executor:session": session_tasks.session_id,
        "starburst-executor:store": session_tasks.url.partition("/sessions/")[0],
    }
    return [
        {"key": key, "value": _TAG_FORBIDDEN.sub("_", value)[:256]} for key, value in values.items()
    ]

"""Workers as ECS tasks on Fargate or EC2: start them, know which are alive and why others are not.

    launch   RunTask, up to 10 tasks per call, startedBy = the session's id
               container: the definition's entry point + SESSION_URL --id @ecs-task, and the market
               the worker's id is "w-" and the task's id, which it reads from the task metadata
    look     ListTasks(startedBy)                      what is alive
             DescribeTasks(those starting, those no longer listed)
                                                       what has started, what has ended, and why

All state is in ECS: any client finds a session's workers by the session's id. ECS reports a
stopped task for about an hour. Its answers may be some seconds old, so a task that was just
started counts as alive although it is not listed yet.

A task that ended before its process started was never a worker: it is neither live nor ended,
and the launcher decides whether to try again, to wait for capacity, or to give up. If Spot has
no capacity and `spot_fallback` is set, missing workers are started on-demand, and Spot is tried
again after a while.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from msgspec.structs import replace

from starburst_executor.aws.account import Clients, Vcpus, date_of, fargate_vcpus
from starburst_executor.aws.clients import make_client
from starburst_executor.aws.ecs.api import EcsApi
from starburst_executor.aws.ecs.diagnosis import Stop
from starburst_executor.aws.ecs.metadata import definition_of_task
from starburst_executor.aws.ecs.observer import LOOK_SECONDS, TaskObserver
from starburst_executor.aws.ecs.placement import place
from starburst_executor.aws.ecs.requests import PacedRequests, RequestRefused
from starburst_executor.aws.ecs.spot_fallback import SpotFallback
from starburst_executor.aws.ecs.starting import TaskStarter
from starburst_executor.aws.ecs.stopping import STOP_SECONDS, TaskStopper
from starburst_executor.aws.ecs.task_definition import TaskDefinition
from starburst_executor.aws.ecs.tasks import (
    THERE,
    Phase,
    SessionTasks,
    Task,
    workers_of,
)
from starburst_executor.aws.prices import prices_for
from starburst_executor.config import Deployment, load_deployment
from starburst_executor.costs.prices import worker_hour
from starburst_executor.errors import AccountError
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.runtime import Runtime, SystemRuntime
from starburst_executor.storage.url import split_session_url, without_owner

__all__ = ["EcsLauncher", "open_ecs"]

log = logging.getLogger(__name__)

_TAKEN_AWAY = ("SpotInterruption", "TerminationNotice", "UserInitiated")  # stop codes


def open_ecs(spec: WorkerSpec, given: Mapping[str, Any] | None = None) -> EcsLauncher:
    """The launcher for workers like `spec`, where the manifest, or else the configuration, says.

    Raises:
        ValueError, ConfigError: such workers are impossible, or nothing is configured.
    """
    deployment = load_deployment() if given is None else _deployment(given)
    if deployment is None:
        raise ValueError(
            'launcher="ecs": no ECS cluster is configured. Run `starburst-executor setup` once for '
            "this account and region, or set STARBURST_CLUSTER and the settings it needs; "
            'launcher="local" needs none of this.'
        )
    clients = Clients(deployment.region)
    return EcsLauncher(
        spec,
        deployment,
        vcpus=lambda spot: fargate_vcpus(clients, use_spot=spot),
        hourly=lambda spot: _hourly(spec, clients, deployment, use_spot=spot),
    )


def open_ecs_within(spec: WorkerSpec, given: Mapping[str, Any] | None) -> EcsLauncher:
    """The launcher for a worker in an ECS task, which starts more workers like itself.

    They use the worker's own task definition, because its role may not register any. Nor may it
    read quotas: RunTask reports what does not fit.

    Raises:
        ValueError, StarburstError: the session's manifest or the task metadata does not say where.
    """
    if given is None:
        raise ValueError("the session does not name the cluster of its workers")
    return EcsLauncher(spec, _deployment(given), definition=definition_of_task())


def _deployment(given: Mapping[str, Any]) -> Deployment:
    try:
        return msgspec.convert(given, Deployment)
    except msgspec.ValidationError as error:
        raise ValueError(f"the session does not say where its workers run: {error}") from error


class EcsLauncher:
    """Workers on ECS, each the only process of a task.

    Args:
        spec: What a worker should be.
        deployment: Cluster, network, roles and image.
        runtime: Clock, waits and ids.
        vcpus: Returns the account's Fargate vCPUs, Spot or not; None if unknown.
        hourly: Returns dollars per worker and hour, Spot or not; None if unknown.
        clients: For what EC2 workers need besides ECS; they try once.
        definition: The task definition to use, as "family:revision"; by default a matching one,
            registered if there is none.

    Raises:
        ValueError: such workers are impossible.
        AccountError: EC2 does not tell whether they are possible.
    """

    name = "ecs"
    lag = (
        LOOK_SECONDS + 3.0
    )  # ListTasks shows new tasks within seconds, and is polled every LOOK_SECONDS

    def __init__(
        self,
        spec: WorkerSpec,
        deployment: Deployment,
        runtime: Runtime | None = None,
        vcpus: Callable[[bool], Vcpus | None] = lambda spot: None,
        hourly: Callable[[bool], float | None] = lambda spot: None,
        clients: Clients | None = None,
        definition: str | None = None,
    ) -> None:
        _check(spec, deployment)
        self._deployment = deployment
        self._runtime = SystemRuntime() if runtime is None else runtime
        self._requests = PacedRequests(self._runtime)
        once = clients or Clients(deployment.region, partial(make_client, tries=1))
        placement = place(spec, deployment, self._requests, once, vcpus)
        self._api = EcsApi(deployment, self._requests)
        self._definition = TaskDefinition(self._api, spec, deployment, placement, definition)
        self._stopper = TaskStopper(self._api, self._runtime)
        fallback = SpotFallback(spec, placement, self._stopper, self._runtime, hourly)
        self._observer = TaskObserver(
            self._api, self._definition, placement, fallback, self._runtime
        )
        self._starter = TaskStarter(
            self._api,
            spec,
            deployment,
            self._definition,
            placement,
            fallback,
            self._runtime,
        )
        self._sessions: dict[str, SessionTasks] = {}
        self._lock = threading.RLock()

    def launch(self, session_url: str, count: int) -> list[str]:
        """Start up to `count` workers; return the ids of those that ECS accepted.

        They are fewer if capacity or quota is short, and none for some seconds after that: callers
        that still need workers call again. Paced to the rate at which Fargate starts tasks.

        Raises:
            LaunchFailed: none is alive, and none will ever start unless something is fixed.
        """
        with self._lock:
            session_tasks = self._looked_at(session_url)
            hopeless = session_tasks.hopeless
            if hopeless and not session_tasks.having(Phase.RUNNING, Phase.STOPPING):
                # Those that are starting will fare no better.
                raise self._starter.failure(session_tasks, hopeless)
            if self._runtime.monotonic() < session_tasks.not_before:
                return []
            return [task.worker for task in self._starter.start(session_tasks, count)]

    def live(self, session_url: str) -> set[str] | None:
        """Ids of the workers that are starting or running; None while ECS does not answer."""
        with self._lock:
            session_tasks = self._looked_at(session_url)
            return workers_of(session_tasks.having(*THERE)) if session_tasks.known else None

    def ended(self, session_url: str) -> set[str]:
        """Ids of the workers whose process has ended and that ECS still reports."""
        with self._lock:
            return workers_of(self._looked_at(session_url).having(Phase.ENDED))

    def stop(
        self,
        session_url: str,
        worker_ids: Collection[str] | None = None,
        *,
        grace: float,
    ) -> None:
        """End workers by StopTask: SIGTERM, SIGKILL two minutes later; `grace` has no effect.

        Raises:
            AccountError: ECS refused or did not answer, or tasks are still there after that time.
        """
        with self._lock:
            session_tasks = self._tasks_of(session_url)
            deadline = self._runtime.monotonic() + STOP_SECONDS
            stopped: set[str] = set()
            while left := self._left(session_tasks, worker_ids):
                if self._runtime.monotonic() > deadline:
                    raise AccountError(_immortal(session_tasks, left))
                fresh = [t for t in left if t.phase in THERE and t.arn not in stopped]
                self._stopper.stop(session_tasks, fresh)
                stopped.update(task.arn for task in fresh)
                self._requests.sleep(0.5 if fresh else 1.0)

    def forget(self, session_url: str) -> None:
        """Forget a session that has ended; ECS keeps nothing of it."""
        with self._lock:
            self._sessions.pop(session_url, None)

    def log_tail(self, session_url: str, worker_id: str) -> str:
        """Why the worker's task stopped, and the last lines it printed."""
        stop = self._stop_of(session_url, worker_id)
        printed = self._api.log_tail(worker_id.removeprefix("w-"))
        return "\n".join(part for part in (str(stop or ""), printed) if part)

    def platform(self) -> str:
        """The workers' platform: Linux on the architecture of their task definition."""
        return self._definition.platform

    def taken_away(self, session_url: str, worker_id: str) -> bool:
        """Whether ECS reports that a worker's task was reclaimed, or stopped by a user."""
        stop = self._stop_of(session_url, worker_id)
        return stop is not None and stop.code in _TAKEN_AWAY

    def shortage(self, session_url: str) -> str:
        """What ECS lacked capacity or quota for at the last launch, in its words."""
        with self._lock:
            session_tasks = self._tasks_of(session_url)
            return session_tasks.fell_short or session_tasks.shortage

    def halt(self) -> None:
        """Start no more workers; a launch in progress ends after its current group."""
        self._starter.halted = True

    def _tasks_of(self, session_url: str) -> SessionTasks:
        if session_url not in self._sessions:
            _, session_id = split_session_url(session_url)
            url = session_url
            if "owner=" not in self._deployment.store:
                url = without_owner(url)  # the session's workers may be of an earlier version
            self._sessions[session_url] = SessionTasks(url=url, session_id=session_id)
        return self._sessions[session_url]

    def _looked_at(self, session_url: str) -> SessionTasks:
        session_tasks = self._tasks_of(session_url)
        self._observer.look_if_due(session_tasks)
        return session_tasks

    def _stop_of(self, session_url: str, worker_id: str) -> Stop | None:
        with self._lock:
            tasks = self._tasks_of(session_url).tasks.values()
            return next((t.stop for t in tasks if t.worker == worker_id), None)

    def _left(self, session_tasks: SessionTasks, worker_ids: Collection[str] | None) -> list[Task]:
        """The tasks, of those named or of all, that have not ended."""
        try:
            self._observer.look(session_tasks)
        except RequestRefused as refused:
            raise AccountError(
                f"workers of session {session_tasks.session_id} cannot be stopped because ECS does "
                f"not list them. {refused.diagnosis.text} Stop them with `aws ecs list-tasks "
                f"--cluster {self._deployment.cluster} --started-by {session_tasks.session_id}` "
                "and `aws ecs stop-task`."
            ) from refused
        session_tasks.looked_at = self._runtime.monotonic()
        there = session_tasks.having(*THERE, Phase.STOPPING)
        return [t for t in there if worker_ids is None or t.worker in worker_ids]


def _check(spec: WorkerSpec, deployment: Deployment) -> None:
    if spec.region not in (None, deployment.region):
        raise ValueError(
            f"region={spec.region!r}, but the configured cluster {deployment.cluster} is in "
            f"{deployment.region}. Omit region, or run `starburst-executor setup --region "
            f"{spec.region} --profile NAME` and set STARBURST_PROFILE=NAME."
        )


def _hourly(
    spec: WorkerSpec, clients: Clients, deployment: Deployment, *, use_spot: bool
) -> float | None:
    """Dollars per worker and hour; None, with a log message, if AWS does not tell."""
    wanted = replace(spec, use_spot=use_spot, spot_fallback=False)
    try:
        prices = prices_for(wanted, clients, date_of(SystemRuntime()))
        return worker_hour(wanted, prices, public_ip=deployment.assign_public_ip)
    except (AccountError, ValueError) as error:
        log.info("the price of a worker is unknown: %s", error)
        return None


def _immortal(session_tasks: SessionTasks, tasks: Sequence[Task]) -> str:
    return (
        f"{len(tasks)} ECS tasks of session {session_tasks.session_id} are still there "
        f"{STOP_SECONDS:.0f} s after StopTask: {', '.join(task.arn for task in tasks[:5])}. "
        "Look at them in the ECS console."
    )

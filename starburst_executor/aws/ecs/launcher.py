"""Workers as ECS tasks, on Fargate or EC2: starting them, knowing which live, and why others do not.

    launch   RunTask, up to 10 tasks a call, startedBy = the session's id
               container: the definition's entry point + SESSION_URL --id @ecs-task, and its market
               the worker asks the task's metadata who it is: its id is "w-" and the task's id
    look     ListTasks(startedBy)                      what lives
             DescribeTasks(those starting, those no longer listed)
                                                       what has begun, what has ended, and why

Nothing is kept but in ECS: any client finds a session's workers by the session's id. ECS tells of a
stopped task for about an hour. What it tells may be some seconds old, so a task that was just started
counts as there although it is not listed yet.

A task that ended before its process was started never was a worker: it is neither live nor ended, and
the launcher itself judges whether to try again, to wait for capacity, or to give up. Where Spot has no
capacity and `spot_fallback` is wanted, what lacks is started on-demand, and Spot is tried again after a while.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections import defaultdict
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
from botocore.exceptions import BotoCoreError, ClientError
from msgspec.structs import replace

from starburst_executor.aws import make_client
from starburst_executor.aws.account import Clients, Vcpus, date_of, fargate_vcpus
from starburst_executor.aws.ecs.capacity import market
from starburst_executor.aws.ecs.container import entry_point, image
from starburst_executor.aws.ecs.diagnosis import (
    Diagnosis,
    Retryability,
    Stop,
    judge_failure,
    judge_shortage,
    judge_start,
)
from starburst_executor.aws.ecs.metadata import ECS_TASK, definition_of_task
from starburst_executor.aws.ecs.placement import place
from starburst_executor.aws.ecs.requests import (
    PacedRequests,
    RequestRefused,
    TokenBucket,
)
from starburst_executor.aws.ecs.tasks import (
    OVER,
    THERE,
    Phase,
    SessionTasks,
    Task,
    Waiting,
    names_of,
    phase_of,
    workers_of,
)
from starburst_executor.aws.prices import prices_for
from starburst_executor.config import Deployment, load_deployment
from starburst_executor.cost import worker_hour
from starburst_executor.errors import AccountError, LaunchFailed
from starburst_executor.runtime import Runtime, SystemRuntime
from starburst_executor.spec import MARKET_VARIABLE, WorkerSpec
from starburst_executor.store import split_session_url

if TYPE_CHECKING:
    from mypy_boto3_ecs import ECSClient
    from mypy_boto3_ecs.type_defs import (
        RegisterTaskDefinitionRequestTypeDef,
        TaskTypeDef,
    )
    from mypy_boto3_logs import CloudWatchLogsClient

__all__ = ["EcsLauncher", "open_ecs"]

log = logging.getLogger(__name__)

CONTAINER = "worker"
STREAM_PREFIX = "starburst"
_ARCHITECTURE: Final = "X86_64"  # on Fargate, which does not ask the image
_PLATFORMS = {"X86_64": "linux-x86_64", "ARM64": "linux-aarch64"}
_STOP_TIMEOUT = 120  # seconds from SIGTERM to SIGKILL: the most that Fargate gives

# ECS's own limits.
_AT_ONCE = 10  # tasks of one RunTask
_PAGE = 100  # tasks of one ListTasks or DescribeTasks
_LAUNCHES = (100, 20.0)  # Fargate: tasks at once, then so many a second
_STOPS = (100, 40.0)  # calls that change tasks
_UNSEEN = 60.0  # seconds for which a new task may not be listed or described yet

_LOOK_SECONDS = 5.0  # between looks at a session's tasks
_LOOK_AGAIN = 30.0  # after one without an answer, which may have cost the budget
_STOPPED_PAGES = 10  # the newest 1,000 stopped tasks of this size, of all sessions
_TRY_AGAIN = (5.0, 60.0)  # first and last pause after a launch that fell short
_DOUBTS = 3  # launches in a row of which nothing began, each perhaps by accident
_SLOW_START = 300.0  # seconds: Fargate takes 20 to 60, an instance one to three minutes
_ASK_AGAIN = 30.0  # between questions to a group why no instance comes
_SPOT_AGAIN = 600.0  # seconds for which on-demand capacity is taken where Spot had none
_STOP_SECONDS = 60.0  # beyond the stop timeout: what ECS takes to say so
_LOG_LINES = 30
_STOP_WIDTH = 8  # StopTasks at once
_TAKEN_AWAY = ("SpotInterruption", "TerminationNotice", "UserInitiated")  # stop codes

_TAG_FORBIDDEN = re.compile(r"[^\w +\-=.:/@]")


def open_ecs(spec: WorkerSpec, given: Mapping[str, Any] | None = None) -> EcsLauncher:
    """The launcher for workers like `spec`, where the session's manifest says, else the configuration.

    Raises:
        ValueError, ConfigError: there can be no such workers, or nothing is configured.
    """
    deployment = load_deployment() if given is None else _deployment(given)
    if deployment is None:
        raise ValueError(
            'launcher="ecs": no ECS cluster is configured. Run `starburst-executor setup` once for this account '
            'and region, or set STARBURST_CLUSTER and what goes with it; launcher="local" needs nothing.'
        )
    clients = Clients(deployment.region)
    return EcsLauncher(
        spec,
        deployment,
        vcpus=lambda spot: fargate_vcpus(clients, use_spot=spot),
        hourly=lambda spot: _hourly(spec, clients, deployment, use_spot=spot),
    )


def open_ecs_within(spec: WorkerSpec, given: Mapping[str, Any] | None) -> EcsLauncher:
    """The launcher for a worker in an ECS task, which starts more of its own kind.

    They are of the worker's own task definition: its role may register none. Nor may it read quotas, so
    that what does not fit is told by RunTask.

    Raises:
        ValueError, StarburstError: the session's manifest or the task's metadata does not say where.
    """
    if given is None:
        raise ValueError("the session does not say in which cluster its workers are")
    return EcsLauncher(spec, _deployment(given), definition=definition_of_task())


def _deployment(given: Mapping[str, Any]) -> Deployment:
    return msgspec.convert(given, Deployment)


class EcsLauncher:
    """Workers on ECS, each the one process of a task.

    Args:
        spec: What a worker shall be.
        deployment: Where: cluster, network, roles, image.
        runtime: Clock, waits and ids.
        vcpus: Asks for the account's Fargate vCPUs, Spot or not; None if they cannot be known.
        hourly: Dollars for a worker for an hour, Spot or not; None if they cannot be known.
        clients: For what EC2 workers need besides ECS; they try once.
        definition: The task definition to use, as "family:revision"; default one that says just what is
            wanted, registered if there is none.

    Raises:
        ValueError: there can be no such workers.
        AccountError: EC2 does not say whether there can.
    """

    name = "ecs"
    lag = (
        _LOOK_SECONDS + 3.0
    )  # ListTasks shows new tasks within seconds, and is asked as often

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
        self._spec = spec
        self._deployment = deployment
        self._runtime = SystemRuntime() if runtime is None else runtime
        self._hourly = hourly
        self._calls = PacedRequests(self._runtime)
        once = clients or Clients(deployment.region, partial(make_client, tries=1))
        self._placement = place(spec, deployment, self._calls, once, vcpus)
        self._size = self._placement.size
        self._given_definition = self._definition_arn = definition
        self._halted = False
        self._sessions: dict[str, SessionTasks] = {}
        self._lock = threading.RLock()
        self._launch_bucket = TokenBucket(self._runtime, *_LAUNCHES)
        self._stop_bucket = TokenBucket(self._runtime, *_STOPS)

    # --- the launcher's promise -------------------------------------------------------

    def launch(self, session_url: str, count: int) -> list[str]:
        """Start up to `count` workers; returns the ids of those that ECS took on.

        They are fewer when capacity or quota lacks, and none for some seconds after that: whoever
        still lacks workers calls again. Paced to the rate at which Fargate starts tasks.

        Raises:
            LaunchFailed: none lives, and none will ever start unless something is mended.
        """
        with self._lock:
            session_tasks = self._tasks_of(session_url)
            self._look_if_due(session_tasks)
            if session_tasks.hopeless and not session_tasks.having(
                Phase.RUNNING, Phase.STOPPING
            ):
                # Those that are starting will fare no better.
                raise self._failure(session_tasks, session_tasks.hopeless)
            if self._runtime.monotonic() < session_tasks.not_before:
                return []
            return self._launch(session_tasks, count)

    def live(self, session_url: str) -> set[str] | None:
        """Ids of the workers that are starting or running; None while ECS does not answer."""
        with self._lock:
            session_tasks = self._tasks_of(session_url)
            self._look_if_due(session_tasks)
            return (
                workers_of(session_tasks.having(*THERE))
                if session_tasks.known
                else None
            )

    def ended(self, session_url: str) -> set[str]:
        """Ids of the workers whose process has ended, of those that ECS still tells of."""
        with self._lock:
            session_tasks = self._tasks_of(session_url)
            self._look_if_due(session_tasks)
            return workers_of(session_tasks.having(Phase.ENDED))

    def stop(
        self,
        session_url: str,
        worker_ids: Collection[str] | None = None,
        *,
        grace: float,
    ) -> None:
        """End workers by StopTask: SIGTERM, and SIGKILL two minutes later, for `grace` is not ECS's to vary.

        Raises:
            AccountError: ECS refused or did not answer, or tasks are still there after that time.
        """
        with self._lock:
            session_tasks = self._tasks_of(session_url)
            deadline = self._runtime.monotonic() + _STOP_TIMEOUT + _STOP_SECONDS
            told: set[str] = set()
            while left := self._left(session_tasks, worker_ids):
                if self._runtime.monotonic() > deadline:
                    raise AccountError(_immortal(session_tasks, left))
                fresh = [t for t in left if t.phase in THERE and t.arn not in told]
                self._stop_tasks(session_tasks, fresh)
                told.update(task.arn for task in fresh)
                self._sleep(0.5 if fresh else 1.0)

    def forget(self, session_url: str) -> None:
        """Forget a session that has ended; in ECS nothing is left of it."""
        with self._lock:
            self._sessions.pop(session_url, None)

    def log_tail(self, session_url: str, worker_id: str) -> str:
        """Why the worker's task stopped, and the last lines that it printed."""
        with self._lock:
            tasks = self._tasks_of(session_url).tasks.values()
            stop = next((t.stop for t in tasks if t.worker == worker_id), None)
        printed = self._printed(worker_id.removeprefix("w-"))
        return "\n".join(part for part in (str(stop or ""), printed) if part)

    def platform(self) -> str:
        """What workers' binaries are built for: Linux on the architecture of their task definition."""
        request = cast(Any, self._definition_request)
        return _PLATFORMS[request["runtimePlatform"]["cpuArchitecture"]]

    def taken_away(self, session_url: str, worker_id: str) -> bool:
        """Whether ECS says that a worker's task was reclaimed, or stopped by somebody."""
        with self._lock:
            tasks = self._tasks_of(session_url).tasks.values()
            stop = next((t.stop for t in tasks if t.worker == worker_id), None)
        return stop is not None and stop.code in _TAKEN_AWAY

    def halt(self) -> None:
        """Start none from now on; a launch under way ends with the group that it is at."""
        self._halted = True

    # --- launching --------------------------------------------------------------------

    def _launch(self, session_tasks: SessionTasks, count: int) -> list[str]:
        session_tasks.launches += 1
        session_tasks.hopeless = ""
        use_spot = self._takes_spot(session_tasks)
        started, diagnosis = self._start(session_tasks, count, use_spot=use_spot)
        if use_spot and self._falls_back(session_tasks, diagnosis):
            more, diagnosis = self._start(
                session_tasks, count - len(started), use_spot=False
            )
            started += more
        self._note_launch(session_tasks, count, len(started), diagnosis)
        return [task.worker for task in started]

    def _start(
        self, session_tasks: SessionTasks, count: int, *, use_spot: bool
    ) -> tuple[list[Task], Diagnosis | None]:
        """Start up to `count` tasks on one market; and what kept the others from being started."""
        started: list[Task] = []
        diagnosis: Diagnosis | None = None
        try:
            definition = self._definition()
            fit, diagnosis = self._fitting(count, use_spot=use_spot)
            for tasks, short in self._groups(
                session_tasks, definition, fit, use_spot=use_spot
            ):
                started += tasks
                diagnosis = short or diagnosis
        except RequestRefused as refused:
            diagnosis = refused.diagnosis
            # It may have been deregistered.
            self._definition_arn = self._given_definition
        return started, diagnosis

    def _groups(
        self,
        session_tasks: SessionTasks,
        definition: str,
        count: int,
        *,
        use_spot: bool,
    ) -> Iterator[tuple[list[Task], Diagnosis | None]]:
        """Run tasks, group by group, until there are `count` or ECS has no more."""
        most, made = _AT_ONCE, False
        while count and not self._halted:
            group = min(most, count)
            self._launch_bucket.take(group)
            try:
                tasks, diagnosis = self._run(
                    session_tasks, definition, group, use_spot=use_spot
                )
            except RequestRefused as refused:
                if not made and "capacity provider" in refused.diagnosis.text:
                    # The first of this kind, or dropped from the cluster's list by somebody.
                    made = self._placement.make_provider(use_spot=use_spot)
                    if made:
                        continue
                if refused.diagnosis.retryability is not Retryability.FULL:
                    raise
                # A group that does not fit is refused as a whole.
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
        """One RunTask: the tasks that it started, and what kept it from the others."""
        reply = self._call(
            "run_task",
            cluster=self._deployment.cluster,
            taskDefinition=definition,
            count=count,
            clientToken=self._runtime.new_id(32),
            startedBy=session_tasks.session_id,
            capacityProviderStrategy=[
                {
                    "capacityProvider": self._placement.provider(use_spot=use_spot),
                    "weight": 1,
                }
            ],
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
        failures = reply.get("failures", [])
        if len(tasks) >= count:
            return tasks, None
        first = failures[0] if failures else {}
        reason = first.get("reason", "neither a task nor a failure was returned")
        return tasks, judge_failure(reason, first.get("detail", ""))

    def _fitting(self, count: int, *, use_spot: bool) -> tuple[int, Diagnosis | None]:
        """How many of `count` workers the account's quota has room for."""
        vcpus = self._placement.vcpus(use_spot=use_spot)
        if vcpus is None:
            return count, None
        each = self._size.cpu / 1024
        fit = min(count, max(0, int((vcpus.quota - vcpus.used) / each)))
        if fit == count:
            return count, None
        kind = "Fargate Spot" if use_spot else "Fargate"
        falls_back = use_spot and self._spec.spot_fallback
        never = vcpus.quota < each and not falls_back
        return fit, Diagnosis(
            retryability=Retryability.NEVER if never else Retryability.FULL,
            text=f"the account's quota is {vcpus.quota:g} {kind} vCPUs at once, of which {vcpus.used:g} are in "
            f"use, and a worker takes {each:g}. `starburst-executor quota` shows it and can ask for more.",
        )

    def _note_launch(
        self,
        session_tasks: SessionTasks,
        count: int,
        started: int,
        diagnosis: Diagnosis | None,
    ) -> None:
        if started:
            log.info(
                "session %s: ECS starts %d workers", session_tasks.session_id, started
            )
        if diagnosis is None:
            session_tasks.pause = 0.0
            return
        never = self._is_hopeless(session_tasks, diagnosis, session_tasks.launches)
        if never and not session_tasks.having(*THERE, Phase.STOPPING):
            raise self._failure(session_tasks, diagnosis.text)
        log.warning(
            "session %s: ECS starts %d of %d workers that are wanted; the rest is tried again in %.0f s. %s",
            session_tasks.session_id, started, count, self._hold_off(session_tasks), diagnosis.text,
        )  # fmt: skip

    def _is_hopeless(
        self, session_tasks: SessionTasks, diagnosis: Diagnosis, launch: int
    ) -> bool:
        """Whether nothing will start unless something is mended; counts the doubtful launches."""
        if diagnosis.retryability is Retryability.DOUBTFUL:
            session_tasks.doubts[launch] = diagnosis.text
        return (
            diagnosis.retryability is Retryability.NEVER
            or len(session_tasks.doubts) >= _DOUBTS
        )

    def _hold_off(self, session_tasks: SessionTasks) -> float:
        """Launch nothing for a while; returns the seconds."""
        first, last = _TRY_AGAIN
        session_tasks.pause = min(last, max(first, 2 * session_tasks.pause))
        session_tasks.not_before = self._runtime.monotonic() + session_tasks.pause
        return session_tasks.pause

    def _failure(self, session_tasks: SessionTasks, text: str) -> LaunchFailed:
        session_tasks.hopeless = ""
        session_tasks.doubts.clear()
        return LaunchFailed(
            f"no worker of session {session_tasks.session_id} can be started on ECS (cluster {self._deployment.cluster}, "
            f"{self._deployment.region}): {text}"
        )

    # --- the market -------------------------------------------------------------------

    def _takes_spot(self, session_tasks: SessionTasks) -> bool:
        """Whether to start workers on Spot now."""
        return (
            self._spec.use_spot
            and self._runtime.monotonic() >= session_tasks.on_demand_until
        )

    def _falls_back(
        self, session_tasks: SessionTasks, diagnosis: Diagnosis | None
    ) -> bool:
        """Whether what Spot lacks is to be started on-demand, now and for a while; says so once."""
        full = diagnosis is not None and diagnosis.retryability is Retryability.FULL
        if diagnosis is None or not full or not self._spec.spot_fallback:
            return False
        if self._takes_spot(session_tasks):
            log.warning(
                "session %s: Spot has no capacity, so that workers are started on-demand for the next %.0f minutes%s. %s",
                session_tasks.session_id, _SPOT_AGAIN / 60, self._dearer(), diagnosis.text,
            )  # fmt: skip
        session_tasks.on_demand_until = self._runtime.monotonic() + _SPOT_AGAIN
        return True

    def _dearer(self) -> str:
        spot, full = self._hourly(True), self._hourly(False)
        if spot is None or full is None:
            return ""
        return f"; a worker costs ${full:.3g} an hour instead of ${spot:.3g}"

    def _check_waiting(
        self, session_tasks: SessionTasks, waiting: list[Waiting]
    ) -> None:
        """Find out why no instances come for tasks that have waited for some time, and act on it."""
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
        said = self._placement.shortage(since, use_spot=use_spot)
        longest = max(w.seconds for w in waiting)
        if not said and longest < _SLOW_START:
            return
        said = said or f"no instance came within {_SLOW_START:.0f} s"
        diagnosis = judge_shortage(said)
        tasks = [w.task for w in waiting]
        if diagnosis.retryability is Retryability.NEVER:
            session_tasks.hopeless = diagnosis.text
        elif not use_spot or not self._falls_back(session_tasks, diagnosis):
            if session_tasks.shortage != said:
                log.warning(
                    "session %s: %d workers wait for %s instances of %s and start when there are some. %s",
                    session_tasks.session_id, len(tasks), market(use_spot=use_spot), self._spec.instance_type, diagnosis.text,
                )  # fmt: skip
            session_tasks.shortage = said
            return
        try:
            self._stop_tasks(session_tasks, tasks)
        except AccountError as error:
            log.warning("session %s: %s", session_tasks.session_id, error)

    # --- the task definition ----------------------------------------------------------

    def _definition(self) -> str:
        """ARN of the task definition for such workers: found, or else registered."""
        if self._definition_arn is None:
            self._definition_arn = self._find_definition() or self._register()
        return self._definition_arn

    def _find_definition(self) -> str | None:
        family = self._definition_request["family"]
        try:
            reply = self._call("describe_task_definition", taskDefinition=family)
        except RequestRefused as refused:
            if "Unable to describe task definition" in refused.diagnosis.text:
                return None
            raise
        found = reply["taskDefinition"]
        return found["taskDefinitionArn"] if found.get("status") == "ACTIVE" else None

    def _register(self) -> str:
        reply = self._call("register_task_definition", **self._definition_request)
        arn: str = reply["taskDefinition"]["taskDefinitionArn"]
        log.info("registered task definition %s", arn)
        return arn

    @cached_property
    def _definition_request(self) -> RegisterTaskDefinitionRequestTypeDef:
        """What to register. Its family is named after all that it says, so that equals are shared."""
        request: RegisterTaskDefinitionRequestTypeDef = {
            "family": "",
            "requiresCompatibilities": ["FARGATE"],
            "networkMode": "awsvpc",
            "cpu": str(self._size.cpu),
            "memory": str(self._size.memory),
            "runtimePlatform": {
                "cpuArchitecture": _ARCHITECTURE,
                "operatingSystemFamily": "LINUX",
            },
            "executionRoleArn": self._deployment.execution_role_arn,
            "taskRoleArn": self._deployment.task_role_arn,
            "containerDefinitions": [
                {
                    "name": CONTAINER,
                    "image": image(self._spec, self._deployment),
                    "essential": True,
                    "entryPoint": entry_point(self._spec),
                    "stopTimeout": _STOP_TIMEOUT,
                    # A first process that passes SIGTERM on also before the worker listens for it.
                    "linuxParameters": {"initProcessEnabled": True},
                    "logConfiguration": {
                        "logDriver": "awslogs",
                        "options": {
                            "awslogs-group": self._deployment.log_group,
                            "awslogs-region": self._deployment.region,
                            "awslogs-stream-prefix": STREAM_PREFIX,
                            "mode": "non-blocking",  # a stalled log must not stall a worker
                        },
                    },
                }
            ],
            "tags": [{"key": "starburst-executor", "value": "worker"}],
        }
        request = cast(Any, self._placement.define(cast(Any, request)))
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode())
        return {**request, "family": f"starburst-{digest.hexdigest()[:16]}"}

    # --- looking ----------------------------------------------------------------------

    def _tasks_of(self, session_url: str) -> SessionTasks:
        if session_url not in self._sessions:
            _, session_id = split_session_url(session_url)
            self._sessions[session_url] = SessionTasks(
                url=session_url, session_id=session_id
            )
        return self._sessions[session_url]

    def _look_if_due(self, session_tasks: SessionTasks) -> None:
        now = self._runtime.monotonic()
        pause = _LOOK_SECONDS if session_tasks.known else _LOOK_AGAIN
        if (
            session_tasks.looked_at is not None
            and now - session_tasks.looked_at < pause
        ):
            return
        try:
            self._look(session_tasks)
        except RequestRefused as refused:
            if session_tasks.known or session_tasks.looked_at is None:
                log.warning(
                    "session %s: ECS does not say which workers live. %s",
                    session_tasks.session_id, refused.diagnosis.text,
                )  # fmt: skip
            session_tasks.known = False
        session_tasks.looked_at = self._runtime.monotonic()

    def _look(self, session_tasks: SessionTasks) -> None:
        """Bring the tasks up to date, and say what has become of those that are gone."""
        stopped = [] if session_tasks.known else self._stopped(session_tasks)
        now = self._runtime.monotonic()
        arns = self._list(startedBy=session_tasks.session_id)
        listed = set(arns)
        for arn in arns:
            session_tasks.take(arn, now)
        unsure = [
            task
            for task in session_tasks.tasks.values()
            if task.phase not in OVER
            and (task.phase is Phase.STARTING or task.arn not in listed)
        ]
        described = {t["taskArn"]: t for t in self._describe([t.arn for t in unsure])}
        over = [
            task
            for task in unsure
            if self._update(session_tasks, task, described.get(task.arn), now)
        ]
        self._check_waiting(session_tasks, Waiting.among(unsure, described, now))
        for old in stopped:
            self._update(
                session_tasks, session_tasks.take(old["taskArn"], now), old, now
            )
        session_tasks.known = True
        self._tell(session_tasks, over)

    def _stopped(self, session_tasks: SessionTasks) -> list[TaskTypeDef]:
        """Tasks of the session that ended before this launcher looked for the first time."""
        # ListTasks filters by startedBy or by status, not by both.
        given = (self._given_definition or "").partition(":")[0]
        family = given or self._definition_request["family"]
        arns = self._list(pages=_STOPPED_PAGES, family=family, desiredStatus="STOPPED")
        tasks = self._describe(arns)
        return [
            task for task in tasks if task.get("startedBy") == session_tasks.session_id
        ]

    def _list(self, pages: int | None = None, **filters: str) -> list[str]:
        arns: list[str] = []
        token: dict[str, str] = {}
        while pages is None or pages > 0:
            reply = self._call(
                "list_tasks",
                cluster=self._deployment.cluster,
                maxResults=_PAGE,
                **filters,
                **token,
            )
            arns += reply["taskArns"]
            if not reply.get("nextToken"):
                break
            token = {"nextToken": reply["nextToken"]}
            pages = None if pages is None else pages - 1
        return arns

    def _describe(self, arns: Sequence[str]) -> list[TaskTypeDef]:
        """What ECS tells of the tasks that it still knows."""
        tasks: list[TaskTypeDef] = []
        for start in range(0, len(arns), _PAGE):
            reply = self._call(
                "describe_tasks",
                cluster=self._deployment.cluster,
                tasks=list(arns[start : start + _PAGE]),
            )
            tasks += reply["tasks"]
        return tasks

    def _update(
        self,
        session_tasks: SessionTasks,
        task: Task,
        said: TaskTypeDef | None,
        now: float,
    ) -> bool:
        """Take in what ECS says of a task; whether it was heard just now that it is over."""
        if said is None:
            if now - task.since < _UNSEEN:
                return False
            task.phase = Phase.ENDED
            return True
        task.phase = phase_of(said)
        if "capacityProviderName" in said:
            spot = self._placement.provider(use_spot=True)
            task.use_spot = said["capacityProviderName"] == spot
        if task.phase is Phase.RUNNING:
            session_tasks.hopeless = session_tasks.shortage = ""
            session_tasks.doubts.clear()
        if task.phase is Phase.STARTING and now - task.since > _SLOW_START:
            self._tell_slow(session_tasks, task, said)
        if task.phase in OVER:
            task.stop = Stop.of(said)
        return task.phase in OVER

    # --- telling ----------------------------------------------------------------------

    def _tell(self, session_tasks: SessionTasks, over: Iterable[Task]) -> None:
        """Say, once for all tasks with the same fate, what it was; and draw conclusions."""
        fates: defaultdict[str, list[Task]] = defaultdict(list)
        for task in over:
            fates[str(task.stop or "")].append(task)
        for fate, tasks in fates.items():
            unborn = [t for t in tasks if t.phase is Phase.UNBORN and t.launch]
            if unborn:
                self._tell_unborn(session_tasks, unborn)
            elif tasks[0].stop is None or tasks[0].stop.expected:
                log.info(
                    "session %s: %s: %s",
                    session_tasks.session_id,
                    names_of(tasks),
                    fate,
                )
            else:
                printed = self._printed(tasks[0].id) if tasks[0].stop.exit_code else ""
                log.warning(
                    "session %s: %s ended: %s%s",
                    session_tasks.session_id, names_of(tasks), fate, f"; it printed:\n{printed}" if printed else "",
                )  # fmt: skip

    def _tell_unborn(self, session_tasks: SessionTasks, tasks: list[Task]) -> None:
        stop = tasks[0].stop
        assert stop is not None
        if stop.code == "UserInitiated":
            return
        diagnosis = judge_start(stop)
        if session_tasks.shortage and diagnosis.retryability is Retryability.DOUBTFUL:
            # ECS gave up waiting for an instance, in words that are not known.
            diagnosis = judge_shortage(f"{diagnosis.text} {session_tasks.shortage}")
        for launch in {task.launch for task in tasks}:
            if self._is_hopeless(session_tasks, diagnosis, launch):
                session_tasks.hopeless = diagnosis.text
        if not (tasks[0].use_spot and self._falls_back(session_tasks, diagnosis)):
            self._hold_off(session_tasks)
        log.warning(
            "session %s: %s could not be started. %s",
            session_tasks.session_id, names_of(tasks), diagnosis.text,
        )  # fmt: skip

    def _tell_slow(
        self, session_tasks: SessionTasks, task: Task, said: TaskTypeDef
    ) -> None:
        if not task.slow:
            task.slow = True
            log.warning(
                "session %s: worker %s is still %s after %.0f s",
                session_tasks.session_id, task.worker, said.get("lastStatus", "starting"), _SLOW_START,
            )  # fmt: skip

    def _printed(self, task_id: str) -> str:
        """The last lines of a task's log; what is wrong, if they cannot be had."""
        stream = f"{STREAM_PREFIX}/{CONTAINER}/{task_id}"
        try:
            reply = self._logs.get_log_events(
                logGroupName=self._deployment.log_group,
                logStreamName=stream,
                limit=_LOG_LINES,
                startFromHead=False,
            )
        except (ClientError, BotoCoreError) as error:
            if "ResourceNotFound" in str(error):
                return ""  # it never printed anything
            return f"(its log {stream} cannot be read: {error})"
        return "\n".join(event["message"].rstrip("\n") for event in reply["events"])

    # --- stopping ---------------------------------------------------------------------

    def _left(
        self, session_tasks: SessionTasks, worker_ids: Collection[str] | None
    ) -> list[Task]:
        """The tasks, of those named or of all, that are not over."""
        try:
            self._look(session_tasks)
        except RequestRefused as refused:
            raise AccountError(
                f"workers of session {session_tasks.session_id} cannot be stopped, for ECS does not say which live. "
                f"{refused.diagnosis.text} Stop them with `aws ecs list-tasks --cluster {self._deployment.cluster} "
                f"--started-by {session_tasks.session_id}` and `aws ecs stop-task`."
            ) from refused
        session_tasks.looked_at = self._runtime.monotonic()
        there = session_tasks.having(*THERE, Phase.STOPPING)
        return [t for t in there if worker_ids is None or t.worker in worker_ids]

    def _stop_tasks(self, session_tasks: SessionTasks, tasks: Sequence[Task]) -> None:
        if not tasks:
            return
        with ThreadPoolExecutor(min(_STOP_WIDTH, len(tasks)), "starburst-stop") as pool:
            for _ in pool.map(lambda task: self._stop_task(session_tasks, task), tasks):
                pass

    def _stop_task(self, session_tasks: SessionTasks, task: Task) -> None:
        self._stop_bucket.take(1)
        reason = f"starburst_executor: session {session_tasks.session_id} stops it"
        try:
            self._call(
                "stop_task",
                cluster=self._deployment.cluster,
                task=task.arn,
                reason=reason,
            )
        except RequestRefused as refused:
            if "not found" not in refused.diagnosis.text:
                raise AccountError(
                    f"worker {task.worker} cannot be stopped. {refused.diagnosis.text}"
                ) from refused

    # --- calls ------------------------------------------------------------------------

    @cached_property
    def _ecs(self) -> ECSClient:
        client: ECSClient = make_client("ecs", region=self._deployment.region, tries=1)
        return client

    @cached_property
    def _logs(self) -> CloudWatchLogsClient:
        region = self._deployment.region
        client: CloudWatchLogsClient = make_client("logs", region=region)
        return client

    def _call(self, operation: str, **request: Any) -> Any:
        """Make a call of ECS, again while its error is a passing one.

        Raises:
            Refused: with what the error means.
        """
        return self._calls.make(getattr(self._ecs, operation), **request)

    def _sleep(self, seconds: float) -> None:
        self._calls.sleep(seconds)


def _check(spec: WorkerSpec, deployment: Deployment) -> None:
    if spec.region not in (None, deployment.region):
        raise ValueError(
            f"region={spec.region!r}, but the cluster {deployment.cluster} that is configured is in "
            f"{deployment.region}. Leave region out, or run `starburst-executor setup --region {spec.region} "
            "--profile NAME` and set STARBURST_PROFILE=NAME."
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


def _hourly(
    spec: WorkerSpec, clients: Clients, deployment: Deployment, *, use_spot: bool
) -> float | None:
    """Dollars for a worker for an hour; None, with a note in the log, where AWS does not tell."""
    wanted = replace(spec, use_spot=use_spot, spot_fallback=False)
    try:
        prices = prices_for(wanted, clients, date_of(SystemRuntime()))
        return worker_hour(wanted, prices, public_ip=deployment.assign_public_ip)
    except (AccountError, ValueError) as error:
        log.info("what a worker costs is not known: %s", error)
        return None


def _tags(session_tasks: SessionTasks) -> list[dict[str, str]]:
    values = {
        "Name": f"starburst {session_tasks.session_id}",
        "starburst-executor:session": session_tasks.session_id,
        "starburst-executor:store": session_tasks.url.partition("/sessions/")[0],
    }
    return [
        {"key": key, "value": _TAG_FORBIDDEN.sub("_", value)[:256]}
        for key, value in values.items()
    ]


def _immortal(session_tasks: SessionTasks, tasks: Sequence[Task]) -> str:
    return (
        f"{len(tasks)} ECS tasks of session {session_tasks.session_id} are still there {_STOP_TIMEOUT + _STOP_SECONDS:.0f} s "
        f"after they were told to stop: {', '.join(task.arn for task in tasks[:5])}. Look at them in the ECS console."
    )

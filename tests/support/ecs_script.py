"""ECS as a script: what the launcher asks for, exactly, and what is answered."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from botocore.stub import ANY, Stubber

from starburst_executor.aws.account import Vcpus
from starburst_executor.aws.ecs.launcher import EcsLauncher
from starburst_executor.config import Deployment
from starburst_executor.protocol.worker_spec import WorkerSpec

T = TypeVar("T")
SESSION = "20260102-030405-abc234"
URL = f"s3://bucket/starburst/sessions/{SESSION}"
CLUSTER = "arn:aws:ecs:eu-west-1:123456789012:cluster/starburst"
DEFINITION = "arn:aws:ecs:eu-west-1:123456789012:task-definition/starburst-0123456789abcdef:1"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
FULL = (
    "Capacity is unavailable at this time. "
    "Please try again later or in a different availability zone"
)
NO_QUOTA = "You've reached the limit on the number of vCPUs you can run concurrently"
DEPLOYMENT = Deployment(
    region="eu-west-1",
    store="s3://bucket/starburst",
    cluster=CLUSTER,
    subnets=("subnet-1", "subnet-2"),
    security_groups=("sg-1",),
    assign_public_ip=True,
    execution_role_arn="arn:aws:iam::123456789012:role/execution",
    task_role_arn="arn:aws:iam::123456789012:role/task",
    log_group="/starburst",
    image="registry.test/python:3.11",
)


class VirtualSignal:
    def __init__(self, runtime: VirtualRuntime) -> None:
        self._runtime = runtime

    def set(self) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def is_set(self) -> bool:
        return False

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self._runtime.now += timeout
        return False


class VirtualRuntime:
    """A clock that waiting moves on, and ids that count."""

    def __init__(self) -> None:
        self.random: random.Random = random.Random(1)
        self.now = 1000.0
        self.ids = 0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return 0.0

    def signal(self) -> VirtualSignal:
        return VirtualSignal(self)

    def gather(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        return [call() for call in calls]

    def new_id(self, length: int) -> str:
        self.ids += 1
        return f"{self.ids:0{length}d}"


def arn(number: int) -> str:
    return f"arn:aws:ecs:eu-west-1:123456789012:task/starburst/{number:032x}"


def worker(number: int) -> str:
    return f"w-{number:032x}"


def workers(*numbers: int) -> set[str]:
    return {worker(number) for number in numbers}


def task(number: int, status: str = "RUNNING", **more: Any) -> dict[str, Any]:
    """A task as DescribeTasks tells of it."""
    desired = "STOPPED" if status == "STOPPED" else "RUNNING"
    began = {"startedAt": NOW} if status in ("RUNNING", "STOPPED") else {}
    return {
        "taskArn": arn(number),
        "lastStatus": status,
        "desiredStatus": desired,
        "startedBy": SESSION,
        **began,
        **more,
    }


def unborn(number: int, reason: str, code: str = "TaskFailedToStart") -> dict[str, Any]:
    """A task that stopped before its process was started."""
    told = task(number, "STOPPED", stopCode=code, stoppedReason=reason)
    del told["startedAt"]
    return told


class Script:
    """What is expected of the launcher, in order, and what is answered."""

    def __init__(self, launcher: EcsLauncher, ecs: Stubber, logs: Stubber) -> None:
        self.launcher = launcher
        self.runtime: VirtualRuntime = launcher._runtime  # type: ignore[assignment]
        self.ecs, self.logs = ecs, logs

    def first_look(self, *listed: int, stopped: Sequence[dict[str, Any]] = ()) -> None:
        """The look at a session that was never looked at; the tasks listed are running."""
        self.earlier(*stopped)
        self.look(*listed)
        if listed:
            self.describe(*(task(number) for number in listed))

    def earlier(self, *stopped: dict[str, Any]) -> None:
        """What comes before the first look."""
        arns = [told["taskArn"] for told in stopped]
        self.ecs.add_response(
            "list_tasks",
            {"taskArns": arns},
            {
                "cluster": CLUSTER,
                "maxResults": 100,
                "family": self.launcher._definition.request["family"],
                "desiredStatus": "STOPPED",
            },
        )
        if arns:
            self.describe(*stopped)

    def look(self, *listed: int) -> None:
        self.ecs.add_response(
            "list_tasks",
            {"taskArns": [arn(number) for number in listed]},
            {"cluster": CLUSTER, "maxResults": 100, "startedBy": SESSION},
        )

    def describe(self, *told: dict[str, Any], missing: Sequence[int] = ()) -> None:
        arns = [*(one["taskArn"] for one in told), *(arn(n) for n in missing)]
        failures = [{"arn": arn(number), "reason": "MISSING"} for number in missing]
        self.ecs.add_response(
            "describe_tasks",
            {"tasks": list(told), "failures": failures},
            {"cluster": CLUSTER, "tasks": arns},
        )

    def definition(self) -> None:
        self.ecs.add_response(
            "describe_task_definition",
            {"taskDefinition": {"taskDefinitionArn": DEFINITION, "status": "ACTIVE"}},
            {"taskDefinition": self.launcher._definition.request["family"]},
        )

    def run(self, count: int, *numbers: int, failure: str = "", **expected: Any) -> None:
        """A RunTask for so many, that starts these."""
        failures = [{"reason": failure}] * (count - len(numbers)) if failure else []
        tasks = [{"taskArn": arn(number)} for number in numbers]
        self.ecs.add_response(
            "run_task",
            {"tasks": tasks, "failures": failures},
            {**RUN, "count": count, **expected},
        )

    def refuse(self, operation: str, code: str, message: str, status: int = 400) -> None:
        self.ecs.add_client_error(operation, code, message, status)

    def stop(self, number: int) -> None:
        request = {"cluster": CLUSTER, "task": arn(number), "reason": ANY}
        self.ecs.add_response("stop_task", {}, request)

    def later(self, seconds: float = 6.0) -> None:
        self.runtime.now += seconds

    def done(self) -> None:
        """Whatever was expected was asked."""
        self.ecs.assert_no_pending_responses()
        self.logs.assert_no_pending_responses()


RUN: dict[str, Any] = {
    "cluster": CLUSTER,
    "taskDefinition": DEFINITION,
    "count": ANY,
    "clientToken": ANY,
    "startedBy": SESSION,
    "capacityProviderStrategy": [{"capacityProvider": "FARGATE", "weight": 1}],
    "networkConfiguration": {
        "awsvpcConfiguration": {
            "subnets": ["subnet-1", "subnet-2"],
            "securityGroups": ["sg-1"],
            "assignPublicIp": "ENABLED",
        }
    },
    "overrides": {
        "containerOverrides": [
            {
                "name": "worker",
                "command": [URL, "--id", "@ecs-task"],
                "environment": [{"name": "STARBURST_MARKET", "value": "on-demand"}],
            }
        ]
    },
    "enableECSManagedTags": True,
    "tags": [
        {"key": "Name", "value": f"starburst {SESSION}"},
        {"key": "starburst-executor:session", "value": SESSION},
        {"key": "starburst-executor:store", "value": "s3://bucket/starburst"},
    ],
}  # fmt: skip


def on_spot(provider: str = "FARGATE_SPOT") -> dict[str, Any]:
    """What is different in a RunTask for Spot."""
    [override] = RUN["overrides"]["containerOverrides"]
    variable = {"name": "STARBURST_MARKET", "value": "spot"}
    return {
        "capacityProviderStrategy": [{"capacityProvider": provider, "weight": 1}],
        "overrides": {"containerOverrides": [{**override, "environment": [variable]}]},
    }


@contextlib.contextmanager
def scripted(
    vcpus: Callable[[bool], Vcpus | None] = lambda spot: None, **spec: Any
) -> Iterator[tuple[EcsLauncher, Script]]:
    """A launcher with real clients, whose expected requests and replies are scripted."""
    wanted = WorkerSpec(launcher="ecs", **spec)
    launcher = EcsLauncher(wanted, DEPLOYMENT, VirtualRuntime(), vcpus)
    ecs, logs = Stubber(launcher._api.ecs), Stubber(launcher._api.logs)
    with ecs, logs:
        script = Script(launcher, ecs, logs)
        yield launcher, script
        script.done()


@contextlib.contextmanager
def launched(*numbers: int) -> Iterator[tuple[EcsLauncher, Script]]:
    """A launcher that has just started these workers."""
    with scripted() as (launcher, script):
        script.first_look()
        script.definition()
        script.run(len(numbers), *numbers)
        launcher.launch(URL, len(numbers))
        yield launcher, script

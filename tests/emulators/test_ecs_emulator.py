"""The emulated ECS keeps to what AWS documents.

RunTask and its refusals, the life of a task, its end, quotas.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from starburst_executor.config import Deployment
from tests.emulators.ecs_server import EcsServer, ecs_server
from tests.support.sessions import is_alive
from tests.support.tasks import until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EcsServer]:
    with ecs_server(tmp_path_factory.mktemp("ecs")) as running:
        yield running


class Account:
    """An ECS client, and a cluster to use it on."""

    def __init__(self, server: EcsServer) -> None:
        self.server = server
        self.deployment: Deployment = server.deploy()
        self.ecs = server.aws("ecs")

    def define(self, *command: str, image: str = "image", **more: Any) -> str:
        """Register a task definition of 1 vCPU; its container runs a command."""
        options = {
            "awslogs-group": self.deployment.log_group,
            "awslogs-region": "us-east-1",
            "awslogs-stream-prefix": "prefix",
        }
        container = {
            "name": "worker",
            "image": image,
            "entryPoint": list(command),
            "logConfiguration": {"logDriver": "awslogs", "options": options},
            **more,
        }
        reply = self.ecs.register_task_definition(
            family=f"f-{os.urandom(4).hex()}",
            requiresCompatibilities=["FARGATE"],
            networkMode="awsvpc",
            cpu="1024",
            memory="2048",
            executionRoleArn=self.deployment.execution_role_arn,
            taskRoleArn=self.deployment.task_role_arn,
            containerDefinitions=[container],
        )
        arn: str = reply["taskDefinition"]["taskDefinitionArn"]
        return arn

    def run(self, definition: str, count: int = 1, **more: Any) -> Any:
        network = {"awsvpcConfiguration": {"subnets": ["subnet-1"]}}
        wish = {
            "cluster": self.deployment.cluster,
            "taskDefinition": definition,
            "count": count,
            "capacityProviderStrategy": [{"capacityProvider": "FARGATE_SPOT", "weight": 1}],
            "networkConfiguration": network,
        }
        return self.ecs.run_task(**{**wish, **more})

    def start(self, *command: str, **more: Any) -> str:
        """Run one task until its process is there; returns its ARN."""
        arn: str = self.run(self.define(*command), **more)["tasks"][0]["taskArn"]
        self.await_status(arn, "RUNNING")
        return arn

    def about(self, arn: str, **more: Any) -> Any:
        reply = self.ecs.describe_tasks(cluster=self.deployment.cluster, tasks=[arn], **more)
        return reply["tasks"][0]

    def await_status(self, arn: str, status: str) -> Any:
        until(lambda: self.about(arn)["lastStatus"] == status, f"task is {status}")
        return self.about(arn)

    def stop(self, arn: str) -> None:
        self.ecs.stop_task(cluster=self.deployment.cluster, task=arn, reason="enough")

    def pid(self, arn: str) -> int:
        tasks = self.server.tasks(self.deployment.cluster)
        [pid] = [task["pid"] for task in tasks if task["taskArn"] == arn]
        assert isinstance(pid, int)
        return pid

    def listed(self, **filters: str) -> list[str]:
        reply = self.ecs.list_tasks(cluster=self.deployment.cluster, **filters)
        found: list[str] = reply["taskArns"]
        return found


@pytest.fixture(scope="module")
def shared(server: EcsServer) -> Iterator[Account]:
    account = Account(server)
    yield account
    account.ecs.close()


@pytest.fixture
def account(shared: Account) -> Iterator[Account]:
    """The account; no task is left from before."""
    server, cluster = shared.server, shared.deployment.cluster
    server.reset()
    yield shared
    until(lambda: not _killed(server, cluster), "all have ended")


def _killed(server: EcsServer, cluster: str) -> list[str]:
    """Kill what lives, as far as its process has been started, and tell which that was."""
    live = [task["id"] for task in server.live(cluster)]
    server.kill(*live)
    return live


@contextlib.contextmanager
def refused(code: str, text: str | None = None) -> Iterator[None]:
    with pytest.raises(ClientError, match=text) as caught:
        yield
    assert caught.value.response["Error"]["Code"] == code


# --- running -------------------------------------------------------------------------


def test_a_task_is_a_process_that_ends_with_its_exit_code(account: Account) -> None:
    definition = account.define("sh", "-c", "echo hello; exit 3")
    [task] = account.run(definition, startedBy="me")["tasks"]
    assert task["lastStatus"] == "PROVISIONING"
    said = account.await_status(task["taskArn"], "STOPPED")
    assert said["stopCode"] == "EssentialContainerExited"
    assert said["containers"][0]["exitCode"] == 3
    assert said["startedAt"] <= said["stoppedAt"]
    with contextlib.closing(account.server.aws("logs")) as logs:
        [event] = logs.get_log_events(
            logGroupName=account.deployment.log_group,
            logStreamName=f"prefix/worker/{task['taskArn'].rpartition('/')[2]}",
        )["events"]
    assert event["message"] == "hello"


def test_tags_are_told_to_who_asks_for_them(account: Account) -> None:
    arn = account.start("sleep", "60", tags=[{"key": "a", "value": "b"}])
    assert "tags" not in account.about(arn)
    assert account.about(arn, include=["TAGS"])["tags"] == [{"key": "a", "value": "b"}]


def test_the_same_client_token_is_the_same_launch(account: Account) -> None:
    definition = account.define("sleep", "60")
    first = account.run(definition, clientToken="token")["tasks"]
    again = account.run(definition, clientToken="token")["tasks"]
    assert [t["taskArn"] for t in again] == [t["taskArn"] for t in first]
    assert len(account.listed()) == 1
    with refused("ConflictException", "token"):
        account.run(definition, count=2, clientToken="token")


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        ({"count": 11}, "InvalidParameterException"),
        ({"startedBy": "x" * 129}, "InvalidParameterException"),
        ({"networkConfiguration": {}}, "InvalidParameterException"),
        ({"cluster": "no-such"}, "ClusterNotFoundException"),
        ({"taskDefinition": "no-such"}, "ClientException"),
        (
            {"overrides": {"containerOverrides": [{"name": "worker", "command": ["x" * 8192]}]}},
            "InvalidParameterException",
        ),
        (
            {"capacityProviderStrategy": [{"capacityProvider": "OTHER"}]},
            "InvalidParameterException",
        ),
    ],
)
def test_what_ecs_refuses_is_refused(account: Account, wish: dict[str, Any], code: str) -> None:
    definition = account.define("sleep", "60")
    with refused(code):
        account.run(definition, **wish)
    assert account.listed() == []


# --- capacity and quota --------------------------------------------------------------


def test_capacity_that_lacks_is_a_failure_for_each_task_in_a_plain_answer(
    account: Account,
) -> None:
    account.server.set(capacity={"FARGATE_SPOT": 2})
    reply = account.run(account.define("sleep", "60"), count=3)
    assert len(reply["tasks"]) == 2
    [failure] = reply["failures"]
    assert "Capacity is unavailable" in failure["reason"]


def test_a_task_may_stop_for_lack_of_capacity_before_it_was_born(
    account: Account,
) -> None:
    account.server.set(unborn={"FARGATE_SPOT": 1})
    [task] = account.run(account.define("sleep", "60"))["tasks"]
    said = account.await_status(task["taskArn"], "STOPPED")
    assert said["stopCode"] == "TaskFailedToStart"
    assert "Capacity is unavailable" in said["stoppedReason"]
    assert "startedAt" not in said
    account.start("sleep", "60")  # it was the only one


def test_a_group_beyond_the_quota_is_refused_as_a_whole(account: Account) -> None:
    account.server.set(vcpus={"FARGATE_SPOT": 2.0})
    definition = account.define("sleep", "60")
    with refused("ClientException", "limit on the number of vCPUs"):
        account.run(definition, count=3)
    assert account.listed() == []
    assert len(account.run(definition, count=2)["tasks"]) == 2


def test_service_quotas_tells_the_quota_and_takes_one_request_for_more(
    account: Account,
) -> None:
    account.server.set(vcpus={"FARGATE_SPOT": 6.0})
    quotas: Any = account.server.quotas()
    which = {"ServiceCode": "fargate", "QuotaCode": "L-36FBB829"}
    assert quotas.get_service_quota(**which)["Quota"]["Value"] == 6.0
    with refused("IllegalArgumentException"):
        quotas.request_service_quota_increase(**which, DesiredValue=5.0)
    asked = quotas.request_service_quota_increase(**which, DesiredValue=64.0)
    assert asked["RequestedQuota"]["Status"] == "PENDING"
    with refused("ResourceAlreadyExistsException"):
        quotas.request_service_quota_increase(**which, DesiredValue=65.0)
    history = quotas.list_requested_service_quota_change_history_by_quota(**which)
    assert [r["DesiredValue"] for r in history["RequestedQuotas"]] == [64.0]
    with refused("NoSuchResourceException"):
        quotas.get_service_quota(ServiceCode="fargate", QuotaCode="L-0")
    quotas.close()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("missing:1", "CannotPullContainerError.*not found"),
        ("unreachable:1", "ResourceInitializationError.*i/o timeout"),
    ],
)
def test_an_image_that_cannot_be_had_stops_the_task_unborn(
    account: Account, image: str, says: str
) -> None:
    [task] = account.run(account.define("true", image=image))["tasks"]
    said = account.await_status(task["taskArn"], "STOPPED")
    assert said["stopCode"] == "TaskFailedToStart"
    assert re.search(says, said["stoppedReason"])


# --- trouble -------------------------------------------------------------------------


def test_a_call_can_be_throttled(account: Account) -> None:
    account.server.set(throttle={"ListTasks": 1})
    with refused("ThrottlingException"):
        account.listed()
    assert account.listed() == []


def test_a_reply_can_be_lost_of_a_call_that_took_effect(account: Account) -> None:
    account.server.set(lose={"RunTask": 1})
    definition = account.define("sleep", "60")
    with refused("ServerException"):
        account.run(definition, clientToken="lost")
    [task] = account.run(definition, clientToken="lost")["tasks"]
    assert account.listed() == [task["taskArn"]]


def test_new_tasks_are_not_listed_at_once(account: Account) -> None:
    account.server.set(list_delay=60.0)
    [task] = account.run(account.define("sleep", "60"))["tasks"]
    assert account.listed() == []
    reply = account.ecs.describe_tasks(cluster=account.deployment.cluster, tasks=[task["taskArn"]])
    assert reply["failures"][0]["reason"] == "MISSING"
    account.server.set(list_delay=0.0)
    assert account.listed() == [task["taskArn"]]


# --- ends ----------------------------------------------------------------------------

IGNORES = "trap '' TERM; while :; do sleep 0.05; done"


def test_stop_task_is_sigterm_then_sigkill(account: Account) -> None:
    mild = account.start("sleep", "60")
    account.stop(mild)
    said = account.await_status(mild, "STOPPED")
    assert (said["stopCode"], said["stoppedReason"]) == ("UserInitiated", "enough")
    assert said["containers"][0]["exitCode"] == 128 + 15

    definition = account.define("sh", "-c", IGNORES, stopTimeout=2)
    [task] = account.run(definition)["tasks"]
    account.await_status(task["taskArn"], "RUNNING")
    account.stop(task["taskArn"])
    assert account.about(task["taskArn"])["desiredStatus"] == "STOPPED"
    assert account.about(task["taskArn"])["lastStatus"] == "RUNNING"
    said = account.await_status(task["taskArn"], "STOPPED")
    assert said["containers"][0]["exitCode"] == 128 + 9


def test_a_kill_comes_without_warning_and_is_the_tasks_own_end(
    account: Account,
) -> None:
    arn = account.start("sh", "-c", IGNORES)
    pid = account.pid(arn)
    account.server.kill(arn.rpartition("/")[2])
    said = account.await_status(arn, "STOPPED")
    assert said["stopCode"] == "EssentialContainerExited"
    assert said["containers"][0]["exitCode"] == 128 + 9
    assert not is_alive(pid)


def test_a_reclaim_is_sigterm_and_spots_reason(account: Account) -> None:
    arn = account.start("sleep", "60")
    account.server.reclaim(arn.rpartition("/")[2])
    said = account.await_status(arn, "STOPPED")
    assert said["stopCode"] == "SpotInterruption"
    assert said["stoppedReason"] == "Your Spot Task was interrupted."


def test_tasks_are_listed_by_starter_or_by_status_but_not_by_both(
    account: Account,
) -> None:
    mine = account.start("sleep", "60", startedBy="me")
    other = account.start("sleep", "60", startedBy="you")
    assert account.listed(startedBy="me") == [mine]
    account.stop(other)
    assert account.listed() == [mine]
    stopped = account.listed(desiredStatus="STOPPED")
    assert other in stopped
    assert mine not in stopped
    with refused("InvalidParameterException", "only filter"):
        account.listed(startedBy="me", desiredStatus="STOPPED")

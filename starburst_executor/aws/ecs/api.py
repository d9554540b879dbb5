"""ECS operations on the tasks of one cluster, and their CloudWatch logs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from starburst_executor.aws.clients import make_client
from starburst_executor.aws.ecs.requests import PacedRequests, RequestRefused
from starburst_executor.config import Deployment

if TYPE_CHECKING:
    from mypy_boto3_ecs import ECSClient
    from mypy_boto3_ecs.type_defs import RunTaskResponseTypeDef, TaskTypeDef
    from mypy_boto3_logs import CloudWatchLogsClient

__all__ = ["CONTAINER", "STREAM_PREFIX", "EcsApi"]

CONTAINER = "worker"
STREAM_PREFIX = "starburst"

_PAGE = 100  # tasks per ListTasks or DescribeTasks: ECS's own limit
_LOG_LINES = 30


class EcsApi:
    """ECS calls for one cluster; each raises `RequestRefused` with a diagnosis on errors.

    Args:
        deployment: Cluster, region and log group.
        requests: Paces calls, and retries transient errors.
    """

    def __init__(self, deployment: Deployment, requests: PacedRequests) -> None:
        self._deployment = deployment
        self._requests = requests

    @cached_property
    def ecs(self) -> ECSClient:
        """boto3's ECS client, which tries once."""
        client: ECSClient = make_client("ecs", region=self._deployment.region, tries=1)
        return client

    @cached_property
    def logs(self) -> CloudWatchLogsClient:
        """boto3's CloudWatch Logs client."""
        region = self._deployment.region
        client: CloudWatchLogsClient = make_client("logs", region=region)
        return client

    def run(self, **request: Any) -> RunTaskResponseTypeDef:
        """RunTask in the cluster."""
        reply: RunTaskResponseTypeDef = self._call("run_task", **self._in_cluster(request))
        return reply

    def task_arns(self, pages: int | None = None, **filters: str) -> list[str]:
        """ARNs of the matching tasks, from all pages or at most `pages`."""
        arns: list[str] = []
        token: dict[str, str] = {}
        while pages is None or pages > 0:
            request = {"maxResults": _PAGE, **filters, **token}
            reply = self._call("list_tasks", **self._in_cluster(request))
            arns += reply["taskArns"]
            if not reply.get("nextToken"):
                break
            token = {"nextToken": reply["nextToken"]}
            pages = None if pages is None else pages - 1
        return arns

    def describe(self, arns: Sequence[str]) -> list[TaskTypeDef]:
        """Descriptions of the tasks that ECS still knows."""
        tasks: list[TaskTypeDef] = []
        for start in range(0, len(arns), _PAGE):
            request = {"tasks": [*arns[start : start + _PAGE]]}
            tasks += self._call("describe_tasks", **self._in_cluster(request))["tasks"]
        return tasks

    def stop(self, arn: str, reason: str) -> None:
        """StopTask; does nothing if the task is already gone."""
        try:
            self._call("stop_task", **self._in_cluster({"task": arn, "reason": reason}))
        except RequestRefused as refused:
            if "not found" not in refused.diagnosis.text:
                raise

    def find_definition(self, family: str) -> str | None:
        """ARN of the newest active task definition of a family; None if there is none."""
        try:
            reply = self._call("describe_task_definition", taskDefinition=family)
        except RequestRefused as refused:
            if "Unable to describe task definition" in refused.diagnosis.text:
                return None
            raise
        found = reply["taskDefinition"]
        return found["taskDefinitionArn"] if found.get("status") == "ACTIVE" else None

    def register_definition(self, request: Any) -> str:
        """RegisterTaskDefinition; return the ARN."""
        reply = self._call("register_task_definition", **request)
        arn: str = reply["taskDefinition"]["taskDefinitionArn"]
        return arn

    def log_tail(self, task_id: str) -> str:
        """The last lines a task printed, or why they cannot be read."""
        stream = f"{STREAM_PREFIX}/{CONTAINER}/{task_id}"
        try:
            reply = self.logs.get_log_events(
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

    def _in_cluster(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"cluster": self._deployment.cluster, **request}

    def _call(self, operation: str, **request: Any) -> Any:
        return self._requests.make(getattr(self.ecs, operation), **request)

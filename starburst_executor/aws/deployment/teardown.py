"""Removes what `setup` created, and what launching workers left behind."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from botocore.exceptions import ClientError

from starburst_executor.aws.account import Clients, account_id, asking
from starburst_executor.aws.deployment.removal import Owner, remove_capacity
from starburst_executor.aws.deployment.setup import bucket_name
from starburst_executor.aws.deployment.stack import Say, Stack, delete_stack
from starburst_executor.errors import AccountError
from starburst_executor.runtime import Runtime

__all__ = ["teardown"]

_FAMILY = re.compile(r".*:task-definition/starburst-[0-9a-f]{16}:\d+")
_STORE_TAG = "starburst-executor:store"
_LOOK_SECONDS = 3.0
_STOP_SECONDS = 240.0  # a worker has 120 s to hand back


def teardown(
    clients: Clients,
    stack: Stack,
    runtime: Runtime,
    say: Say,
    *,
    delete_data: bool = False,
) -> list[str]:
    """Remove everything that `deploy` created and that launching left behind.

    Args:
        clients: Clients for the region.
        stack: The stack to remove.
        runtime: For waiting.
        say: Called with a line per resource removed.
        delete_data: Also delete the store: everything under its prefix, and a bucket that setup
            created.

    Returns:
        What remains, for display.

    Raises:
        AccountError: something could not be removed.
    """
    outputs, parameters = stack.outputs, stack.parameters
    if "Cluster" in outputs:
        whole = not parameters["ClusterName"]
        _stop_workers(clients, outputs, runtime, say, whole=whole)
        _forget_definitions(clients, outputs["TaskRoleArn"], say)
        # Stacks of earlier versions have no instance profile, so nothing depends on one.
        profile = None if whole else outputs.get("InstanceProfileArn", "")
        owner = Owner(cluster=outputs["Cluster"].rpartition("/")[2], instance_profile_arn=profile)
        remove_capacity(clients, owner, runtime, say)
    delete_stack(clients, stack.name, runtime, say)
    bucket, prefix = parameters["BucketName"], parameters["KeyPrefix"]
    # A bucket left behind by an earlier stack of this name counts as the stack's own, not as a
    # given one.
    account = account_id(clients)
    own = bucket == bucket_name(stack.name, account, clients.region)
    bucket_owner = parameters.get("BucketOwner") or account
    if not delete_data:
        hint = "; --delete-data deletes it" if own else ""
        return [f"the bucket s3://{bucket}/{prefix} with its results{hint}"]
    say(f"deleting s3://{bucket}/{prefix}")
    _delete_objects(clients, bucket, prefix, bucket_owner)
    if not own:
        return [f"the bucket {bucket}, which setup did not create, without s3://{bucket}/{prefix}"]
    _delete_bucket(clients, bucket, bucket_owner)
    return []


def _stop_workers(
    clients: Clients,
    outputs: Mapping[str, str],
    runtime: Runtime,
    say: Say,
    *,
    whole: bool,
) -> None:
    """Stop this store's workers, or all tasks if the cluster goes, and wait until they are gone."""
    ecs, cluster = clients.get("ecs"), outputs["Cluster"]
    pause, stopped = runtime.signal(), set[str]()
    deadline = runtime.monotonic() + _STOP_SECONDS
    with asking(f"stopping the tasks in {cluster}"):
        while left := _tasks(ecs, cluster, outputs["Store"], whole=whole):
            for arn in left - stopped:
                say(f"stopping task {arn.rpartition('/')[2]}")
                ecs.stop_task(cluster=cluster, task=arn, reason="starburst-executor teardown")
            stopped |= left
            if runtime.monotonic() > deadline:
                raise AccountError(
                    f"{len(left)} tasks are still there {_STOP_SECONDS:.0f} s after StopTask: "
                    f"{', '.join(sorted(left)[:5])}. Run teardown again."
                )
            pause.wait(_LOOK_SECONDS)


def _tasks(ecs: Any, cluster: str, store: str, *, whole: bool) -> set[str]:
    """ARNs of the tasks that have not ended."""
    found: set[str] = set()
    # Stopping tasks are listed as stopped at once, but keep their network until they end.
    for status in ("RUNNING", "STOPPED"):
        pages = ecs.get_paginator("list_tasks").paginate(cluster=cluster, desiredStatus=status)
        for page in pages:
            if page["taskArns"]:
                tasks = ecs.describe_tasks(
                    cluster=cluster, tasks=page["taskArns"], include=["TAGS"]
                )["tasks"]
                found |= {
                    task["taskArn"]
                    for task in tasks
                    if task.get("lastStatus") != "STOPPED" and (whole or _is_of(task, store))
                }
    return found


def _is_of(task: Any, store: str) -> bool:
    tags = {tag["key"]: tag["value"] for tag in task.get("tags", ())}
    named: str = tags.get(_STORE_TAG, "").partition("?")[0]
    return bool(named) and named.rstrip("/") == store.rstrip("/")


def _forget_definitions(clients: Clients, task_role: str, say: Say) -> None:
    """Deregister the task definitions that launching registered for this role."""
    ecs = clients.get("ecs")
    with asking("removing task definitions"):
        for page in ecs.get_paginator("list_task_definitions").paginate(status="ACTIVE"):
            for arn in filter(_FAMILY.fullmatch, page["taskDefinitionArns"]):
                about = ecs.describe_task_definition(taskDefinition=arn)
                if about["taskDefinition"].get("taskRoleArn") == task_role:
                    say(f"removing task definition {arn.rpartition('/')[2]}")
                    ecs.deregister_task_definition(taskDefinition=arn)


def _delete_objects(clients: Clients, bucket: str, prefix: str, owner: str) -> None:
    s3 = clients.get("s3")
    place = {"Bucket": bucket, "ExpectedBucketOwner": owner}
    with asking(f"deleting the objects of s3://{bucket}/{prefix}"):
        for page in s3.get_paginator("list_objects_v2").paginate(**place, Prefix=prefix):
            keys = [{"Key": item["Key"]} for item in page.get("Contents", ())]
            if keys:
                reply = s3.delete_objects(**place, Delete={"Objects": keys, "Quiet": True})
                _check_deleted(bucket, reply.get("Errors", ()))
        for page in s3.get_paginator("list_multipart_uploads").paginate(**place, Prefix=prefix):
            for upload in page.get("Uploads", ()):
                s3.abort_multipart_upload(**place, Key=upload["Key"], UploadId=upload["UploadId"])


def _check_deleted(bucket: str, errors: Sequence[Any]) -> None:
    if errors:
        first = errors[0]
        raise AccountError(
            f"{len(errors)} objects of {bucket} could not be deleted; the first is "
            f"{first.get('Key')}: {first.get('Code')} {first.get('Message', '')}"
        )


def _delete_bucket(clients: Clients, bucket: str, owner: str) -> None:
    with asking(f"deleting the bucket {bucket}"):
        try:
            clients.get("s3").delete_bucket(Bucket=bucket, ExpectedBucketOwner=owner)
        except ClientError as error:
            if "BucketNotEmpty" not in str(error):
                raise
            raise AccountError(
                f"the bucket {bucket} is not empty: it holds new objects, or others outside the "
                f"store; delete it by hand: `aws s3 rb --force s3://{bucket}`"
            ) from error

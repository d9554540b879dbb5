"""Setting up what workers need in an AWS account, by one CloudFormation stack.

    plan       looks (account, stack, bucket, network) and decides; changes nothing
    deploy     makes the stack, or updates it in place; returns the settings for the configuration file

Everything that was brought along is a parameter of the stack, and everything that workers need is an output: a
second `setup` repeats what the first was told, from whichever machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from botocore.exceptions import ClientError

from starburst_executor.aws.account import Clients, account_id, asking
from starburst_executor.aws.deployment.network import Network, find_network
from starburst_executor.aws.deployment.stack import (
    Say,
    Stack,
    find_stack,
    put_stack,
    resource_of,
)
from starburst_executor.aws.ecs.capacity import Capacity
from starburst_executor.aws.ecs.instances import InstanceType, describe_instance_type
from starburst_executor.aws.ecs.requests import PacedRequests, RequestRefused
from starburst_executor.config import Deployment
from starburst_executor.errors import AccountError
from starburst_executor.runtime import Runtime

__all__ = ["DEFAULT_STACK", "Plan", "SetupOptions", "bucket_name", "deploy", "plan"]

DEFAULT_STACK = "starburst-executor"

_STACK_NAME = re.compile(r"[a-z][a-z0-9-]{0,27}[a-z0-9]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupOptions:
    """What to use instead of making it; None or empty: as the stack has it, else found or made.

    Attributes:
        stack: Name of the stack.
        store: `s3://bucket/prefix` in a bucket that exists.
        vpc: The VPC for workers.
        subnets: Subnets for workers, all of one VPC.
        security_groups: Security groups for workers.
        cluster: Name of an ECS cluster.
        execution_role_arn: A role for ECS.
        task_role_arn: A role for workers.
        instance_profile_arn: An instance profile for EC2 instances that workers run on.
        kms_key_arn: The key that the store's objects are encrypted with.
        instance_types: EC2 types to make capacity providers for now, with no instances.
        log_days: How long logs are kept.
        public_ip: Whether workers get public addresses; None: if their subnets have a way out for those.
    """

    stack: str = DEFAULT_STACK
    store: str | None = None
    vpc: str | None = None
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    cluster: str | None = None
    execution_role_arn: str | None = None
    task_role_arn: str | None = None
    instance_profile_arn: str | None = None
    kms_key_arn: str | None = None
    instance_types: tuple[str, ...] = ()
    log_days: int | None = None
    public_ip: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `deploy` would do.

    Attributes:
        stack: Name of the stack.
        region: Where.
        account: Whose.
        found: The stack as it is; None if there is none.
        parameters: What it will be given.
        instances: EC2 types to make capacity providers for.
        makes: What it makes or keeps up, for people.
        uses: What is used as it is, for people.
        warnings: What may not work, for people.
    """

    stack: str
    region: str
    account: str
    found: Stack | None
    parameters: Mapping[str, str]
    instances: Sequence[InstanceType]
    makes: Sequence[str]
    uses: Sequence[str]
    warnings: Sequence[str]


# --- planning ------------------------------------------------------------------------


def plan(clients: Clients, wishes: SetupOptions) -> Plan:
    """Look at the account and decide what to make; changes nothing.

    Raises:
        ValueError: a wish is wrong.
        AccountError: something that was brought is not there, or the account does not say.
    """
    _check_stack_name(wishes.stack)
    _check_key(wishes.kms_key_arn)
    account = account_id(clients)
    found = find_stack(clients, wishes.stack)
    _check_idle(found)
    before = dict(found.parameters) if found and not found.is_debris else {}
    made = bucket_name(wishes.stack, account, clients.region)
    bucket = _bucket(clients, wishes.store, made, before)
    network = find_network(
        clients,
        vpc=wishes.vpc,
        subnets=wishes.subnets,
        public_ip=wishes.public_ip,
        before=before,
        own_endpoint=resource_of(clients, wishes.stack, "S3Endpoint"),
    )
    instances = [_described(clients, name) for name in wishes.instance_types]
    parameters = {**bucket, **_brought(wishes, before), **_placed(network)}
    makes, uses = _lines(parameters)
    makes += [
        f"capacity providers for {i.name} ({i.vcpus} vCPUs, {i.memory / 1024:g} GB, {i.architecture}), on-demand "
        "and Spot: no instances"
        for i in instances
    ]
    return Plan(
        stack=wishes.stack,
        region=clients.region,
        account=account,
        found=found,
        parameters=parameters,
        instances=instances,
        makes=makes,
        uses=uses,
        warnings=(*network.warnings, *_cluster_warnings(clients, parameters)),
    )


def _brought(wishes: SetupOptions, before: Mapping[str, str]) -> dict[str, str]:
    """The stack's parameters about what somebody has already, or wishes otherwise."""
    given = {
        "KmsKeyArn": wishes.kms_key_arn,
        "ClusterName": wishes.cluster,
        "ExecutionRoleArn": wishes.execution_role_arn,
        "TaskRoleArn": wishes.task_role_arn,
        "InstanceProfileArn": wishes.instance_profile_arn,
        "SecurityGroupIds": ",".join(wishes.security_groups),
    }
    days = wishes.log_days or before.get("LogRetentionDays") or 30
    kept = {name: _kept(value, before, name) for name, value in given.items()}
    return {**kept, "LogRetentionDays": str(days)}


def _placed(network: Network) -> dict[str, str]:
    """The stack's parameters about where workers are."""
    return {
        "VpcId": network.vpc,
        "SubnetIds": ",".join(network.subnets),
        "AssignPublicIp": "true" if network.public_ip else "false",
        "EndpointRouteTableIds": ",".join(network.without_s3),
    }


def bucket_name(stack: str, account: str, region: str) -> str:
    """The bucket that a stack makes: always the same, so that results left behind are found again."""
    return f"{stack}-{account}-{region}"


def _check_stack_name(name: str) -> None:
    if not _STACK_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be the name of the stack: a bucket is named after it, so that it takes 2 to 29 small "
            "letters, digits and dashes, beginning with a letter"
        )


def _check_key(arn: str | None) -> None:
    if arn and not re.fullmatch(r"arn:[a-z-]+:kms:[a-z0-9-]+:\d{12}:key/[\w-]+", arn):
        raise ValueError(
            f"{arn!r} is not the ARN of a KMS key; it reads arn:aws:kms:REGION:ACCOUNT:key/ID, without an alias"
        )


def _described(clients: Clients, name: str) -> InstanceType:
    with asking(f"asking EC2 about {name}"):
        return describe_instance_type(clients.get("ec2"), name)


def _check_idle(found: Stack | None) -> None:
    if found and found.status.endswith("_IN_PROGRESS"):
        raise AccountError(
            f"the stack {found.name} is being changed already ({found.status}); wait until that has ended"
        )


def _kept(wish: str | None, before: Mapping[str, str], parameter: str) -> str:
    return wish or before.get(parameter, "")


def _bucket(
    clients: Clients, store: str | None, made: str, before: Mapping[str, str]
) -> dict[str, str]:
    """The parameters about the bucket."""
    if store is None and before:
        return {p: before[p] for p in ("BucketName", "MakeBucket", "KeyPrefix")}
    if store is None:
        # One that an earlier stack of this name left behind is used again.
        there = _bucket_exists(clients, made)
        return _bucket_parameters(made, "", make=not there)
    match = re.fullmatch(r"s3://([^/?]+)/?([^?]*)", store)
    if match is None:
        raise ValueError(f"{store!r} is not a place in a bucket; write s3://bucket/prefix")
    name, prefix = match[1], match[2].strip("/")
    if before.get("BucketName") == name and before.get("MakeBucket") == "true":
        return _bucket_parameters(name, prefix, make=True)
    if not _bucket_exists(clients, name):
        raise AccountError(
            f"the bucket {name} does not exist; leave --store out to have one made, or make it"
        )
    return _bucket_parameters(name, prefix, make=False)


def _bucket_parameters(name: str, prefix: str, *, make: bool) -> dict[str, str]:
    return {
        "BucketName": name,
        "MakeBucket": "true" if make else "false",
        "KeyPrefix": f"{prefix}/" if prefix else "",
    }


def _bucket_exists(clients: Clients, name: str) -> bool:
    with asking(f"looking for the bucket {name}"):
        try:
            clients.get("s3").head_bucket(Bucket=name)
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == 404:
                return False
            if status == 301:
                raise AccountError(
                    f"the bucket {name} is in another region than {clients.region}; workers and bucket must share one"
                ) from error
            raise
    return True


def _cluster_warnings(clients: Clients, parameters: Mapping[str, str]) -> Iterable[str]:
    name = parameters["ClusterName"]
    if not name:
        return
    with asking(f"looking at the cluster {name}"):
        found = clients.get("ecs").describe_clusters(clusters=[name])["clusters"]
    if not found or found[0].get("status") != "ACTIVE":
        raise AccountError(
            f"the cluster {name} does not exist in {clients.region}; leave --cluster out to have one made"
        )
    lacking = {"FARGATE", "FARGATE_SPOT"} - set(found[0].get("capacityProviders", ()))
    if lacking:
        yield (
            f"the cluster {name} lacks {' and '.join(sorted(lacking))}, without which workers cannot start; add with "
            "`aws ecs put-cluster-capacity-providers`"
        )


def _lines(parameters: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What is made and what is used, for people."""
    bucket = f"s3://{parameters['BucketName']}/{parameters['KeyPrefix']}"
    days = parameters["LogRetentionDays"]
    makes = [f"log group, keeping {days} days"]
    uses = [f"VPC {parameters['VpcId']}, subnets {parameters['SubnetIds']}"]
    made = {
        "ClusterName": "ECS cluster with FARGATE and FARGATE_SPOT",
        "ExecutionRoleArn": "role for ECS: pulls images, writes logs",
        "TaskRoleArn": "role for workers: this store's objects, starting workers like themselves",
        "InstanceProfileArn": "instance profile and role for EC2 instances: joining the cluster",
        "SecurityGroupIds": "security group: nothing in, everything out",
    }
    for parameter, text in made.items():
        given = parameters[parameter]
        (uses if given else makes).append(
            f"{text.partition(':')[0].partition(' with')[0]} {given}" if given else text
        )
    if parameters["MakeBucket"] == "true":
        makes.insert(0, f"bucket {bucket}: private, encrypted, TLS only")
    else:
        uses.insert(0, f"bucket {bucket}, which exists")
    if parameters["KmsKeyArn"]:
        uses.append(f"KMS key {parameters['KmsKeyArn']} for the store's objects")
    if parameters["EndpointRouteTableIds"]:
        tables = parameters["EndpointRouteTableIds"]
        makes.append(f"gateway endpoint to S3 for {tables}: free of charge")
    return makes, uses


# --- deploying -----------------------------------------------------------------------


def deploy(clients: Clients, plan: Plan, runtime: Runtime, say: Say) -> dict[str, Any]:
    """Make the stack or update it, and wait until it is done.

    Args:
        clients: Of the region.
        plan: What to do.
        runtime: For waiting.
        say: Gets a line for each thing that is made.

    Returns:
        The settings for the configuration file.

    Raises:
        AccountError: it failed; says what CloudFormation said. What it had begun is rolled back.
    """
    stack = put_stack(clients, plan.stack, plan.found, plan.parameters, runtime, say)
    settings = _settings(stack, plan.region)
    deployment = msgspec.convert({**settings, "image": ""}, Deployment)
    for instance in plan.instances:
        for use_spot in (False, True):
            _make_capacity(clients, deployment, instance, runtime, say, use_spot)
    return settings


def _make_capacity(
    clients: Clients,
    deployment: Deployment,
    instance: InstanceType,
    runtime: Runtime,
    say: Say,
    use_spot: bool,
) -> None:
    capacity = Capacity(
        deployment,
        instance,
        use_spot=use_spot,
        clients=clients,
        calls=PacedRequests(runtime),
    )
    try:
        capacity.make()
    except RequestRefused as refused:
        raise AccountError(
            f"the stack is there, but instances of {instance.name} cannot be had. {refused.diagnosis.text} Run setup "
            "again."
        ) from refused
    say(f"{capacity.name}: no instances")


def _settings(stack: Stack, region: str) -> dict[str, Any]:
    outputs = stack.outputs
    return {
        "store": f"{outputs['Store'].rstrip('/')}?region={region}",
        "launcher": "ecs",
        "region": region,
        "cluster": outputs["Cluster"],
        "subnets": outputs["SubnetIds"].split(","),
        "security_groups": outputs["SecurityGroupIds"].split(","),
        "assign_public_ip": outputs["AssignPublicIp"] == "true",
        "execution_role_arn": outputs["ExecutionRoleArn"],
        "task_role_arn": outputs["TaskRoleArn"],
        "instance_profile_arn": outputs["InstanceProfileArn"],
        "log_group": outputs["LogGroup"],
        "stack": stack.name,
    }

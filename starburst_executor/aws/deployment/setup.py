"""Sets up what workers need in an AWS account, with one CloudFormation stack.

    plan       inspects account, stack, bucket and network, and decides; changes nothing
    deploy     creates the stack or updates it in place; returns the configuration file's settings

Every existing resource to use is a parameter of the stack, and everything that workers need is
an output: a second `setup` repeats the first one's choices, from any machine.
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
from starburst_executor.errors import AccountDenied, AccountError
from starburst_executor.runtime import Runtime

__all__ = ["DEFAULT_STACK", "Plan", "SetupOptions", "bucket_name", "deploy", "plan"]

DEFAULT_STACK = "starburst-executor"

_ROLE_SECONDS = 10.0  # until ECS can use the role that was just made for it
_STACK_NAME = re.compile(r"[a-z][a-z0-9-]{0,27}[a-z0-9]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupOptions:
    """What to use instead of creating it; if None or empty: as in the stack, or found, or created.

    Attributes:
        stack: Name of the stack.
        store: `s3://bucket/prefix` in an existing bucket; with `?owner=ID` in one of another
            account.
        vpc: The VPC for workers.
        subnets: Subnets for workers, all in one VPC.
        security_groups: Security groups for workers.
        cluster: Name of an ECS cluster.
        execution_role_arn: A role for ECS.
        task_role_arn: A role for workers.
        instance_profile_arn: An instance profile for EC2 instances that workers run on.
        kms_key_arn: The key that the store's objects are encrypted with.
        instance_types: EC2 types to create capacity providers for, without instances.
        log_days: How many days to keep logs.
        public_ip: Whether workers get public addresses; None: if their subnets have an internet
            gateway.
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
        region: The AWS region.
        account: The AWS account id.
        found: The existing stack; None if there is none.
        parameters: The stack's new parameters.
        instances: EC2 types to create capacity providers for.
        makes: What is created or maintained, for display.
        uses: What is used as it is, for display.
        warnings: What may not work, for display.
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


def plan(clients: Clients, options: SetupOptions) -> Plan:
    """Inspect the account and decide what to create; change nothing.

    Raises:
        ValueError: an option is invalid.
        AccountError: a resource to use does not exist, or AWS does not answer.
    """
    _check_stack_name(options.stack)
    _check_key(options.kms_key_arn)
    account = account_id(clients)
    found = find_stack(clients, options.stack)
    _check_idle(found)
    before = dict(found.parameters) if found and not found.is_debris else {}
    made = bucket_name(options.stack, account, clients.region)
    bucket = _bucket(clients, options.store, made, before, account)
    network = find_network(
        clients,
        vpc=options.vpc,
        subnets=options.subnets,
        public_ip=options.public_ip,
        before=before,
        own_endpoint=resource_of(clients, options.stack, "S3Endpoint"),
    )
    instances = [_described(clients, name) for name in options.instance_types]
    parameters = {**bucket, **_brought(options, before), **_placed(network)}
    makes, uses = _lines(parameters)
    makes += [
        f"capacity providers for {i.name} ({i.vcpus} vCPUs, {i.memory / 1024:g} GB, "
        f"{i.architecture}), on-demand and Spot: no instances"
        for i in instances
    ]
    return Plan(
        stack=options.stack,
        region=clients.region,
        account=account,
        found=found,
        parameters=parameters,
        instances=instances,
        makes=makes,
        uses=uses,
        warnings=(*network.warnings, *_cluster_warnings(clients, parameters)),
    )


def _brought(options: SetupOptions, before: Mapping[str, str]) -> dict[str, str]:
    """The stack's parameters for existing resources and settings."""
    given = {
        "KmsKeyArn": options.kms_key_arn,
        "ClusterName": options.cluster,
        "ExecutionRoleArn": options.execution_role_arn,
        "TaskRoleArn": options.task_role_arn,
        "InstanceProfileArn": options.instance_profile_arn,
        "SecurityGroupIds": ",".join(options.security_groups),
    }
    days = options.log_days or before.get("LogRetentionDays") or 30
    kept = {name: _kept(value, before, name) for name, value in given.items()}
    return {**kept, "LogRetentionDays": str(days)}


def _placed(network: Network) -> dict[str, str]:
    """The stack's network parameters."""
    return {
        "VpcId": network.vpc,
        "SubnetIds": ",".join(network.subnets),
        "AssignPublicIp": "true" if network.public_ip else "false",
        "EndpointRouteTableIds": ",".join(network.without_s3),
    }


def bucket_name(stack: str, account: str, region: str) -> str:
    """The bucket that a stack creates: always the same, so that remaining results are reused."""
    return f"{stack}-{account}-{region}"


def _check_stack_name(name: str) -> None:
    if not _STACK_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a valid stack name: a bucket is named after it, so it must be 2 to "
            "29 lowercase letters, digits and dashes, starting with a letter"
        )


def _check_key(arn: str | None) -> None:
    if arn and not re.fullmatch(r"arn:[a-z-]+:kms:[a-z0-9-]+:\d{12}:key/[\w-]+", arn):
        raise ValueError(
            f"{arn!r} is not the ARN of a KMS key; expected "
            "arn:PARTITION:kms:REGION:ACCOUNT:key/ID, not an alias"
        )


def _described(clients: Clients, name: str) -> InstanceType:
    with asking(f"asking EC2 about {name}"):
        return describe_instance_type(clients.get("ec2"), name)


def _check_idle(found: Stack | None) -> None:
    if found and found.status.endswith("_IN_PROGRESS"):
        raise AccountError(
            f"the stack {found.name} is already being changed ({found.status}); wait until that "
            "ends"
        )


def _kept(value: str | None, before: Mapping[str, str], parameter: str) -> str:
    return value or before.get(parameter, "")


def _bucket(
    clients: Clients, store: str | None, made: str, before: Mapping[str, str], account: str
) -> dict[str, str]:
    """The stack's bucket parameters."""
    if store is None and before:
        kept = {p: before[p] for p in ("BucketName", "MakeBucket", "KeyPrefix")}
        kept["BucketOwner"] = before.get("BucketOwner") or account
        _bucket_exists(clients, kept["BucketName"], kept["BucketOwner"])
        return kept
    if store is None:
        # A bucket left behind by an earlier stack of this name is used again.
        there = _bucket_exists(clients, made, account)
        return _bucket_parameters(made, "", account, make=not there)
    match = re.fullmatch(r"s3://([^/?]+)/?([^?]*)(?:\?owner=(\d{12}))?", store)
    if match is None:
        raise ValueError(
            f"{store!r} is not an S3 URL; expected s3://bucket/prefix, with ?owner=ACCOUNT_ID if "
            "the bucket belongs to another account"
        )
    name, prefix, owner = match[1], match[2].strip("/"), match[3] or account
    if before.get("BucketName") == name and before.get("MakeBucket") == "true":
        return _bucket_parameters(name, prefix, owner, make=True)
    if not _bucket_exists(clients, name, owner):
        raise AccountError(
            f"the bucket {name} does not exist; omit --store to have one created, or create it"
        )
    return _bucket_parameters(name, prefix, owner, make=False)


def _bucket_parameters(name: str, prefix: str, owner: str, *, make: bool) -> dict[str, str]:
    return {
        "BucketName": name,
        "MakeBucket": "true" if make else "false",
        "KeyPrefix": f"{prefix}/" if prefix else "",
        "BucketOwner": owner,
    }


def _bucket_exists(clients: Clients, name: str, owner: str) -> bool:
    """Whether there is such a bucket of that account.

    Raises:
        AccountError: there is one, but of another account or in another region.
    """
    with asking(f"looking for the bucket {name}"):
        try:
            clients.get("s3").head_bucket(Bucket=name, ExpectedBucketOwner=owner)
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == 404:
                return False
            if status == 301:
                raise AccountError(
                    f"the bucket {name} is not in {clients.region}; workers and bucket must be in "
                    "the same region"
                ) from error
            if status == 403:
                raise AccountDenied(
                    f"the bucket {name} exists, but does not belong to the account {owner}, or "
                    "s3:ListBucket on it is missing. Whoever owns the store's bucket can run code "
                    "on workers and on this machine. If it is meant, name its owner: --store "
                    f"'s3://{name}/prefix?owner=ACCOUNT_ID'; otherwise use another --stack or "
                    "--store."
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
            f"the cluster {name} does not exist in {clients.region}; omit --cluster to have one "
            "created"
        )
    missing = {"FARGATE", "FARGATE_SPOT"} - set(found[0].get("capacityProviders", ()))
    if missing:
        yield (
            f"the cluster {name} lacks {' and '.join(sorted(missing))}, which workers need to "
            "start; add them with `aws ecs put-cluster-capacity-providers`"
        )


def _lines(parameters: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What is created and what is used, for display."""
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
        tables = parameters["EndpointRouteTableIds"].replace(",", ", ")
        makes.append(f"gateway endpoint to S3 in the private route tables {tables}: free of charge")
    return makes, uses


# --- deploying -----------------------------------------------------------------------


def deploy(clients: Clients, plan: Plan, runtime: Runtime, say: Say) -> dict[str, Any]:
    """Create or update the stack, and wait until it is done.

    Args:
        clients: Clients for the region.
        plan: What to do.
        runtime: For waiting.
        say: Called with a line per resource created.

    Returns:
        The settings for the configuration file.

    Raises:
        AccountError: it failed; contains CloudFormation's reasons. Changes are rolled back.
    """
    if not plan.parameters["ClusterName"] and (plan.found is None or plan.found.is_debris):
        _make_linked_role(clients, runtime, say)
    stack = put_stack(clients, plan.stack, plan.found, plan.parameters, runtime, say)
    settings = _settings(stack, plan.region, plan.parameters["BucketOwner"])
    deployment = msgspec.convert({**settings, "image": ""}, Deployment)
    for instance in plan.instances:
        for use_spot in (False, True):
            _make_capacity(clients, deployment, instance, runtime, say, use_spot)
    return settings


def _make_linked_role(clients: Clients, runtime: Runtime, say: Say) -> None:
    """Create the role that ECS has in every account, before its first cluster fails without it."""
    with asking("creating the service-linked role of ECS"):
        try:
            clients.get("iam").create_service_linked_role(AWSServiceName="ecs.amazonaws.com")
        except ClientError as error:
            if re.search("has been taken|already exists", str(error)):
                return
            raise
    say("service-linked role of ECS: created, as this account had none")
    runtime.signal().wait(_ROLE_SECONDS)


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
            f"the stack is complete, but the capacity for {instance.name} cannot be created. "
            f"{refused.diagnosis.text} Run setup again."
        ) from refused
    say(f"{capacity.name}: no instances")


def _settings(stack: Stack, region: str, owner: str) -> dict[str, Any]:
    outputs = stack.outputs
    return {
        "store": f"{outputs['Store'].rstrip('/')}?region={region}&owner={owner}",
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

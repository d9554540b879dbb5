"""Placement of workers: on Fargate, or on instances of one EC2 type, with all their differences.

Tasks on instances use Docker's bridge instead of network interfaces of their own: such an interface
gets no public address on EC2, so workers in public subnets would reach nothing, and an instance has
few of them, so fewer workers could start than fit. Nothing connects to workers, and the task role's
credentials and the task metadata are the same in both modes. The size is the task's, a hard limit
as on Fargate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any, Protocol

from botocore.exceptions import BotoCoreError, ClientError

from starburst_executor.aws.account import Clients, Vcpus
from starburst_executor.aws.ecs.capacity import Capacity
from starburst_executor.aws.ecs.fargate import Size, fargate_size
from starburst_executor.aws.ecs.instances import (
    InstanceType,
    describe_instance_type,
    worker_size,
)
from starburst_executor.aws.ecs.requests import PacedRequests, RequestRefused
from starburst_executor.config import Deployment
from starburst_executor.errors import AccountError
from starburst_executor.protocol.worker_spec import WorkerSpec

__all__ = ["OnFargate", "OnInstances", "Placement", "place"]

log = logging.getLogger(__name__)

_LATEST_ACTIVITIES = 20


class Placement(Protocol):
    """Where workers run."""

    size: Size

    def provider(self, *, use_spot: bool) -> str:
        """Name of the capacity provider."""

    def make_provider(self, *, use_spot: bool) -> bool:
        """Create the missing provider; return False if it is not this package's to create.

        Raises:
            RequestRefused: it cannot be created, or not yet.
        """

    def define(self, request: dict[str, Any]) -> dict[str, Any]:
        """Adapt a task definition for Fargate to this placement."""

    def network(self) -> dict[str, Any]:
        """RunTask's network parameters."""

    def vcpus(self, *, use_spot: bool) -> Vcpus | None:
        """The account's vCPU quota and use; None if unknown."""

    def shortage(self, since: datetime, *, use_spot: bool) -> str:
        """Why no instance has come since then; "" if no reason is known."""


class OnFargate:
    """Workers on Fargate.

    Args:
        spec: What a worker should be.
        deployment: Cluster, network and roles.
        vcpus: Returns the account's Fargate vCPUs, Spot or not.

    Raises:
        ValueError: Fargate has no such size.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        deployment: Deployment,
        vcpus: Callable[[bool], Vcpus | None],
    ) -> None:
        self.size = fargate_size(spec.cpu, spec.memory)
        self._deployment = deployment
        self._vcpus = vcpus

    def provider(self, *, use_spot: bool) -> str:
        """The cluster has both, thanks to `setup`."""
        return "FARGATE_SPOT" if use_spot else "FARGATE"

    def make_provider(self, *, use_spot: bool) -> bool:
        """Return False: the providers are AWS's."""
        return False

    def define(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the definition unchanged."""
        return request

    def network(self) -> dict[str, Any]:
        """Each task has its own network interface."""
        public = "ENABLED" if self._deployment.assign_public_ip else "DISABLED"
        return {
            "networkConfiguration": {
                "awsvpcConfiguration": {
                    "subnets": list(self._deployment.subnets),
                    "securityGroups": list(self._deployment.security_groups),
                    "assignPublicIp": public,
                }
            }
        }

    def vcpus(self, *, use_spot: bool) -> Vcpus | None:
        """The quota of Fargate vCPUs."""
        return self._vcpus(use_spot)

    def shortage(self, since: datetime, *, use_spot: bool) -> str:
        """Return "": RunTask, or the stopped task, reports it."""
        return ""


class OnInstances:
    """Workers on instances of one EC2 type.

    Args:
        spec: What a worker should be.
        deployment: Cluster, network and roles.
        calls: Makes calls, and retries.
        clients: Clients for the region; they try once, `calls` retries.

    Raises:
        ValueError: there is no such type, the worker does not fit on it, or instances have no role.
        AccountError: EC2 does not describe the type.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        deployment: Deployment,
        calls: PacedRequests,
        clients: Clients,
    ) -> None:
        if not deployment.instance_profile_arn:
            raise ValueError(
                'launch_type="EC2": no instance profile is configured; instances cannot join the '
                "cluster without one. Run `starburst-executor setup` again, which creates one, or "
                "set STARBURST_INSTANCE_PROFILE_ARN."
            )
        assert spec.instance_type is not None  # `WorkerSpec` ensures it
        self._instance = _described(calls, clients, spec.instance_type)
        self.size = worker_size(spec, self._instance)
        self._clients = clients
        self._capacities = {
            spot: Capacity(
                deployment,
                self._instance,
                use_spot=spot,
                clients=clients,
                calls=calls,
            )
            for spot in (False, True)
        }

    def provider(self, *, use_spot: bool) -> str:
        """The provider for this type and market."""
        return self._capacities[use_spot].name

    def make_provider(self, *, use_spot: bool) -> bool:
        """Create it and what it needs, without instances."""
        self._capacities[use_spot].make()
        return True

    def define(self, request: dict[str, Any]) -> dict[str, Any]:
        """Adapt it to instances, Docker's bridge and the type's architecture."""
        return {
            **request,
            "requiresCompatibilities": ["EC2"],
            "networkMode": "bridge",
            "runtimePlatform": {
                **request["runtimePlatform"],
                "cpuArchitecture": self._instance.architecture,
            },
        }

    def network(self) -> dict[str, Any]:
        """Return nothing: tasks use the instance's network."""
        return {}

    def vcpus(self, *, use_spot: bool) -> None:
        """Return None: an EC2 quota that is too small shows as a shortage."""
        return

    def shortage(self, since: datetime, *, use_spot: bool) -> str:
        """The message of the group's last activity, if it failed after `since`."""
        try:
            activities = self._clients.get("autoscaling").describe_scaling_activities(
                AutoScalingGroupName=self.provider(use_spot=use_spot),
                MaxRecords=_LATEST_ACTIVITIES,
            )["Activities"]
        except (ClientError, BotoCoreError) as error:
            log.info("cannot find out why no instance has come: %s", error)
            return ""
        fresh = [a for a in activities if a["StartTime"] >= since]
        newest = max(fresh, key=lambda activity: activity["StartTime"], default=None)
        if newest is None or newest["StatusCode"] not in ("Failed", "Cancelled"):
            return ""
        message: str = newest.get("StatusMessage") or newest.get("Description", "")
        return message


def place(
    spec: WorkerSpec,
    deployment: Deployment,
    calls: PacedRequests,
    clients: Clients,
    vcpus: Callable[[bool], Vcpus | None],
) -> Placement:
    """The placement of such workers.

    Raises:
        ValueError: such workers are impossible.
        AccountError: AWS does not tell whether they are possible.
    """
    if spec.launch_type == "FARGATE":
        return OnFargate(spec, deployment, vcpus)
    return OnInstances(spec, deployment, calls, clients)


def _described(calls: PacedRequests, clients: Clients, name: str) -> InstanceType:
    try:
        return calls.make(lambda: describe_instance_type(clients.get("ec2"), name))
    except RequestRefused as refused:
        raise AccountError(
            f"instance_type={name!r}: cannot look up its size. {refused.diagnosis.text}"
        ) from refused

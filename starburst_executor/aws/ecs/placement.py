"""On what workers are put: Fargate, or instances of one EC2 type. What differs between the two is here.

A task on instances uses Docker's bridge and not a network interface of its own: such an interface gets no public
address on EC2, so that workers in public subnets would reach nothing, and an instance has few of them, so that
fewer workers than have room could start. Nothing connects to workers, and the task role's credentials
and the task's metadata are the same in both modes. Size is that of the task, a hard limit as on Fargate.
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
    """What workers are put on."""

    size: Size

    def provider(self, *, use_spot: bool) -> str:
        """Name of the capacity provider."""

    def make_provider(self, *, use_spot: bool) -> bool:
        """Make the provider that the cluster lacks; False if that is not for this package to do.

        Raises:
            Refused: it cannot be made, or not yet.
        """

    def define(self, request: dict[str, Any]) -> dict[str, Any]:
        """A task definition for Fargate, changed into one for here."""

    def network(self) -> dict[str, Any]:
        """What of RunTask's request is about the network."""

    def vcpus(self, *, use_spot: bool) -> Vcpus | None:
        """How many vCPUs the account may use at once; None if nobody can tell."""

    def shortage(self, since: datetime, *, use_spot: bool) -> str:
        """Why no instance has come since then; "" if nothing is known against it."""


class OnFargate:
    """Workers on Fargate.

    Args:
        spec: What a worker shall be.
        deployment: Where.
        vcpus: Asks for the account's Fargate vCPUs, Spot or not.

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
        """`setup` sees to it that the cluster has both."""
        return "FARGATE_SPOT" if use_spot else "FARGATE"

    def make_provider(self, *, use_spot: bool) -> bool:
        """It is AWS's."""
        return False

    def define(self, request: dict[str, Any]) -> dict[str, Any]:
        """As it is."""
        return request

    def network(self) -> dict[str, Any]:
        """Each task has an interface of its own."""
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
        """RunTask, or the task's end, says so by itself."""
        return ""


class OnInstances:
    """Workers on instances of one EC2 type.

    Args:
        spec: What a worker shall be.
        deployment: Where.
        calls: Makes the calls.
        clients: Of the region; they try once, `calls` tries again.

    Raises:
        ValueError: there is no such type, or no such worker fits on it, or instances have no role.
        AccountError: EC2 does not say what the type is.
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
                'launch_type="EC2": no instance profile is configured, without which instances cannot join the '
                "cluster. Run `starburst-executor setup` again, which makes one, or set "
                "STARBURST_INSTANCE_PROFILE_ARN."
            )
        assert spec.instance_type is not None  # `WorkerSpec` sees to it
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
        """That of this type and market."""
        return self._capacities[use_spot].name

    def make_provider(self, *, use_spot: bool) -> bool:
        """Make it, and what it stands on, at no instances."""
        self._capacities[use_spot].make()
        return True

    def define(self, request: dict[str, Any]) -> dict[str, Any]:
        """For instances, on the bridge, with the type's architecture."""
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
        """The instance's."""
        return {}

    def vcpus(self, *, use_spot: bool) -> None:
        """Not asked for: a quota of EC2's that is too small shows as a shortage."""
        return

    def shortage(self, since: datetime, *, use_spot: bool) -> str:
        """What the group's last activity says, if it failed after `since`."""
        try:
            activities = self._clients.get("autoscaling").describe_scaling_activities(
                AutoScalingGroupName=self.provider(use_spot=use_spot),
                MaxRecords=_LATEST_ACTIVITIES,
            )["Activities"]
        except (ClientError, BotoCoreError) as error:
            log.info("why no instance has come cannot be asked: %s", error)
            return ""
        fresh = [a for a in activities if a["StartTime"] >= since]
        newest = max(fresh, key=lambda activity: activity["StartTime"], default=None)
        if newest is None or newest["StatusCode"] not in ("Failed", "Cancelled"):
            return ""
        said: str = newest.get("StatusMessage") or newest.get("Description", "")
        return said


def place(
    spec: WorkerSpec,
    deployment: Deployment,
    calls: PacedRequests,
    clients: Clients,
    vcpus: Callable[[bool], Vcpus | None],
) -> Placement:
    """What such workers are put on.

    Raises:
        ValueError: there are no such workers.
        AccountError: AWS does not say whether there are.
    """
    if spec.launch_type == "FARGATE":
        return OnFargate(spec, deployment, vcpus)
    return OnInstances(spec, deployment, calls, clients)


def _described(calls: PacedRequests, clients: Clients, name: str) -> InstanceType:
    try:
        return calls.make(lambda: describe_instance_type(clients.get("ec2"), name))
    except RequestRefused as refused:
        raise AccountError(
            f"instance_type={name!r}: how large that is cannot be asked. {refused.diagnosis.text}"
        ) from refused

"""Removes the EC2 capacity that launching workers created, on any machine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from starburst_executor.aws.account import Clients, asking
from starburst_executor.aws.deployment.stack import Say
from starburst_executor.aws.ecs.capacity import CLUSTER_TAG, PROFILE_TAG
from starburst_executor.aws.ecs.requests import PacedRequests, RequestRefused
from starburst_executor.errors import AccountError
from starburst_executor.runtime import Runtime

__all__ = ["Owner", "remove_capacity"]

_NAME = re.compile(r"starburst-[a-z0-9-]+-(spot|on-demand)-[0-9a-f]{12}")
_LOOK_SECONDS = 3.0
_GONE_SECONDS = 900.0  # instances take minutes to shut down


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The owner of the capacity to remove.

    Attributes:
        cluster: Name of the cluster.
        instance_profile_arn: The instances' profile; None for everything ever created for the
            cluster.
    """

    cluster: str
    instance_profile_arn: str | None

    def has(self, tags: Iterable[Any]) -> bool:
        """Whether it owns a resource with these tags."""
        values = {
            tag.get("key", tag.get("Key")): tag.get("value", tag.get("Value")) for tag in tags
        }
        profile = self.instance_profile_arn
        return values.get(CLUSTER_TAG) == self.cluster and (
            profile is None or values.get(PROFILE_TAG) == profile
        )


def remove_capacity(clients: Clients, owner: Owner, runtime: Runtime, say: Say) -> None:
    """Remove capacity providers, Auto Scaling groups with their instances, and launch templates.

    The tasks on the instances must have ended.

    Args:
        clients: Clients for the region.
        owner: Whose capacity.
        runtime: For waiting.
        say: Called with a line per resource removed.

    Raises:
        AccountError: something could not be removed, or is still there after 15 minutes.
    """
    with asking(f"looking for the EC2 capacity of {owner.cluster}"):
        providers = _providers(clients, owner)
        groups = _groups(clients, owner)
        templates = _templates(clients, owner)
    if not providers and not groups and not templates:
        return
    _detach(clients, owner.cluster, providers, PacedRequests(runtime))
    autoscaling, ecs, ec2 = (clients.get(s) for s in ("autoscaling", "ecs", "ec2"))
    with asking(f"removing the EC2 capacity of {owner.cluster}"):
        for name in groups:
            say(f"removing Auto Scaling group {name} and its instances")
            autoscaling.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)
        for name in providers:
            say(f"removing capacity provider {name}")
            ecs.delete_capacity_provider(capacityProvider=name)
        _await_gone(clients, owner, runtime)
        for name in templates:
            say(f"removing launch template {name}")
            ec2.delete_launch_template(LaunchTemplateName=name)
    if owner.instance_profile_arn is None:
        _forget_instances(clients, owner.cluster)


def _detach(clients: Clients, cluster: str, names: list[str], calls: PacedRequests) -> None:
    """Take providers off the cluster's list; only then can they be deleted."""
    ecs = clients.get("ecs")

    def once() -> None:
        before = ecs.describe_clusters(clusters=[cluster])["clusters"][0]
        listed = before.get("capacityProviders", [])
        left = [name for name in listed if name not in names]
        if left == listed:
            return
        default = before.get("defaultCapacityProviderStrategy", [])
        ecs.put_cluster_capacity_providers(
            cluster=cluster,
            capacityProviders=left,
            defaultCapacityProviderStrategy=[
                item for item in default if item["capacityProvider"] in left
            ],
        )

    try:
        calls.make(once)
    except RequestRefused as refused:
        raise AccountError(
            f"the capacity providers {', '.join(names)} cannot be taken off the cluster {cluster}. "
            f"{refused.diagnosis.text} Run teardown again."
        ) from refused


def _providers(clients: Clients, owner: Owner) -> list[str]:
    ecs = clients.get("ecs")
    found: list[str] = []
    token: dict[str, str] = {}
    while True:
        reply = ecs.describe_capacity_providers(include=["TAGS"], **token)
        found += [
            provider["name"]
            for provider in reply["capacityProviders"]
            if _NAME.fullmatch(provider["name"])
            and provider.get("status") == "ACTIVE"
            and owner.has(provider.get("tags", ()))
        ]
        if not reply.get("nextToken"):
            return found
        token = {"nextToken": reply["nextToken"]}


def _groups(clients: Clients, owner: Owner) -> list[str]:
    pages = clients.get("autoscaling").get_paginator("describe_auto_scaling_groups")
    return [
        group["AutoScalingGroupName"]
        for page in pages.paginate(Filters=_tagged(owner))
        for group in page["AutoScalingGroups"]
        if owner.has(group.get("Tags", ()))
    ]


def _templates(clients: Clients, owner: Owner) -> list[str]:
    pages = clients.get("ec2").get_paginator("describe_launch_templates")
    return [
        template["LaunchTemplateName"]
        for page in pages.paginate(Filters=_tagged(owner))
        for template in page["LaunchTemplates"]
        if owner.has(template.get("Tags", ()))
    ]


def _tagged(owner: Owner) -> list[dict[str, Any]]:
    return [{"Name": f"tag:{CLUSTER_TAG}", "Values": [owner.cluster]}]


def _await_gone(clients: Clients, owner: Owner, runtime: Runtime) -> None:
    """Wait until the instances are gone: security group and cluster can only be deleted then."""
    pause = runtime.signal()
    deadline = runtime.monotonic() + _GONE_SECONDS
    while left := _groups(clients, owner):
        if runtime.monotonic() > deadline:
            raise AccountError(
                f"the Auto Scaling groups {', '.join(left)} are still there {_GONE_SECONDS:.0f} s "
                "after their deletion. Look at their instances in the EC2 console, and run "
                "teardown again."
            )
        pause.wait(_LOOK_SECONDS)


def _forget_instances(clients: Clients, cluster: str) -> None:
    """Deregister remaining container instances: a cluster that has some cannot be deleted."""
    ecs = clients.get("ecs")
    with asking(f"deregistering the instances of {cluster}"):
        for arn in _instances(ecs, cluster):
            ecs.deregister_container_instance(cluster=cluster, containerInstance=arn, force=True)


def _instances(ecs: Any, cluster: str) -> Iterator[str]:
    pages = ecs.get_paginator("list_container_instances").paginate(cluster=cluster)
    for page in list(pages):
        yield from page["containerInstanceArns"]

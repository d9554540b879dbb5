"""EC2 instances for workers: what ECS needs to start them, created on first use.

    launch template     image, role, network; how an instance joins the cluster
    Auto Scaling group  no instances, of one type and one market
    capacity provider   ECS grows the group while tasks wait, and shrinks it when instances are
    empty the cluster's list  includes the provider

There is one of each per (deployment, instance type, market), named after a hash of its content:
every client creates the same one, concurrent clients share it, and an existing one is right.
Instances are protected from scale-in while tasks run on them, so that no session takes
another's. All of it costs nothing while there is no instance; `teardown` removes it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from typing import Any

from botocore.exceptions import ClientError

from starburst_executor.aws.account import Clients
from starburst_executor.aws.ecs.diagnosis import Diagnosis, NotYet, Retryability
from starburst_executor.aws.ecs.instances import InstanceType
from starburst_executor.aws.ecs.requests import PacedRequests, RequestRefused
from starburst_executor.config import Deployment

__all__ = ["CLUSTER_TAG", "PROFILE_TAG", "Capacity", "cluster_name", "market"]

log = logging.getLogger(__name__)

CLUSTER_TAG = "starburst-executor:cluster"
"""Tag of everything created here; its value is the cluster's name."""

PROFILE_TAG = "starburst-executor:instance-profile"
"""Tag with the ARN of the instance profile; stacks that share a cluster tell theirs by it."""

_MOST_INSTANCES = 10_000  # a session's maximum number of workers
_AMI = "resolve:ssm:/aws/service/ecs/optimized-ami/amazon-linux-2023/{}recommended/image_id"
_AMI_FOLDER = {"X86_64": "", "ARM64": "arm64/"}
# Containers on the instance's bridge are one hop further from its metadata, which has the Spot
# notice.
_METADATA_HOPS = 2
_ATTACHING = "UPDATE_IN_PROGRESS"


class Capacity:
    """The capacity of one instance type and market, as ECS needs to know it.

    Args:
        deployment: Cluster, network and the instances' role.
        instance: The instance type.
        use_spot: The market.
        clients: Clients for the region; they try once.
        calls: Retries.
    """

    def __init__(
        self,
        deployment: Deployment,
        instance: InstanceType,
        *,
        use_spot: bool,
        clients: Clients,
        calls: PacedRequests,
    ) -> None:
        self._deployment = deployment
        self._instance = instance
        self._use_spot = use_spot
        self._clients = clients
        self._calls = calls
        self.name = self._name()

    def make(self) -> None:
        """Create what is missing and attach it to the cluster; idempotent, and safe concurrently.

        Raises:
            RequestRefused: AWS refuses, or has not finished yet.
        """
        self._make_template()
        self._make_group()
        self._make_provider()
        # Others may change the cluster's list at the same time: reread it on each try, and check
        # afterwards.
        self._calls.make(self._attach)
        log.info("%s is ready on cluster %s", self.name, self._deployment.cluster)

    # --- resources --------------------------------------------------------------------

    def _make_template(self) -> None:
        self._make(
            self._clients.get("ec2").create_launch_template,
            r"InvalidLaunchTemplateName\.AlreadyExists",
            LaunchTemplateName=self.name,
            LaunchTemplateData=self._template(),
            TagSpecifications=[
                {"ResourceType": "launch-template", "Tags": self._tags("Key", "Value")}
            ],
        )

    def _make_group(self) -> None:
        self._make(
            self._clients.get("autoscaling").create_auto_scaling_group,
            r"AlreadyExists",
            AutoScalingGroupName=self.name,
            MinSize=0,
            MaxSize=_MOST_INSTANCES,
            DesiredCapacity=0,
            VPCZoneIdentifier=",".join(self._deployment.subnets),
            NewInstancesProtectedFromScaleIn=True,
            MixedInstancesPolicy={
                "LaunchTemplate": {
                    "LaunchTemplateSpecification": {
                        "LaunchTemplateName": self.name,
                        "Version": "$Latest",
                    }
                },
                "InstancesDistribution": {
                    "OnDemandPercentageAboveBaseCapacity": 0 if self._use_spot else 100,
                    "SpotAllocationStrategy": "price-capacity-optimized",
                },
            },
            Tags=[{**tag, "PropagateAtLaunch": True} for tag in self._tags("Key", "Value")],
        )

    def _make_provider(self) -> None:
        self._make(
            self._clients.get("ecs").create_capacity_provider,
            r"already exists",
            name=self.name,
            autoScalingGroupProvider={
                "autoScalingGroupArn": self.name,  # which may be a name
                "managedScaling": {"status": "ENABLED", "targetCapacity": 100},
                "managedTerminationProtection": "ENABLED",
                "managedDraining": "ENABLED",
            },
            tags=self._tags("key", "value"),
        )

    def _attach(self) -> None:
        """Add the provider to the cluster's list without dropping others.

        Raises:
            NotYet: it was added, but is not listed yet.
            ClientError: another client is changing the list; retry once that is done.
        """
        ecs, cluster = self._clients.get("ecs"), self._deployment.cluster
        found = ecs.describe_clusters(clusters=[cluster], include=["ATTACHMENTS"])
        if not found["clusters"]:
            raise RequestRefused(
                Diagnosis(
                    retryability=Retryability.NEVER,
                    text=f"there is no cluster {cluster}. `starburst-executor setup` creates one.",
                )
            )
        before = found["clusters"][0]
        if self.name in before.get("capacityProviders", ()):
            if before.get("attachmentsStatus") == _ATTACHING:
                raise NotYet(f"capacity provider {self.name} is being added to {cluster}")
            return
        ecs.put_cluster_capacity_providers(
            cluster=cluster,
            capacityProviders=[*before.get("capacityProviders", ()), self.name],
            defaultCapacityProviderStrategy=before.get("defaultCapacityProviderStrategy", []),
        )
        raise NotYet(f"capacity provider {self.name} was just added to {cluster}")

    def _make(self, call: Any, exists: str, **request: Any) -> None:
        """Create something unless it exists."""

        def once() -> None:
            try:
                call(**request)
            except ClientError as error:
                code = error.response["Error"].get("Code", "")
                text = f"{code}: {error.response['Error'].get('Message', '')}"
                if not re.search(exists, text):
                    raise
            else:
                log.info("%s: created by %s", self.name, call.__name__)

        self._calls.make(once)

    # --- their content ----------------------------------------------------------------

    def _template(self) -> dict[str, Any]:
        deployment = self._deployment
        return {
            # Resolved at each instance start, so always the newest.
            "ImageId": _AMI.format(_AMI_FOLDER[self._instance.architecture]),
            "InstanceType": self._instance.name,
            "IamInstanceProfile": {"Arn": deployment.instance_profile_arn},
            "NetworkInterfaces": [
                {
                    "DeviceIndex": 0,
                    "AssociatePublicIpAddress": deployment.assign_public_ip,
                    "Groups": list(deployment.security_groups),
                }
            ],
            "MetadataOptions": {
                "HttpTokens": "required",
                "HttpPutResponseHopLimit": _METADATA_HOPS,
            },
            "UserData": base64.b64encode(self._user_data().encode()).decode(),
            "TagSpecifications": [
                {"ResourceType": kind, "Tags": self._tags("Key", "Value", named=False)}
                for kind in ("instance", "volume")
            ],
        }

    def _user_data(self) -> str:
        # Draining keeps ECS from placing more on an instance that Spot reclaims; workers watch for
        # the notice themselves, because draining leaves tasks alone that belong to no service. With
        # the override, logs are written with the execution role, as on Fargate.
        lines = (
            f"ECS_CLUSTER={cluster_name(self._deployment)}",
            "ECS_ENABLE_SPOT_INSTANCE_DRAINING=true",
            "ECS_ENABLE_AWSLOGS_EXECUTIONROLE_OVERRIDE=true",
        )
        return "\n".join(("#!/bin/bash", "cat >> /etc/ecs/ecs.config <<END", *lines, "END", ""))

    def _tags(self, key: str, value: str, *, named: bool = True) -> list[dict[str, str]]:
        tags = {
            CLUSTER_TAG: cluster_name(self._deployment),
            PROFILE_TAG: self._deployment.instance_profile_arn,
        }
        if named:
            tags["Name"] = self.name
        return [{key: name, value: text} for name, text in tags.items()]

    def _name(self) -> str:
        content = [self._template(), self._deployment.cluster, self._deployment.subnets]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        kind = self._instance.name.replace(".", "-")
        return f"starburst-{kind}-{market(use_spot=self._use_spot)}-{digest[:12]}"


def cluster_name(deployment: Deployment) -> str:
    """The cluster's name, whether the deployment has its name or ARN."""
    return deployment.cluster.rpartition("/")[2]


def market(*, use_spot: bool) -> str:
    """The word for a market."""
    return "spot" if use_spot else "on-demand"

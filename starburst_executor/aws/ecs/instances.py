"""EC2 instance types: their size according to EC2, and how many workers fit on one."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal

from botocore.exceptions import ClientError

from starburst_executor.aws.ecs.fargate import Size
from starburst_executor.protocol.worker_spec import WorkerSpec, memory_mib

__all__ = [
    "USABLE_MEMORY",
    "Architecture",
    "InstanceType",
    "describe_instance_type",
    "worker_size",
]

Architecture = Literal["X86_64", "ARM64"]

# EC2's name for an architecture -> ECS's.
_ARCHITECTURES: dict[str, Architecture] = {"x86_64": "X86_64", "arm64": "ARM64"}

USABLE_MEMORY = 0.925
"""The share of an instance's nominal memory that workers can use.

The kernel keeps some before ECS counts (2.5 % of an m4.large in the AWS Batch guide, "Compute
resource memory management"), and 5 % are recommended for ECS's agent and the system (same guide,
"Reserve system memory").
"""

# CPU units of a task on EC2: "between 128 and 196608", according to RegisterTaskDefinition.
_LEAST_UNITS, _MOST_UNITS = 128, 196_608


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceType:
    """An instance type as EC2 describes it.

    Attributes:
        name: Such as "c8a.xlarge".
        vcpus: Its vCPUs.
        memory: Its memory in MiB, of which workers can use a part.
        architecture: Processor architecture, in ECS's terms.
        has_spot: Whether it is sold as Spot capacity.
    """

    name: str
    vcpus: int
    memory: int
    architecture: Architecture
    has_spot: bool

    @property
    def usable(self) -> int:
        """MiB of memory for all workers: 92.5 %; the rest is for the kernel and ECS's agent."""
        return math.floor(self.memory * USABLE_MEMORY)

    def fits(self, size: Size) -> int:
        """How many workers of that size fit on one instance."""
        return min(self.vcpus * 1024 // size.cpu, self.usable // size.memory)


def describe_instance_type(ec2: Any, name: str) -> InstanceType:
    """Ask EC2 about an instance type.

    Args:
        ec2: A boto3 client.
        name: The type's name.

    Raises:
        ValueError: EC2 has no such type, or workers cannot run on it. The message suggests others.
        ClientError, BotoCoreError: EC2 does not answer.
    """
    try:
        reply = ec2.describe_instance_types(InstanceTypes=[name])
    except ClientError as error:
        if error.response["Error"].get("Code") != "InvalidInstanceType":
            raise
        region = ec2.meta.region_name
        raise ValueError(
            f"instance_type={name!r}: EC2 has no such type in {region}{_near(ec2, name)}"
        ) from error
    about = reply["InstanceTypes"][0]
    known = about["ProcessorInfo"].get("SupportedArchitectures", ())
    architecture = next((_ARCHITECTURES[a] for a in known if a in _ARCHITECTURES), None)
    if architecture is None:
        raise ValueError(
            f"instance_type={name!r} has a processor ({', '.join(known)}) that workers do not run "
            "on; use one with x86_64 or arm64"
        )
    return InstanceType(
        name=name,
        vcpus=about["VCpuInfo"]["DefaultVCpus"],
        memory=about["MemoryInfo"]["SizeInMiB"],
        architecture=architecture,
        has_spot="spot" in about.get("SupportedUsageClasses", ("spot",)),
    )


def worker_size(spec: WorkerSpec, instance: InstanceType) -> Size:
    """The task size of such a worker on that instance type.

    Raises:
        ValueError: no such worker fits, or the type has no Spot. The message says what would work.
    """
    if spec.use_spot and not instance.has_spot:
        raise ValueError(
            f"instance_type={instance.name!r} is not available as Spot capacity; omit use_spot"
        )
    size = Size(cpu=round(spec.cpu * 1024), memory=memory_mib(spec.memory))
    if not _LEAST_UNITS <= size.cpu <= _MOST_UNITS:
        raise ValueError(
            f"cpu={spec.cpu:g} is not possible for a task on EC2; 0.125 to 192 vCPUs are"
        )
    if instance.fits(size):
        return size
    raise ValueError(
        f"cpu={spec.cpu:g}, memory={spec.memory!r} does not fit on a {instance.name}, which has "
        f"{instance.vcpus} vCPUs and {instance.memory / 1024:g} GB, of which {instance.usable} MB "
        "are available to workers (the rest is for its kernel and ECS's agent). "
        f"cpu={min(spec.cpu, instance.vcpus):g}, "
        f'memory="{min(size.memory, instance.usable)}MB" would fit, or use a larger instance_type'
    )


def _near(ec2: Any, name: str) -> str:
    """Similar names from the same family."""
    where = [{"Name": "instance-type", "Values": [f"{name.partition('.')[0]}.*"]}]
    found = ec2.describe_instance_types(Filters=where)["InstanceTypes"]
    names = sorted(str(about["InstanceType"]) for about in found)
    near = difflib.get_close_matches(name, names, 3, 0) or names[:3]
    if not near:
        return "; `aws ec2 describe-instance-type-offerings` lists those it has"
    return f"; similar ones: {', '.join(near)}"

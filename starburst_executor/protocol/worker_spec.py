"""What each worker is: its size and where it runs, checked on creation."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from starburst_executor.protocol.bounds import Amount, Count, Digest

__all__ = ["MARKET_VARIABLE", "WorkerSpec", "memory_mib"]

MARKET_VARIABLE = "STARBURST_MARKET"
"""Environment variable with a worker's market, "spot" or "on-demand", set by its launcher."""

_MEMORY = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([MGT])i?B", re.IGNORECASE | re.ASCII)
_MIB = {"M": 1, "G": 1024, "T": 1024 * 1024}
_INSTANCE_TYPE = re.compile(r"[a-z][a-z0-9-]*\.[a-z0-9-]+")


class WorkerSpec(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """What each worker of a session is; checked whenever one is created or decoded.

    Attributes:
        launcher: Where workers run: "local" (this machine) or "ecs".
        cpu: vCPUs of a worker.
        memory: Memory of a worker, such as "2GB" or "512MB"; as with AWS, 1 GB is 1,024 MiB.
        launch_type: "FARGATE" or "EC2".
        instance_type: The EC2 instance type, such as "c8a.xlarge"; only with `launch_type="EC2"`,
            and required there.
        use_spot: Whether to run on Spot capacity.
        spot_fallback: Whether to run on demand what Spot has no capacity for; only with `use_spot`.
        region: The AWS region, or None for that of the AWS settings.
        slots: How many tasks a worker runs at once.
        environment: Where a worker's packages come from: "none" (they are already there), "image"
            (its container image has them), "sync" (installed from the lock).
        image: Container image on ECS; None for the configured one, or the stock one.
        lock: Digest of what "sync" installs, below `environments/` in the store.

    Raises:
        TypeError, ValueError: the message names the argument, its value and what would be right.
    """

    launcher: Literal["local", "ecs"] = "local"
    cpu: Amount = 1
    memory: str = "2GB"
    launch_type: Literal["FARGATE", "EC2"] = "FARGATE"
    instance_type: str | None = None
    use_spot: bool = False
    spot_fallback: bool = False
    region: str | None = None
    slots: Count = 1
    environment: Literal["none", "image", "sync"] = "none"
    image: str | None = None
    lock: Digest | None = None

    def __post_init__(self) -> None:
        _check_choice("launcher", self.launcher, ("local", "ecs"))
        _check_cpu(self.cpu)
        memory_mib(self.memory)
        _check_choice("launch_type", self.launch_type, ("FARGATE", "EC2"))
        _check_instance_type(self.launch_type, self.instance_type)
        _check_type("use_spot", self.use_spot, bool, "True or False")
        _check_type("spot_fallback", self.spot_fallback, bool, "True or False")
        _check_spot_fallback(self.use_spot, self.spot_fallback)
        _check_region(self.region)
        _check_slots(self.slots)
        _check_choice("environment", self.environment, ("none", "image", "sync"))


def memory_mib(text: str) -> int:
    """The memory that `text` asks for, rounded up to whole MiB.

    Args:
        text: A number and MB, GB or TB (or MiB, GiB, TiB, which mean the same, as with AWS).

    Raises:
        TypeError, ValueError: it is something else, or zero.
    """
    _check_type("memory", text, str, 'a number with its unit, such as "2GB" or "512MB"')
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"memory={text!r} is not an amount of memory; write a number and MB or GB, "
            'such as "2GB"'
        )
    mib = math.ceil(float(match[1]) * _MIB[match[2].upper()])
    if mib < 1:
        raise ValueError(f'memory={text!r} is zero; a worker needs some, such as "2GB"')
    return mib


def _check_type(name: str, value: object, kind: type, right: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; it must be {right}")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is unknown; it must be one of {', '.join(map(repr, choices))}"
        )


def _check_cpu(cpu: float) -> None:
    if isinstance(cpu, bool) or not isinstance(cpu, int | float):
        raise TypeError(
            f"cpu={cpu!r} is of type {type(cpu).__name__}; it must be a number of vCPUs, "
            "such as 1 or 0.5"
        )
    if not 0 < cpu < math.inf:
        raise ValueError(
            f"cpu={cpu!r} is not a number of vCPUs; it must be above 0, such as 1 or 0.5"
        )


def _check_instance_type(launch_type: str, instance_type: str | None) -> None:
    if instance_type is None:
        if launch_type == "EC2":
            raise ValueError(
                'launch_type="EC2" needs an instance_type, such as instance_type="c8a.xlarge"; '
                'for workers without instances of your own, use launch_type="FARGATE"'
            )
        return
    _check_type("instance_type", instance_type, str, 'a name such as "c8a.xlarge"')
    if launch_type != "EC2":
        raise ValueError(
            f"instance_type={instance_type!r} has no meaning with launch_type={launch_type!r}; "
            'add launch_type="EC2", or leave instance_type out'
        )
    if not _INSTANCE_TYPE.fullmatch(instance_type):
        raise ValueError(
            f"instance_type={instance_type!r} is not an instance type; write family, dot and size, "
            'such as "c8a.xlarge"'
        )


def _check_spot_fallback(use_spot: bool, spot_fallback: bool) -> None:
    if spot_fallback and not use_spot:
        raise ValueError(
            "spot_fallback=True has no meaning without use_spot=True; "
            "add that, or leave spot_fallback out"
        )


def _check_region(region: str | None) -> None:
    if region is None:
        return
    _check_type("region", region, str, 'a name such as "eu-west-1", or None')
    if not region or region != region.strip():
        raise ValueError(
            f'region={region!r} is not a region; write a name such as "eu-west-1", or leave it out'
        )


def _check_slots(slots: int) -> None:
    if isinstance(slots, bool) or not isinstance(slots, int):
        raise TypeError(
            f"slots={slots!r} is of type {type(slots).__name__}; "
            "it must be a whole number, 1 or more"
        )
    if slots < 1:
        raise ValueError(f"slots={slots!r} is too few; a worker runs at least 1 task at a time")

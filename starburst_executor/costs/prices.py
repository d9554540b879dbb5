"""prices"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import Literal

from starburst_executor.protocol.session_prices import SessionPrices
from starburst_executor.protocol.worker_spec import WorkerSpec, memory_mib

__all__ = [
    "Architecture",
    "Cost",
    "LOGGED_GB_MONTH",
    "Prices",
    "STORED_GB_MONTH",
    "TABLE_DATE",
    "affordable",
    "billed_seconds",
    "built_in",
    "check_hourly_cost",
    "fitting",
    "memory_gb",
    "spent",
    "worker_hour",
]


Architecture = Literal["X86_64", "ARM64"]

_HOUR = 3600.0

_MINIMUM = 60.0  # seconds; of Fargate and of Linux on EC2

_GIB = 1024.0  # MiB

TABLE_DATE = date(2026, 9, 28)

_TABLE_REGION = "us-east-1"

# Dollars for a vCPU-hour and a GB-hour on Fargate, as copies of the AWS price list and of the list behind
# aws.amazon.com/fargate/pricing had them on that date. Spot floats; it changes about once a day.
_FARGATE: dict[tuple[Architecture, bool], tuple[float, float]] = {
    ("X86_64", False): (0.04048, 0.004445),
    ("ARM64", False): (0.03238, 0.00356),
    ("X86_64", True): (0.01288871, 0.00141527),
    ("ARM64", True): (0.01030969, 0.00113349),
}

_ADDRESS = 0.005  # dollars for an hour of a public IPv4 address

_WRITE = 0.005 / 1000  # dollars for a PUT, COPY, POST or LIST in S3 Standard

_READ = 0.0004 / 1000  # and for a GET

STORED_GB_MONTH = 0.023  # dollars for a GB in S3 Standard for a month

LOGGED_GB_MONTH = 0.03  # and in CloudWatch Logs


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Prices in US dollars, of one region, market and architecture.

    Attributes:
        region: The region that they are of; not the one asked for, where only another's are known.
        use_spot: Whether they are those of Spot capacity.
        vcpu_hour: A vCPU on Fargate for an hour.
        gb_hour: A GB of memory on Fargate for an hour.
        instance_hour: An EC2 instance for an hour; None on Fargate.
        instance_vcpus: vCPUs of that instance.
        instance_gb: GB of memory that workers can have of that instance.
        address_hour: A public IPv4 address for an hour.
        write: One PUT, COPY, POST or LIST.
        read: One GET.
        source: Where they are from, for people.
        taken: When they were taken down.
    """

    region: str
    use_spot: bool = False
    vcpu_hour: float = 0.0
    gb_hour: float = 0.0
    instance_hour: float | None = None
    instance_vcpus: float = 0.0
    instance_gb: float = 0.0
    address_hour: float = _ADDRESS
    write: float = _WRITE
    read: float = _READ
    source: str
    taken: date

    def __str__(self) -> str:
        market = "Spot" if self.use_spot else "on-demand"
        return f"{market} prices of {self.region} from {self.source}, {self.taken:%Y-%m-%d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What was used and what it costs, in US dollars.

    Attributes:
        workers: How many workers there were.
        vcpu_seconds: vCPUs times seconds, as they are billed.
        gb_seconds: GB of memory times seconds, as they are billed.
        compute: Dollars for the workers, their addresses included.
        requests: Dollars for the requests to S3.
        prices: The prices applied.
    """

    workers: int
    vcpu_seconds: float
    gb_seconds: float
    compute: float
    requests: float
    prices: Prices

    @property
    def total(self) -> float:
        """Dollars in all."""
        return self.compute + self.requests


def built_in(
    region: str, *, use_spot: bool = False, architecture: Architecture = "X86_64"
) -> Prices:
    """Fargate's prices from the table here, which has one region and a date.

    Args:
        region: The region wanted, for the source to say that it is another's.
        use_spot: Those of Fargate Spot.
        architecture: Of the processor.
    """
    vcpu, gb = _FARGATE[architecture, use_spot]
    source = "the built-in table"
    if region != _TABLE_REGION:
        source += f", for want of those of {region or 'your region'}"
    return Prices(
        region=_TABLE_REGION,
        use_spot=use_spot,
        vcpu_hour=vcpu,
        gb_hour=gb,
        source=source,
        taken=TABLE_DATE,
    )


def worker_hour(spec: WorkerSpec, prices: Prices, *, public_ip: bool = True) -> float:
    """Dollars for one worker of that size for an hour.

    On EC2 an instance's price is shared by as many workers as fit on it, as when all are full.

    Raises:
        ValueError: the worker does not fit on the instance.
    """
    if spec.launcher == "local":
        return 0.0
    gb = memory_gb(spec)
    if prices.instance_hour is None:
        address = prices.address_hour if public_ip else 0.0
        return spec.cpu * prices.vcpu_hour + gb * prices.gb_hour + address
    fit = math.floor(min(prices.instance_vcpus / spec.cpu, prices.instance_gb / gb))
    if fit < 1:
        raise ValueError(
            f"a worker with cpu={spec.cpu:g} and memory={spec.memory!r} does not fit on {spec.instance_type}, "
            f"which has {prices.instance_vcpus:g} vCPUs and {prices.instance_gb:g} GB; take less, or a larger "
            "instance_type"
        )
    return prices.instance_hour / fit


def memory_gb(spec: WorkerSpec) -> float:
    """GB of memory of one worker, as they are billed."""
    return memory_mib(spec.memory) / _GIB


def billed_seconds(seconds: float) -> float:
    """What is billed for a worker that lived so long: whole seconds, at least a minute."""
    return max(_MINIMUM, math.ceil(seconds))


def spent(
    spec: WorkerSpec,
    prices: Prices,
    stays: Iterable[float],
    *,
    writes: float = 0,
    reads: float = 0,
    public_ip: bool = True,
) -> Cost:
    """What workers that lived so long, and requests, cost.

    Args:
        spec: The workers' size.
        prices: What to reckon with.
        stays: Seconds of each worker, from its start to its end or now.
        writes: PUT, COPY, POST and LIST requests.
        reads: GET requests.
        public_ip: Whether workers have public addresses.
    """
    billed = [billed_seconds(seconds) for seconds in stays]
    seconds = math.fsum(billed)
    return Cost(
        workers=len(billed),
        vcpu_seconds=seconds * spec.cpu,
        gb_seconds=seconds * memory_gb(spec),
        compute=seconds / _HOUR * worker_hour(spec, prices, public_ip=public_ip),
        requests=writes * prices.write + reads * prices.read,
        prices=prices,
    )


def fitting(quota: float, used: float, cpu: float) -> int:
    """How many more workers of `cpu` vCPUs a quota of vCPUs allows, `used` being taken."""
    return max(0, math.floor((quota - used) / cpu + 1e-9))  # 0.3 / 0.1 is below 3


def affordable(max_hourly_cost: float, hourly: float) -> int | None:
    """How many workers at `hourly` dollars an hour each stay within a limit; None: any number."""
    return None if hourly <= 0 else math.floor(max_hourly_cost / hourly + 1e-9)


def check_hourly_cost(
    max_hourly_cost: float, workers: int, hourly: float, prices: Prices | SessionPrices
) -> None:
    """Refuse workers that together cost more an hour than allowed.

    Args:
        max_hourly_cost: Dollars.
        workers: How many are wanted.
        hourly: Dollars for one of them.
        prices: What `hourly` was reckoned with, for the message.

    Raises:
        ValueError: they cost more; says how many do not.
    """
    most = affordable(max_hourly_cost, hourly)
    if most is not None and workers > most:
        fewer = f"max_workers={most} would not, nor might" if most else "take"
        raise ValueError(
            f"max_workers={workers} would cost ${workers * hourly:.4g} an hour ({prices}), more than "
            f"max_hourly_cost={max_hourly_cost:g}; {fewer} smaller workers or use_spot=True"
        )

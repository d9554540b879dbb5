"""What workers and requests cost: arithmetic alone, on prices that say where they come from.

    prices       `aws.prices` fetches them, or the table here
       |
       v
    worker_hour  what one worker costs for an hour, by its size
       |
       +-- estimate    before a run: so many tasks on so many workers, in waves if fewer fit
       +-- spent       afterwards: the seconds of each worker, and the requests
       +-- affordable  how many workers an hourly limit allows

US dollars, without taxes, discounts and free tiers. Storage, logs, traffic between regions or to
the internet, NAT gateways, and disk beyond what comes with a worker are not included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import Literal

from starburst_executor.protocol.session_prices import SessionPrices
from starburst_executor.protocol.worker_spec import WorkerSpec, memory_mib

__all__ = [
    "LOGGED_GB_MONTH",
    "STORED_GB_MONTH",
    "TABLE_DATE",
    "Architecture",
    "Cost",
    "Prices",
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

_MINIMUM = 60.0  # seconds; billed by Fargate, and by EC2 for Linux

_GIB = 1024.0  # MiB

TABLE_DATE = date(2026, 9, 28)

_TABLE_REGION = "us-east-1"

# Dollars per vCPU-hour and GB-hour on Fargate, from copies of the AWS price list and of the list
# behind aws.amazon.com/fargate/pricing on that date. Spot prices float, changing about once a day.
_FARGATE: dict[tuple[Architecture, bool], tuple[float, float]] = {
    ("X86_64", False): (0.04048, 0.004445),
    ("ARM64", False): (0.03238, 0.00356),
    ("X86_64", True): (0.01288871, 0.00141527),
    ("ARM64", True): (0.01030969, 0.00113349),
}

_ADDRESS = 0.005  # dollars per hour of a public IPv4 address

_WRITE = 0.005 / 1000  # dollars per PUT, COPY, POST or LIST in S3 Standard

_READ = 0.0004 / 1000  # per GET

STORED_GB_MONTH = 0.023  # dollars per GB and month in S3 Standard

LOGGED_GB_MONTH = 0.03  # the same in CloudWatch Logs


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Prices in US dollars for one region, market and architecture.

    Attributes:
        region: Their region; not the requested one if only another's prices are known.
        use_spot: Whether they are Spot prices.
        vcpu_hour: A vCPU on Fargate for an hour.
        gb_hour: A GB of memory on Fargate for an hour.
        instance_hour: An EC2 instance for an hour; None on Fargate.
        instance_vcpus: vCPUs of that instance.
        instance_gb: GB of memory that workers can have of that instance.
        address_hour: A public IPv4 address for an hour.
        write: One PUT, COPY, POST or LIST.
        read: One GET.
        source: Where they are from, for display.
        taken: The date they are from.
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
    """Usage, and what it costs in US dollars.

    Attributes:
        workers: Number of workers.
        vcpu_seconds: vCPUs times seconds, as billed.
        gb_seconds: GB of memory times seconds, as billed.
        compute: Dollars for the workers, including their addresses.
        requests: Dollars for S3 requests.
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
        """Total dollars."""
        return self.compute + self.requests


def built_in(
    region: str, *, use_spot: bool = False, architecture: Architecture = "X86_64"
) -> Prices:
    """Fargate's prices from the built-in table, which covers one region on one date.

    Args:
        region: The requested region; if it is another one, the source says so.
        use_spot: Use Fargate Spot prices.
        architecture: Processor architecture.
    """
    vcpu, gb = _FARGATE[architecture, use_spot]
    source = "the built-in table"
    if region != _TABLE_REGION:
        source += f", because prices for {region or 'your region'} are not available"
    return Prices(
        region=_TABLE_REGION,
        use_spot=use_spot,
        vcpu_hour=vcpu,
        gb_hour=gb,
        source=source,
        taken=TABLE_DATE,
    )


def worker_hour(spec: WorkerSpec, prices: Prices, *, public_ip: bool = True) -> float:
    """Dollars per hour for one worker of that size.

    On EC2 the instance's price is divided by the number of workers that fit, as if it were full.

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
            f"a worker with cpu={spec.cpu:g} and memory={spec.memory!r} does not fit on "
            f"{spec.instance_type}, which has {prices.instance_vcpus:g} vCPUs and "
            f"{prices.instance_gb:g} GB; reduce them, or use a larger instance_type"
        )
    return prices.instance_hour / fit


def memory_gb(spec: WorkerSpec) -> float:
    """GB of memory of one worker, as billed."""
    return memory_mib(spec.memory) / _GIB


def billed_seconds(seconds: float) -> float:
    """Seconds billed for a worker's lifetime: whole seconds, at least a minute."""
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
    """Cost of workers with these lifetimes, and of requests.

    Args:
        spec: The workers' size.
        prices: Prices to apply.
        stays: Seconds of each worker, from its start to its end or until now.
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
    """How many more workers of `cpu` vCPUs a vCPU quota allows when `used` of it is taken."""
    return max(0, math.floor((quota - used) / cpu + 1e-9))  # 0.3 / 0.1 is below 3


def affordable(max_hourly_cost: float, hourly: float) -> int | None:
    """How many workers at `hourly` dollars each stay within the limit; None: any number."""
    return None if hourly <= 0 else math.floor(max_hourly_cost / hourly + 1e-9)


def check_hourly_cost(
    max_hourly_cost: float, workers: int, hourly: float, prices: Prices | SessionPrices
) -> None:
    """Refuse workers that together cost more per hour than allowed.

    Args:
        max_hourly_cost: Dollars per hour.
        workers: Requested number of workers.
        hourly: Dollars per hour for one of them.
        prices: The prices behind `hourly`, for the message.

    Raises:
        ValueError: they cost more. The message says how many are allowed.
    """
    most = affordable(max_hourly_cost, hourly)
    if most is not None and workers > most:
        advice = f"use max_workers={most}, or try" if most else "try"
        raise ValueError(
            f"max_workers={workers} would cost ${workers * hourly:.4g} an hour ({prices}), more "
            f"than max_hourly_cost={max_hourly_cost:g}; {advice} smaller workers or use_spot=True"
        )

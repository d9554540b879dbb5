"""How many workers a session's cost limit allows."""

from __future__ import annotations

from starburst_executor.costs import prices
from starburst_executor.protocol.manifest import Manifest

__all__ = ["affordable_workers", "check_workers"]


def affordable_workers(manifest: Manifest) -> int:
    """Number of requested workers that `max_hourly_cost` allows; launchers start no more."""
    most = _most_workers(manifest)
    return manifest.workers if most is None else min(manifest.workers, most)


def _most_workers(manifest: Manifest) -> int | None:
    if manifest.max_hourly_cost is None or manifest.rate is None:
        return None
    return prices.affordable(manifest.max_hourly_cost, _highest_hourly(manifest))


def _highest_hourly(manifest: Manifest) -> float:
    """The most that a worker may cost per hour."""
    if manifest.rate is None:
        return 0.0
    if manifest.spec.spot_fallback:
        return max(manifest.rate.worker_hour, manifest.rate.fallback_hour)
    return manifest.rate.worker_hour


def check_workers(manifest: Manifest) -> None:
    """Refuse a session whose workers would cost more per hour than it allows.

    Raises:
        ValueError: they would, or their price is unknown. The message says how many are allowed.
    """
    limit = manifest.max_hourly_cost
    if limit is None or manifest.spec.launcher == "local":
        return
    if manifest.rate is None:
        raise ValueError(
            f"max_hourly_cost={limit:g} cannot be enforced because the workers' price is unknown: "
            "AWS did not return it, and the built-in table covers Fargate only. Allow "
            "pricing:GetProducts (and for Spot on EC2 ec2:DescribeSpotPriceHistory), or omit "
            "max_hourly_cost."
        )
    prices.check_hourly_cost(limit, manifest.workers, _highest_hourly(manifest), manifest.rate)

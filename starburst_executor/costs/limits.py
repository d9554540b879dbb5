"""How many workers a session's limit on dollars allows."""

from __future__ import annotations

from starburst_executor.costs import prices
from starburst_executor.protocol.manifest import Manifest

__all__ = ["affordable_workers", "check_workers"]


def affordable_workers(manifest: Manifest) -> int:
    """How many of the wanted workers `max_hourly_cost` allows; whoever launches starts no more."""
    most = _most_workers(manifest)
    return manifest.workers if most is None else min(manifest.workers, most)


def _most_workers(manifest: Manifest) -> int | None:
    if manifest.max_hourly_cost is None or manifest.rate is None:
        return None
    return prices.affordable(manifest.max_hourly_cost, _dearest(manifest))


def _dearest(manifest: Manifest) -> float:
    """What a worker may come to cost an hour."""
    if manifest.rate is None:
        return 0.0
    if manifest.spec.spot_fallback:
        return max(manifest.rate.worker_hour, manifest.rate.fallback_hour)
    return manifest.rate.worker_hour


def check_workers(manifest: Manifest) -> None:
    """Refuse a session whose workers would cost more an hour than it allows.

    Raises:
        ValueError: they would, or what they cost is not known; says how many would not.
    """
    limit = manifest.max_hourly_cost
    if limit is None or manifest.spec.launcher == "local":
        return
    if manifest.rate is None:
        raise ValueError(
            f"max_hourly_cost={limit:g} cannot be kept, for what the workers cost is not known: AWS did not tell, "
            "and the built-in table has Fargate alone. Allow pricing:GetProducts (and for Spot on EC2 "
            "ec2:DescribeSpotPriceHistory), or leave max_hourly_cost out."
        )
    prices.check_hourly_cost(limit, manifest.workers, _dearest(manifest), manifest.rate)

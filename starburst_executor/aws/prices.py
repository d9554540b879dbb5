"""Prices of workers and requests from AWS, cached with their date, with a table as fallback.

    fresh cache       the file in the user's cache folder
    AWS               Pricing API (Fargate, EC2, S3), Spot price history (EC2)
    stale cache       the same file, with the date of its prices
    table             `costs.prices.built_in`: Fargate only

No API has Fargate Spot prices: they are derived from the on-demand price and the table's ratio.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

from starburst_executor.aws.account import Clients, asking
from starburst_executor.aws.ecs.instances import USABLE_MEMORY
from starburst_executor.costs.prices import TABLE_DATE, Architecture, Prices, built_in
from starburst_executor.errors import AccountError
from starburst_executor.protocol.worker_spec import WorkerSpec

__all__ = ["ask_prices", "cache_file", "prices_for"]

log = logging.getLogger(__name__)

_PRICING_REGION = "us-east-1"  # the API runs in a few regions, and covers all
_FRESH = {False: 30, True: 1}  # days, by whether it is Spot, whose prices float
_FARGATE = re.compile(r"(?:[A-Z0-9]+-)?Fargate-(ARM-)?(vCPU-Hours:perCPU|GB-Hours)")
_REQUESTS = re.compile(r"(?:[A-Z0-9]+-)?Requests-Tier([12])")


# At import: building it in two threads at once crashes the process.
_documents = msgspec.json.Decoder(dict[str, Prices])


def prices_for(
    spec: WorkerSpec,
    clients: Clients,
    today: date,
    *,
    architecture: Architecture = "X86_64",
    file: Path | None = None,
) -> Prices:
    """The best available prices for such workers; their source says which those are.

    Args:
        spec: The workers.
        clients: Clients for the region.
        today: Today's date.
        architecture: Processor architecture on Fargate.
        file: The price cache; defaults to `cache_file()`.

    Raises:
        AccountError: AWS gives no prices, and none are cached.
    """
    file = cache_file() if file is None else file
    name = _name(spec, clients.region, architecture)
    kept = _cached(file).get(name)
    if kept and (today - kept.taken).days <= _FRESH[spec.use_spot]:
        return kept
    try:
        asked = ask_prices(spec, clients, today, architecture=architecture)
    except AccountError as error:
        log.info("prices may be out of date: %s", error)
        if kept:
            return kept
        if spec.launch_type == "EC2":
            raise
        return built_in(clients.region, use_spot=spec.use_spot, architecture=architecture)
    _keep(file, name, asked)
    return asked


def cache_file() -> Path:
    """Path of the price cache."""
    return platformdirs.user_cache_path("starburst_executor") / "prices.json"


def ask_prices(
    spec: WorkerSpec,
    clients: Clients,
    today: date,
    *,
    architecture: Architecture = "X86_64",
) -> Prices:
    """Ask AWS for the prices of such workers.

    Raises:
        AccountError: AWS does not give them.
    """
    write, read = _requests(clients)
    if spec.launch_type == "EC2":
        found = _instance(spec, clients, today)
    else:
        found = _fargate(clients, architecture, use_spot=spec.use_spot)
    return Prices(
        region=clients.region,
        use_spot=spec.use_spot,
        write=write,
        read=read,
        taken=today,
        **found,
    )


# --- querying ------------------------------------------------------------------------


def _fargate(clients: Clients, architecture: Architecture, *, use_spot: bool) -> dict[str, Any]:
    by_name: dict[str, float] = {}
    for product in _products(clients, "AmazonECS", productFamily="Compute"):
        match = _FARGATE.fullmatch(_usage(product))
        if match and bool(match[1]) == (architecture == "ARM64"):
            by_name[match[2].partition("-")[0]] = _dollars(product)
    if by_name.keys() != {"vCPU", "GB"}:
        raise AccountError(f"the Pricing API lists no Fargate prices for {clients.region}")
    source = "the AWS Pricing API"
    share = (1.0, 1.0)
    if use_spot:
        share = _spot_share(architecture)
        source += (
            f", times {share[0]:.2f}, Spot's share in the built-in table of {TABLE_DATE:%Y-%m-%d}"
        )
    return {
        "vcpu_hour": by_name["vCPU"] * share[0],
        "gb_hour": by_name["GB"] * share[1],
        "source": source,
    }


def _spot_share(architecture: Architecture) -> tuple[float, float]:
    spot = built_in("", use_spot=True, architecture=architecture)
    full = built_in("", architecture=architecture)
    return spot.vcpu_hour / full.vcpu_hour, spot.gb_hour / full.gb_hour


def _instance(spec: WorkerSpec, clients: Clients, today: date) -> dict[str, Any]:
    assert spec.instance_type is not None  # `WorkerSpec` ensures it
    product = next(
        _products(
            clients,
            "AmazonEC2",
            instanceType=spec.instance_type,
            operatingSystem="Linux",
            tenancy="Shared",
            preInstalledSw="NA",
            capacitystatus="Used",
        ),
        None,
    )
    if product is None:
        raise AccountError(
            f"the Pricing API lists no {spec.instance_type} for {clients.region}; "
            "does this instance type exist?"
        )
    about = product["product"]["attributes"]
    memory = float(about["memory"].replace(",", "").split()[0])
    hourly, source = _dollars(product), "the AWS Pricing API"
    if spec.use_spot:
        hourly, source = _spot_price(clients, spec.instance_type, today)
    return {
        "instance_hour": hourly,
        "instance_vcpus": float(about["vcpu"]),
        "instance_gb": memory * USABLE_MEMORY,
        "source": source,
    }


def _spot_price(clients: Clients, instance_type: str, today: date) -> tuple[float, str]:
    """The highest current Spot price of any zone: workers may land in any of them."""
    with asking(f"reading the Spot price history of {instance_type}"):
        reply = clients.get("ec2").describe_spot_price_history(
            InstanceTypes=[instance_type],
            ProductDescriptions=["Linux/UNIX"],
            StartTime=datetime.combine(today, time(), UTC),
        )
    newest: dict[str, Any] = {}
    for entry in reply["SpotPriceHistory"]:
        zone = entry["AvailabilityZone"]
        if zone not in newest or entry["Timestamp"] > newest[zone]["Timestamp"]:
            newest[zone] = entry
    if not newest:
        raise AccountError(f"there is no Spot price of {instance_type} in {clients.region}")
    highest = max(newest.values(), key=lambda entry: float(entry["SpotPrice"]))
    return (
        float(highest["SpotPrice"]),
        f"the Spot price history ({highest['AvailabilityZone']})",
    )


def _requests(clients: Clients) -> tuple[float, float]:
    tiers: dict[str, float] = {}
    for product in _products(clients, "AmazonS3", productFamily="API Request"):
        match = _REQUESTS.fullmatch(_usage(product))
        if match:
            tiers[match[1]] = _dollars(product)
    if tiers.keys() != {"1", "2"}:
        raise AccountError(f"the Pricing API lists no S3 requests for {clients.region}")
    return tiers["1"], tiers["2"]


def _products(clients: Clients, service: str, **fields: str) -> Iterator[Any]:
    filters = [
        {"Type": "TERM_MATCH", "Field": field, "Value": value}
        for field, value in {"regionCode": clients.region, **fields}.items()
    ]
    client = clients.get("pricing", _PRICING_REGION)
    pages = client.get_paginator("get_products").paginate(
        ServiceCode=service, Filters=filters, FormatVersion="aws_v1"
    )
    with asking(f"reading the prices of {service}"):
        for page in pages:
            yield from map(json.loads, page["PriceList"])


def _usage(product: Any) -> str:
    usage: str = product["product"]["attributes"].get("usagetype", "")
    return usage


def _dollars(product: Any) -> float:
    """A product's on-demand price beyond any free tier."""
    amounts = [
        float(dimension["pricePerUnit"].get("USD", 0))
        for term in product["terms"].get("OnDemand", {}).values()
        for dimension in term["priceDimensions"].values()
    ]
    found = max(amounts, default=0.0)
    if not found:
        raise AccountError(f"the Pricing API has no price for {_usage(product)}")
    return found


# --- caching -------------------------------------------------------------------------


def _name(spec: WorkerSpec, region: str, architecture: Architecture) -> str:
    kind = spec.instance_type or f"fargate {architecture}"
    return f"{region} {kind} {'spot' if spec.use_spot else 'on-demand'}"


def _cached(file: Path) -> dict[str, Prices]:
    """The cached prices; empty if the file is missing, or from another version of this package."""
    try:
        return _documents.decode(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        log.info("the price cache %s cannot be read, reading prices from AWS: %s", file, error)
        return {}


def _keep(file: Path, name: str, prices: Prices) -> None:
    everything = {**_cached(file), name: prices}
    document = {n: dataclasses.asdict(p) for n, p in everything.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".new")
        temporary.write_bytes(msgspec.json.encode(document))
        temporary.replace(file)
    except OSError as error:  # only a cache: the prices are known anyway
        log.info("prices cannot be cached in %s: %s", file, error)

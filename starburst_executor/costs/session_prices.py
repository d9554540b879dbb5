"""The prices of a new session: looked up once, when it is created, and stored with it.

Workers on ECS are priced by the AWS price list, which `aws.prices` caches; Fargate falls back to
the built-in table. S3 requests use the same list, or the table where workers run elsewhere. Workers
on this machine and requests to a directory cost nothing.
"""

from __future__ import annotations

import logging

from msgspec.structs import replace

from starburst_executor import config
from starburst_executor.costs.prices import Prices, built_in, worker_hour
from starburst_executor.errors import AccountError
from starburst_executor.protocol.session_prices import SessionPrices
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.runtime import Runtime

__all__ = ["rate_for", "rate_of"]

log = logging.getLogger(__name__)


def rate_for(spec: WorkerSpec, store_url: str, runtime: Runtime) -> SessionPrices | None:
    """Prices of such workers and of requests to that store; None if both are free, or unknown.

    May ask AWS, once, for a few seconds at most. Answers are cached for a month, Spot's for a day.

    Raises:
        ValueError: such a worker does not fit on its instance type.
    """
    on_s3 = store_url.startswith("s3://")
    if spec.launcher == "local":
        here = config.load().settings.region
        return _of_requests(built_in(spec.region or here)) if on_s3 else None
    try:
        asked = _ask(spec, runtime)
        fallback = _ask(_on_demand(spec), runtime) if spec.use_spot else None
    except AccountError as error:
        log.warning("the workers' price is unknown: %s", error)
        return None
    public_ip = config.load().settings.assign_public_ip
    return rate_of(spec, asked, fallback, public_ip=public_ip)


def rate_of(
    spec: WorkerSpec,
    prices: Prices,
    fallback: Prices | None = None,
    *,
    public_ip: bool = True,
) -> SessionPrices:
    """A session's prices for such workers.

    Args:
        spec: The workers.
        prices: Prices in the requested market.
        fallback: On-demand prices, if Spot was requested.
        public_ip: Whether workers have public addresses.

    Raises:
        ValueError: such a worker does not fit on its instance type.
    """
    return replace(
        _of_requests(prices),
        worker_hour=worker_hour(spec, prices, public_ip=public_ip),
        fallback_hour=0.0 if fallback is None else worker_hour(spec, fallback, public_ip=public_ip),
        market="spot" if spec.use_spot else "on-demand",
    )


def _on_demand(spec: WorkerSpec) -> WorkerSpec:
    """The same worker without its Spot settings."""
    return WorkerSpec(
        launcher=spec.launcher,
        cpu=spec.cpu,
        memory=spec.memory,
        launch_type=spec.launch_type,
        instance_type=spec.instance_type,
        region=spec.region,
        slots=spec.slots,
    )


def _of_requests(prices: Prices) -> SessionPrices:
    return SessionPrices(
        write=prices.write,
        read=prices.read,
        region=prices.region,
        source=prices.source,
        taken=prices.taken,
    )


def _ask(spec: WorkerSpec, runtime: Runtime) -> Prices:
    from starburst_executor.aws import account, prices

    deployment = config.load_deployment()
    region = spec.region or (deployment.region if deployment else None)
    # One try: a session must not wait for a price list that cannot be reached.
    clients = account.Clients(region, make=account.make_client_once)
    return prices.prices_for(spec, clients, account.date_of(runtime))

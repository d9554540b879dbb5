"""Verbs for capacity and cost: quota, estimate."""

from __future__ import annotations

import shutil
from contextlib import closing
from textwrap import fill
from typing import Any, cast

import click

from starburst_executor.cli.exits import Exit, Failed
from starburst_executor.cli.options import json_option
from starburst_executor.cli.output import counted, document, echo_table
from starburst_executor.formatting import dollars

__all__ = ["VERBS"]

_region_option = click.option(
    "--region",
    metavar="NAME",
    help="AWS region; defaults to the configured one, or that of your AWS settings.",
)
_spot_option = click.option("--use-spot", is_flag=True, help="For Spot capacity.")


def _clients(region: str | None) -> Any:
    from starburst_executor import config
    from starburst_executor.aws.account import Clients

    return Clients(region or config.load().settings.region or None)


# --- quota ---------------------------------------------------------------------------


@click.command()
@_region_option
@click.option(
    "--cpu",
    type=float,
    default=1.0,
    show_default=True,
    help="vCPUs of a worker, to say how many fit.",
)
@click.option("--request", type=float, metavar="VCPUS", help="Ask AWS for this many vCPUs.")
@click.option("--dry-run", is_flag=True, help="Show what would be requested, and stop.")
@_spot_option
@json_option
def quota(
    region: str | None,
    cpu: float,
    request: float | None,
    dry_run: bool,
    use_spot: bool,
    as_json: bool,
) -> None:
    """Show how many Fargate vCPUs the account may run at once, and how many it runs.

    With --request (and --use-spot, for Spot's) ask AWS for more; it may take days to decide.
    """  # fmt: skip
    from starburst_executor.aws import account
    from starburst_executor.costs.prices import fitting

    if cpu <= 0:
        raise click.BadParameter(f"{cpu:g} is not a number of vCPUs", param_hint="--cpu")
    if dry_run and request is None:
        raise click.UsageError("--dry-run requires --request")
    clients = _clients(region)
    rows: list[dict[str, Any]] = []
    for spot in (False, True):
        found = account.quota(clients, use_spot=spot)
        if request is not None and spot is use_spot:
            _request(clients, found, request, dry_run=dry_run, aside=as_json)
        used = account.used_vcpus(clients, use_spot=spot)
        rows.append(
            {
                "market": "Spot" if spot else "on-demand",
                "code": found.code,
                "vcpus": found.vcpus,
                "used": used,
                "workers_that_fit": fitting(found.vcpus, used, cpu),
                "requested": found.requested,
            }
        )
    if request is not None and not dry_run:
        rows[use_spot]["requested"] = request
    if as_json:
        click.echo(document("quota", {"region": clients.region, "cpu": cpu, "markets": rows}))
        return
    click.echo(f"Fargate vCPUs at once in {clients.region}")
    echo_table(
        ("market", "quota", "used", f"workers of {cpu:g} vCPU that fit", "requested", "code"),
        [
            (
                row["market"],
                f"{row['vcpus']:g}",
                f"{row['used']:g}",
                str(row["workers_that_fit"]),
                "-" if row["requested"] is None else f"{row['requested']:g}",
                row["code"],
            )
            for row in rows
        ],
    )  # fmt: skip


def _request(clients: Any, found: Any, vcpus: float, *, dry_run: bool, aside: bool) -> None:
    """Ask AWS to raise the quota to this many vCPUs, unless that makes no sense."""
    from starburst_executor.aws import account

    if vcpus <= found.vcpus:
        raise click.BadParameter(
            f"{vcpus:g} vCPUs are not more than the current {found.vcpus:g}", param_hint="--request"
        )  # fmt: skip
    if found.requested is not None:
        raise Failed(
            f"a request for {found.requested:g} vCPUs is already open (quota {found.code}); AWS "
            "takes one request at a time. The console's Service Quotas page has its history.",
            Exit.OTHER,
        )
    if dry_run:
        text = f"Would request {vcpus:g} vCPUs instead of {found.vcpus:g} (quota {found.code})"
    else:
        status = account.request_quota(clients, vcpus, use_spot=found.use_spot)
        text = f"Requested {vcpus:g} vCPUs: {status}"
    click.echo(text, err=aside)


# --- estimate ------------------------------------------------------------------------


@click.command()
@click.option("--tasks", type=click.IntRange(1), required=True, help="Number of tasks.")
@click.option("--seconds", type=click.FloatRange(0), required=True, help="Duration of each task.")
@click.option(
    "--max-workers", type=click.IntRange(1), required=True, help="Maximum number of workers."
)
@click.option("--cpu", type=float, default=1.0, show_default=True, help="vCPUs of a worker.")
@click.option("--memory", default="2GB", show_default=True, help="Memory of a worker.")
@click.option(
    "--launch-type",
    type=click.Choice(("FARGATE", "EC2")),
    default="FARGATE",
    show_default=True,
)
@click.option("--instance-type", metavar="NAME", help="With EC2, such as c8a.xlarge.")
@click.option(
    "--slots",
    type=int,
    default=1,
    show_default=True,
    help="Tasks that a worker runs at once.",
)
@click.option(
    "--max-hourly-cost",
    type=float,
    metavar="DOLLARS",
    help="Fail if it would cost more per hour.",
)
@click.option("--offline", is_flag=True, help="Do not ask AWS: use built-in prices, and no quota.")
@_spot_option
@_region_option
@json_option
def estimate(
    tasks: int,
    seconds: float,
    max_workers: int,
    cpu: float,
    memory: str,
    launch_type: str,
    instance_type: str | None,
    slots: int,
    max_hourly_cost: float | None,
    offline: bool,
    use_spot: bool,
    region: str | None,
    as_json: bool,
) -> None:
    """Estimate how long a run on AWS would take, what it would cost, and by which prices."""
    from starburst_executor.costs.estimate import estimate_run
    from starburst_executor.protocol.worker_spec import WorkerSpec

    try:
        spec = WorkerSpec(
            launcher="ecs",
            cpu=cpu,
            memory=memory,
            launch_type=cast(Any, launch_type),
            instance_type=instance_type,
            use_spot=use_spot,
            slots=slots,
        )
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    prices, fit, public_ip = _known(spec, region, offline=offline)
    try:
        found = estimate_run(
            spec,
            prices,
            tasks=tasks,
            task_seconds=seconds,
            workers=max_workers,
            fit=fit,
            public_ip=public_ip,
        )
    except ValueError as error:
        raise Failed(str(error), Exit.OTHER) from error
    if as_json:
        click.echo(document("estimate", _content(found, fit)))
    else:
        _echo(found, fit, max_workers)
    _check(max_hourly_cost, found)


def _known(spec: Any, region: str | None, *, offline: bool) -> tuple[Any, int | None, bool]:
    """Prices, how many workers fit in the quota (None: unknown), and if they have public IPs."""
    from starburst_executor import config
    from starburst_executor.aws import account
    from starburst_executor.aws.prices import prices_for
    from starburst_executor.costs.prices import built_in, fitting
    from starburst_executor.runtime import SystemRuntime

    settings = config.load().settings
    if offline:
        if spec.launch_type == "EC2":
            raise click.UsageError("the built-in prices cover Fargate only; omit --offline")
        name = region or settings.region
        return (
            built_in(name, use_spot=spec.use_spot),
            None,
            settings.assign_public_ip,
        )
    clients = _clients(region)
    with closing(SystemRuntime()) as runtime:
        prices = prices_for(spec, clients, account.date_of(runtime))
    fit = None
    if spec.launch_type == "FARGATE":
        vcpus = account.fargate_vcpus(clients, use_spot=spec.use_spot)
        fit = None if vcpus is None else fitting(vcpus.quota, vcpus.used, spec.cpu)
    return prices, fit, settings.assign_public_ip


def _content(found: Any, fit: int | None) -> dict[str, Any]:
    return {
        "workers": found.workers,
        "workers_that_fit": fit,
        "waves": found.waves,
        "seconds": found.seconds,
        "hourly_dollars": found.hourly,
        "compute_dollars": found.cost.compute,
        "request_dollars": found.cost.requests,
        "total_dollars": found.cost.total,
        "vcpu_seconds": found.cost.vcpu_seconds,
        "gb_seconds": found.cost.gb_seconds,
        "prices": found.cost.prices,
    }


def _echo(found: Any, fit: int | None, workers: int) -> None:
    amounts = found.cost
    waves = f", in {found.waves} waves" if found.waves > 1 else ""
    click.echo(
        f"Time:      about {_duration(found.seconds)} on {counted(found.workers, 'worker')}{waves}"
    )
    if fit is not None and fit < workers and found.workers == fit:
        click.echo(
            f"           (the quota has room for {fit}: `starburst-executor quota` can request "
            "more)"
        )
    hourly = f"{dollars(found.hourly)} an hour while all of them run"
    click.echo(f"Workers:   {dollars(amounts.compute)} ({hourly})")
    click.echo(f"Requests:  {dollars(amounts.requests)} to S3")
    click.echo(f"Total:     {dollars(amounts.total)}")
    prices = f"{amounts.prices}; excluding storage, logs, traffic, retries and taxes"
    width = shutil.get_terminal_size().columns
    click.echo(fill(f"Prices:    {prices}", width, subsequent_indent=" " * 11))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _check(max_hourly_cost: float | None, found: Any) -> None:
    from starburst_executor.costs.prices import check_hourly_cost

    if max_hourly_cost is None:
        return
    each = found.hourly / found.workers
    try:
        check_hourly_cost(max_hourly_cost, found.workers, each, found.cost.prices)
    except ValueError as error:
        raise Failed(str(error), Exit.OTHER) from error


VERBS: dict[str, click.Command] = {"estimate": estimate, "quota": quota}

"""Verbs for where workers run: config, setup, teardown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click
import msgspec

from starburst_executor.cli.exits import Exit, Failed
from starburst_executor.cli.options import json_option
from starburst_executor.cli.output import document, echo_table

if TYPE_CHECKING:
    from starburst_executor.aws.account import Clients
    from starburst_executor.aws.deployment.setup import Plan, SetupOptions

__all__ = ["VERBS"]

_TASK_SECONDS = 300.0  # Fargate takes 20 to 60 s to start a worker
_LOG_DAYS = ("1", "3", "5", "7", "14", "30", "60", "90", "180", "365")

_profile_option = click.option(
    "--profile",
    metavar="NAME",
    help="Profile in the configuration file; defaults to STARBURST_PROFILE, or default.",
)
_region_option = click.option(
    "--region",
    metavar="NAME",
    help="AWS region; defaults to that of the profile, or of your AWS settings.",
)
_stack_option = click.option(
    "--stack",
    metavar="NAME",
    help="CloudFormation stack; defaults to that of the profile, or starburst-executor.",
)
_yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")


# --- config --------------------------------------------------------------------------


@click.command()
@_profile_option
@json_option
def config(profile: str | None, as_json: bool) -> None:
    """Show every setting and where its value came from.

    Arguments come first, then STARBURST_ variables, then the configuration file, then built-in
    defaults.
    """
    from starburst_executor import config as settings

    found = settings.load(profile)
    values = msgspec.structs.asdict(found.settings)
    if as_json:
        content = {
            "file": str(settings.config_file()),
            "profile": found.profile,
            "settings": {
                name: {"value": value, "source": found.sources[name]}
                for name, value in values.items()
            },
        }
        click.echo(document("config", content))
        return
    click.echo(f"Profile {found.profile} of {settings.config_file()}")
    rows = [(name, _shown(value), found.sources[name]) for name, value in values.items()]
    echo_table(("setting", "value", "from"), rows)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value) or "-"
    return str(value).lower() if isinstance(value, bool) else value or "-"


# --- setup ---------------------------------------------------------------------------


@click.command()
@_profile_option
@_region_option
@_stack_option
@click.option(
    "--store",
    metavar="URL",
    help="A prefix in your own bucket: s3://bucket/prefix; with ?owner=ACCOUNT_ID in that of "
    "another account.",
)
@click.option(
    "--vpc", metavar="ID", help="The VPC for workers; defaults to the account's default VPC."
)
@click.option(
    "--subnets",
    metavar="ID,ID",
    help="Subnets for workers; defaults to the VPC's public ones.",
)
@click.option("--security-groups", metavar="ID,ID", help="Your own security groups for workers.")
@click.option("--cluster", metavar="NAME", help="Your own ECS cluster.")
@click.option(
    "--execution-role-arn",
    metavar="ARN",
    help="Your own role for ECS to pull images and write logs.",
)
@click.option("--task-role-arn", metavar="ARN", help="Your own role for workers and tasks.")
@click.option(
    "--instance-profile-arn",
    metavar="ARN",
    help="Your own instance profile for EC2 instances that workers run on.",
)
@click.option(
    "--instance-type",
    "instance_types",
    metavar="TYPE",
    multiple=True,
    help="Prepare for workers on EC2 instances of this type without starting any; repeatable.",
)
@click.option(
    "--kms-key",
    metavar="ARN",
    help="Your own KMS key to encrypt the store's objects.",
)
@click.option(
    "--log-days",
    type=click.Choice(_LOG_DAYS),
    help="How many days logs are kept; default 30.",
)
@click.option(
    "--assign-public-ip/--no-assign-public-ip",
    default=None,
    help="Whether workers get public addresses.",
)
@click.option(
    "--image",
    metavar="URI",
    help="Container image for workers, kept in the configuration file.",
)
@click.option(
    "--task/--no-task",
    default=True,
    help="Whether to run a test task at the end; it costs less than a cent.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be created, and stop.")
@click.option(
    "--print-template",
    is_flag=True,
    help="Print the CloudFormation template, and stop.",
)
@click.option(
    "--print-policy",
    is_flag=True,
    help="Print the IAM policies that are needed, and stop.",
)
@_yes_option
def setup(profile: str | None, **options: Any) -> None:
    """Create what workers need in an AWS account, or bring it up to date.

    It deploys one CloudFormation stack: a bucket, an ECS cluster, a log group, three roles, a
    security group and a gateway to S3. You can name what you already have instead. It writes the
    configuration file, and may be run again.
    """  # fmt: skip
    from starburst_executor import config as settings
    from starburst_executor.aws.deployment import setup as aws_setup
    from starburst_executor.aws.deployment.stack import template

    if options["print_template"]:
        click.echo(template(), nl=False)
        return
    name = settings.profile_name(profile)
    before = settings.profile_values(name)
    clients = _clients(options["region"], before)
    requested = _requested(options, before)
    if options["print_policy"]:
        _echo_policies(clients, requested)
        return
    try:
        plan = aws_setup.plan(clients, requested)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    _echo_plan(plan)
    if options["dry_run"]:
        return
    if not options["yes"]:
        click.confirm("Go ahead?", default=True, abort=True)
    values = _deploy(clients, plan)
    image = options["image"] or before.get("image")
    values |= {"image": image} if image else {}
    file = settings.write_profile(name, values)
    click.echo(f"Wrote profile {name} to {file}: StarburstExecutor() now starts its workers there.")
    if options["task"]:
        with _profile_set(name):
            _try(values)


def _clients(region: str | None, before: Mapping[str, Any]) -> Clients:
    from starburst_executor.aws.account import Clients

    named = region or os.environ.get("STARBURST_REGION") or before.get("region")
    return Clients(named or None)


def _requested(options: Mapping[str, Any], before: Mapping[str, Any]) -> Any:
    from starburst_executor.aws.deployment.setup import DEFAULT_STACK, SetupOptions

    return SetupOptions(
        stack=options["stack"] or before.get("stack") or DEFAULT_STACK,
        store=options["store"],
        vpc=options["vpc"],
        subnets=_ids(options["subnets"]),
        security_groups=_ids(options["security_groups"]),
        cluster=options["cluster"],
        execution_role_arn=options["execution_role_arn"],
        task_role_arn=options["task_role_arn"],
        instance_profile_arn=options["instance_profile_arn"],
        kms_key_arn=options["kms_key"],
        instance_types=options["instance_types"],
        log_days=int(options["log_days"]) if options["log_days"] else None,
        public_ip=options["assign_public_ip"],
    )


def _ids(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _echo_plan(plan: Plan) -> None:
    from starburst_executor.costs import prices

    verb = "Updates" if plan.found else "Creates"
    click.echo(f"{verb} the stack {plan.stack} in {plan.region}, account {plan.account}, with")
    for line in plan.makes:
        click.echo(f"  + {line}")
    click.echo("and uses")
    for line in plan.uses:
        click.echo(f"  = {line}")
    for line in plan.warnings:
        click.echo(click.style(f"  ! {line}", fg="yellow"))
    click.echo(
        f"While no worker runs, you pay only for storage: about ${prices.STORED_GB_MONTH} per GB "
        f"and month in S3 and ${prices.LOGGED_GB_MONTH} in logs (us-east-1, "
        f"{prices.TABLE_DATE:%Y-%m-%d})."
    )


def _deploy(clients: Clients, plan: Plan) -> dict[str, Any]:
    from starburst_executor.aws.deployment.setup import deploy
    from starburst_executor.runtime import SystemRuntime

    with closing(SystemRuntime()) as runtime:
        return deploy(clients, plan, runtime, _say)


def _say(line: str) -> None:
    click.echo(f"  {line}")


@contextmanager
def _profile_set(name: str) -> Iterator[None]:
    """Make the launcher use that profile."""
    before = os.environ.get("STARBURST_PROFILE")
    os.environ["STARBURST_PROFILE"] = name
    try:
        yield
    finally:
        del os.environ["STARBURST_PROFILE"]
        if before is not None:
            os.environ["STARBURST_PROFILE"] = before


def _try(values: Mapping[str, Any]) -> None:
    """Run a test task on a worker there."""
    from starburst_executor.errors import StarburstError
    from starburst_executor.executor import StarburstExecutor

    click.echo("Running a test task; a worker takes about a minute to start.")
    executor = StarburstExecutor(1, store=values["store"], launcher="ecs", name="setup")
    try:
        answer = executor.submit(sum, (1, 2)).result(_TASK_SECONDS)
    except (StarburstError, TimeoutError) as error:
        executor.cleanup()  # keeps what is stored, but no worker that costs money
        reason = str(error) or f"nothing came back within {_TASK_SECONDS:.0f} s"
        raise Failed(
            f"everything is set up, but the test task failed: {reason}\n"
            f"Once that is fixed, run setup again. `starburst-executor logs {executor.session_id} "
            "--workers` shows what workers printed.",
            Exit.OTHER,
        ) from error
    executor.shutdown()
    click.echo(f"A worker ran the test task (1 + 2 = {answer}).")


def _echo_policies(clients: Clients, requested: SetupOptions) -> None:
    from starburst_executor.aws.account import account_id, partition_of
    from starburst_executor.aws.deployment import policy
    from starburst_executor.aws.deployment.setup import bucket_name
    from starburst_executor.errors import AccountError

    try:
        account = account_id(clients)
    except AccountError:
        account = "ACCOUNT_ID"  # for an administrator to fill in
    stack, store = requested.stack, requested.store or ""
    bucket, _, prefix = store.removeprefix("s3://").partition("?")[0].partition("/")
    scope = policy.Scope(
        account=account,
        region=clients.region,
        bucket=bucket or bucket_name(stack, account, clients.region),
        prefix=f"{prefix.strip('/')}/" if prefix.strip("/") else "",
        stack=stack,
        partition=partition_of(clients.region),
        cluster=(requested.cluster or "").rpartition("/")[2] or None,
        roles=[arn for arn in (requested.execution_role_arn, requested.task_role_arn) if arn],
        kms_key=requested.kms_key_arn,
    )
    both = {
        "who runs sessions": policy.client_policy(scope),
        "who runs setup and teardown": policy.setup_policy(scope),
    }
    click.echo(json.dumps(both, indent=2))


# --- teardown ------------------------------------------------------------------------


@click.command()
@_profile_option
@_region_option
@_stack_option
@click.option("--delete-data", is_flag=True, help="Also delete the store, with all results.")
@click.option("--force", is_flag=True, help="Even if tasks are unfinished; they are abandoned.")
@_yes_option
def teardown(
    profile: str | None,
    region: str | None,
    stack: str | None,
    delete_data: bool,
    force: bool,
    yes: bool,
) -> None:
    """Remove what setup created; the bucket and its results stay unless --delete-data is given."""
    from starburst_executor import config as settings
    from starburst_executor.aws.deployment.setup import DEFAULT_STACK
    from starburst_executor.aws.deployment.stack import find_stack
    from starburst_executor.aws.deployment.teardown import teardown as take_down
    from starburst_executor.runtime import SystemRuntime

    name = settings.profile_name(profile)
    before = settings.profile_values(name)
    clients = _clients(region, before)
    stack = stack or before.get("stack") or DEFAULT_STACK
    found = find_stack(clients, stack)
    if found is None:
        raise Failed(
            f"there is no stack {stack} in {clients.region}; name it with --stack, --region or "
            "--profile",
            Exit.NOT_FOUND,
        )
    with closing(SystemRuntime()) as runtime:
        if "Store" in found.outputs:
            _end_sessions(
                f"{found.outputs['Store']}?region={clients.region}",
                runtime,
                force=force,
            )
        if not yes:
            also = " and deletes all results" if delete_data else ""
            click.confirm(
                f"This removes the stack {stack} in {clients.region}{also}. Go ahead?",
                abort=True,
            )
        remains = take_down(clients, found, runtime, _say, delete_data=delete_data)
    if before.get("stack") == stack:
        click.echo(f"Removed profile {name} from {settings.remove_profile(name)}.")
    click.echo(f"The stack {stack} is gone.")
    for line in remains:
        click.echo(f"Still there: {line}.")


def _end_sessions(url: str, runtime: Any, *, force: bool) -> None:
    from starburst_executor.coordination.administration import (
        terminate_all,
        unfinished_sessions,
    )
    from starburst_executor.errors import StoreMissing
    from starburst_executor.storage.url import open_store

    with closing(open_store(url)) as store:
        try:
            unfinished = unfinished_sessions(store)
        except StoreMissing:
            return
        if not unfinished:
            return
        names = ", ".join(s.session_id for s in unfinished[:5])
        what = f"tasks are unfinished in {len(unfinished)} sessions of {store.url}: {names}"
        if not force:
            raise Failed(
                f"{what}. Wait for them, end them with `starburst-executor cleanup`, or abandon "
                "them with --force.",
                Exit.OTHER,
            )
        click.echo(f"Abandoning: {what}")
        terminate_all(store, unfinished, runtime)


VERBS: dict[str, click.Command] = {
    "config": config,
    "setup": setup,
    "teardown": teardown,
}

"""Whose credentials are in use; quotas, what is used of them, prices and their age.

And that the policies name every call that the code makes.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore import xform_name
from click.testing import CliRunner, Result

from starburst_executor.aws import account, prices
from starburst_executor.aws.account import Credentials, find_credentials, identity
from starburst_executor.aws.deployment import policy
from starburst_executor.cli.exits import Exit
from starburst_executor.cli.main import main
from starburst_executor.costs import prices as table
from starburst_executor.errors import AccountDenied, AccountError
from starburst_executor.protocol.worker_spec import WorkerSpec
from tests.support.scripted import Scripted
from tests.support.servers import S3Server

TODAY = date(2026, 10, 1)
SPEC = WorkerSpec(launcher="ecs", cpu=4, memory="8GB")
SPOT = WorkerSpec(launcher="ecs", cpu=4, memory="8GB", use_spot=True)
INSTANCE = {"launcher": "ecs", "cpu": 2, "memory": "4GB", "launch_type": "EC2"}
EC2 = WorkerSpec(**INSTANCE, instance_type="c8a.xlarge")  # type: ignore[arg-type]
EC2_SPOT = WorkerSpec(**INSTANCE, instance_type="c8a.xlarge", use_spot=True)  # type: ignore[arg-type]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Scripted]:
    """Scripted answers for whoever asks, and a cache folder of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    scripted = Scripted()
    monkeypatch.setattr(account.Clients.__init__, "__defaults__", (None, scripted.make))
    yield scripted
    scripted.assert_used_up()


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


# --- credentials ---------------------------------------------------------------------


def test_credentials_are_found_where_the_aws_settings_lead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert find_credentials() is None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert find_credentials() == Credentials(source="env", key_id="AKIDEXAMPLE")


def test_a_profile_that_does_not_exist_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    with pytest.raises(AccountDenied, match="nosuch"):
        find_credentials()


def test_sts_says_whose_the_credentials_are(
    ministack: S3Server, s3_env: Callable[..., None]
) -> None:
    s3_env(ministack)
    assert identity().startswith("arn:aws:")


# --- quotas --------------------------------------------------------------------------


def script_quota(
    scripted: Scripted, vcpus: float, *, spot: bool, requested: float | None = None
) -> None:
    code = "L-36FBB829" if spot else "L-3032A538"
    names = {"ServiceCode": "fargate", "QuotaCode": code}
    found = {"QuotaName": "vCPUs", "Value": vcpus, "Adjustable": True}
    scripted.answer("service-quotas", "get_service_quota", {"Quota": found}, **names)
    history = [{"Status": "DENIED", "DesiredValue": 9999.0}]
    if requested:
        history.append({"Status": "PENDING", "DesiredValue": requested})
    scripted.answer(
        "service-quotas",
        "list_requested_service_quota_change_history_by_quota",
        {"RequestedQuotas": history},
        **names,
    )


def script_tasks(scripted: Scripted, *tasks: tuple[str, str | None]) -> None:
    """One cluster with Fargate tasks: their CPU units and capacity providers."""
    scripted.answer("ecs", "list_clusters", {"clusterArns": ["arn:c"]})
    arns = [f"arn:t/{number}" for number in range(len(tasks))]
    scripted.answer(
        "ecs",
        "list_tasks",
        {"taskArns": arns},
        cluster="arn:c",
        launchType="FARGATE",
        maxResults=100,
    )
    if not tasks:
        return
    described = [
        {"cpu": cpu, **({"capacityProviderName": name} if name else {})} for cpu, name in tasks
    ]
    scripted.answer("ecs", "describe_tasks", {"tasks": described}, cluster="arn:c", tasks=arns)


def test_the_applied_quota_and_the_open_request_are_read(scripted: Scripted) -> None:
    script_quota(scripted, 16.0, spot=True, requested=200.0)
    found = account.quota(scripted.clients(), use_spot=True)
    assert (found.vcpus, found.requested, found.code) == (16.0, 200.0, "L-36FBB829")


def test_a_quota_that_was_never_changed_is_awss_default(scripted: Scripted) -> None:
    scripted.refuse("service-quotas", "get_service_quota", "NoSuchResourceException")
    scripted.answer("service-quotas", "get_aws_default_service_quota", {"Quota": {"Value": 6.0}})
    scripted.answer(
        "service-quotas",
        "list_requested_service_quota_change_history_by_quota",
        {"RequestedQuotas": []},
    )
    found = account.quota(scripted.clients(), use_spot=False)
    assert (found.vcpus, found.requested) == (6.0, None)


@pytest.mark.parametrize(("spot", "used"), [(False, 4.25), (True, 2.0)])
def test_what_runs_is_counted_by_market(spot: bool, used: float, scripted: Scripted) -> None:
    script_tasks(scripted, ("4096", "FARGATE"), ("2048", "FARGATE_SPOT"), ("256", None))
    assert account.used_vcpus(scripted.clients(), use_spot=spot) == used


def test_every_cluster_and_page_is_counted(scripted: Scripted) -> None:
    scripted.answer("ecs", "list_clusters", {"clusterArns": ["arn:c"], "nextToken": "n"})
    scripted.answer("ecs", "list_tasks", {"taskArns": ["arn:t/1"], "nextToken": "m"})
    scripted.answer("ecs", "describe_tasks", {"tasks": [{"cpu": "1024"}]})
    scripted.answer("ecs", "list_tasks", {"taskArns": ["arn:t/2"]})
    scripted.answer("ecs", "describe_tasks", {"tasks": [{"cpu": "1024"}]})
    scripted.answer("ecs", "list_clusters", {"clusterArns": ["arn:d"]}, nextToken="n")
    scripted.answer("ecs", "list_tasks", {"taskArns": []})
    assert account.used_vcpus(scripted.clients(), use_spot=False) == 2.0


def test_whoever_launches_goes_on_without_a_quota(scripted: Scripted) -> None:
    scripted.refuse("service-quotas", "get_service_quota", "AccessDeniedException", "no", 403)
    assert account.fargate_vcpus(scripted.clients(), use_spot=False) is None


def test_whoever_launches_hears_quota_and_use(scripted: Scripted) -> None:
    script_quota(scripted, 6.0, spot=False)
    script_tasks(scripted, ("4096", "FARGATE"))
    found = account.fargate_vcpus(scripted.clients(), use_spot=False)
    assert found == account.Vcpus(quota=6.0, used=4.0)


def test_the_quota_verb_says_how_many_workers_fit(scripted: Scripted) -> None:
    script_quota(scripted, 16.0, spot=False)
    script_tasks(scripted, ("4096", "FARGATE"))
    script_quota(scripted, 6.0, spot=True, requested=64.0)
    script_tasks(scripted)
    document = json.loads(run("quota", "--cpu", "4", "--json").output)
    assert document["schema"] == 1
    markets = document["quota"]["markets"]
    assert [m["workers_that_fit"] for m in markets] == [3, 1]
    assert [m["requested"] for m in markets] == [None, 64.0]


def test_an_increase_can_be_asked_for(scripted: Scripted) -> None:
    for spot in (False, True):
        script_quota(scripted, 6.0, spot=spot)
        script_tasks(scripted)
    scripted.answer(
        "service-quotas",
        "request_service_quota_increase",
        {"RequestedQuota": {"Status": "PENDING"}},
        ServiceCode="fargate",
        QuotaCode="L-36FBB829",
        DesiredValue=64.0,
    )
    output = run("quota", "--request", "64", "--use-spot").output
    assert "Requested 64 vCPUs: PENDING" in output
    assert "64" in next(line for line in output.splitlines() if "L-36FBB829" in line)


def test_a_dry_run_asks_for_no_increase(scripted: Scripted) -> None:
    for spot in (False, True):
        script_quota(scripted, 6.0, spot=spot)
        script_tasks(scripted)
    output = run("quota", "--request", "64", "--dry-run").output
    assert "Would request 64 vCPUs instead of 6 (quota L-3032A538)" in output
    run("quota", "--dry-run", code=Exit.USAGE)


def test_less_than_there_is_cannot_be_asked_for(scripted: Scripted) -> None:
    script_quota(scripted, 16.0, spot=False)
    output = run("quota", "--request", "16", code=Exit.USAGE).output
    assert "not more than the current 16" in output


def test_a_second_request_waits_for_the_first(scripted: Scripted) -> None:
    script_quota(scripted, 6.0, spot=False, requested=64.0)
    output = run("quota", "--request", "128", code=Exit.OTHER).output
    assert "a request for 64 vCPUs is already open" in output


def test_a_missing_permission_ends_with_its_own_exit_code(scripted: Scripted) -> None:
    scripted.refuse("service-quotas", "get_service_quota", "AccessDeniedException", "no", 403)
    assert "--print-policy" in run("quota", code=Exit.CREDENTIALS).output


def test_expired_credentials_are_named_as_such(scripted: Scripted) -> None:
    scripted.refuse("sts", "get_caller_identity", "ExpiredToken", "expired", 403)
    with pytest.raises(AccountDenied, match="wrong or have expired"):
        account.account_id(scripted.clients())


# --- prices --------------------------------------------------------------------------


def product(usage: str, dollars: str, **attributes: str) -> str:
    dimensions = {
        "free": {"pricePerUnit": {"USD": "0.0000000000"}},
        "paid": {"pricePerUnit": {"USD": dollars}},
    }
    return json.dumps(
        {
            "product": {"attributes": {"usagetype": usage, **attributes}},
            "terms": {"OnDemand": {"sku.term": {"priceDimensions": dimensions}}},
        }
    )


def script_requests(scripted: Scripted) -> None:
    products = [
        product("EU-Requests-Tier1", "0.0000055"),
        product("EU-Requests-Tier2", "0.00000044"),
        product("EU-Requests-GDA-Tier1", "0.7"),
    ]
    scripted.answer("pricing", "get_products", {"PriceList": products})


def script_fargate(scripted: Scripted) -> None:
    script_requests(scripted)
    first = [
        product("EU-Fargate-vCPU-Hours:perCPU", "0.05"),
        product("EU-Fargate-ARM-vCPU-Hours:perCPU", "0.04"),
        product("EU-Fargate-Windows-vCPU-Hours:perCPU", "0.9"),
    ]
    second = [
        product("EU-Fargate-GB-Hours", "0.006"),
        product("EU-Fargate-ARM-GB-Hours", "0.005"),
        product("EU-Fargate-EphemeralStorage-GB-Hours", "0.8"),
    ]
    scripted.answer("pricing", "get_products", {"PriceList": first, "NextToken": "n"})
    scripted.answer("pricing", "get_products", {"PriceList": second})


def test_live_prices_are_of_the_region_and_dated(scripted: Scripted) -> None:
    script_fargate(scripted)
    found = prices.prices_for(SPEC, scripted.clients(), TODAY)
    assert (found.vcpu_hour, found.gb_hour) == (0.05, 0.006)
    assert (found.write, found.read) == (0.0000055, 0.00000044)
    assert str(found) == "on-demand prices of eu-west-1 from the AWS Pricing API, 2026-10-01"


def test_arm_has_prices_of_its_own(scripted: Scripted) -> None:
    script_fargate(scripted)
    found = prices.prices_for(SPEC, scripted.clients(), TODAY, architecture="ARM64")
    assert (found.vcpu_hour, found.gb_hour) == (0.04, 0.005)


def test_the_price_of_fargate_spot_says_how_it_was_reckoned(scripted: Scripted) -> None:
    script_fargate(scripted)
    found = prices.prices_for(SPOT, scripted.clients(), TODAY)
    assert found.vcpu_hour == pytest.approx(0.05 * 0.01288871 / 0.04048)
    assert "times 0.32, Spot's share" in str(found)


def script_instance(scripted: Scripted) -> None:
    script_requests(scripted)
    one = product("EU-BoxUsage:c8a.xlarge", "0.2", vcpu="4", memory="8 GiB")
    scripted.answer("pricing", "get_products", {"PriceList": [one]})


def test_an_instance_costs_what_the_pricing_api_says(scripted: Scripted) -> None:
    script_instance(scripted)
    found = prices.prices_for(EC2, scripted.clients(), TODAY)
    assert (found.instance_hour, found.instance_vcpus) == (0.2, 4)
    assert found.instance_gb == pytest.approx(8 * 0.925)  # the system has the rest
    assert table.worker_hour(EC2, found) == pytest.approx(0.2)


def test_a_spot_instance_costs_what_the_dearest_zone_asks_now(
    scripted: Scripted,
) -> None:
    script_instance(scripted)
    early, late = (datetime(2026, 10, 1, hour, tzinfo=UTC) for hour in (1, 2))
    history = [
        {"AvailabilityZone": "a", "SpotPrice": "0.9", "Timestamp": early},
        {"AvailabilityZone": "a", "SpotPrice": "0.06", "Timestamp": late},
        {"AvailabilityZone": "b", "SpotPrice": "0.07", "Timestamp": early},
    ]
    scripted.answer("ec2", "describe_spot_price_history", {"SpotPriceHistory": history})
    found = prices.prices_for(EC2_SPOT, scripted.clients(), TODAY)
    assert found.instance_hour == 0.07
    assert "Spot price history (b)" in str(found)


def test_an_unknown_instance_type_is_named(scripted: Scripted) -> None:
    script_requests(scripted)
    scripted.answer("pricing", "get_products", {"PriceList": []})
    with pytest.raises(AccountError, match=r"c8a\.xlarge for eu-west-1"):
        prices.prices_for(EC2, scripted.clients(), TODAY)


def test_prices_are_kept_and_asked_for_again_when_old(scripted: Scripted) -> None:
    script_fargate(scripted)
    first = prices.prices_for(SPEC, scripted.clients(), TODAY)
    later = date(2026, 10, 31)
    assert prices.prices_for(SPEC, scripted.clients(), later) == first
    script_fargate(scripted)
    anew = prices.prices_for(SPEC, scripted.clients(), date(2026, 11, 1))
    assert anew.taken == date(2026, 11, 1)


def test_old_prices_beat_none_and_say_their_date(scripted: Scripted) -> None:
    script_fargate(scripted)
    prices.prices_for(SPEC, scripted.clients(), TODAY)
    scripted.refuse("pricing", "get_products", "AccessDeniedException", "no", 403)
    found = prices.prices_for(SPEC, scripted.clients(), date(2027, 10, 1))
    assert found.taken == TODAY


def test_without_any_price_the_built_in_table_serves_and_says_so(
    scripted: Scripted,
) -> None:
    scripted.refuse("pricing", "get_products", "AccessDeniedException", "no", 403)
    found = prices.prices_for(SPEC, scripted.clients(), TODAY)
    assert found == table.built_in("eu-west-1")
    assert "built-in table, because prices for eu-west-1 are not available" in str(found)


def test_a_damaged_cache_is_asked_for_anew(scripted: Scripted) -> None:
    prices.cache_file().parent.mkdir(parents=True)
    prices.cache_file().write_text('{"torn')
    script_fargate(scripted)
    assert prices.prices_for(SPEC, scripted.clients(), TODAY).vcpu_hour == 0.05


def test_a_cache_that_cannot_be_written_does_no_harm(scripted: Scripted, tmp_path: Path) -> None:
    script_fargate(scripted)
    (tmp_path / "file").touch()
    file = tmp_path / "file" / "prices.json"
    assert prices.prices_for(SPEC, scripted.clients(), TODAY, file=file).vcpu_hour == 0.05


# --- estimates -----------------------------------------------------------------------

WISH = (
    "estimate",
    "--tasks",
    "100",
    "--seconds",
    "600",
    "--max-workers",
    "10",
    "--cpu",
    "4",
    "--memory",
    "8GB",
)


def test_an_estimate_says_its_prices_and_reckons_with_the_quota(
    scripted: Scripted,
) -> None:
    script_fargate(scripted)
    script_quota(scripted, 16.0, spot=False)
    script_tasks(scripted)
    output = run(*WISH).output
    assert "on 4 workers, in 25 waves" in output
    assert "the quota has room for 4" in output
    assert "from the AWS Pricing API" in output


def test_an_offline_estimate_asks_nobody(scripted: Scripted) -> None:
    document = json.loads(run(*WISH, "--offline", "--json").output)["estimate"]
    assert document["workers"] == 10
    assert document["workers_that_fit"] is None
    assert document["prices"]["source"].startswith("the built-in table")
    hours = 10 * (60 + 10 * 600) / 3600
    assert document["compute_dollars"] == pytest.approx(hours * (0.19748 + 0.005))


def test_too_costly_estimates_end_with_an_error(scripted: Scripted) -> None:
    output = run(*WISH, "--offline", "--max-hourly-cost", "1", code=Exit.OTHER).output
    assert "use max_workers=4" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "8"], "is not an amount of memory"),
        (["--launch-type", "EC2"], "needs an instance_type"),
        (
            ["--launch-type", "EC2", "--instance-type", "c8a.xlarge"],
            "omit --offline",
        ),
    ],
)
def test_wrong_wishes_are_wrong_usage(arguments: list[str], said: str, scripted: Scripted) -> None:
    assert said in run(*WISH, "--offline", *arguments, code=Exit.USAGE).output


# --- what the code calls, and what the policies name ---------------------------------

PACKAGE = Path(account.__file__).parent
# Which services' clients a module has, where a call's name alone does not tell.
SERVICES = (
    "s3",
    "ecs",
    "autoscaling",
    "logs",
    "ec2",
    "sts",
    "iam",
    "cloudformation",
    "service-quotas",
    "pricing",
)
MODULES = {
    "s3": ("s3", "s3_transfer"),
    "placement": ("ecs/placement", "ecs/instances"),
    "capacity": ("ecs/capacity",),
    "removal": ("deployment/removal",),
    "ecs": ("ecs/api", "ecs/logs"),
    "account": ("account",),
    "prices": ("prices",),
    "setup": (
        "deployment/setup",
        "deployment/stack",
        "deployment/network",
        "deployment/teardown",
    ),
}


def operations() -> dict[str, set[str]]:
    """Python name of an operation -> "service:Operation", of the services that the package uses."""
    session = botocore.session.get_session()
    found: dict[str, set[str]] = {}
    for service in SERVICES:
        for name in session.get_service_model(service).operation_names:
            found.setdefault(xform_name(name), set()).add(f"{service}:{name}")
    return found


def names_in(module: str) -> set[str]:
    """Attributes and texts in a module that are the name of an operation: calls and paginators."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    texts = {
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    return attributes | texts


@pytest.mark.parametrize("group", policy.CALLS)
def test_policies_name_every_call_that_the_code_makes_and_no_other(group: str) -> None:
    known = operations()
    made = {
        operation
        for module in MODULES[group]
        for name in names_in(module) & known.keys()
        for operation in known[name]
    }
    stated = policy.CALLS[group].keys()
    unstated = {o for o in made - stated if xform_name(o.partition(":")[2]) not in shared(stated)}
    assert not unstated
    assert not stated - made


def shared(stated: Any) -> set[str]:
    """Names of the stated operations, which other services may have too."""
    return {xform_name(operation.partition(":")[2]) for operation in stated}


def test_every_operation_stated_exists() -> None:
    everything = {operation for names in operations().values() for operation in names}
    for calls in policy.CALLS.values():
        assert calls.keys() <= everything


def test_every_module_that_makes_calls_is_in_a_group() -> None:
    grouped = {module for modules in MODULES.values() for module in modules}
    known = operations().keys()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        called = {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        assert not called & known or module in grouped, module

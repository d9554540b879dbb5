"""Set-up and tear-down: on an emulator end to end, and on scripted answers where it has none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from click.testing import CliRunner, Result

from starburst_executor import StarburstExecutor, config
from starburst_executor.aws.account import Clients
from starburst_executor.aws.deployment import policy
from starburst_executor.aws.deployment import setup as aws_setup
from starburst_executor.aws.deployment.network import find_network
from starburst_executor.aws.deployment.setup import SetupOptions
from starburst_executor.aws.deployment.stack import (
    Stack,
    find_stack,
    put_stack,
    template,
)
from starburst_executor.cli.exits import Exit
from starburst_executor.cli.main import main
from starburst_executor.errors import AccountDenied, AccountError
from starburst_executor.runtime import SystemRuntime
from tests.support import servers
from tests.support.cfn import Loader
from tests.support.scripted import Scripted
from tests.support.servers import S3Server

ACCOUNT = "000000000000"
BUCKET = f"starburst-executor-{ACCOUNT}-us-east-1"


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An emulator of these tests' own: they look at the whole account."""
    with servers.ministack(tmp_path_factory.mktemp("aws")) as server:
        iam = boto3.client(
            "iam",
            endpoint_url=server.endpoint,
            region_name="us-east-1",
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
        )
        iam.create_service_linked_role(AWSServiceName="ecs.amazonaws.com")
        iam.close()
        yield server


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starburst_executor.aws.deployment.stack._LOOK_SECONDS", 0.01)
    monkeypatch.setattr("starburst_executor.aws.deployment.teardown._LOOK_SECONDS", 0.01)
    monkeypatch.setattr("starburst_executor.aws.deployment.removal._LOOK_SECONDS", 0.01)
    monkeypatch.setattr("starburst_executor.aws.ecs.requests._FIRST_PAUSE", 0.01)


@pytest.fixture
def account(
    aws: S3Server,
    s3_env: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Clients:
    """The emulator's account, and a home without configuration."""
    s3_env(aws)
    monkeypatch.setenv("HOME", str(tmp_path))
    return Clients("us-east-1")


def run(*arguments: str, code: int = 0) -> Result:
    if arguments[0] == "setup":
        arguments += ("--no-task",)  # this emulator's workers are no processes
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def buckets(account: Clients) -> set[str]:
    return {b["Name"] for b in account.get("s3").list_buckets()["Buckets"]}


def left_over(account: Clients) -> list[str]:
    """What is there of what setup makes, besides buckets."""
    roles = account.get("iam").list_roles()["Roles"]
    groups = account.get("ec2").describe_security_groups()["SecurityGroups"]
    logs = account.get("logs").describe_log_groups()["logGroups"]
    endpoints = account.get("ec2").describe_vpc_endpoints()["VpcEndpoints"]
    profiles = account.get("iam").list_instance_profiles()["InstanceProfiles"]
    made = account.get("autoscaling").describe_auto_scaling_groups()
    templates = account.get("ec2").describe_launch_templates()["LaunchTemplates"]
    providers = account.get("ecs").describe_capacity_providers()["capacityProviders"]
    return [
        *(r["RoleName"] for r in roles if not r["Path"].startswith("/aws-service-role/")),
        *(g["GroupName"] for g in groups if g["GroupName"] != "default"),
        *(g["logGroupName"] for g in logs),
        *(e["VpcEndpointId"] for e in endpoints),
        *(p["InstanceProfileName"] for p in profiles),
        *(g["AutoScalingGroupName"] for g in made["AutoScalingGroups"]),
        *(t["LaunchTemplateName"] for t in templates),
        *(p["name"] for p in providers if not p["name"].startswith("FARGATE")),
    ]


# --- on the emulator -----------------------------------------------------------------


def test_setup_run_teardown_leaves_nothing(account: Clients) -> None:
    before = buckets(account)
    output = run("setup", "--yes").output
    # The emulator's default VPC has no internet gateway, so its subnets are private.
    for part in ("bucket s3://", "security group", "gateway endpoint to S3 in the private route"):
        assert part in output
    deployment = config.load_deployment()
    assert deployment is not None
    assert deployment.cluster.endswith(":cluster/starburst-executor")
    assert deployment.store == f"s3://{BUCKET}?region=us-east-1&owner={ACCOUNT}"
    assert all(name.startswith("sg-") for name in deployment.security_groups)
    assert config.load().settings.launcher == "ecs"

    with StarburstExecutor(1, launcher="local") as executor:
        assert executor.submit(sum, (1, 2)).result(60) == 3
        assert executor._engine.session.url.startswith(f"s3://{BUCKET}/sessions/")

    output = run("teardown", "--yes", "--delete-data").output
    assert "Still there" not in output
    assert buckets(account) == before
    assert left_over(account) == []
    assert config.load_deployment() is None


def test_setup_again_changes_nothing_and_writes_the_same_file(account: Clients) -> None:
    run("setup", "--yes")
    first = config.config_file().read_text()
    config.config_file().unlink()  # as on another machine
    assert "nothing to change" in run("setup", "--yes").output
    assert config.config_file().read_text() == first
    run("teardown", "--yes", "--delete-data")


def test_setup_updates_in_place_and_remembers_what_it_was_told(
    account: Clients,
) -> None:
    run("setup", "--yes", "--log-days", "7")
    run("setup", "--yes", "--no-assign-public-ip", "--image", "registry/image:1")
    found = find_stack(account, "starburst-executor")
    assert found is not None
    assert found.status == "UPDATE_COMPLETE" or found.status == "CREATE_COMPLETE"
    assert found.parameters["LogRetentionDays"] == "7"
    deployment = config.load_deployment()
    assert deployment is not None
    assert deployment.image == "registry/image:1"
    assert not deployment.assign_public_ip
    run("teardown", "--yes", "--delete-data")


def test_results_stay_and_are_found_by_the_next_setup(account: Clients) -> None:
    run("setup", "--yes")
    account.get("s3").put_object(Bucket=BUCKET, Key="sessions/mine", Body=b"result")
    output = run("teardown", "--yes").output
    assert f"Still there: the bucket s3://{BUCKET}/ with its results" in output
    assert "--delete-data" in output
    assert BUCKET in buckets(account)

    assert "which exists" in run("setup", "--yes").output
    kept = account.get("s3").get_object(Bucket=BUCKET, Key="sessions/mine")["Body"]
    assert kept.read() == b"result"
    run("teardown", "--yes", "--delete-data")
    assert BUCKET not in buckets(account)


def test_a_bucket_that_was_brought_along_loses_the_store_only(account: Clients) -> None:
    s3 = account.get("s3")
    s3.create_bucket(Bucket="starburst-executor-of-mine")
    s3.put_object(Bucket="starburst-executor-of-mine", Key="other/thing", Body=b"x")
    run("setup", "--yes", "--store", "s3://starburst-executor-of-mine/runs")
    s3.put_object(Bucket="starburst-executor-of-mine", Key="runs/a", Body=b"x")
    assert config.load().settings.store.startswith("s3://starburst-executor-of-mine/runs?")
    output = run("teardown", "--yes", "--delete-data").output
    assert "which setup did not create" in output
    found = s3.list_objects_v2(Bucket="starburst-executor-of-mine")["Contents"]
    assert [item["Key"] for item in found] == ["other/thing"]
    assert BUCKET not in buckets(account)


def test_a_dry_run_changes_nothing(account: Clients) -> None:
    before = buckets(account)
    output = run("setup", "--dry-run").output
    assert "Creates the stack starburst-executor in us-east-1" in output
    assert "you pay only for storage" in output
    assert buckets(account) == before
    assert find_stack(account, "starburst-executor") is None
    assert not config.config_file().exists()


def test_no_changes_nothing(account: Clients) -> None:
    result = CliRunner().invoke(main, ["setup"], input="n\n")
    assert result.exit_code == 1
    assert find_stack(account, "starburst-executor") is None


def test_teardown_refuses_while_tasks_are_unfinished(account: Clients) -> None:
    run("setup", "--yes")
    executor = StarburstExecutor(1, launcher="local", keep=True)
    executor._engine.autoscaler.close()  # no worker takes it
    executor.submit(pow, 2, 3)
    session_id = executor.detach()
    output = run("teardown", "--yes", code=Exit.OTHER).output
    assert session_id in output
    assert "--force" in output
    assert find_stack(account, "starburst-executor") is not None
    output = run("teardown", "--yes", "--force", "--delete-data").output
    assert "Abandoning" in output
    assert find_stack(account, "starburst-executor") is None


def test_teardown_deregisters_the_definitions_of_its_role_and_no_other(
    account: Clients,
) -> None:
    run("setup", "--yes")
    deployment = config.load_deployment()
    assert deployment is not None
    ecs = account.get("ecs")
    for family, role in (
        ("starburst-0123456789abcdef", deployment.task_role_arn),
        ("starburst-fedcba9876543210", f"arn:aws:iam::{ACCOUNT}:role/other"),
        ("mine", deployment.task_role_arn),
    ):
        container = {"name": "worker", "image": "image", "memory": 512}
        ecs.register_task_definition(
            family=family, taskRoleArn=role, containerDefinitions=[container]
        )
    run("teardown", "--yes", "--delete-data")
    left = ecs.list_task_definitions(status="ACTIVE")["taskDefinitionArns"]
    names = {arn.rpartition("/")[2] for arn in left}
    assert names == {"starburst-fedcba9876543210:1", "mine:1"}


def test_instance_types_are_prepared_at_no_instances_and_taken_down_again(
    account: Clients,
) -> None:
    wish = ("--instance-type", "m5.large", "--instance-type", "c5.xlarge")
    assert "capacity providers for m5.large (" in run("setup", "--dry-run", *wish).output
    assert not [n for n in left_over(account) if n.startswith("starburst-m5")]
    output = run("setup", "--yes", *wish).output
    assert output.count(": no instances") >= 4
    run("setup", "--yes", *wish)  # again, which changes nothing
    cluster = config.load_deployment()
    assert cluster is not None
    [found] = account.get("ecs").describe_clusters(clusters=[cluster.cluster])["clusters"]
    names = found["capacityProviders"]
    assert {"FARGATE", "FARGATE_SPOT"} <= set(names)
    assert len(names) == len(set(names)) == 6
    groups = account.get("autoscaling").describe_auto_scaling_groups()
    for group in groups["AutoScalingGroups"]:
        assert (group["MinSize"], group["DesiredCapacity"]) == (0, 0)
        assert group["NewInstancesProtectedFromScaleIn"]
    output = run("teardown", "--yes", "--delete-data").output
    assert output.count("removing capacity provider starburst-m5-large-") == 2
    assert left_over(account) == []


def test_teardown_leaves_the_instances_of_others_on_a_shared_cluster(
    account: Clients,
) -> None:
    account.get("ecs").create_cluster(
        clusterName="shared", capacityProviders=["FARGATE", "FARGATE_SPOT"]
    )
    wish = ("--cluster", "shared", "--instance-type", "m5.large")
    run("setup", "--yes", *wish)
    run("setup", "--yes", "--profile", "lab", "--stack", "lab", *wish)
    run("teardown", "--yes", "--delete-data")
    [found] = account.get("ecs").describe_clusters(clusters=["shared"])["clusters"]
    kept = [n for n in found["capacityProviders"] if n.startswith("starburst-")]
    assert len(kept) == 2
    assert set(kept) <= set(left_over(account))
    run("teardown", "--yes", "--delete-data", "--profile", "lab")
    [found] = account.get("ecs").describe_clusters(clusters=["shared"])["clusters"]
    assert found["capacityProviders"] == ["FARGATE", "FARGATE_SPOT"]
    assert left_over(account) == []
    account.get("ecs").delete_cluster(cluster="shared")


def test_a_key_and_an_instance_profile_that_were_brought_along_are_remembered(
    account: Clients,
) -> None:
    key = f"arn:aws:kms:us-east-1:{ACCOUNT}:key/0123-abc"
    profile = f"arn:aws:iam::{ACCOUNT}:instance-profile/mine"
    run("setup", "--yes", "--kms-key", key, "--instance-profile-arn", profile)
    output = run("setup", "--yes").output
    assert key in output
    found = find_stack(account, "starburst-executor")
    assert found is not None
    assert found.parameters["KmsKeyArn"] == key
    assert config.load().settings.instance_profile_arn == profile
    run("teardown", "--yes", "--delete-data")


def test_teardown_of_nothing_says_what_was_looked_for(account: Clients) -> None:
    output = run("teardown", "--stack", "other", code=Exit.NOT_FOUND).output
    assert "no stack other in us-east-1" in output


def test_profiles_keep_two_stacks_apart(account: Clients) -> None:
    run("setup", "--yes")
    run("setup", "--yes", "--profile", "lab", "--stack", "lab")
    one, two = config.load_deployment(), config.load_deployment("lab")
    assert one is not None
    assert two is not None
    assert one.cluster != two.cluster
    assert one.store != two.store
    run("teardown", "--yes", "--delete-data", "--profile", "lab")
    assert config.load_deployment() == one
    run("teardown", "--yes", "--delete-data")
    assert left_over(account) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stack", "Not_This"], "lowercase letters"),
        (["--store", "/a/directory"], "s3://bucket/prefix"),
        (["--log-days", "8"], "8"),
        (["--kms-key", "alias/mine"], "is not the ARN of a KMS key"),
    ],
)
def test_wrong_wishes_are_refused_before_anything_is_made(
    arguments: list[str], said: str, account: Clients
) -> None:
    assert said in run("setup", "--yes", *arguments, code=Exit.USAGE).output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--store", "s3://is-not-there-at-all/x"], "does not exist"),
        (["--cluster", "is-not-there"], "the cluster is-not-there does not exist"),
    ],
)
def test_what_is_brought_along_must_be_there(
    arguments: list[str], said: str, account: Clients
) -> None:
    assert said in run("setup", "--yes", *arguments, code=Exit.OTHER).output


# --- scripted answers ----------------------------------------------------------------


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    scripted = Scripted()
    yield scripted
    scripted.assert_used_up()


def subnet(name: str, vpc: str = "vpc-1") -> dict[str, str]:
    return {"SubnetId": name, "VpcId": vpc}


def table(
    name: str, way_out: dict[str, str] | None, *subnets: str, main: bool = False
) -> dict[str, Any]:
    links: list[dict[str, Any]] = [{"SubnetId": s, "Main": False} for s in subnets]
    routes = [{"DestinationCidrBlock": "0.0.0.0/0", **way_out}] if way_out else []
    if main:
        links.append({"Main": True})
    return {"RouteTableId": name, "Associations": links, "Routes": routes}


def network_of(
    scripted: Scripted,
    subnets: Sequence[dict[str, str]],
    tables: Sequence[dict[str, Any]],
    endpoints: Sequence[dict[str, Any]] = (),
    own: str | None = None,
    **wishes: Any,
) -> Any:
    if not wishes.get("ids") and not wishes.get("before"):
        scripted.answer("ec2", "describe_vpcs", {"Vpcs": [{"VpcId": "vpc-1"}]})
    scripted.answer("ec2", "describe_subnets", {"Subnets": list(subnets)})
    scripted.answer("ec2", "describe_route_tables", {"RouteTables": list(tables)})
    scripted.answer("ec2", "describe_vpc_endpoints", {"VpcEndpoints": list(endpoints)})
    return find_network(
        scripted.clients(),
        vpc=None,
        subnets=wishes.get("ids", ()),
        public_ip=wishes.get("public_ip"),
        before=wishes.get("before", {}),
        own_endpoint=own,
    )


INTERNET = {"GatewayId": "igw-1"}
NAT = {"NatGatewayId": "nat-1"}


def test_public_subnets_of_the_default_vpc_are_taken(scripted: Scripted) -> None:
    found = network_of(
        scripted,
        [subnet("subnet-1"), subnet("subnet-2"), subnet("subnet-3")],
        [table("rtb-1", NAT, "subnet-2"), table("rtb-2", INTERNET, main=True)],
    )
    assert found.vpc == "vpc-1"
    assert found.subnets == ("subnet-1", "subnet-3")
    assert found.public_ip
    assert found.without_s3 == ()
    assert found.warnings == ()


def test_private_subnets_that_were_given_get_no_public_address(
    scripted: Scripted,
) -> None:
    found = network_of(
        scripted,
        [subnet("subnet-2")],
        [table("rtb-1", NAT, "subnet-2")],
        ids=("subnet-2",),
    )
    assert not found.public_ip
    assert found.warnings == ()


def test_subnets_without_a_way_out_are_warned_of(scripted: Scripted) -> None:
    found = network_of(
        scripted,
        [subnet("subnet-2")],
        [table("rtb-1", None, main=True)],
        ids=("subnet-2",),
    )
    assert "VPC endpoints" in found.warnings[0]


def test_an_internet_gateway_without_a_public_address_is_warned_of(
    scripted: Scripted,
) -> None:
    found = network_of(
        scripted,
        [subnet("subnet-1")],
        [table("rtb-1", INTERNET, main=True)],
        ids=("subnet-1",),
        public_ip=False,
    )
    assert "--assign-public-ip" in found.warnings[0]


def test_a_gateway_that_is_there_is_not_made_again_but_the_stacks_own_is_kept(
    scripted: Scripted,
) -> None:
    subnets = [subnet("subnet-1"), subnet("subnet-2")]
    tables = [table("rtb-1", NAT, "subnet-1"), table("rtb-2", NAT, "subnet-2")]
    endpoints = [
        {"VpcEndpointId": "vpce-theirs", "RouteTableIds": ["rtb-1"]},
        {"VpcEndpointId": "vpce-own", "RouteTableIds": ["rtb-2"]},
    ]
    found = network_of(
        scripted,
        subnets,
        tables,
        endpoints,
        own="vpce-own",
        ids=("subnet-1", "subnet-2"),
    )
    assert found.without_s3 == ("rtb-2",)


def test_the_endpoint_goes_into_private_route_tables_only_and_the_plan_says_which(
    scripted: Scripted,
) -> None:
    subnets = [subnet("subnet-1"), subnet("subnet-2"), subnet("subnet-3")]
    tables = [
        table("rtb-1", INTERNET, "subnet-1"),
        table("rtb-2", NAT, "subnet-2"),
        table("rtb-3", None, "subnet-3"),
    ]
    found = network_of(scripted, subnets, tables, ids=("subnet-1", "subnet-2", "subnet-3"))
    assert found.without_s3 == ("rtb-2", "rtb-3")
    parameters = dict.fromkeys(DOCUMENT["Parameters"], "") | aws_setup._placed(found)
    makes, _ = aws_setup._lines(parameters)
    assert (
        "gateway endpoint to S3 in the private route tables rtb-2, rtb-3: free of charge" in makes
    )


def test_what_the_stack_has_holds_unless_something_else_is_said(
    scripted: Scripted,
) -> None:
    before = {"SubnetIds": "subnet-9", "AssignPublicIp": "false"}
    found = network_of(
        scripted,
        [subnet("subnet-9")],
        [table("rtb-1", INTERNET, main=True)],
        before=before,
    )
    assert found.subnets == ("subnet-9",)
    assert not found.public_ip


def test_subnets_of_two_vpcs_are_refused(scripted: Scripted) -> None:
    both = [subnet("subnet-1"), subnet("subnet-2", "vpc-2")]
    scripted.answer("ec2", "describe_subnets", {"Subnets": both})
    with pytest.raises(AccountError, match="subnet-2 in vpc-2"):
        find_network(
            scripted.clients(),
            vpc=None,
            subnets=("subnet-1", "subnet-2"),
            public_ip=None,
            before={},
            own_endpoint=None,
        )


def test_an_account_without_a_default_vpc_is_told_what_to_say(
    scripted: Scripted,
) -> None:
    scripted.answer("ec2", "describe_vpcs", {"Vpcs": []})
    with pytest.raises(AccountError, match="--vpc or --subnets"):
        find_network(
            scripted.clients(),
            vpc=None,
            subnets=(),
            public_ip=None,
            before={},
            own_endpoint=None,
        )


def stack_reply(status: str) -> dict[str, Any]:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return {"Stacks": [{"StackName": "s", "CreationTime": now, "StackStatus": status}]}


def event(number: int, name: str, status: str, reason: str = "") -> dict[str, Any]:
    return {
        "StackId": "s",
        "EventId": str(number),
        "StackName": "s",
        "LogicalResourceId": name,
        "ResourceStatus": status,
        "ResourceStatusReason": reason,
        "Timestamp": datetime(2026, 1, 1, tzinfo=UTC),
    }


def test_a_failing_stack_says_what_failed_first(scripted: Scripted) -> None:
    said: list[str] = []
    scripted.answer("cloudformation", "create_stack", {"StackId": "s"})
    scripted.answer("cloudformation", "describe_stacks", stack_reply("ROLLBACK_IN_PROGRESS"))
    first = [event(1, "Cluster", "CREATE_FAILED", "not authorized")]
    scripted.answer("cloudformation", "describe_stack_events", {"StackEvents": first})
    scripted.answer("cloudformation", "describe_stacks", stack_reply("ROLLBACK_COMPLETE"))
    later = [event(2, "Bucket", "CREATE_FAILED", "cancelled"), *first]
    scripted.answer("cloudformation", "describe_stack_events", {"StackEvents": later})
    with pytest.raises(
        AccountError, match=r"ROLLBACK_COMPLETE\):\nCluster: not authorized\nBucket"
    ):
        put_stack(scripted.clients(), "s", None, {}, SystemRuntime(), said.append)
    assert said == [
        "Cluster: create failed (not authorized)",
        "Bucket: create failed (cancelled)",
    ]


def test_what_is_left_of_a_failed_try_is_removed_first(scripted: Scripted) -> None:
    debris = Stack(name="s", status="ROLLBACK_COMPLETE", parameters={}, outputs={})
    scripted.answer("cloudformation", "describe_stack_events", {"StackEvents": []})
    scripted.answer("cloudformation", "delete_stack", {}, StackName="s")
    scripted.refuse(
        "cloudformation", "describe_stacks", "ValidationError", "Stack s does not exist"
    )
    scripted.answer("cloudformation", "describe_stack_events", {"StackEvents": []})
    scripted.answer("cloudformation", "create_stack", {"StackId": "s"})
    scripted.answer("cloudformation", "describe_stacks", stack_reply("CREATE_COMPLETE"))
    scripted.answer("cloudformation", "describe_stack_events", {"StackEvents": []})
    found = put_stack(scripted.clients(), "s", debris, {}, SystemRuntime(), lambda line: None)
    assert found.status == "CREATE_COMPLETE"


def test_a_stack_that_is_being_changed_is_left_alone(scripted: Scripted) -> None:
    scripted.answer("sts", "get_caller_identity", {"Account": ACCOUNT})
    scripted.answer("cloudformation", "describe_stacks", stack_reply("UPDATE_IN_PROGRESS"))
    with pytest.raises(AccountError, match="already being changed"):
        aws_setup.plan(scripted.clients(), SetupOptions())


def test_a_missing_permission_is_named_as_such(scripted: Scripted) -> None:
    scripted.answer("sts", "get_caller_identity", {"Account": ACCOUNT})
    text = "User: u is not authorized to perform: cloudformation:DescribeStacks"
    scripted.refuse("cloudformation", "describe_stacks", "AccessDenied", text, 403)
    with pytest.raises(AccountDenied, match=r"DescribeStacks.*--print-policy"):
        aws_setup.plan(scripted.clients(), SetupOptions())


# --- the template and the policies ---------------------------------------------------


DOCUMENT: dict[str, Any] = yaml.load(template(), Loader)


def resources() -> dict[str, Any]:
    found: dict[str, Any] = DOCUMENT["Resources"]
    return found


@pytest.mark.slow
def test_cfn_lint_finds_nothing() -> None:
    file = Path(aws_setup.__file__).with_name("template.yaml")
    done = subprocess.run(
        [Path(sys.executable).with_name("cfn-lint"), file],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_bucket_is_private_encrypted_and_never_expires_objects() -> None:
    bucket = resources()["Bucket"]
    assert bucket["DeletionPolicy"] == bucket["UpdateReplacePolicy"] == "Retain"
    properties = bucket["Properties"]
    assert set(properties["PublicAccessBlockConfiguration"].values()) == {True}
    rules = properties["LifecycleConfiguration"]["Rules"]
    assert [set(rule) for rule in rules] == [{"Id", "Status", "AbortIncompleteMultipartUpload"}]
    assert "ServerSideEncryptionConfiguration" in properties["BucketEncryption"]


def test_nobody_reaches_workers() -> None:
    assert "SecurityGroupIngress" not in resources()["SecurityGroup"]["Properties"]


def worker_statements() -> list[dict[str, Any]]:
    statements: list[dict[str, Any]] = resources()["TaskPolicy"]["Properties"]["PolicyDocument"][
        "Statement"
    ]
    return statements


def actions(statements: Sequence[dict[str, Any]]) -> set[str]:
    lists = [s["Action"] if isinstance(s["Action"], list) else [s["Action"]] for s in statements]
    return {action for one in lists for action in one}


def test_workers_may_do_what_working_and_replacing_takes_and_no_more() -> None:
    groups = ("s3", "ecs", "placement")
    calls = {name: needs for g in groups for name, needs in policy.CALLS[g].items()}
    # Replacements of themselves only: a worker's own metadata names its definition.
    del calls["ecs:RegisterTaskDefinition"], calls["ecs:DescribeTaskDefinition"]
    needed = {action for needs in calls.values() for action in needs}
    assert actions(worker_statements()) == needed


def test_workers_are_kept_to_their_store_their_cluster_and_their_roles() -> None:
    for statement in worker_statements():
        place = json.dumps([statement["Resource"], statement.get("Condition", {})])
        names = actions([statement])
        if any(name.startswith("s3:") for name in names):
            assert "${KeyPrefix}sessions/*" in place
            owner = statement["Condition"]["StringEquals"]["aws:ResourceAccount"]["If"]
            assert owner == ["HasBucketOwner", {"Ref": "BucketOwner"}, {"Ref": "AWS::AccountId"}]
        elif names & {"ecs:RunTask", "ecs:StopTask"}:
            assert "ecs:cluster" in place
        elif "iam:PassRole" in names:
            assert "*" not in json.dumps(statement["Resource"])
            assert "ecs-tasks.amazonaws.com" in place


def test_every_type_of_resource_has_its_permissions_listed() -> None:
    types = {resource["Type"] for resource in resources().values()}
    assert types == policy.MADE_BY_STACK.keys()


def test_print_template_prints_the_file() -> None:
    assert run("setup", "--print-template").output == template()


def test_print_policy_prints_policies_without_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    documents = json.loads(run("setup", "--print-policy", "--store", "s3://mine/runs").output)
    assert len(documents) == 2
    text = json.dumps(documents)
    assert "arn:aws:s3:::mine/runs/*" in text
    assert "ACCOUNT_ID" in text
    client = actions(documents["who runs sessions"]["Statement"])
    assert {"s3:PutObject", "ecs:RunTask", "iam:PassRole"} <= client
    assert not any(a.startswith(("cloudformation:", "iam:CreateRole")) for a in client)


def test_a_policy_never_allows_all_actions_and_narrows_what_it_can() -> None:
    scope = policy.Scope(account="1", region="r", bucket="b", prefix="p/", stack="s")
    for document in (policy.client_policy(scope), policy.setup_policy(scope)):
        for statement in document["Statement"]:
            assert not any("*" in action for action in statement["Action"])
            services = {action.partition(":")[0] for action in statement["Action"]}
            if services & {"s3", "iam", "cloudformation"}:
                assert statement["Resource"] != "*" or "Condition" in statement


def scope(**more: Any) -> policy.Scope:
    names = {"account": "1", "region": "r", "bucket": "b", "prefix": "p/", "stack": "s"}
    return policy.Scope(**{**names, **more})


def places(document: dict[str, Any], action: str) -> set[str]:
    """The resources on which a policy allows an action."""
    found: set[str] = set()
    for statement in document["Statement"]:
        if action in statement["Action"]:
            named = statement["Resource"]
            found |= {named} if isinstance(named, str) else set(named)
    return found


def test_tags_of_the_log_group_are_on_the_group_itself() -> None:
    document = policy.setup_policy(scope())
    for action in ("logs:TagResource", "logs:ListTagsForResource"):
        assert places(document, action) == {"arn:aws:logs:r:1:log-group:/starburst-executor/s"}
    [place] = places(document, "logs:CreateLogGroup")
    assert place.endswith(":*")


def test_the_stack_may_look_at_what_it_deletes() -> None:
    wanted = {"iam:ListAttachedRolePolicies", "iam:ListRolePolicies", "ec2:DescribeInstances"}
    assert wanted <= actions(policy.setup_policy(scope())["Statement"])


def test_a_cluster_roles_and_a_key_that_are_brought_along_are_in_the_policies() -> None:
    key, role = "arn:aws:kms:r:1:key/k", "arn:aws:iam::1:role/mine"
    ours = scope(cluster="shared", kms_key=key, roles=[role])
    document = policy.client_policy(ours)
    assert places(document, "ecs:DescribeClusters") == {"arn:aws:ecs:r:1:cluster/shared"}
    assert places(document, "iam:PassRole") == {"arn:aws:iam::1:role/s-*", role}
    assert places(document, "kms:Decrypt") == places(document, "kms:GenerateDataKey") == {key}
    assert not places(policy.client_policy(scope()), "kms:Decrypt")


def test_print_policy_takes_what_is_brought_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "cn-north-1")
    key = "arn:aws-cn:kms:cn-north-1:123456789012:key/k"
    wish = ("--cluster", "shared", "--kms-key", key, "--task-role-arn", "arn:aws-cn:iam::1:role/r")
    text = run("setup", "--print-policy", *wish).output
    for part in ("cluster/shared", key, "arn:aws-cn:iam::1:role/r", "ec2.amazonaws.com.cn"):
        assert part in text
    assert "arn:aws:" not in text


# These services have the same name in all partitions. The others, such as EC2, do not: see
# `Default.servicePrincipal` in github.com/aws/aws-cdk, packages/aws-cdk-lib/region-info.
EVERYWHERE = re.compile(r"\b(ecs|ecs-tasks|autoscaling|spot)\.amazonaws\.com\b")
FIXED = re.compile(r"amazonaws\.com|arn:aws:")
PER_PARTITION = '"amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"'


def test_no_partition_of_aws_is_taken_for_granted() -> None:
    root = Path(aws_setup.__file__).parents[2]
    files = [file for kind in ("*.py", "*.yaml") for file in root.rglob(kind)]
    fixed = [
        f"{file.relative_to(root)}: {line.strip()}"
        for file in files
        for line in file.read_text().splitlines()
        if FIXED.search(EVERYWHERE.sub("", line.replace(PER_PARTITION, "")))
    ]
    assert not fixed

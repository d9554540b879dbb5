"""What EC2 workers stand on.

Exact requests, checked by botocore's own models, and what AWS may answer.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from botocore.stub import ANY, Stubber

from starburst_executor.aws.account import Vcpus
from starburst_executor.aws.deployment.removal import Owner, remove_capacity
from starburst_executor.aws.ecs.capacity import Capacity
from starburst_executor.aws.ecs.diagnosis import Retryability
from starburst_executor.aws.ecs.instances import InstanceType, describe_instance_type, worker_size
from starburst_executor.aws.ecs.launcher import EcsLauncher
from starburst_executor.aws.ecs.requests import PacedRequests, RequestRefused
from starburst_executor.errors import AccountError, LaunchFailed
from starburst_executor.protocol.worker_spec import WorkerSpec
from tests.support.ecs_script import (
    DEPLOYMENT,
    FULL,
    NOW,
    RUN,
    URL,
    Script,
    VirtualRuntime,
    arn,
    on_spot,
    task,
    unborn,
    worker,
    workers,
)
from tests.support.ecs_script import scripted as on_fargate
from tests.support.scripted import Scripted

pytestmark = pytest.mark.usefixtures("aws_keys")

PROFILE = "arn:aws:iam::123456789012:instance-profile/starburst"
HERE = msgspec.structs.replace(DEPLOYMENT, instance_profile_arn=PROFILE)
C8A = InstanceType(name="c8a.xlarge", vcpus=4, memory=8192, architecture="X86_64", has_spot=True)
TAGS = {
    "starburst-executor:cluster": "starburst",
    "starburst-executor:instance-profile": PROFILE,
}


@pytest.fixture
def aws() -> Iterator[Scripted]:
    scripted = Scripted()
    yield scripted
    scripted.assert_used_up()


def described(
    name: str = "c8a.xlarge",
    vcpus: int = 4,
    memory: int = 8192,
    architecture: str = "x86_64",
    usage: tuple[str, ...] = ("on-demand", "spot"),
) -> dict[str, Any]:
    about = {
        "InstanceType": name,
        "VCpuInfo": {"DefaultVCpus": vcpus},
        "MemoryInfo": {"SizeInMiB": memory},
        "ProcessorInfo": {"SupportedArchitectures": [architecture]},
        "SupportedUsageClasses": list(usage),
    }
    return {"InstanceTypes": [about]}


# --- sizes ---------------------------------------------------------------------------


def ask(aws: Scripted, name: str) -> InstanceType:
    return describe_instance_type(aws.clients().get("ec2"), name)


def test_size_and_architecture_are_what_ec2_says(aws: Scripted) -> None:
    reply = described("c8g.large", 2, 4096, "arm64", ("on-demand",))
    aws.answer("ec2", "describe_instance_types", reply, InstanceTypes=["c8g.large"])
    found = ask(aws, "c8g.large")
    assert (found.vcpus, found.memory, found.architecture) == (2, 4096, "ARM64")
    assert not found.has_spot


def test_an_unknown_type_is_refused_with_names_that_are_near(aws: Scripted) -> None:
    aws.refuse("ec2", "describe_instance_types", "InvalidInstanceType", "no such type")
    names = ("c8a.large", "c8a.xlarge", "c8a.metal-48xl", "c8a.2xlarge")
    family = {"InstanceTypes": [described(n)["InstanceTypes"][0] for n in names]}
    aws.answer("ec2", "describe_instance_types", family)
    with pytest.raises(ValueError, match=r"similar ones: c8a\.xlarge, c8a\.2xlarge"):
        ask(aws, "c8a.xlage")


def test_a_processor_that_workers_do_not_run_on_is_refused(aws: Scripted) -> None:
    reply = described("mac2.metal", architecture="arm64_mac")
    aws.answer("ec2", "describe_instance_types", reply)
    with pytest.raises(ValueError, match="arm64_mac"):
        ask(aws, "mac2.metal")


@pytest.mark.parametrize(
    ("cpu", "memory", "fit"), [(4, "7577MB", 1), (1, "1.8GB", 4), (1, "2GB", 3)]
)
def test_memory_for_kernel_and_agent_is_left_out(cpu: float, memory: str, fit: int) -> None:
    spec = WorkerSpec(launcher="ecs", cpu=cpu, memory=memory)
    assert C8A.fits(worker_size(spec, C8A)) == fit


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"cpu": 4, "memory": "8GB"}, r'cpu=4, memory="7577MB" would fit'),
        ({"cpu": 8, "memory": "4GB"}, r'cpu=4, memory="4096MB" would fit'),
        ({"cpu": 0.1}, r"0\.125 to 192"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused_with_what_would(
    spec: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        worker_size(WorkerSpec(launcher="ecs", **spec), C8A)


def test_a_type_that_is_not_sold_on_spot_is_refused() -> None:
    lacking = InstanceType(name="x", vcpus=4, memory=8192, architecture="X86_64", has_spot=False)
    with pytest.raises(ValueError, match="not available as Spot"):
        worker_size(WorkerSpec(launcher="ecs", use_spot=True), lacking)


# --- making --------------------------------------------------------------------------


def capacity(aws: Scripted, *, use_spot: bool = False, **other: Any) -> Capacity:
    return Capacity(
        msgspec.structs.replace(HERE, **other),
        C8A,
        use_spot=use_spot,
        clients=aws.clients(),
        calls=PacedRequests(VirtualRuntime()),
    )


def cluster(*providers: str, status: str = "UPDATE_COMPLETE") -> dict[str, Any]:
    names = ["FARGATE", "FARGATE_SPOT", *providers]
    found = {"capacityProviders": names, "attachmentsStatus": status}
    return {"clusters": [{**found, "defaultCapacityProviderStrategy": []}]}


def expect_three(aws: Scripted, *, there: bool = False) -> None:
    """What is made before the cluster's list is changed."""
    if not there:
        aws.answer("ec2", "create_launch_template", {})
        aws.answer("autoscaling", "create_auto_scaling_group", {})
        aws.answer("ecs", "create_capacity_provider", {})
        return
    aws.refuse(
        "ec2",
        "create_launch_template",
        "InvalidLaunchTemplateName.AlreadyExistsException",
    )
    aws.refuse("autoscaling", "create_auto_scaling_group", "AlreadyExists")
    text = "The specified capacity provider already exists."
    aws.refuse("ecs", "create_capacity_provider", "ClientException", text)


@pytest.mark.parametrize("use_spot", [False, True])
def test_what_is_made_is_asked_for_exactly_so(aws: Scripted, use_spot: bool) -> None:
    one = capacity(aws, use_spot=use_spot)
    given = {"Key": "starburst-executor:cluster", "Value": "starburst"}
    profile = {"Key": "starburst-executor:instance-profile", "Value": PROFILE}
    named = {"Key": "Name", "Value": one.name}
    aws.answer(
        "ec2",
        "create_launch_template",
        {},
        LaunchTemplateName=one.name,
        LaunchTemplateData={
            "ImageId": (
                "resolve:ssm:/aws/service/ecs/optimized-ami/amazon-linux-2023/recommended/image_id"
            ),
            "InstanceType": "c8a.xlarge",
            "IamInstanceProfile": {"Arn": PROFILE},
            "NetworkInterfaces": [
                {
                    "DeviceIndex": 0,
                    "AssociatePublicIpAddress": True,
                    "Groups": ["sg-1"],
                }
            ],
            "MetadataOptions": {
                "HttpTokens": "required",
                "HttpPutResponseHopLimit": 2,
            },
            "UserData": ANY,
            "TagSpecifications": [
                {"ResourceType": "instance", "Tags": [given, profile]},
                {"ResourceType": "volume", "Tags": [given, profile]},
            ],
        },
        TagSpecifications=[{"ResourceType": "launch-template", "Tags": [given, profile, named]}],
    )
    aws.answer(
        "autoscaling",
        "create_auto_scaling_group",
        {},
        AutoScalingGroupName=one.name,
        MinSize=0,
        MaxSize=10_000,
        DesiredCapacity=0,
        VPCZoneIdentifier="subnet-1,subnet-2",
        NewInstancesProtectedFromScaleIn=True,
        MixedInstancesPolicy={
            "LaunchTemplate": {
                "LaunchTemplateSpecification": {
                    "LaunchTemplateName": one.name,
                    "Version": "$Latest",
                }
            },
            "InstancesDistribution": {
                "OnDemandPercentageAboveBaseCapacity": 0 if use_spot else 100,
                "SpotAllocationStrategy": "price-capacity-optimized",
            },
        },
        Tags=[{**tag, "PropagateAtLaunch": True} for tag in (given, profile, named)],
    )
    aws.answer(
        "ecs",
        "create_capacity_provider",
        {},
        name=one.name,
        autoScalingGroupProvider={
            "autoScalingGroupArn": one.name,
            "managedScaling": {"status": "ENABLED", "targetCapacity": 100},
            "managedTerminationProtection": "ENABLED",
            "managedDraining": "ENABLED",
        },
        tags=ANY,
    )
    asked = {"clusters": [HERE.cluster], "include": ["ATTACHMENTS"]}
    aws.answer("ecs", "describe_clusters", cluster("theirs"), **asked)
    aws.answer(
        "ecs",
        "put_cluster_capacity_providers",
        {},
        cluster=HERE.cluster,
        capacityProviders=["FARGATE", "FARGATE_SPOT", "theirs", one.name],
        defaultCapacityProviderStrategy=[],
    )
    busy = cluster("theirs", one.name, status="UPDATE_IN_PROGRESS")
    aws.answer("ecs", "describe_clusters", busy)
    aws.answer("ecs", "describe_clusters", cluster("theirs", one.name))
    one.make()


def test_an_instance_joins_its_cluster_and_drains_when_spot_takes_it(
    aws: Scripted,
) -> None:
    text = base64.b64decode(capacity(aws)._template()["UserData"]).decode()
    assert text.startswith("#!/bin/bash\n")
    assert "ECS_CLUSTER=starburst\n" in text
    assert "ECS_ENABLE_SPOT_INSTANCE_DRAINING=true\n" in text


def test_arm_instances_start_from_the_image_for_them(aws: Scripted) -> None:
    arm = InstanceType(name="c8g.large", vcpus=2, memory=4096, architecture="ARM64", has_spot=True)
    one = Capacity(
        HERE,
        arm,
        use_spot=False,
        clients=aws.clients(),
        calls=PacedRequests(VirtualRuntime()),
    )
    assert "/amazon-linux-2023/arm64/recommended/" in one._template()["ImageId"]


def test_what_is_there_is_no_error_and_nothing_is_changed(aws: Scripted) -> None:
    one = capacity(aws)
    expect_three(aws, there=True)
    aws.answer("ecs", "describe_clusters", cluster(one.name))
    one.make()


def test_a_list_that_another_client_changes_is_read_anew(aws: Scripted) -> None:
    one = capacity(aws)
    expect_three(aws)
    aws.answer("ecs", "describe_clusters", cluster())
    aws.refuse("ecs", "put_cluster_capacity_providers", "UpdateInProgressException")
    aws.answer("ecs", "describe_clusters", cluster("theirs"))
    aws.answer(
        "ecs",
        "put_cluster_capacity_providers",
        {},
        cluster=HERE.cluster,
        capacityProviders=["FARGATE", "FARGATE_SPOT", "theirs", one.name],
        defaultCapacityProviderStrategy=[],
    )
    aws.answer("ecs", "describe_clusters", cluster("theirs", one.name))
    one.make()


def test_a_list_that_stays_busy_is_tried_again_by_the_next_launch(
    aws: Scripted,
) -> None:
    one = capacity(aws)
    expect_three(aws)
    for _ in range(6):
        aws.answer("ecs", "describe_clusters", cluster())
        aws.refuse("ecs", "put_cluster_capacity_providers", "UpdateInProgressException")
    with pytest.raises(RequestRefused) as caught:
        one.make()
    assert caught.value.diagnosis.retryability is Retryability.LATER


def test_what_was_just_made_is_waited_for(aws: Scripted) -> None:
    one = capacity(aws)
    aws.answer("ec2", "create_launch_template", {})
    text = (
        "You must use a valid fully-formed launch template. The specified launch template, "
        "with template name x, does not exist."
    )
    aws.refuse("autoscaling", "create_auto_scaling_group", "ValidationError", text)
    aws.answer("autoscaling", "create_auto_scaling_group", {})
    aws.answer("ecs", "create_capacity_provider", {})
    aws.answer("ecs", "describe_clusters", cluster(one.name))
    one.make()


def test_a_group_that_serves_another_provider_is_an_error(aws: Scripted) -> None:
    aws.answer("ec2", "create_launch_template", {})
    aws.answer("autoscaling", "create_auto_scaling_group", {})
    text = (
        "The specified Auto Scaling group ARN is already being used by another capacity provider."
    )
    aws.refuse("ecs", "create_capacity_provider", "ClientException", text)
    with pytest.raises(RequestRefused, match="already being used"):
        capacity(aws).make()


def test_names_differ_with_the_market_and_all_that_is_said(aws: Scripted) -> None:
    names = {
        capacity(aws).name,
        capacity(aws, use_spot=True).name,
        capacity(aws, subnets=("subnet-3",)).name,
        capacity(aws, security_groups=("sg-2",)).name,
        capacity(aws, assign_public_ip=False).name,
        capacity(aws, cluster="another").name,
    }
    assert len(names) == 6
    assert capacity(aws, image="another").name in names  # of tasks, not of instances
    assert all(len(name) <= 128 for name in names)


# --- removing ------------------------------------------------------------------------


def key_value(tags: dict[str, str], key: str, value: str) -> list[dict[str, str]]:
    return [{key: name, value: text} for name, text in tags.items()]


def script_found(aws: Scripted, name: str, tags: dict[str, str]) -> None:
    small, large = key_value(tags, "key", "value"), key_value(tags, "Key", "Value")
    about = {"name": name, "status": "ACTIVE", "tags": small}
    page = {"capacityProviders": [{"name": "FARGATE"}], "nextToken": "n"}
    aws.answer("ecs", "describe_capacity_providers", page, include=["TAGS"])
    page = {"capacityProviders": [about]}
    aws.answer("ecs", "describe_capacity_providers", page, include=["TAGS"], nextToken="n")
    script_groups(aws, name, large)
    template = {"LaunchTemplateName": name, "Tags": large}
    aws.answer("ec2", "describe_launch_templates", {"LaunchTemplates": [template]})


def script_groups(aws: Scripted, name: str, tags: list[dict[str, str]]) -> None:
    group = {
        "AutoScalingGroupName": name,
        "MinSize": 0,
        "MaxSize": 1,
        "DesiredCapacity": 0,
        "DefaultCooldown": 1,
        "AvailabilityZones": ["a"],
        "HealthCheckType": "EC2",
        "CreatedTime": NOW,
        "Tags": tags,
    }
    reply = {"AutoScalingGroups": [group] if name else []}
    aws.answer("autoscaling", "describe_auto_scaling_groups", reply)


NAME = "starburst-c8a-xlarge-spot-0123456789ab"


def test_capacity_is_removed_in_order_and_waited_for(aws: Scripted) -> None:
    runtime, said = VirtualRuntime(), list[str]()
    script_found(aws, NAME, TAGS)
    aws.answer("ecs", "describe_clusters", cluster(NAME, "theirs"))
    aws.refuse("ecs", "put_cluster_capacity_providers", "UpdateInProgressException")
    aws.answer("ecs", "describe_clusters", cluster(NAME, "theirs"))
    aws.answer(
        "ecs",
        "put_cluster_capacity_providers",
        {},
        cluster="starburst",
        capacityProviders=["FARGATE", "FARGATE_SPOT", "theirs"],
        defaultCapacityProviderStrategy=[],
    )
    force = {"AutoScalingGroupName": NAME, "ForceDelete": True}
    aws.answer("autoscaling", "delete_auto_scaling_group", {}, **force)
    aws.answer("ecs", "delete_capacity_provider", {}, capacityProvider=NAME)
    script_groups(aws, NAME, key_value(TAGS, "Key", "Value"))
    script_groups(aws, "", [])
    aws.answer("ec2", "delete_launch_template", {}, LaunchTemplateName=NAME)
    listed = {"containerInstanceArns": ["arn:i"]}
    aws.answer("ecs", "list_container_instances", listed, cluster="starburst")
    aws.answer(
        "ecs",
        "deregister_container_instance",
        {},
        cluster="starburst",
        containerInstance="arn:i",
        force=True,
    )
    owner = Owner(cluster="starburst", instance_profile_arn=None)
    remove_capacity(aws.clients(), owner, runtime, said.append)
    assert len(said) == 3


def test_what_is_tagged_for_others_stays(aws: Scripted) -> None:
    script_found(aws, NAME, TAGS)
    owner = Owner(cluster="starburst", instance_profile_arn="arn:another")
    remove_capacity(aws.clients(), owner, VirtualRuntime(), print)


def test_instances_that_will_not_go_are_named(aws: Scripted) -> None:
    script_found(aws, NAME, TAGS)
    aws.answer("ecs", "describe_clusters", cluster())
    aws.answer("autoscaling", "delete_auto_scaling_group", {})
    aws.answer("ecs", "delete_capacity_provider", {})
    for _ in range(302):
        script_groups(aws, NAME, key_value(TAGS, "Key", "Value"))
    owner = Owner(cluster="starburst", instance_profile_arn=None)
    with pytest.raises(AccountError, match=f"{NAME} are still there"):
        remove_capacity(aws.clients(), owner, VirtualRuntime(), lambda line: None)


# --- launching -----------------------------------------------------------------------


class Ec2Script(Script):
    """The launcher on EC2, with what else it asks."""

    aws: Scripted

    def provider(self, *, use_spot: bool) -> str:
        return self.launcher._starter._placement.provider(use_spot=use_spot)

    def run_on(self, count: int, *numbers: int, use_spot: bool, **more: Any) -> None:
        """A RunTask on that market, without a network of its own."""
        expected = {**RUN, **more, "count": count}
        name = self.provider(use_spot=use_spot)
        expected["capacityProviderStrategy"] = [{"capacityProvider": name, "weight": 1}]
        if use_spot:
            expected |= on_spot(name)
        del expected["networkConfiguration"]
        tasks = [{"taskArn": arn(number)} for number in numbers]
        self.ecs.add_response("run_task", {"tasks": tasks}, expected)

    def waiting(self, *numbers: int, use_spot: bool) -> None:
        """A look at tasks that have no instance."""
        self.look(*numbers)
        provider = {"capacityProviderName": self.provider(use_spot=use_spot)}
        told = (task(n, "PROVISIONING", createdAt=NOW, **provider) for n in numbers)
        self.describe(*told)

    def activity(self, text: str, after: float = 10.0, status: str = "Failed") -> None:
        """What the group of the waiting tasks has done last."""
        activity = {
            "ActivityId": "1",
            "AutoScalingGroupName": "g",
            "Cause": "c",
            "StartTime": NOW + timedelta(seconds=after),
            "StatusCode": status,
            **({"StatusMessage": text} if text else {}),
        }
        self.aws.answer("autoscaling", "describe_scaling_activities", {"Activities": [activity]})


NO_SPOT = "Could not launch Spot Instances. UnfulfillableCapacity - Unable to fulfill capacity."


@pytest.fixture
def ec2(aws: Scripted, request: pytest.FixtureRequest) -> Iterator[Ec2Script]:
    """A launcher for Spot instances; `spot_fallback` by the fixture's parameter."""
    aws.answer("ec2", "describe_instance_types", described())
    spec = WorkerSpec(
        launcher="ecs",
        launch_type="EC2",
        instance_type="c8a.xlarge",
        use_spot=True,
        spot_fallback=getattr(request, "param", False),
    )
    prices = {True: 0.06, False: 0.2}
    launcher = EcsLauncher(spec, HERE, VirtualRuntime(), hourly=prices.get, clients=aws.clients())
    ecs, logs = Stubber(launcher._api.ecs), Stubber(launcher._api.logs)
    with ecs, logs:
        script = Ec2Script(launcher, ecs, logs)
        script.aws = aws
        yield script
        script.done()


with_fallback = pytest.mark.parametrize("ec2", [True], indirect=True)


def start_one(ec2: Ec2Script) -> None:
    ec2.first_look()
    ec2.definition()
    ec2.run_on(1, 1, use_spot=True)
    assert ec2.launcher.launch(URL, 1) == [worker(1)]


def test_a_definition_for_instances_is_on_the_bridge_with_the_types_architecture(
    aws: Scripted,
) -> None:
    aws.answer("ec2", "describe_instance_types", described(architecture="arm64"))
    spec = WorkerSpec(launcher="ecs", launch_type="EC2", instance_type="c8g.large")
    launcher = EcsLauncher(spec, HERE, VirtualRuntime(), clients=aws.clients())
    request: Any = launcher._definition.request
    assert request["requiresCompatibilities"] == ["EC2"]
    assert request["networkMode"] == "bridge"
    assert request["runtimePlatform"]["cpuArchitecture"] == "ARM64"
    assert (request["cpu"], request["memory"]) == ("1024", "2048")


def test_a_provider_that_the_cluster_lacks_is_made_and_asked_again(
    ec2: Ec2Script,
) -> None:
    name = ec2.provider(use_spot=True)
    ec2.first_look()
    ec2.definition()
    text = (
        "The specified capacity provider strategy cannot contain a capacity provider "
        "that is not associated"
    )
    ec2.refuse("run_task", "InvalidParameterException", text)
    expect_three(ec2.aws)
    ec2.aws.answer("ecs", "describe_clusters", cluster(name))
    ec2.run_on(1, 1, use_spot=True)
    assert ec2.launcher.launch(URL, 1) == [worker(1)]


def test_a_task_that_ecs_gave_up_on_for_lack_of_an_instance_is_started_again(
    ec2: Ec2Script,
) -> None:
    start_one(ec2)
    ec2.later(70)
    ec2.waiting(1, use_spot=True)
    ec2.activity(NO_SPOT)
    ec2.launcher.live(URL)
    for number in range(1, 6):  # more often than a doubtful start is tried
        ec2.later(20)
        ec2.look()
        ec2.describe(unborn(number, "Something that nobody has seen yet"))
        assert ec2.launcher.live(URL) == set()
        ec2.later(61)
        ec2.look()
        ec2.run_on(1, number + 1, use_spot=True)
        assert ec2.launcher.launch(URL, 1) == [worker(number + 1)]


def test_nobody_is_asked_why_within_the_first_minute(ec2: Ec2Script) -> None:
    start_one(ec2)
    ec2.later(50)
    ec2.waiting(1, use_spot=True)
    assert ec2.launcher.live(URL) == workers(1)


def test_without_fallback_what_is_waited_for_is_said_once(
    ec2: Ec2Script, caplog: pytest.LogCaptureFixture
) -> None:
    start_one(ec2)
    for _ in range(2):
        ec2.later(70)
        ec2.waiting(1, use_spot=True)
        ec2.activity(NO_SPOT)
        assert ec2.launcher.live(URL) == workers(1)
    assert caplog.text.count("1 workers wait for spot instances of c8a.xlarge") == 1
    assert "UnfulfillableCapacity" in caplog.text


@with_fallback
def test_tasks_without_an_instance_are_stopped_and_started_on_demand(
    ec2: Ec2Script, caplog: pytest.LogCaptureFixture
) -> None:
    start_one(ec2)
    ec2.later(70)
    ec2.waiting(1, use_spot=True)
    ec2.activity(NO_SPOT)
    ec2.stop(1)
    ec2.launcher.live(URL)
    ec2.later()
    ec2.look()
    ec2.describe(unborn(1, "starburst_executor", "UserInitiated"))
    assert ec2.launcher.live(URL) == set()
    ec2.run_on(1, 2, use_spot=False)
    assert ec2.launcher.launch(URL, 1) == [worker(2)]
    assert "on-demand for the next 10 minutes; a worker costs $0.2 an hour" in caplog.text
    assert "instead of $0.06" in caplog.text


@with_fallback
def test_five_minutes_without_an_instance_are_no_capacity_whatever_is_said(
    ec2: Ec2Script, caplog: pytest.LogCaptureFixture
) -> None:
    start_one(ec2)
    ec2.later(250)
    ec2.waiting(1, use_spot=True)
    ec2.activity("", status="InProgress")
    assert ec2.launcher.live(URL) == workers(1)
    ec2.later(60)
    ec2.waiting(1, use_spot=True)
    ec2.activity(NO_SPOT, after=-3600)  # of an earlier session
    ec2.stop(1)
    ec2.launcher.live(URL)
    assert "no instance came within 300 s" in caplog.text


def test_a_group_that_can_never_grow_is_an_error(ec2: Ec2Script) -> None:
    start_one(ec2)
    ec2.later(70)
    ec2.waiting(1, use_spot=True)
    ec2.activity("Invalid IamInstanceProfile: Invalid IAM Instance Profile ARN")
    ec2.stop(1)
    ec2.launcher.live(URL)
    with pytest.raises(LaunchFailed, match="Instances have no role"):
        ec2.launcher.launch(URL, 1)


def test_a_group_that_cannot_be_asked_is_no_error(ec2: Ec2Script) -> None:
    start_one(ec2)
    ec2.later(70)
    ec2.waiting(1, use_spot=True)
    ec2.aws.refuse("autoscaling", "describe_scaling_activities", "AccessDenied")
    assert ec2.launcher.live(URL) == workers(1)


def test_an_ec2_that_does_not_answer_is_tried_again_and_then_said(
    aws: Scripted,
) -> None:
    for _ in range(6):
        aws.refuse("ec2", "describe_instance_types", "Unavailable", "down", 503)
    spec = WorkerSpec(launcher="ecs", launch_type="EC2", instance_type="c8a.xlarge")
    with pytest.raises(AccountError, match="cannot look up"):
        EcsLauncher(spec, HERE, VirtualRuntime(), clients=aws.clients())


# --- Fargate Spot --------------------------------------------------------------------


def test_what_fargate_spot_lacks_is_started_on_demand_for_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with on_fargate(use_spot=True, spot_fallback=True) as (launcher, script):
        script.first_look()
        script.definition()
        script.run(3, 1, failure=FULL, **on_spot())
        script.run(2, 2, 3)
        assert launcher.launch(URL, 3) == [worker(1), worker(2), worker(3)]
        assert "Capacity is unavailable" in caplog.text
        script.later()
        script.look(1, 2, 3)
        script.describe(task(1), task(2), task(3))
        script.run(1, 4)
        launcher.launch(URL, 1)  # Spot is not asked again so soon
        script.later(600)
        script.look(1, 2, 3, 4)
        script.describe(task(4))
        script.run(1, 5, **on_spot())
        launcher.launch(URL, 1)
    assert caplog.text.count("Spot has no capacity") == 1


def test_a_start_that_fails_for_lack_of_spot_falls_back_at_once() -> None:
    provider = {"capacityProviderName": "FARGATE_SPOT"}
    with on_fargate(use_spot=True, spot_fallback=True) as (launcher, script):
        script.first_look()
        script.definition()
        script.run(1, 1, **on_spot())
        launcher.launch(URL, 1)
        script.later()
        script.look()
        script.describe({**unborn(1, FULL), **provider})
        script.run(1, 2)
        assert launcher.launch(URL, 1) == [worker(2)]


def test_a_quota_of_no_spot_falls_back_too() -> None:
    def vcpus(spot: bool) -> Vcpus:
        return Vcpus(quota=0 if spot else 16, used=0)

    with on_fargate(vcpus, use_spot=True, spot_fallback=True) as (launcher, script):
        script.first_look()
        script.definition()
        script.run(1, 1)
        assert launcher.launch(URL, 1) == [worker(1)]


def test_other_failures_do_not_fall_back() -> None:
    with on_fargate(use_spot=True, spot_fallback=True) as (launcher, script):
        script.first_look()
        script.definition()
        script.refuse("run_task", "AccessDeniedException", "no")
        with pytest.raises(LaunchFailed):
            launcher.launch(URL, 1)

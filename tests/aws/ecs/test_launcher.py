"""The ECS launcher: exact requests, checked by botocore's models, and whatever ECS may answer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from botocore.stub import ANY, Stubber

from starburst_executor.aws.account import Vcpus
from starburst_executor.aws.ecs.launcher import EcsLauncher
from starburst_executor.config import Deployment
from starburst_executor.errors import AccountError, LaunchFailed
from starburst_executor.launchers.base import open_launcher
from starburst_executor.protocol.worker_spec import WorkerSpec
from tests.support.ecs_script import (
    CLUSTER,
    DEFINITION,
    DEPLOYMENT,
    FULL,
    NO_QUOTA,
    NOW,
    RUN,
    SESSION,
    URL,
    VirtualRuntime,
    arn,
    launched,
    on_spot,
    scripted,
    task,
    unborn,
    worker,
    workers,
)

pytestmark = pytest.mark.usefixtures("aws_keys")


# --- What is asked for -------------------------------------------------------------


def test_a_size_that_fargate_lacks_is_refused_before_anything_is_started() -> None:
    with pytest.raises(ValueError, match="nearest"):
        EcsLauncher(WorkerSpec(launcher="ecs", cpu=3), DEPLOYMENT)


def test_workers_are_started_ten_at_a_time_by_one_exact_request() -> None:
    with scripted() as (launcher, script):
        script.first_look()
        script.definition()
        script.run(10, *range(10), clientToken=f"{1:032d}")
        script.run(4, *range(10, 14), clientToken=f"{2:032d}")
        started = launcher.launch(URL, 14)
    assert started == [worker(n) for n in range(14)]


def test_spot_is_another_capacity_provider() -> None:
    with scripted(use_spot=True) as (launcher, script):
        script.first_look()
        script.definition()
        script.run(1, 1, **on_spot())
        launcher.launch(URL, 1)


def test_a_task_definition_is_registered_when_there_is_none_of_its_content() -> None:
    with scripted(cpu=2, memory="8GB") as (launcher, script):
        family = launcher._definition.request["family"]
        script.first_look()
        script.refuse(
            "describe_task_definition",
            "ClientException",
            "Unable to describe task definition.",
        )
        script.ecs.add_response(
            "register_task_definition",
            {"taskDefinition": {"taskDefinitionArn": DEFINITION}},
            {
                "family": family,
                "requiresCompatibilities": ["FARGATE"],
                "networkMode": "awsvpc",
                "cpu": "2048",
                "memory": "8192",
                "runtimePlatform": {
                    "cpuArchitecture": "X86_64",
                    "operatingSystemFamily": "LINUX",
                },
                "executionRoleArn": DEPLOYMENT.execution_role_arn,
                "taskRoleArn": DEPLOYMENT.task_role_arn,
                "containerDefinitions": [
                    {
                        "name": "worker",
                        "image": "registry.test/python:3.11",
                        "essential": True,
                        "entryPoint": ["python", "-P", "-m", "starburst_executor", "worker"],
                        "stopTimeout": 120,
                        "linuxParameters": {"initProcessEnabled": True},
                        "logConfiguration": {
                            "logDriver": "awslogs",
                            "options": {
                                "awslogs-group": "/starburst",
                                "awslogs-region": "eu-west-1",
                                "awslogs-stream-prefix": "starburst",
                                "mode": "non-blocking",
                            },
                        },
                    }
                ],
                "tags": [{"key": "starburst-executor", "value": "worker"}],
            },
        )  # fmt: skip
        script.run(1, 1)
        script.run(1, 2)
        launcher.launch(URL, 1)
        launcher.launch(URL, 1)  # asks for no definition


def test_equal_definitions_share_a_family_and_others_do_not() -> None:
    def family(deployment: Deployment = DEPLOYMENT, **spec: Any) -> str:
        launcher = EcsLauncher(WorkerSpec(launcher="ecs", **spec), deployment)
        return launcher._definition.request["family"]

    other = msgspec.structs.replace(DEPLOYMENT, image="another")
    assert family() == family(use_spot=True)
    assert len({family(), family(cpu=2, memory="4GB"), family(other)}) == 3


def test_launches_are_paced_to_fargates_rate() -> None:
    with scripted() as (launcher, script):
        script.first_look()
        script.definition()
        for start in range(0, 150, 10):
            script.run(10, *range(start, start + 10))
        began = script.runtime.now
        assert len(launcher.launch(URL, 150)) == 150
        assert script.runtime.now - began == pytest.approx(50 / 20)


# --- What ECS answers --------------------------------------------------------------


def test_a_partial_failure_keeps_what_was_started_and_tries_the_rest_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with scripted() as (launcher, script):
        script.first_look()
        script.definition()
        script.run(5, 1, 2, failure=FULL)
        assert launcher.launch(URL, 5) == [worker(1), worker(2)]
        assert "ECS starts 2 of 5 workers" in caplog.text
        assert "Capacity is unavailable" in caplog.text
        script.later(4)
        assert launcher.launch(URL, 3) == []  # asks nothing
        script.later(2)
        script.look(1, 2)
        script.describe(task(1), task(2))
        script.run(3, 3, 4, 5)
        assert launcher.launch(URL, 3) == [worker(3), worker(4), worker(5)]


def test_the_pauses_between_launches_grow_to_a_minute_and_never_end() -> None:
    with scripted() as (launcher, script):
        script.first_look()
        script.definition()
        pauses = []
        for tries in range(7):
            if tries:
                script.look()
            script.run(1, failure=FULL)
            assert launcher.launch(URL, 1) == []
            pause = launcher._sessions[URL].not_before - script.runtime.now
            pauses.append(pause)
            script.later(max(pause, 5) + 1)
    assert pauses == [5, 10, 20, 40, 60, 60, 60]


def test_a_group_that_exceeds_the_quota_is_tried_in_smaller_ones() -> None:
    with scripted() as (launcher, script):
        script.first_look()
        script.definition()
        script.refuse("run_task", "ClientException", NO_QUOTA)
        script.run(5, *range(5))
        script.refuse("run_task", "ClientException", NO_QUOTA)
        script.run(2, 5, 6)
        script.refuse("run_task", "ClientException", NO_QUOTA)
        script.refuse("run_task", "ClientException", NO_QUOTA)
        assert len(launcher.launch(URL, 10)) == 7


def test_a_lost_reply_is_asked_for_again_with_the_same_token() -> None:
    with scripted() as (launcher, script):
        script.first_look()
        script.definition()
        script.refuse("run_task", "ServerException", "", 500)
        script.refuse("run_task", "ThrottlingException", "Rate exceeded")
        script.run(1, 1, clientToken=f"{1:032d}")
        assert launcher.launch(URL, 1) == [worker(1)]


def test_throttling_is_retried_within_a_budget_and_then_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with scripted() as (launcher, script):
        script.first_look()
        script.definition()
        for _ in range(6):
            script.refuse("run_task", "ThrottlingException", "Rate exceeded")
        began = script.runtime.now
        assert launcher.launch(URL, 1) == []
        assert 7 < script.runtime.now - began <= 16
        assert "ThrottlingException: Rate exceeded" in caplog.text


@pytest.mark.parametrize(
    ("code", "message", "says"),
    [
        ("ClusterNotFoundException", "Cluster not found.", "setup"),
        ("AccessDeniedException", "not authorized to perform: iam:PassRole on x", "iam:PassRole"),
        ("InvalidParameterException", "The subnet ID 'subnet-1' does not exist", "subnets"),
        (
            "InvalidParameterException",
            "The security group 'sg-1' does not exist",
            "security groups",
        ),
        (
            "InvalidParameterException",
            "The specified capacity provider FARGATE was not found",
            "setup",
        ),
        ("PlatformUnknownException", "The platform version is unknown", "platform"),
        ("BlockedException", "Your account is currently blocked", "Support"),
        ("UnrecognizedClientException", "The security token is invalid", "Renew"),
        ("ClientException", "Something that nobody has seen yet", "nobody has seen"),
    ],
)  # fmt: skip
def test_a_request_that_can_never_do_is_an_error_at_once(
    code: str, message: str, says: str
) -> None:
    with scripted() as (launcher, script):
        script.first_look()
        script.definition()
        script.refuse("run_task", code, message)
        with pytest.raises(LaunchFailed) as caught:
            launcher.launch(URL, 1)
    assert message in str(caught.value)
    assert says in str(caught.value)
    assert SESSION in str(caught.value)


def test_a_role_that_nobody_knows_is_an_error_after_the_budget_of_retries() -> None:
    text = "ECS was unable to assume the role 'x' that was provided for this task."
    with scripted() as (launcher, script):
        script.first_look()
        script.definition()
        for _ in range(6):
            script.refuse("run_task", "ClientException", text)
        with pytest.raises(LaunchFailed, match=r"unable to assume.*Check that the exec"):
            launcher.launch(URL, 1)


def test_a_refusal_is_no_error_while_workers_live(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with scripted() as (launcher, script):
        script.first_look(1)
        script.definition()
        script.refuse("run_task", "AccessDeniedException", "no")
        assert launcher.launch(URL, 1) == []
    assert "lack a permission" in caplog.text


def test_a_definition_that_somebody_deregistered_is_looked_for_again() -> None:
    with launched(1) as (launcher, script):
        script.refuse("run_task", "ClientException", "TaskDefinition is inactive")
        assert launcher.launch(URL, 1) == []
        script.later()
        script.look(1)
        script.describe(task(1))
        script.definition()
        script.run(1, 2)
        assert launcher.launch(URL, 1) == [worker(2)]


# --- Quota -------------------------------------------------------------------------


def test_as_many_are_started_as_the_quota_has_room_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = []

    def vcpus(spot: bool) -> Vcpus:
        asked.append(spot)
        return Vcpus(quota=16, used=9)

    with scripted(vcpus, cpu=2, memory="4GB", use_spot=True) as (launcher, script):
        script.first_look()
        script.definition()
        script.run(3, 1, 2, 3, **on_spot())
        assert len(launcher.launch(URL, 10)) == 3
    assert asked == [True]
    assert "starts 3 of 10" in caplog.text
    assert "16 concurrent Fargate Spot vCPUs, of which 9 are in use" in caplog.text


def test_a_quota_of_less_than_one_worker_is_an_error_at_once() -> None:
    with scripted(lambda spot: Vcpus(quota=0, used=0)) as (launcher, script):
        script.first_look()
        script.definition()
        with pytest.raises(LaunchFailed, match=r"quota is 0 concurrent Fargate vCPUs"):
            launcher.launch(URL, 1)


def test_a_quota_that_others_use_up_is_waited_for() -> None:
    with scripted(lambda spot: Vcpus(quota=8, used=8)) as (launcher, script):
        script.first_look()
        script.definition()
        assert launcher.launch(URL, 1) == []


# --- Looking -----------------------------------------------------------------------


def test_a_task_is_live_from_its_launch_until_it_is_told_to_stop() -> None:
    with launched(1, 2, 3) as (launcher, script):
        assert launcher.live(URL) == workers(1, 2, 3)
        script.later()
        script.look(2, 3)
        script.describe(
            task(1, "STOPPED", stopCode="EssentialContainerExited"),
            task(2, "PENDING"),
            task(3),
        )
        assert launcher.live(URL) == workers(2, 3)
        assert launcher.ended(URL) == workers(1)
        script.later()
        script.look(2)
        script.describe(task(2), task(3, desiredStatus="STOPPED"))
        assert launcher.live(URL) == workers(2)
        assert launcher.ended(URL) == workers(1)  # 3 may still hand back
        script.later()
        script.look(2)
        script.describe(task(3, "DEPROVISIONING", startedAt=NOW))
        assert launcher.ended(URL) == workers(1, 3)
        script.later()
        script.look(2)
        assert launcher.live(URL) == workers(2)  # nothing is left to be asked about


def test_a_look_serves_for_some_seconds() -> None:
    with launched(1) as (launcher, script):
        for _ in range(4):
            launcher.live(URL)
            launcher.ended(URL)
            script.later(1)


def test_tasks_of_other_clients_are_found_by_the_sessions_id() -> None:
    exited = task(3, "STOPPED", stopCode="EssentialContainerExited")
    foreign = task(4, "STOPPED", startedBy="another-session")
    with scripted() as (launcher, script):
        script.first_look(1, 2, stopped=[exited, foreign])
        assert launcher.live(URL) == workers(1, 2)
        assert launcher.ended(URL) == workers(3)


def test_listings_are_followed_and_descriptions_asked_for_by_the_hundred() -> None:
    with scripted() as (launcher, script):
        script.earlier()
        request = {"cluster": CLUSTER, "maxResults": 100, "startedBy": SESSION}
        first, second = list(range(100)), list(range(100, 130))
        script.ecs.add_response(
            "list_tasks",
            {"taskArns": [arn(n) for n in first], "nextToken": "more"},
            request,
        )
        script.ecs.add_response(
            "list_tasks",
            {"taskArns": [arn(n) for n in second]},
            {**request, "nextToken": "more"},
        )
        asked: list[int] = []
        for size in (100, 30):
            expected = {"cluster": CLUSTER, "tasks": ANY}
            told = [task(n) for n in range(len(asked), len(asked) + size)]
            asked += range(size)
            script.ecs.add_response("describe_tasks", {"tasks": told}, expected)
        assert launcher.live(URL) == workers(*range(130))


def test_a_new_task_is_given_a_minute_to_be_listed_and_described() -> None:
    with launched(1) as (launcher, script):
        script.later(50)
        script.look()
        script.describe(missing=[1])
        assert launcher.live(URL) == workers(1)
        assert launcher.ended(URL) == set()
        script.later(20)
        script.look()
        script.describe(missing=[1])
        assert launcher.live(URL) == set()
        assert launcher.ended(URL) == workers(1)


def test_while_ecs_does_not_answer_nobody_is_taken_for_live_or_dead(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with launched(1) as (launcher, script):
        script.later(6)
        for _ in range(6):
            script.refuse("list_tasks", "ServerException", "", 500)
        assert launcher.live(URL) is None
        assert launcher.ended(URL) == set()
        script.later(31)
        script.earlier()
        for _ in range(6):
            script.refuse("list_tasks", "ThrottlingException", "Rate exceeded")
        assert launcher.live(URL) is None
        assert caplog.text.count("does not tell which workers are alive") == 1
        script.later(31)
        script.first_look(1)
        assert launcher.live(URL) == workers(1)


# --- Why workers are missing -------------------------------------------------------


def test_an_image_that_is_not_found_is_an_error_at_the_next_launch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = "CannotPullContainerError: failed to resolve ref registry.test/python:3.11: not found"
    with launched(1, 2) as (launcher, script):
        script.later()
        script.look(2)
        script.describe(unborn(1, text), task(2, "PENDING"))
        assert launcher.live(URL) == workers(2)
        assert launcher.ended(URL) == set()  # they never were workers
        with pytest.raises(LaunchFailed, match=r"not found.*Check `image`"):
            launcher.launch(URL, 1)
    assert "could not be started" in caplog.text


def test_a_start_that_may_have_failed_by_accident_is_tried_three_times() -> None:
    text = "Something that nobody has seen yet."
    with launched(1) as (launcher, script):
        for number in (1, 2, 3):
            script.later(6)
            script.look()
            script.describe(unborn(number, text))
            if number < 3:
                assert launcher.launch(URL, 1) == []  # holds off
                script.later(60)
                script.look()
                script.run(1, number + 1)
                assert launcher.launch(URL, 1) == [worker(number + 1)]
        with pytest.raises(LaunchFailed, match="nobody has seen"):
            launcher.launch(URL, 1)


def test_a_worker_that_runs_gives_hope_again() -> None:
    text = "Something that nobody has seen yet."
    with launched(1, 2) as (launcher, script):
        script.later()
        script.look(2)
        script.describe(unborn(1, text), task(2, "PENDING"))
        launcher.live(URL)
        assert launcher._sessions[URL].doubts
        script.later()
        script.look(2)
        script.describe(task(2))
        launcher.live(URL)
        assert not launcher._sessions[URL].doubts


@pytest.mark.parametrize("reason", [FULL, "Your Spot Task was interrupted before it began."])
def test_capacity_that_lacks_at_the_start_is_waited_for(reason: str) -> None:
    code = "SpotInterruption" if "Spot" in reason else "TaskFailedToStart"
    with launched(1) as (launcher, script):
        for number in range(1, 6):
            script.later(6)
            script.look()
            script.describe(unborn(number, reason, code))
            assert launcher.live(URL) == set()
            script.later(61)
            script.look()
            script.run(1, number + 1)
            assert launcher.launch(URL, 1) == [worker(number + 1)]


def test_an_end_that_nobody_asked_for_is_a_warning_with_what_was_printed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    container = {"exitCode": 137, "reason": "OutOfMemoryError: Container killed"}
    oom = {"stopCode": "EssentialContainerExited", "containers": [container]}
    with launched(1) as (launcher, script):
        script.later()
        script.look()
        script.describe(task(1, "STOPPED", **oom))
        script.logs.add_response(
            "get_log_events",
            {"events": [{"message": "claimed 3 tasks\n"}, {"message": "huge array"}]},
            {
                "logGroupName": "/starburst",
                "logStreamName": f"starburst/worker/{1:032x}",
                "limit": 30,
                "startFromHead": False,
            },
        )
        launcher.live(URL)
    assert "exit code 137 (killed by signal 9)" in caplog.text
    assert "raise memory=" in caplog.text
    assert "claimed 3 tasks\nhuge array" in caplog.text


def test_a_wave_of_reclaims_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    reclaimed = {
        "stopCode": "SpotInterruption",
        "stoppedReason": "Your Spot Task was interrupted.",
        "containers": [{"exitCode": 0}],
    }
    with launched(*range(6)) as (launcher, script):
        script.later()
        script.look()
        script.describe(*(task(n, "STOPPED", **reclaimed) for n in range(6)))
        launcher.live(URL)
    [record] = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "and 3 more ended: SpotInterruption" in record.getMessage()


def test_a_worker_that_leaves_by_itself_is_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    left = {"stopCode": "EssentialContainerExited", "containers": [{"exitCode": 0}]}
    with launched(1) as (launcher, script):
        script.later()
        script.look()
        script.describe(task(1, "STOPPED", **left))
        launcher.live(URL)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_a_slow_start_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with launched(1) as (launcher, script):
        script.later(301)
        for _ in range(2):
            script.look(1)
            script.describe(task(1, "PROVISIONING"))
            launcher.live(URL)
            script.later()
    assert caplog.text.count("is still PROVISIONING after 300 s") == 1


def test_a_log_tail_is_the_reason_and_the_last_lines() -> None:
    left = {
        "stopCode": "EssentialContainerExited",
        "stoppedReason": "Essential container in task exited",
        "containers": [{"exitCode": 1}],
    }
    events = {"events": [{"message": "No module named starburst_executor"}]}
    with launched(1) as (launcher, script):
        script.later()
        script.look()
        script.describe(task(1, "STOPPED", **left))
        script.logs.add_response("get_log_events", events)
        script.logs.add_response("get_log_events", events)
        launcher.live(URL)
        assert launcher.log_tail(URL, worker(1)) == (
            "EssentialContainerExited: Essential container in task exited; exit code 1\n"
            "No module named starburst_executor"
        )


def test_a_log_that_is_not_there_is_empty_and_one_that_is_refused_says_so() -> None:
    with scripted() as (launcher, script):
        script.logs.add_client_error("get_log_events", "ResourceNotFoundException")
        assert launcher.log_tail(URL, worker(1)) == ""
        script.logs.add_client_error("get_log_events", "AccessDeniedException")
        assert "cannot be read" in launcher.log_tail(URL, worker(1))


# --- Stopping ----------------------------------------------------------------------


def test_stop_tells_each_task_once_and_returns_when_all_are_over() -> None:
    told = {"stopCode": "UserInitiated"}
    with launched(1) as (launcher, script):
        script.look(1)
        script.describe(task(1))
        script.stop(1)
        script.look()
        script.describe(task(1, desiredStatus="STOPPED"))
        script.look()
        script.describe(task(1, "STOPPED", **told))
        launcher.stop(URL, grace=2)
        assert launcher.ended(URL) == workers(1)


def test_stop_finds_what_others_started_and_leaves_what_is_not_named() -> None:
    with scripted() as (launcher, script):
        script.first_look(1, 2)
        script.stop(2)
        script.look(1)
        script.describe(task(2, "STOPPED"))
        launcher.stop(URL, [worker(2), "w-abcdefghij"], grace=2)
        assert launcher.live(URL) == workers(1)


def test_a_task_that_is_gone_when_it_is_told_to_stop_is_no_error() -> None:
    with launched(1) as (launcher, script):
        script.look(1)
        script.describe(task(1))
        script.refuse(
            "stop_task",
            "InvalidParameterException",
            "The referenced task was not found.",
        )
        script.look()
        script.describe(task(1, "STOPPED"))
        launcher.stop(URL, grace=2)


def test_a_stop_that_is_refused_is_an_error() -> None:
    with launched(1) as (launcher, script):
        script.look(1)
        script.describe(task(1))
        script.refuse("stop_task", "AccessDeniedException", "no")
        with pytest.raises(AccountError, match="cannot be stopped"):
            launcher.stop(URL, grace=2)


def test_a_stop_that_cannot_see_what_lives_is_an_error_that_says_what_to_do() -> None:
    with scripted() as (launcher, script):
        script.refuse("list_tasks", "AccessDeniedException", "no")
        with pytest.raises(AccountError, match=f"--started-by {SESSION}"):
            launcher.stop(URL, grace=2)


def test_tasks_that_will_not_end_are_named() -> None:
    with launched(1) as (launcher, script):
        script.look(1)
        script.describe(task(1))
        script.stop(1)
        for _ in range(181):  # looks a second apart, the first after half of one
            script.look()
            script.describe(task(1, desiredStatus="STOPPED"))
        with pytest.raises(AccountError, match=arn(1)):
            launcher.stop(URL, grace=2)


# --- Opening -----------------------------------------------------------------------


def test_without_a_configured_cluster_there_is_no_launcher() -> None:
    with pytest.raises(ValueError, match="starburst-executor setup"):
        open_launcher(WorkerSpec(launcher="ecs"))


def test_a_region_without_the_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match="is in eu-west-1"):
        EcsLauncher(WorkerSpec(launcher="ecs", region="us-east-1"), DEPLOYMENT)


def test_instances_without_a_role_are_refused_before_anything_is_asked() -> None:
    ec2 = WorkerSpec(launcher="ecs", launch_type="EC2", instance_type="c8a.xlarge")
    with pytest.raises(ValueError, match="no instance profile is configured"):
        EcsLauncher(ec2, DEPLOYMENT)


# --- What workers and their staff ask ----------------------------------------------


@pytest.mark.parametrize(
    ("code", "taken"),
    [
        ("SpotInterruption", True),
        ("TerminationNotice", True),
        ("UserInitiated", True),
        ("EssentialContainerExited", False),
    ],
)
def test_who_was_reclaimed_or_stopped_was_taken_away(code: str, taken: bool) -> None:
    told = {"stopCode": code, "containers": [{"exitCode": 0}]}
    with launched(1) as (launcher, script):
        script.later()
        script.look()
        script.describe(task(1, "STOPPED", **told))
        assert launcher.ended(URL) == workers(1)
        assert launcher.taken_away(URL, worker(1)) is taken
        assert not launcher.taken_away(URL, worker(9))


def test_a_launch_that_is_halted_ends_with_the_group_it_is_at() -> None:
    with scripted() as (launcher, script):
        script.first_look()
        script.definition()
        script.run(10, *range(10))
        take = launcher._starter._bucket.take

        def halting(count: int) -> None:
            take(count)
            launcher.halt()

        launcher._starter._bucket.take = halting  # type: ignore[method-assign]
        assert len(launcher.launch(URL, 500)) == 10
        assert launcher.launch(URL, 500) == []


def test_a_worker_starts_others_of_its_own_definition_and_registers_none() -> None:
    spec = WorkerSpec(launcher="ecs")
    launcher = EcsLauncher(spec, DEPLOYMENT, VirtualRuntime(), definition="mine:7")
    with Stubber(launcher._api.ecs) as ecs:
        family = {"family": "mine", "desiredStatus": "STOPPED"}
        where: dict[str, Any] = {"cluster": CLUSTER, "maxResults": 100}
        ecs.add_response("list_tasks", {"taskArns": []}, {**where, **family})
        ecs.add_response("list_tasks", {"taskArns": []}, {**where, "startedBy": SESSION})
        started = {"tasks": [{"taskArn": arn(1)}], "failures": []}
        ecs.add_response("run_task", started, {**RUN, "taskDefinition": "mine:7"})
        assert launcher.launch(URL, 1) == [worker(1)]
        ecs.assert_no_pending_responses()


@pytest.mark.parametrize(
    ("store", "told"),
    [
        ("s3://bucket/starburst?owner=123456789012", f"{URL}?region=eu-west-1&owner=123456789012"),
        ("s3://bucket/starburst", f"{URL}?region=eu-west-1"),  # made by an earlier version
    ],
)
def test_workers_are_told_the_buckets_owner_if_their_session_has_one(store: str, told: str) -> None:
    session_url = f"{URL}?region=eu-west-1&owner=123456789012"
    with scripted() as (launcher, script):
        launcher._deployment = msgspec.structs.replace(DEPLOYMENT, store=store)
        script.first_look()
        script.definition()
        [override] = RUN["overrides"]["containerOverrides"]
        command = [told, "--id", "@ecs-task"]
        script.run(1, 1, overrides={"containerOverrides": [{**override, "command": command}]})
        assert launcher.launch(session_url, 1) == [worker(1)]

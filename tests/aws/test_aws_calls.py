"""What is allowed against what is called.

Every call of AWS that the tests made the package make, and both policies.

It runs last. With a part of the suite it checks only that what was called is allowed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.exceptions import ParamValidationError

from starburst_executor.aws.clients import make_client
from starburst_executor.aws.deployment import policy
from starburst_executor.aws.deployment.stack import template
from starburst_executor.aws.ecs.api import EcsApi
from starburst_executor.aws.ecs.requests import PacedRequests, RequestRefused
from tests.support import together
from tests.support.ecs_script import DEPLOYMENT, VirtualRuntime
from tests.support.recorder import call_recorder
from tests.support.together import WHY_PARTIAL

SETUP = {f"aws/deployment/{name}" for name in ("setup", "stack", "network", "teardown", "removal")}
# A worker starts replacements by the client's own code, so what that calls there it calls anywhere.
SHARED = {
    "aws/ecs/api",
    "aws/ecs/instances",
    "aws/ecs/placement",
    "aws/s3",
    "aws/s3_transfer",
}

# Operation -> its actions in IAM, where that is not the operation's own name. From the service
# authorization reference: docs.aws.amazon.com/service-authorization/latest/reference/
ACTIONS = {
    "s3:CompleteMultipartUpload": {"s3:PutObject"},
    "s3:CreateMultipartUpload": {"s3:PutObject"},
    "s3:DeleteObjects": {"s3:DeleteObject"},
    "s3:HeadBucket": {"s3:ListBucket"},
    "s3:HeadObject": {"s3:GetObject"},
    "s3:ListMultipartUploads": {"s3:ListBucketMultipartUploads"},
    "s3:ListObjectsV2": {"s3:ListBucket"},
    "s3:UploadPart": {"s3:PutObject"},
    "sts:GetCallerIdentity": set[str](),  # nobody needs leave to ask who they are
}
# Parameter -> what it takes besides.
MORE = {
    ("ecs", "tags"): "ecs:TagResource",
    ("ecs", "taskRoleArn"): "iam:PassRole",
    ("ecs", "taskDefinition", "RunTask"): "iam:PassRole",
    ("cloudformation", "Tags"): "cloudformation:TagResource",
}
# Operation -> what AWS checks besides, or does in the caller's name. From the same reference, and
# from the guides of EC2 Auto Scaling (launch template support) and of ECS (capacity providers).
IMPLIED = {
    "autoscaling:CreateAutoScalingGroup": {
        "autoscaling:CreateOrUpdateTags",
        "ec2:CreateTags",
        "ec2:RunInstances",
        "iam:CreateServiceLinkedRole",
        "iam:PassRole",
        "ssm:GetParameters",
    },
    "ec2:CreateLaunchTemplate": {"ec2:CreateTags"},
    "ecs:CreateCapacityProvider": {
        "autoscaling:CreateOrUpdateTags",
        "autoscaling:DescribeAutoScalingGroups",
        "autoscaling:UpdateAutoScalingGroup",
    },
    "ecs:PutClusterCapacityProviders": {"iam:CreateServiceLinkedRole"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A kind of call, as `call_recorder` notes it."""

    role: str
    module: str
    service: str
    operation: str
    parameters: tuple[str, ...]
    of_sessions: bool
    faults: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.service}:{self.operation}"

    @property
    def actions(self) -> set[str]:
        more = {
            action
            for (service, parameter, *only), action in MORE.items()
            if service == self.service
            and parameter in self.parameters
            and (not only or only == [self.operation])
        }
        own = ACTIONS.get(self.name, {self.name})
        return own | more | IMPLIED.get(self.name, set())

    @property
    def whose(self) -> str:
        """Which policy it falls under: that of the worker, of the client, or of who sets up."""
        if self.role == "client" and self.module in SETUP:
            return "setup"
        return self.role


def recorded() -> set[Call]:
    files = Path(os.environ[call_recorder.FOLDER]).glob("*.jsonl")
    lines = [line for file in files for line in file.read_text().splitlines()]
    found = (json.loads(line) for line in lines)
    lists = ("parameters", "faults")
    return {Call(**{**c, **{name: tuple(c[name]) for name in lists}}) for c in found}


def allowed() -> dict[str, set[str]]:
    """The actions that each may take.

    Of people as `--print-policy` prints them, of workers as the template has them.
    """
    scope = policy.Scope(account="1", region="r", bucket="b", prefix="p/", stack="s")
    client = _actions(policy.client_policy(scope)["Statement"])
    return {
        "client": client,
        "setup": client | _actions(policy.setup_policy(scope)["Statement"]),
        "worker": _actions(_worker_statements()),
    }


def _actions(statements: list[dict[str, Any]]) -> set[str]:
    lists = (s["Action"] for s in statements)
    return {a for one in lists for a in ([one] if isinstance(one, str) else one)}


def _worker_statements() -> list[dict[str, Any]]:
    resources = yaml.load(template(), _Loader)["Resources"]
    found: list[dict[str, Any]] = resources["TaskPolicy"]["Properties"]["PolicyDocument"][
        "Statement"
    ]
    return found


class _Loader(yaml.SafeLoader):
    """Reads the template for its actions alone, which are plain texts."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: suffix)


# --- the recorder --------------------------------------------------------------------


@pytest.fixture
def fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(call_recorder.FOLDER, str(tmp_path))
    before = set(call_recorder._noted)
    call_recorder._noted.clear()
    yield tmp_path
    call_recorder._noted.update(before)


PROGRAM = """
import sys
sys.argv[1:] = ["worker"]
from starburst_executor.storage.url import open_store
store = open_store("s3://bucket/prefix")
store.get("sessions/x/session.json")
"""


def test_calls_of_the_package_are_recorded_in_whichever_process(
    fresh_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={
            **os.environ,
            "PYTHONPATH": root,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert "StoreUnavailable" in done.stderr
    [call] = recorded()
    assert (call.role, call.module, call.name) == ("worker", "aws/s3", "s3:GetObject")
    assert call.of_sessions
    assert call.faults == ()


def test_what_aws_would_refuse_is_recorded_with_the_call(
    fresh_folder: Path, monkeypatch: pytest.MonkeyPatch, aws_keys: None
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody is there
    api = EcsApi(DEPLOYMENT, PacedRequests(VirtualRuntime()))
    with pytest.raises(RequestRefused):
        api.run(taskDefinition="d", startedBy="by whom?")
    [call] = recorded()
    assert call.faults == ("ecs .startedBy: 'by whom?' does not match [a-zA-Z0-9\\-_/]*",)
    api.ecs.close()


def test_calls_of_the_tests_themselves_are_not(
    fresh_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client("s3", region="us-east-1", tries=1)
    with pytest.raises(ParamValidationError):
        client.get_object(Bucket="b")
    client.close()
    assert recorded() == set()


def test_parameters_are_checked_against_botocores_models() -> None:
    client = make_client("ecs", region="us-east-1", tries=1)
    with pytest.raises(ParamValidationError, match='Unknown parameter in input: "cnt"'):
        client.run_task(taskDefinition="d", cnt=1)
    with pytest.raises(ParamValidationError, match="Invalid type for parameter count"):
        client.run_task(taskDefinition="d", count="1")
    client.close()


def run_task(role: str, operation: str = "RunTask") -> Call:
    return Call(
        role=role,
        module="aws/ecs/api",
        service="ecs",
        operation=operation,
        parameters=("tags", "taskDefinition"),
        of_sessions=False,
    )


def test_a_call_that_is_not_allowed_is_found_out() -> None:
    assert forbidden({run_task("worker"), run_task("client")}) == []
    [found] = forbidden({run_task("worker", "RegisterTaskDefinition")})
    assert "lacks ['ecs:RegisterTaskDefinition']" in found


def test_an_action_that_no_call_takes_is_found_out() -> None:
    assert unused_actions(set())["worker"] == sorted(allowed()["worker"])
    unused = unused_actions({run_task("client")})["worker"]
    assert {"ecs:RunTask", "ecs:TagResource", "iam:PassRole"}.isdisjoint(unused)
    assert "ecs:StopTask" in unused


# --- waiting for other processes -----------------------------------------------------


def test_tests_of_other_processes_are_waited_for(fresh_folder: Path) -> None:
    together.note_end(failed=False)
    other = fresh_folder / "another-process.ended"
    late = threading.Timer(0.2, other.write_text, ["failed\n"])
    late.start()
    assert together.wait_for(1) is False
    assert together.wait_for(2) is True  # one has failed
    late.join()


def test_a_process_that_dies_is_not_waited_for_without_end(
    fresh_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "_PATIENCE", 0.2)
    together.note_end(failed=False)
    with pytest.raises(RuntimeError, match="1 of 2 tests have ended"):
        together.wait_for(2)


# --- after all others ----------------------------------------------------------------


@pytest.mark.usefixtures("after_all_others")
def test_every_call_that_was_made_is_allowed_to_who_made_it() -> None:
    assert not forbidden(recorded())


@pytest.mark.usefixtures("after_all_others")
def test_every_call_that_was_made_is_one_that_aws_takes() -> None:
    assert not [f"{fault[:300]} (by {call.module})" for call in recorded() for fault in call.faults]


@pytest.mark.usefixtures("after_all_others")
def test_workers_touch_only_what_is_below_sessions_and_environments() -> None:
    strayed = [
        call
        for call in recorded()
        if call.role == "worker"
        and {"Key", "Prefix"} & set(call.parameters)
        and not call.of_sessions
    ]
    assert not strayed


@pytest.mark.usefixtures("after_all_others")
def test_nothing_is_allowed_that_no_call_took(request: pytest.FixtureRequest) -> None:
    partial: str = request.config.stash[WHY_PARTIAL]
    if partial:
        pytest.skip(f"takes the calls of the whole suite, and {partial}")
    unused = unused_actions(recorded())
    assert not any(unused.values()), (
        f"allowed, but no test made the package take them: {unused}. "
        "Take them out of policy.py or template.yaml, or test what needs them."
    )


def forbidden(calls: set[Call]) -> list[str]:
    """Calls that their policy does not allow, with what it lacks."""
    may = allowed()
    return sorted(
        f"{call.name} by {call.whose} ({call.module}) "
        f"lacks {sorted(call.actions - may[call.whose])}"
        for call in calls
        if not call.actions <= may[call.whose]
    )


def unused_actions(calls: set[Call]) -> dict[str, list[str]]:
    """By policy, the actions that it allows and that no call took."""
    may = allowed()
    made: dict[str, set[str]] = {name: set() for name in may}
    for call in calls:
        made[call.whose] |= call.actions
        if call.module in SHARED:
            made["worker"] |= call.actions
    by_stack = {a for actions in policy.MADE_BY_STACK.values() for a in actions}
    made["setup"] |= made["client"] | by_stack
    return {name: sorted(may[name] - made[name]) for name in may}

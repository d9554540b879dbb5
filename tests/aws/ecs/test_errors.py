"""What AWS has said, by `aws_errors.json`: how it is judged, and launching while ECS says so."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from starburst_executor.aws.ecs.diagnosis import (
    Diagnosis,
    Retryability,
    Stop,
    is_passing,
    judge_error,
    judge_failure,
    judge_shortage,
    judge_start,
)
from starburst_executor.aws.ecs.launcher import EcsLauncher
from starburst_executor.config import Deployment
from starburst_executor.errors import LaunchFailed
from starburst_executor.protocol.worker_spec import WorkerSpec
from tests.emulators.ecs_server import EcsServer, ecs_server
from tests.support.ecs_script import VirtualRuntime
from tests.support.servers import S3Server

ERRORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "aws_errors.json").read_text()
)["errors"]
OUTLOOKS = {"passing", "permanent", "settling"}
MINUTE = 60.0
ALWAYS = 1_000_000
PASSES = (Retryability.FULL, Retryability.LATER)


def named(*where: str) -> list[Any]:
    """The errors that are said there, each with a name for the report."""
    return [
        pytest.param(error, id=f"{number}-{error['text'][:50]}")
        for number, error in enumerate(ERRORS)
        if error["where"] in where
    ]


def refusal(error: dict[str, Any]) -> ClientError:
    reply: Any = {
        "Error": {"Code": error["code"], "Message": error["text"]},
        "ResponseMetadata": {"HTTPStatusCode": error["status"]},
    }
    return ClientError(reply, error["operation"])


def test_there_are_sixty_errors_and_each_has_a_public_source() -> None:
    texts = {(error["where"], error["text"]) for error in ERRORS}
    assert len(texts) >= 60
    for error in ERRORS:
        assert error["source"].startswith("https://")
        assert error["where"] == "end" or error["outlook"] in OUTLOOKS


@pytest.mark.parametrize("error", named("call"))
def test_errors_of_calls_are_judged(error: dict[str, Any]) -> None:
    diagnosis = judge_error(refusal(error))
    assert error["text"].rstrip(". ") in diagnosis.text
    if error["outlook"] == "passing":
        assert diagnosis.retryability in PASSES
    else:
        assert diagnosis.retryability is Retryability.NEVER
        assert is_passing(refusal(error)) is (error["outlook"] == "settling")


@pytest.mark.parametrize("error", named("failure", "start", "activity"))
def test_what_starts_nothing_is_judged(error: dict[str, Any]) -> None:
    diagnosis = judged(error)
    if error["outlook"] == "passing":
        assert diagnosis.retryability in PASSES
    elif error["outlook"] == "permanent":
        assert diagnosis.retryability is Retryability.NEVER
    else:
        assert diagnosis.retryability is Retryability.DOUBTFUL


def judged(error: dict[str, Any]) -> Diagnosis:
    if error["where"] == "failure":
        return judge_failure(error["text"], "")
    if error["where"] == "activity":
        return judge_shortage(error["text"])
    stop = Stop(code=error["code"], reason=error["text"], exit_code=None, began=False)
    return judge_start(stop)


@pytest.mark.parametrize("error", named("end"))
def test_ends_of_workers_say_what_to_do(error: dict[str, Any]) -> None:
    stop = Stop(
        code="EssentialContainerExited",
        reason=error["text"],
        exit_code=error["exit_code"],
        began=True,
    )
    assert error["outlook"] in str(stop)


def test_a_text_says_more_than_the_code_it_comes_with() -> None:
    quota = "You've reached the limit on the number of vCPUs you can run concurrently"
    for code in ("ThrottlingException", "ClientException", "AccessDeniedException"):
        error = {"operation": "RunTask", "code": code, "text": quota, "status": 400}
        assert judge_error(refusal(error)).retryability is Retryability.FULL


# --- the launcher, on an ECS that says so ----------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EcsServer]:
    with ecs_server(tmp_path_factory.mktemp("ecs")) as running:
        yield running


class Launches:
    """Launches for one session after another, on real requests and a clock of their own."""

    def __init__(self, server: EcsServer, deployment: Deployment) -> None:
        self._server, self._cluster = server, deployment.cluster
        self._runtime = VirtualRuntime()
        self._launcher = EcsLauncher(WorkerSpec(launcher="ecs"), deployment, self._runtime)
        self._session = 0

    def for_another_session(self) -> Launches:
        self._session += 1
        self._runtime.now += 1000
        return self

    def fail_within(self, seconds: float) -> bool:
        """Whether trying again and again ends in an error within that time."""
        return self._end_within(seconds) is None

    def succeed_within(self, seconds: float) -> bool:
        """Whether trying again and again launches a worker within that time."""
        return bool(self._end_within(seconds, until_there_is_one=True))

    def close(self) -> None:
        self._launcher._api.ecs.close()

    def _end_within(self, seconds: float, *, until_there_is_one: bool = False) -> list[str] | None:
        """The workers that the last try launched; None if it failed for good."""
        end = self._runtime.now + seconds
        launched: list[str] = []
        while self._runtime.now < end and not (launched and until_there_is_one):
            try:
                launched = self._launcher.launch(f"s3://b/p/sessions/{self._session}", 1)
            except LaunchFailed:
                return None
            self._await_tasks(launched)
            self._runtime.now += 6  # until the launcher looks again
        return launched

    def _await_tasks(self, workers: Sequence[str]) -> None:
        """Wait until the tasks have started, or failed to."""
        deadline = time.monotonic() + 60
        arns = [f"{self._cluster}/{worker.removeprefix('w-')}" for worker in workers]
        with contextlib.closing(self._server.aws("ecs")) as ecs:
            while arns:
                told = ecs.describe_tasks(cluster=self._cluster, tasks=arns)["tasks"]
                arns = [t["taskArn"] for t in told if t["lastStatus"] == "PROVISIONING"]
                assert time.monotonic() < deadline


@pytest.fixture(scope="module")
def all_launches(server: EcsServer) -> Iterator[Launches]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        launches = Launches(server, server.deploy())
        yield launches
        launches.close()


@pytest.fixture
def launches(
    server: EcsServer, all_launches: Launches, s3_env: Callable[[S3Server], None]
) -> Launches:
    s3_env(server)
    server.reset()
    return all_launches.for_another_session()


@pytest.mark.parametrize("error", named("call", "failure", "start"))
def test_passing_troubles_are_waited_for_and_permanent_ones_are_errors_within_a_minute(
    error: dict[str, Any], server: EcsServer, launches: Launches
) -> None:
    server.set(says=error, says_times=ALWAYS)
    assert launches.fail_within(MINUTE) is (error["outlook"] != "passing")
    if error["outlook"] == "passing":
        server.set(says_times=0)
        assert launches.succeed_within(3 * MINUTE)


@pytest.mark.parametrize("error", [p for p in named("call", "start") if "settling" in str(p)])
def test_what_settles_by_the_second_try_is_no_error(
    error: dict[str, Any], server: EcsServer, launches: Launches
) -> None:
    server.set(says=error, says_times=1)
    assert not launches.fail_within(MINUTE / 2)

"""Whole sessions on ECS: the emulator's tasks are real worker processes, over S3 with latency."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from starburst_executor import StarburstExecutor
from starburst_executor.cli.exits import Exit
from starburst_executor.cli.main import main
from starburst_executor.config import Deployment
from starburst_executor.errors import ExecutorBroken, LaunchFailed
from tests.emulators.ecs_server import EcsServer, configure, ecs_server
from tests.support.servers import latency_proxy
from tests.support.sessions import QUICK, is_alive, keys, live_workers, run_python, worker_pids
from tests.support.tasks import Gate, until

_LATENCY = 10  # milliseconds


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EcsServer]:
    with ecs_server(tmp_path_factory.mktemp("ecs")) as running:
        yield running


@pytest.fixture
def ecs(
    server: EcsServer,
    monkeypatch: pytest.MonkeyPatch,
    s3_env: Callable[..., None],
) -> Iterator[EcsServer]:
    """The server as it was at its start, and S3 behind a slow network for clients and workers."""
    with latency_proxy(server, _LATENCY) as proxy:
        s3_env(server)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        server.reset()
        server.set(task_endpoints={"AWS_ENDPOINT_URL_S3": proxy.endpoint})
        yield server


@pytest.fixture
def deployment(ecs: EcsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    """A cluster of the test's own, configured; whatever was started in it must have ended."""
    deployed = ecs.deploy()
    for name, value in configure(deployed).items():
        monkeypatch.setenv(name, value)
    yield deployed
    left = ecs.live(deployed.cluster)
    ecs.kill(*(task["id"] for task in left))
    assert not left, f"the test left tasks running: {left}"


def square(x: int) -> int:
    return x * x


def test_a_with_block_runs_on_tasks_of_its_own_and_leaves_nothing(
    ecs: EcsServer, deployment: Deployment
) -> None:
    with StarburstExecutor(max_workers=3, cpu=0.5, memory="1GB") as executor:
        assert list(executor.map(square, range(50))) == [x * x for x in range(50)]
        [first, *_] = tasks = ecs.live(deployment.cluster)
        assert first["startedBy"] == executor.session_id
        assert (first["cpu"], first["memory"]) == ("512", "1024")
        pids = [task["pid"] for task in tasks]
        assert {f"w-{task['id']}" for task in tasks} >= worker_pids(executor).keys()
    assert not [pid for pid in pids if is_alive(pid)]
    assert keys(deployment.store) == []


@pytest.mark.slow
def test_twenty_workers(ecs: EcsServer, deployment: Deployment) -> None:
    with StarburstExecutor(max_workers=20, cpu=0.25, memory="512MB") as executor:
        values = list(executor.map(square, range(400)))
        assert len(ecs.tasks(deployment.cluster)) == 20
    assert values == [x * x for x in range(400)]


@pytest.mark.slow
def test_a_session_outlives_its_client_and_replaces_half_of_its_workers_by_itself(
    ecs: EcsServer,
    deployment: Deployment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(tmp_path / "gate")
    client = tmp_path / "client.py"
    client.write_text(_CLIENT)
    done = run_python(client, str(gate.folder), PYTHONPATH=_here())
    assert done.returncode == -9, done.stderr
    session_id = done.stdout.strip()
    gate.await_arrivals(4)
    spot = ecs.live(deployment.cluster)
    assert {task["capacityProviderName"] for task in spot} == {"FARGATE_SPOT"}
    ecs.reclaim(spot[0]["id"])  # with a warning
    ecs.kill(spot[1]["id"])  # and without
    until(lambda: len(ecs.tasks(deployment.cluster)) == 6, "two were started")
    until(lambda: len(ecs.live(deployment.cluster)) == 4, "two are gone")
    assert {t["startedBy"] for t in ecs.tasks(deployment.cluster)} == {session_id}
    assert {t["taskDefinitionArn"] for t in ecs.tasks(deployment.cluster)} == {
        spot[0]["taskDefinitionArn"]
    }
    for name in configure(deployment):  # the session itself knows where its workers are
        monkeypatch.delenv(name)
    executor = StarburstExecutor.attach(session_id, store=deployment.store)
    assert len(live_workers(executor)) == 4
    gate.open()
    assert [f.result(timeout=60) for f in executor.futures] == list(range(12))
    outcomes = executor.collect(wait=True)  # each once, whoever ran it how often
    assert sorted(outcome.value for outcome in outcomes) == list(range(12))
    assert executor.status().completed == executor.status().total == 12
    executor.cleanup(force=True)
    assert ecs.live(deployment.cluster) == []
    assert keys(deployment.store) == []


_CLIENT = """
import os, sys
from pathlib import Path
from starburst_executor import StarburstExecutor
from tests.support.sessions import QUICK
from tests.support.tasks import Gate

gate = Gate(Path(sys.argv[1]))
executor = StarburstExecutor(max_workers=4, use_spot=True, intervals=QUICK)
for number in range(12):
    executor.submit(gate.hold, number)
executor.flush()
gate.await_arrivals(4)
print(executor.session_id, flush=True)
os.kill(os.getpid(), 9)
"""


def _here() -> str:
    return str(Path(__file__).parents[3])


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_its_end_explained(
    ecs: EcsServer,
    deployment: Deployment,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = Gate(tmp_path / "gate")
    with StarburstExecutor(max_workers=1, intervals=QUICK) as executor:
        future = executor.submit(gate.hold, "kept")
        gate.await_arrivals()
        [task] = ecs.live(deployment.cluster)
        ecs.kill(task["id"])
        gate.await_arrivals(2)
        gate.open()
        assert future.result(timeout=60) == "kept"
    assert f"w-{task['id']} ended: EssentialContainerExited" in caplog.text
    assert "exit code 137 (killed by signal 9)" in caplog.text
    assert "is at session" in caplog.text  # what it had printed


@pytest.mark.slow
def test_fewer_workers_than_wanted_start_while_the_quota_is_small(
    ecs: EcsServer,
    deployment: Deployment,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ecs.set(vcpus={"FARGATE": 2.0})
    gate = Gate(tmp_path / "gate")
    with StarburstExecutor(max_workers=3, intervals=QUICK) as executor:
        futures = [executor.submit(gate.hold, n) for n in range(3)]
        gate.await_arrivals(2)
        assert len(ecs.live(deployment.cluster)) == 2
        assert "ECS starts 2 of 3 workers" in caplog.text
        ecs.set(vcpus={"FARGATE": 8.0})
        gate.await_arrivals(3)  # the third starts as soon as there is room
        gate.open()
        assert [f.result(timeout=60) for f in futures] == [0, 1, 2]


@pytest.mark.slow
def test_work_waits_for_capacity_and_then_runs(
    ecs: EcsServer, deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    ecs.set(capacity={"FARGATE_SPOT": 0})
    with StarburstExecutor(max_workers=2, use_spot=True, intervals=QUICK) as executor:
        future = executor.submit(square, 7)
        until(lambda: "Capacity is unavailable" in caplog.text, "it was said")
        assert not future.done()
        ecs.set(capacity={})
        assert future.result(timeout=60) == 49


@pytest.mark.slow
def test_tasks_that_are_stopped_unborn_for_lack_of_capacity_are_started_again(
    ecs: EcsServer, deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    ecs.set(unborn={"FARGATE_SPOT": 1})
    with StarburstExecutor(max_workers=1, use_spot=True, intervals=QUICK) as executor:
        future = executor.submit(square, 7)
        assert future.result(timeout=60) == 49
    assert "could not be started. TaskFailedToStart: Capacity" in caplog.text
    unborn, _ = ecs.tasks(deployment.cluster)
    assert unborn["stopCode"] == "TaskFailedToStart"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"STARBURST_IMAGE": "registry.test/missing:1"}, r"not found.*Check `image`"),
        ({"STARBURST_SUBNETS": "subnet-missing"}, "Check the subnets"),
        ({"STARBURST_CLUSTER": "no-such-cluster"}, "ClusterNotFoundException"),
        ({"STARBURST_LOG_GROUP": "/missing"}, "log group is missing"),
    ],
)
def test_what_can_never_start_is_an_error_on_the_futures_within_a_minute(
    deployment: Deployment,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    says: str,
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    executor = StarburstExecutor(max_workers=2, intervals=QUICK)
    future = executor.submit(square, 7)
    with pytest.raises(LaunchFailed, match=says):
        future.result(timeout=60)
    assert time.monotonic() - began < 60
    with pytest.raises(LaunchFailed):
        executor.submit(square, 8)
    executor.shutdown()


def test_a_quota_of_nothing_is_an_error_on_the_futures(
    ecs: EcsServer, deployment: Deployment
) -> None:
    ecs.set(vcpus={"FARGATE": 0.0})
    executor = StarburstExecutor(max_workers=2, intervals=QUICK)
    with pytest.raises(LaunchFailed, match="quota is 0 concurrent Fargate vCPUs"):
        executor.submit(square, 7).result(timeout=60)
    executor.shutdown()


@pytest.mark.slow
def test_two_sessions_do_not_touch_each_others_workers(
    ecs: EcsServer, deployment: Deployment, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    with StarburstExecutor(max_workers=1, intervals=QUICK) as first:
        held = first.submit(gate.hold, "first")
        gate.await_arrivals()
        with StarburstExecutor(max_workers=1, intervals=QUICK) as second:
            assert second.submit(square, 3).result(timeout=60) == 9
            assert live_workers(first).isdisjoint(live_workers(second))
        [task] = ecs.live(deployment.cluster)
        assert task["startedBy"] == first.session_id
        gate.open()
        assert held.result(timeout=60) == "first"


@pytest.mark.slow
def test_workers_come_and_leave_as_they_are_wanted(
    ecs: EcsServer, deployment: Deployment, tmp_path: Path
) -> None:
    gate, later = Gate(tmp_path / "gate"), Gate(tmp_path / "later")
    with StarburstExecutor(max_workers=1, idle_timeout=0.5, intervals=QUICK) as executor:
        futures = [executor.submit(gate.hold, n) for n in range(3)]
        gate.await_arrivals(1)
        executor.scale(3)
        gate.await_arrivals(3)
        assert len(ecs.tasks(deployment.cluster)) == 3
        executor.scale(1)
        gate.open()
        wait(futures, timeout=60)
        until(lambda: not ecs.live(deployment.cluster), "idle workers have left")
        more = [executor.submit(later.hold, n) for n in range(3)]
        later.await_arrivals(1)
        later.open()
        wait(more, timeout=60)
        assert len(ecs.tasks(deployment.cluster)) == 4  # one for all three


def test_trouble_of_ecs_passes_unnoticed(ecs: EcsServer, deployment: Deployment) -> None:
    ecs.set(throttle={"RunTask": 1, "ListTasks": 1}, lose={"RunTask": 1}, list_delay=3.0)
    with StarburstExecutor(max_workers=2, intervals=QUICK) as executor:
        assert list(executor.map(square, range(10))) == [x * x for x in range(10)]
        assert len(ecs.tasks(deployment.cluster)) == 2  # the lost reply's are the same


def test_cleanup_stops_what_is_starting_and_what_runs(
    ecs: EcsServer, deployment: Deployment, tmp_path: Path
) -> None:
    ecs.set(start_delay=2.0)
    gate = Gate(tmp_path / "gate")
    executor = StarburstExecutor(max_workers=2, intervals=QUICK)
    executor.submit(gate.hold)
    until(lambda: ecs.live(deployment.cluster), "a task is starting")
    executor.cleanup(force=True)
    assert ecs.live(deployment.cluster) == []
    assert keys(deployment.store) == []


@pytest.mark.slow
def test_workers_that_cannot_work_are_an_error_with_what_they_printed(
    ecs: EcsServer, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    ecs.set(task_endpoints={"AWS_ENDPOINT_URL_S3": "127.0.0.1:9"})
    executor = StarburstExecutor(max_workers=3, intervals=QUICK)
    futures = [executor.submit(square, n) for n in range(3)]
    with pytest.raises(ExecutorBroken, match="AWS_ENDPOINT_URL_S3"):
        futures[0].result(timeout=100)
    said = run("logs", executor.session_id, "--workers")
    assert said.count("AWS_ENDPOINT_URL_S3") >= 3
    executor.shutdown()


def test_no_more_workers_are_started_than_max_hourly_cost_allows_whoever_wants_them(
    ecs: EcsServer, deployment: Deployment, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    executor = StarburstExecutor(
        2,
        cpu=1,
        memory="2GB",
        max_hourly_cost=0.12,
        cost_alert=0.000001,
        intervals=QUICK,
    )  # a worker costs some $0.054 an hour
    # As an older client would, which knows of no limit.
    session = executor._engine.session
    executor._engine.autoscaler.manifest = session.amend(lambda m: replace(m, workers=5))
    futures = [executor.submit(gate.hold, n) for n in range(5)]
    gate.await_arrivals(2)
    assert len(ecs.tasks(deployment.cluster)) == 2
    gate.open()
    assert sorted(f.result() for f in futures) == list(range(5))
    status = executor.status()
    assert len(ecs.tasks(deployment.cluster)) == 2
    assert status.cost is not None
    assert status.cost.vcpu_seconds == 2 * 60
    assert status.cost.hourly == pytest.approx(2 * (0.04048 + 2 * 0.004445 + 0.005))
    assert status.cost.alert
    executor.cleanup(force=True)


# --- from nothing to nothing ---------------------------------------------------------


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def in_account(ecs: EcsServer) -> set[str]:
    """Names of all that setup, or launching, may make."""

    def ask(service: str, operation: str, what: str, name: str = "") -> set[str]:
        with contextlib.closing(ecs.aws(service)) as client:
            found = getattr(client, operation)()[what]
        return {f"{what} {one[name] if name else one}" for one in found}

    return {
        *ask("s3", "list_buckets", "Buckets", "Name"),
        *ask("iam", "list_roles", "Roles", "RoleName"),
        *ask("ec2", "describe_security_groups", "SecurityGroups", "GroupId"),
        *ask("ec2", "describe_vpc_endpoints", "VpcEndpoints", "VpcEndpointId"),
        *ask("logs", "describe_log_groups", "logGroups", "logGroupName"),
        *ask("ecs", "list_clusters", "clusterArns"),
        *(t["id"] for t in ecs.control()["tasks"] if t["lastStatus"] != "STOPPED"),
        *ask("cloudformation", "describe_stacks", "Stacks", "StackName"),
    }


@pytest.mark.slow
def test_setup_run_and_teardown_leave_nothing_but_the_bucket(
    ecs: EcsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("starburst_executor.aws.deployment.stack._LOOK_SECONDS", 0.05)
    monkeypatch.setattr("starburst_executor.aws.deployment.teardown._LOOK_SECONDS", 0.2)
    before = in_account(ecs)

    setup = ("setup", "--yes", "--image")
    said = run(*setup, "registry.test/missing:1", code=Exit.OTHER)
    assert "everything is set up, but the test task failed" in said
    assert "CannotPullContainerError" in said
    said = run(*setup, "registry.test/python:3")
    assert "nothing to change" in said
    assert "A worker ran the test task (1 + 2 = 3)." in said

    with StarburstExecutor(max_workers=1) as executor:  # as the file says
        assert executor.submit(square, 3).result(timeout=60) == 9
        assert executor._engine.launcher.name == "ecs"
    gate = Gate(tmp_path / "gate")
    executor = StarburstExecutor(max_workers=1)
    executor.submit(gate.hold)
    gate.await_arrivals()
    executor.detach()

    assert "tasks are unfinished in 1 sessions" in run("teardown", "--yes", code=Exit.OTHER)
    said = run("teardown", "--yes", "--force")
    bucket = "starburst-executor-000000000000-us-east-1"
    assert f"Still there: the bucket s3://{bucket}/ with its results" in said
    assert in_account(ecs) - before == {f"Buckets {bucket}"}
    assert any(executor.session_id in key for key in keys(f"s3://{bucket}"))


@pytest.mark.slow
def test_the_check_of_a_real_account_passes_on_this_one(ecs: EcsServer, tmp_path: Path) -> None:
    before = in_account(ecs)
    done = run_python(
        *("-m", "pytest", "-q", "-m", "aws", "-p", "no:cacheprovider"),
        Path(__file__).parents[1] / "test_aws_account.py",
        timeout=100,
        STARBURST_AWS_TEST="1",
        STARBURST_IMAGE="registry.test/python:3",
        HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    assert in_account(ecs) == before

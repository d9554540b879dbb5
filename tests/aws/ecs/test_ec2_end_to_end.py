"""Whole sessions on EC2 instances: the emulator's tasks are real worker processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from starburst_executor import StarburstExecutor
from starburst_executor.aws.account import Clients
from starburst_executor.aws.deployment.removal import Owner, remove_capacity
from starburst_executor.aws.ecs import observer, spot_fallback, tasks
from starburst_executor.aws.ecs.capacity import Capacity
from starburst_executor.aws.ecs.diagnosis import Retryability
from starburst_executor.aws.ecs.instances import describe_instance_type
from starburst_executor.aws.ecs.requests import PacedRequests, RequestRefused
from starburst_executor.config import Deployment
from starburst_executor.errors import LaunchFailed
from starburst_executor.runtime import SystemRuntime
from tests.emulators.ecs_server import EcsServer, configure, ecs_server
from tests.support.metadata_server import metadata_server
from tests.support.sessions import QUICK, keys
from tests.support.tasks import Gate, until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EcsServer]:
    with ecs_server(tmp_path_factory.mktemp("ecs")) as running:
        yield running


@pytest.fixture
def deployment(
    server: EcsServer, s3_env: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Deployment]:
    """A cluster of the test's own, configured; whatever was started in it must have ended."""
    s3_env(server)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    server.set(shortage={}, capacity={}, task_endpoints={}, attach_delay=0.0)
    monkeypatch.setattr("starburst_executor.aws.ecs.requests._FIRST_PAUSE", 0.01)
    deployed = server.deploy()
    for name, value in configure(deployed).items():
        monkeypatch.setenv(name, value)
    yield deployed
    left = server.live(deployed.cluster)
    server.kill(*(task["id"] for task in left))
    assert not left, f"the test left tasks running: {left}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instances that have not come at once are asked about."""
    monkeypatch.setattr(tasks, "_ASK_SHORTAGE", 0.0)
    monkeypatch.setattr(observer, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(spot_fallback, "_ASK_AGAIN", 0.0)


def on_ec2(
    workers: int = 1, *, use_spot: bool = False, fall_back: bool = False
) -> StarburstExecutor:
    return StarburstExecutor(
        workers,
        launch_type="EC2",
        instance_type="c8a.xlarge",
        use_spot=use_spot,
        spot_fallback=fall_back,
        intervals=QUICK,
    )


def square(x: int) -> int:
    return x * x


def providers(server: EcsServer, deployment: Deployment) -> list[str]:
    """Those of a cluster, Fargate's aside."""
    found = server.aws("ecs").describe_clusters(clusters=[deployment.cluster])
    names: list[str] = found["clusters"][0]["capacityProviders"]
    assert names[:2] == ["FARGATE", "FARGATE_SPOT"]
    return names[2:]


def test_a_session_makes_its_capacity_once_and_runs_on_it(
    server: EcsServer, deployment: Deployment
) -> None:
    with on_ec2(2) as executor:
        assert list(executor.map(square, range(20))) == [x * x for x in range(20)]
        [first, *_] = server.tasks(deployment.cluster)
    assert first["launchType"] == "EC2"
    [name] = providers(server, deployment)
    assert first["capacityProviderName"] == name
    assert name.startswith("starburst-c8a-xlarge-on-demand-")
    with on_ec2() as executor:
        assert executor.submit(square, 3).result(timeout=60) == 9
    assert providers(server, deployment) == [name]
    assert keys(deployment.store) == []


def test_both_markets_have_capacity_of_their_own(server: EcsServer, deployment: Deployment) -> None:
    for use_spot in (False, True):
        with on_ec2(use_spot=use_spot) as executor:
            assert executor.submit(square, 3).result(timeout=60) == 9
    one, other = providers(server, deployment)
    assert "-on-demand-" in one
    assert "-spot-" in other
    used = [t["capacityProviderName"] for t in server.tasks(deployment.cluster)]
    assert used == [one, other]


@pytest.mark.slow
def test_work_runs_elsewhere_when_a_spot_instance_is_taken_back(
    server: EcsServer, deployment: Deployment, tmp_path_factory: pytest.TempPathFactory
) -> None:
    gate = Gate(tmp_path_factory.mktemp("gate") / "gate")
    with metadata_server() as metadata:
        address = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.endpoint}
        server.set(task_endpoints=address)
        with on_ec2(use_spot=True) as executor:
            future = executor.submit(gate.hold, "kept")
            gate.await_arrivals()
            metadata.take_back()
            gate.await_arrivals(2)
            gate.open()
            assert future.result(timeout=60) == "kept"
        assert len(server.tasks(deployment.cluster)) == 2


NO_SPOT = "Could not launch Spot Instances. UnfulfillableCapacity - Unable to fulfill capacity."


@pytest.mark.slow
def test_what_spot_lacks_is_started_on_demand_where_that_is_wanted(
    server: EcsServer,
    deployment: Deployment,
    impatient: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.set(shortage={"spot": NO_SPOT})
    with on_ec2(use_spot=True, fall_back=True) as executor:
        assert executor.submit(square, 3).result(timeout=60) == 9
    used = [t["capacityProviderName"] for t in server.tasks(deployment.cluster)]
    assert ["-spot-" in name for name in used] == [True, False]
    assert "starting workers on-demand for the next 10 minutes" in caplog.text
    assert "UnfulfillableCapacity" in caplog.text


@pytest.mark.slow
def test_without_fallback_it_is_said_what_is_waited_for(
    server: EcsServer,
    deployment: Deployment,
    impatient: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.set(shortage={"spot": NO_SPOT})
    with on_ec2(use_spot=True) as executor:
        future = executor.submit(square, 3)
        text = "1 workers wait for spot instances of c8a.xlarge"
        until(lambda: text in caplog.text, "it was said")
        assert not future.done()
        server.set(shortage={})
        assert future.result(timeout=60) == 9
    assert caplog.text.count(text) == 1


def test_instances_that_can_never_start_are_an_error_on_the_futures(
    server: EcsServer, deployment: Deployment, impatient: None
) -> None:
    text = "Invalid IamInstanceProfile: Invalid IAM Instance Profile ARN."
    server.set(shortage={"on-demand": text})
    executor = on_ec2()
    with pytest.raises(LaunchFailed, match=r"Invalid IAM Instance.*setup"):
        executor.submit(square, 3).result(timeout=60)
    executor.shutdown()


def made(capacity: Capacity) -> bool:
    """As whoever launches: what is refused for now is tried again some seconds later."""
    try:
        capacity.make()
    except RequestRefused as refused:
        if refused.diagnosis.retryability is not Retryability.LATER:
            raise
        return False
    return True


def test_two_clients_at_once_make_one_capacity_and_drop_no_other(
    server: EcsServer, deployment: Deployment
) -> None:
    server.set(attach_delay=0.5)
    clients = Clients("us-east-1")
    types = [
        describe_instance_type(clients.get("ec2"), name) for name in ("c8a.xlarge", "c8g.large")
    ]
    wanted = [(t, spot) for t in types for spot in (False, True)] * 2
    together = threading.Barrier(len(wanted))

    def make(one: tuple[object, bool]) -> str:
        runtime = SystemRuntime()
        capacity = Capacity(
            deployment,
            one[0],  # type: ignore[arg-type]
            use_spot=one[1],
            clients=Clients("us-east-1"),
            calls=PacedRequests(runtime),
        )
        together.wait(60)
        until(lambda: made(capacity), "ECS is not busy with the others")
        runtime.close()
        return capacity.name

    with ThreadPoolExecutor(len(wanted)) as pool:
        names = list(pool.map(make, wanted))
    assert len(set(names)) == 4
    assert sorted(providers(server, deployment)) == sorted(set(names))


def test_what_was_made_for_a_cluster_is_found_and_removed(
    server: EcsServer, deployment: Deployment
) -> None:
    with on_ec2() as executor:
        assert executor.submit(square, 3).result(timeout=60) == 9
    said: list[str] = []
    runtime = SystemRuntime()
    owner = Owner(cluster=deployment.cluster, instance_profile_arn=None)
    remove_capacity(Clients("us-east-1"), owner, runtime, said.append)
    remove_capacity(Clients("us-east-1"), owner, runtime, said.append)  # of nothing
    runtime.close()
    assert len(said) == 3
    assert providers(server, deployment) == []


def test_a_cluster_that_lost_a_provider_gets_it_back(
    server: EcsServer, deployment: Deployment
) -> None:
    with on_ec2() as executor:
        assert executor.submit(square, 3).result(timeout=60) == 9
        name = providers(server, deployment)
        server.aws("ecs").put_cluster_capacity_providers(
            cluster=deployment.cluster,
            capacityProviders=["FARGATE", "FARGATE_SPOT"],
            defaultCapacityProviderStrategy=[],
        )
        executor.scale(2)
        futures = [executor.submit(square, n) for n in range(50)]
        assert [f.result(timeout=60) for f in futures] == [n * n for n in range(50)]
    assert providers(server, deployment) == name


def test_an_unknown_type_and_a_size_that_does_not_fit_are_refused_and_leave_nothing(
    server: EcsServer, deployment: Deployment
) -> None:
    with pytest.raises(ValueError, match=r"no such type in us-east-1; similar ones: c8a\.xlarge"):
        StarburstExecutor(1, launch_type="EC2", instance_type="c8a.xlagre")
    with pytest.raises(ValueError, match=r'memory="7577MB" would fit'):
        StarburstExecutor(1, launch_type="EC2", instance_type="c8a.xlarge", memory="8GB")
    assert keys(deployment.store) == []
    assert providers(server, deployment) == []


def test_a_store_in_a_directory_is_refused_before_anything_is_made(
    deployment: Deployment, directory_url: str
) -> None:
    with pytest.raises(ValueError, match="cannot reach a directory on this machine"):
        StarburstExecutor(1, store=directory_url, launcher="ecs")
    assert not Path(directory_url).exists()

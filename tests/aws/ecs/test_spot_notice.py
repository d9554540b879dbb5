"""EC2's Spot notice: seen in time by the workers on the instance, and by nobody else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from starburst_executor import StarburstExecutor
from starburst_executor.aws.ecs import spot_notice
from starburst_executor.aws.ecs.spot_notice import SpotNotice
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.url import open_store
from tests.support.metadata_server import MetadataServer, metadata_server
from tests.support.sessions import QUICK, live_workers
from tests.support.tasks import Gate, until


def move_to_ec2(executor: StarburstExecutor, store_url: str) -> None:
    """Let the workers, which will be of this machine, find that they are on EC2."""
    session = Session(open_store(store_url), executor.session_id, SystemRuntime())
    spec = WorkerSpec(launch_type="EC2", instance_type="c8a.xlarge", use_spot=True)
    session.amend(lambda manifest: replace(manifest, spec=spec))


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataServer]:
    with metadata_server() as server:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.endpoint)
        yield server


class Heard:
    """What was said when the notice came."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.event = threading.Event()

    def __call__(self, text: str) -> None:
        self.said.append(text)
        self.event.set()


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot_notice, "_LOOK_SECONDS", 0.01)


def test_the_notice_is_heard_once_with_what_and_when(
    metadata: MetadataServer, quick_looks: None
) -> None:
    heard = Heard()
    watching = SpotNotice(heard)
    until(lambda: metadata.looks > 2, "some looks")
    assert not heard.said
    metadata.take_back()
    metadata.take_back()
    assert heard.event.wait(60)
    watching.close()
    assert heard.said == ["EC2 reclaims its Spot instance (terminate at 2026-01-02T03:04:05Z)"]
    assert len(metadata.tokens) == 1


def test_a_token_that_has_run_out_is_renewed(metadata: MetadataServer, quick_looks: None) -> None:
    heard = Heard()
    watching = SpotNotice(heard)
    until(lambda: metadata.looks > 0, "a look")
    metadata.tokens = {"another"}
    metadata.take_back()
    assert heard.event.wait(60)
    watching.close()


def test_metadata_that_does_not_answer_is_said_once_and_asked_again(
    metadata: MetadataServer, quick_looks: None, caplog: pytest.LogCaptureFixture
) -> None:
    metadata.failing = True
    heard = Heard()
    watching = SpotNotice(heard)
    until(lambda: metadata.looks > 3, "some looks")
    metadata.failing = False
    metadata.take_back()
    assert heard.event.wait(60)
    watching.close()
    assert caplog.text.count("cannot be read") == 1


@pytest.mark.slow
def test_a_worker_on_spot_hands_back_when_its_instance_is_taken_back(
    metadata: MetadataServer,
    directory_url: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("STARBURST_MARKET", "spot")
    gate = Gate(tmp_path / "gate")
    # A single attempt: were it lost, the task would fail.
    with StarburstExecutor(1, store=directory_url, intervals=QUICK, max_attempts=1) as executor:
        move_to_ec2(executor, directory_url)
        future = executor.submit(gate.hold, "kept")
        gate.await_arrivals()
        [first] = live_workers(executor)
        metadata.take_back()
        gate.await_arrivals(2)  # on another worker
        assert first not in live_workers(executor)
        gate.open()
        assert future.result(timeout=60) == "kept"


def test_a_worker_elsewhere_asks_nobody(
    metadata: MetadataServer, directory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARBURST_MARKET", "on-demand")
    with StarburstExecutor(1, store=directory_url, intervals=QUICK) as executor:
        move_to_ec2(executor, directory_url)
        assert executor.submit(pow, 2, 3).result(timeout=60) == 8
    assert metadata.looks == 0

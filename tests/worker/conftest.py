"""Fixtures for the tests of a worker's child processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cloudpickle  # type: ignore[import-untyped]
import pytest

from starburst_executor import StarburstExecutor
from starburst_executor.worker import loop, transfers
from tests.support import bench as benches
from tests.support.bench import Bench
from tests.support.shop import UNHURRIED, Shop


@pytest.fixture(scope="module")
def functions_travel_by_value(request: pytest.FixtureRequest) -> Iterator[None]:
    """Children cannot import the tests."""
    modules = (request.module, benches)
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.slots.close()
    assert not bench.spool.exists()


@pytest.fixture
def lone(directory_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[StarburstExecutor]:
    """An executor that starts no workers."""
    monkeypatch.setattr(
        "starburst_executor.coordination.autoscaler.Autoscaler._fill", lambda *_: None
    )
    one = StarburstExecutor(1, store=directory_url, intervals=UNHURRIED)
    yield one
    one.cleanup(force=True)


@pytest.fixture
def shop(
    lone: StarburstExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shop]:
    monkeypatch.setattr(loop, "ENDURANCE", 2)
    monkeypatch.setattr(transfers, "ENDURANCE", 2)
    shop = Shop(lone, tmp_path / "shop")
    yield shop
    shop.close()

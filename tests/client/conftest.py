"""Executors of each kind, so that the same tests can be run on all."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from starburst_executor import SessionNotFound, StarburstExecutor
from tests.support.sessions import QUICK, Make
from tests.support.tasks import Gate, process_id


@pytest.fixture
def make(directory_url: str) -> Iterator[Make]:
    """Makes executors on a directory; takes down what a failing test leaves."""
    made: list[StarburstExecutor] = []

    def make_one(max_workers: int = 2, **options: Any) -> StarburstExecutor:
        options.setdefault("store", directory_url)
        options.setdefault("intervals", QUICK)
        made.append(StarburstExecutor(max_workers, **options))
        return made[-1]

    yield make_one
    for executor in made:
        with contextlib.suppress(SessionNotFound):
            executor.cleanup(force=True)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StarburstExecutor]:
    """An executor with both of its two workers at work, shared by what does it no harm."""
    folder = tmp_path_factory.mktemp("warm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARBURST_HOME", str(folder))
        executor = StarburstExecutor(2, store=folder / "store", keep=True)
    with executor:
        gate = Gate(folder / "gate")
        futures = [executor.submit(gate.hold, i) for i in range(2)]
        gate.await_arrivals(2)
        gate.open()
        wait(futures)
        _start_all_threads(executor)
        yield executor


def _start_all_threads(executor: StarburstExecutor) -> None:
    """Or the first test with many requests at once would seem to leave some running."""
    width = 8
    together = threading.Barrier(width)
    executor._engine.session.runtime.gather([together.wait] * width)


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as executor:
        both = threading.Barrier(2)
        wait([executor.submit(both.wait) for _ in range(2)])
        yield executor


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        list(executor.map(process_id, range(8)))
        yield executor


@pytest.fixture(params=["threads", "processes", "starburst"])
def pool(request: pytest.FixtureRequest) -> Executor:
    """Each executor in turn: the standard library's show what the contract is."""
    name = "warm" if request.param == "starburst" else request.param
    executor: Executor = request.getfixturevalue(name)
    return executor


@pytest.fixture(params=["threads", "starburst"])
def fresh(request: pytest.FixtureRequest) -> Callable[[], Executor]:
    """Makes executors that a test may shut down."""
    if request.param == "threads":
        return lambda: ThreadPoolExecutor(2)
    maker: Make = request.getfixturevalue("make")
    return maker


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()  # for who still waits where a test has failed

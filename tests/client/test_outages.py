"""A store that is away, or refuses for now, delays what needs it and fails nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest

from starburst_executor import (
    LocalDiskError,
    SessionTerminated,
    StarburstExecutor,
    StoreDenied,
    StoreError,
    StoreMissing,
    StoreUnavailable,
)
from starburst_executor.client import creation
from starburst_executor.storage.base import Store
from starburst_executor.storage.url import open_store
from tests.support.sessions import QUICK, FaultyStore, FirstTries
from tests.support.tasks import double

Client = tuple[StarburstExecutor, FaultyStore]

AWAY = StoreUnavailable("HTTP 503")
DENIED = StoreDenied("ExpiredToken")
FULL = LocalDiskError("the disk is full")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[FaultyStore]]:
    """The stores that clients open from now on; workers have others, which work."""
    opened: list[FaultyStore] = []

    def open_faulty(url: str | Path) -> Store:
        opened.append(FaultyStore(open_store(url)))
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARBURST_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(creation, "open_store", open_faulty)
        yield opened


@pytest.fixture(scope="module")
def shared(stores: list[FaultyStore], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    executor = StarburstExecutor(1, store=tmp_path_factory.mktemp("shared"), intervals=QUICK)
    executor.submit(double, 1).result(60)  # its worker and threads are not a test's
    together = threading.Barrier(8)
    executor._engine.session.runtime.gather([together.wait] * 8)
    yield executor, stores[-1]
    executor.cleanup(force=True)


@pytest.fixture
def client(shared: Client) -> Iterator[Client]:
    """An executor with a worker, and its store, whose faults end with the test."""
    yield shared
    shared[1].fault = no_fault


@pytest.fixture
def fresh(stores: list[FaultyStore], directory_url: str) -> Iterator[Client]:
    """The same for one test alone, without a worker yet."""
    executor = StarburstExecutor(1, store=directory_url, intervals=QUICK)
    store = stores[-1]
    yield executor, store
    store.fault = no_fault
    executor.cleanup(force=True)


@pytest.fixture
def attached(client: Client, stores: list[FaultyStore]) -> Iterator[Client]:
    """A second client of the shared session."""
    executor = StarburstExecutor.attach(client[0].session_id, store=client[0].store)
    store = stores[-1]
    yield executor, store
    store.fault = no_fault
    executor.detach()


def no_fault(method: str, key: str) -> None:
    pass


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# --- results ------------------------------------------------------------------------


@pytest.mark.parametrize("error", [AWAY, DENIED, FULL], ids=["503", "expired", "disk"])
@pytest.mark.parametrize("part", ["/blobs/", "/record", "queue/"])
def test_results_that_cannot_be_read_for_now_come_later(
    client: Client, error: Exception, part: str
) -> None:
    one, store = client
    store.fault = fault = FirstTries(error, ("get", "download", "list"), part, 4)
    big, small = one.submit(np.arange, 100_000), one.submit(double, 21)
    assert np.array_equal(big.result(60), np.arange(100_000))
    assert small.result(60) == 42
    assert fault.left == 0


def test_an_exception_whose_parts_cannot_be_read_for_now_comes_whole_later(client: Client) -> None:
    def fail() -> None:
        raise ValueError(np.arange(100_000))

    one, store = client
    store.fault = fault = FirstTries(DENIED, ("get", "download"), "/blobs/", 4)
    error = one.submit(fail).exception(60)
    assert type(error) is ValueError
    assert np.array_equal(error.args[0], np.arange(100_000))
    assert fault.left == 0


@pytest.mark.parametrize("part", ["/record", "/blobs/"])
def test_a_future_that_could_not_be_read_is_read_when_asked_again(
    client: Client, attached: Client, part: str
) -> None:
    client[0].submit(np.arange, 100_000).result(60)
    again, store = attached
    future = again.futures[-1]
    store.fault = FirstTries(DENIED, ("get", "download"), part, 2)
    for ask in (future.result, future.exception):
        with pytest.raises(StoreDenied):
            ask()
    assert len(future.result()) == 100_000


@pytest.mark.parametrize("error", [AWAY, DENIED], ids=["503", "expired"])
def test_collect_in_an_outage_keeps_nothing_of_it(
    client: Client, attached: Client, error: Exception
) -> None:
    wait([client[0].submit(double, 1), client[0].submit(np.arange, 100_000)], 60)
    again, store = attached
    store.fault = fault = FirstTries(error, ("get", "download"), "/blobs/", 1)
    try:
        outcomes = again.collect()
    except StoreError:
        outcomes = again.collect()
    assert [outcome.error for outcome in outcomes[-2:]] == [None, None]
    assert len(outcomes[-1].value) == 100_000
    assert fault.left == 0


# --- tasks --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [AWAY, DENIED], ids=["503", "expired"])
@pytest.mark.parametrize("part", ["/tasks", "/functions/", "/blobs/"])
def test_a_task_that_cannot_be_stored_for_now_is_stored_later(
    client: Client, error: Exception, part: str
) -> None:
    one, store = client
    store.fault = fault = FirstTries(error, ("create", "put", "upload"), part, 3)
    new = f"{error} {part}"  # else callable and array are stored already
    array = np.frombuffer(new.encode() * 10_000, dtype=np.uint8)
    assert one.submit(lambda a: (new, len(a)), array).result(60) == (new, len(array))
    assert one.submit(double, 1).result(60) == 2
    assert fault.left == 0


def test_a_refusal_is_told_of_once(fresh: Client, caplog: pytest.LogCaptureFixture) -> None:
    one, store = fresh
    store.fault = fault = FirstTries(DENIED, ("create", "list"), "queue/", 6)
    assert one.submit(double, 1).result(60) == 2
    assert fault.left == 0
    [text] = warnings(caplog)
    assert one.session_id in text
    assert "ExpiredToken" in text
    assert "goes on by itself once" in text


def test_cleanup_in_an_outage_does_not_wait_for_tasks_to_be_stored(fresh: Client) -> None:
    one, store = fresh
    store.fault = fault = FirstTries(DENIED, "create", "/tasks")
    future = one.submit(double, 1)
    assert fault.met.wait(60)
    one.cleanup()
    assert isinstance(future.exception(60), SessionTerminated)


def test_a_detach_in_an_outage_returns_once_everything_is_stored(fresh: Client) -> None:
    one, store = fresh
    store.fault = fault = FirstTries(DENIED, "create", "/tasks", 3)
    one.submit(double, 1)
    session_id = one.detach()
    assert fault.left == 0
    with StarburstExecutor.attach(session_id, store=one.store) as again:
        assert [future.result(60) for future in again.futures] == [2]


def test_a_task_that_waiting_cannot_help_to_store_fails_at_once(fresh: Client) -> None:
    one, store = fresh
    store.fault = FirstTries(StoreMissing("no bucket"), "create", "/tasks", 1)
    assert isinstance(one.submit(double, 1).exception(60), StoreMissing)

"""What a worker does about a store that is away or refuses, and about damage: one table."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from starburst_executor import (
    DamagedObject,
    LocalDiskError,
    StarburstExecutor,
    StoreDenied,
    StoreUnavailable,
)
from starburst_executor.errors import ObjectNotFound, StoreError
from starburst_executor.protocol import records
from starburst_executor.protocol.manifest import Manifest, WorkerState
from starburst_executor.worker import transfers
from tests.support.shop import PATIENCE, Faults, Shop, raises, task_of
from tests.support.tasks import Gate, double, until

LENGTH = 1 << 20  # of bytes that are stored beside the record


def make(length: int) -> bytes:
    return b"1" * length


def starved() -> OSError:
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))


# --- the store is away, or refuses for now ------------------------------------------


@pytest.mark.parametrize(
    "error", [StoreUnavailable("503"), StoreDenied("ExpiredToken")], ids=["503", "expired"]
)
@pytest.mark.parametrize("operation", ["upload", "download"])
def test_a_large_object_waits_for_the_store_as_records_do(
    lone: StarburstExecutor, shop: Shop, operation: str, error: Exception
) -> None:
    shop.store.fault = faults = Faults(error, operation, "/blobs/", times=3)
    there = lone.submit(len, bytes(LENGTH))
    back = lone.submit(make, LENGTH)
    shop.open()
    assert there.result(PATIENCE) == LENGTH
    assert len(back.result(PATIENCE)) == LENGTH
    assert len(faults.hits) == 3
    assert {task_of(lone, f).attempt for f in (there, back)} == {1}


def test_other_tasks_go_on_while_a_result_waits_for_the_store(
    lone: StarburstExecutor, shop: Shop
) -> None:
    shop.store.fault = faults = Faults(StoreUnavailable("503"), "upload", "/blobs/")
    waiting = lone.submit(make, LENGTH)
    shop.open()
    assert lone.submit(double, 2).result(PATIENCE) == 4
    until(lambda: len(faults.hits) > 1, "the upload was tried again")
    assert not waiting.done()
    shop.store.fault = lambda *_: None
    assert len(waiting.result(PATIENCE)) == LENGTH


def test_a_worker_that_is_told_to_leave_hands_back_a_result_that_waits_for_the_store(
    lone: StarburstExecutor, shop: Shop
) -> None:
    shop.store.fault = faults = Faults(StoreUnavailable("503"), "upload", "/blobs/")
    waiting = lone.submit(make, LENGTH)
    shop.open()
    until(lambda: len(faults.hits) > 1, "the upload was tried again")
    shop.worker.stop("told to")
    assert shop.left().state is WorkerState.LEFT
    assert task_of(lone, waiting).past[-1].how == "handed back"


def test_a_permission_that_stays_missing_is_named_by_the_worker_that_leaves(
    lone: StarburstExecutor, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "DENIED_SECONDS", 0.0)
    shop.store.fault = Faults(StoreDenied("s3:GetObject is missing"), "download", "/blobs/")
    future = lone.submit(len, bytes(LENGTH))
    shop.open()
    beat = shop.left()
    assert beat.state is WorkerState.BROKEN
    assert "goes on refusing what tasks need: s3:GetObject is missing" in beat.reason
    assert task_of(lone, future).past[-1].how == "handed back"


# --- an object is gone or wrong -----------------------------------------------------


@pytest.mark.parametrize(
    "error", [ObjectNotFound("no such object"), StoreError("400, too large")], ids=["gone", "400"]
)
def test_an_object_that_is_gone_or_refused_fails_its_task_alone(
    lone: StarburstExecutor, shop: Shop, error: Exception
) -> None:
    shop.store.fault = Faults(error, "download", "/blobs/")
    lost = lone.submit(len, bytes(LENGTH))
    shop.open()
    with pytest.raises(DamagedObject):
        lost.result(PATIENCE)
    assert lone.submit(double, 2).result(PATIENCE) == 4


def test_a_result_that_the_store_refuses_for_good_fails_its_task_alone(
    lone: StarburstExecutor, shop: Shop
) -> None:
    shop.store.fault = Faults(StoreError("400, too large"), "upload", "/blobs/")
    refused = lone.submit(make, LENGTH)
    shop.open()
    with pytest.raises(DamagedObject, match="400, too large"):
        refused.result(PATIENCE)
    assert lone.submit(double, 2).result(PATIENCE) == 4


# --- helper threads -----------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("a mistake"), SystemExit("odd")], ids=repr)
@pytest.mark.parametrize("operation", ["upload", "download"])
def test_no_transfer_ends_without_an_entry(
    lone: StarburstExecutor, shop: Shop, operation: str, error: BaseException
) -> None:
    def fault(asked: str, key: str) -> None:
        if asked == operation and "/blobs/" in key:
            raise error

    shop.store.fault = fault
    future = (
        lone.submit(len, bytes(LENGTH)) if operation == "download" else lone.submit(make, LENGTH)
    )
    shop.open()
    with pytest.raises(DamagedObject, match=r"a mistake|broken off"):
        future.result(PATIENCE)
    assert lone.submit(double, 2).result(PATIENCE) == 4


@pytest.mark.parametrize("operation", ["upload", "download"])
def test_a_moment_without_descriptors_delays_a_transfer(
    lone: StarburstExecutor, shop: Shop, operation: str
) -> None:
    shop.store.fault = faults = Faults(starved(), operation, "/blobs/", times=1)
    back = lone.submit(make, LENGTH)
    there = lone.submit(len, bytes(LENGTH))
    shop.open()
    assert len(back.result(PATIENCE)) == there.result(PATIENCE) == LENGTH
    assert len(faults.hits) == 1


@pytest.mark.parametrize("operation", ["upload", "download"])
def test_a_worker_that_has_no_descriptors_for_long_hands_back_and_leaves(
    lone: StarburstExecutor, shop: Shop, operation: str
) -> None:
    shop.store.fault = Faults(starved(), operation, "/blobs/")
    back, there = lone.submit(make, LENGTH), lone.submit(len, bytes(LENGTH))
    shop.open()
    beat = shop.left()
    assert (beat.state, "Too many open files" in beat.reason) == (WorkerState.BROKEN, True)
    task = task_of(lone, there) if operation == "download" else task_of(lone, back)
    assert (task.state, task.losses) == (records.State.PENDING, 0)
    assert task.past[-1].how == "handed back"


# --- this machine's own disk --------------------------------------------------------


@pytest.mark.parametrize("what", ["argument", "result", "function", "modules"])
def test_a_worker_whose_disk_is_full_hands_back_and_leaves_and_says_so(
    lone: StarburstExecutor, shop: Shop, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    error = LocalDiskError("/tmp/x cannot be read or written: No space left on device")
    operation, part = {
        "argument": ("download", "/blobs/"),
        "result": ("upload", "/blobs/"),
        "function": ("download", "/functions/"),
        "modules": ("", "nothing"),
    }[what]
    shop.store.fault = Faults(error, operation, part)
    if what == "modules":
        monkeypatch.setattr(shop.library, "path", raises(error))
    future = lone.submit(len, bytes(LENGTH)) if what == "argument" else lone.submit(make, LENGTH)
    shop.open()
    beat = shop.left()
    assert beat.state is WorkerState.BROKEN
    assert f"this worker's temp folder {shop.folder} is full or gone" in beat.reason
    assert "No space left" in beat.reason
    task = task_of(lone, future)
    assert (task.state, task.losses) == (records.State.PENDING, 0)
    assert [past.how for past in task.past] in ([], ["handed back"])


# --- a store that never returns -----------------------------------------------------


def limit(shop: Shop, **limits: float) -> None:
    """Let workers of the session be patient for less long than usual."""

    def edit(manifest: Manifest) -> Manifest:
        return replace(manifest, limits=replace(manifest.limits, **limits))

    shop.worker._check.manifest = shop.session.amend(edit)


def test_an_idle_worker_leaves_a_store_that_does_not_return(
    lone: StarburstExecutor, shop: Shop
) -> None:
    limit(shop, session_timeout=0.2)
    future = lone.submit(double, 2)
    shop.open()
    assert future.result(PATIENCE) == 4
    shop.store.fault = Faults(StoreUnavailable("503 at every request"))
    assert "the store has not been available" in shop.wait()
    assert "503 at every request" in shop.reason


def test_a_worker_leaves_a_store_that_does_not_take_its_results(
    lone: StarburstExecutor, shop: Shop, tmp_path: Path
) -> None:
    limit(shop, session_timeout=0.2)
    gate = Gate(tmp_path / "gate")
    lone.submit(gate.hold, 1)
    shop.open()
    gate.await_arrivals()
    shop.store.fault = Faults(StoreDenied("ExpiredToken"))
    assert shop.worker._membership.gives_up(StoreUnavailable("503"), 1e9) is None  # while it runs
    gate.open()
    assert "ExpiredToken" in shop.wait()
    shop.store.fault = lambda *_: None


def test_a_session_ends_at_its_time_also_while_the_store_is_away(
    lone: StarburstExecutor, shop: Shop, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    lone.submit(gate.hold, 1)
    shop.open()
    gate.await_arrivals()
    shop.store.fault = faults = Faults(StoreUnavailable("503"))
    until(lambda: any("session.json" in hit for hit in faults.hits), "the manifest is not read")
    check = shop.worker._check
    check.manifest = replace(check.manifest, deadline=check.manifest.created)
    assert "absolute time limit" in shop.wait()
    shop.store.fault = lambda *_: None
    gate.open()

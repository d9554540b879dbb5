"""What errors of the store mean, and how long it is waited for."""

from __future__ import annotations

import logging
import threading

import pytest

from starburst_executor import errors
from starburst_executor.errors import (
    Conflict,
    DamagedObject,
    LocalDiskError,
    NewerSchema,
    ObjectNotFound,
    SessionTerminated,
    StoreDenied,
    StoreError,
    StoreMissing,
    StoreNotConditional,
    StoreUnavailable,
)
from starburst_executor.protocol.patience import Consequence, Outage, Patience, consequence
from starburst_executor.protocol.session import Session
from starburst_executor.runtime import Signal, SystemRuntime
from tests.support.fakes import MemoryStore


class VirtualTime(SystemRuntime):
    """A runtime whose clock moves only while somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def signal(self) -> Signal:
        return _VirtualSignal(self)


class _VirtualSignal(threading.Event):
    def __init__(self, runtime: VirtualTime) -> None:
        super().__init__()
        self._runtime = runtime

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self._runtime.now += timeout
        return self.is_set()


@pytest.fixture
def runtime() -> VirtualTime:
    return VirtualTime()


@pytest.fixture
def patience(runtime: VirtualTime) -> Patience:
    return Patience(runtime, "session s")


@pytest.mark.parametrize(
    ("kind", "meaning"),
    [
        (StoreUnavailable, Consequence.WAIT),
        (StoreDenied, Consequence.WAIT),
        (Conflict, Consequence.WAIT),
        (LocalDiskError, Consequence.WAIT),
        (StoreError, Consequence.WAIT),
        (ObjectNotFound, Consequence.DAMAGE),
        (DamagedObject, Consequence.DAMAGE),
        (NewerSchema, Consequence.END),
        (StoreMissing, Consequence.END),
        (StoreNotConditional, Consequence.END),
    ],
)
def test_each_error_of_the_store_means_one_thing(
    kind: type[Exception], meaning: Consequence
) -> None:
    assert consequence(kind("text")) is meaning


def test_no_error_of_the_store_is_left_out() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__]
    of_the_store = [kind for kind in kinds if issubclass(kind, StoreError)]
    assert len(of_the_store) == 9
    assert consequence(SessionTerminated("ended")) is Consequence.END
    assert consequence(ValueError("a bug")) is Consequence.END


def test_an_outage_of_hours_is_outlasted_with_a_warning_a_minute(
    runtime: VirtualTime, patience: Patience, caplog: pytest.LogCaptureFixture
) -> None:
    def once() -> str:
        if runtime.now < 7_200:
            raise StoreDenied("ExpiredToken")
        return "stored"

    assert patience.outlast(once) == "stored"
    texts = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert 100 <= len(texts) <= 120
    assert {text.partition(":")[0] for text in texts} == {"session s"}


@pytest.mark.parametrize(
    ("url", "remedy"), [("s3://bucket/prefix", "aws sso login"), ("/mnt/store", "written again")]
)
def test_a_refusal_is_told_with_its_remedy(
    runtime: VirtualTime, caplog: pytest.LogCaptureFixture, url: str, remedy: str
) -> None:
    store = MemoryStore(runtime)
    store.url = url
    Session(store, "s", runtime).warn(StoreDenied("403"))
    assert remedy in caplog.text


def test_an_outage_without_end_is_given_up_after_a_day(
    runtime: VirtualTime, patience: Patience
) -> None:
    def once() -> None:
        raise StoreUnavailable("HTTP 503 from http://here in region there")

    with pytest.raises(StoreUnavailable, match="region there") as caught:
        patience.outlast(once)
    assert 86_400 <= runtime.now < 90_000
    assert caught.value.__notes__ == ["It was given up after 1 d 00:00:00."]


def test_who_calls_and_waits_is_answered_within_minutes(
    runtime: VirtualTime, patience: Patience
) -> None:
    def once() -> None:
        raise StoreDenied("no")

    with pytest.raises(StoreDenied):
        patience.outlast(once, seconds=300)
    assert 300 <= runtime.now < 320


@pytest.mark.parametrize("error", [DamagedObject("torn"), StoreMissing("bucket")])
def test_what_waiting_cannot_mend_is_raised_at_once(
    runtime: VirtualTime, patience: Patience, error: Exception
) -> None:
    def once() -> None:
        raise error

    with pytest.raises(type(error)):
        patience.outlast(once)
    assert runtime.now == 0


def test_waiting_ends_when_it_is_told_to(runtime: VirtualTime, patience: Patience) -> None:
    stop = runtime.signal()

    def once() -> None:
        if runtime.now > 100:
            stop.set()
        raise StoreUnavailable("503")

    with pytest.raises(StoreUnavailable):
        patience.outlast(once, stop=stop)
    assert runtime.now < 200


def test_a_good_look_ends_an_outage(runtime: VirtualTime, patience: Patience) -> None:
    outage = Outage(patience, seconds=60)
    for _ in range(10):
        outage.note(StoreUnavailable("503"))
        runtime.now += 50
        outage.note(None)
    outage.note(StoreUnavailable("503"))
    runtime.now += 60
    with pytest.raises(StoreUnavailable):
        outage.note(StoreUnavailable("503"))


def test_a_short_silence_is_not_worth_a_warning_and_a_longer_one_is(
    runtime: VirtualTime, patience: Patience, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter([True] * 3 + [False] + [True] * 40 + [False])

    def once() -> None:
        if next(answers):
            raise StoreUnavailable("503")

    patience.patiently(once)
    assert not caplog.records
    patience.patiently(once)
    assert "503" in caplog.text

"""Exceptions to records and back."""

from __future__ import annotations

import dataclasses
import gc
import pickle
import signal
import threading
import weakref
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

import starburst_executor
from starburst_executor.errors import (
    DamagedObject,
    InitializerFailed,
    RemoteError,
    RemoteTraceback,
    SerializationError,
    StoreUnavailable,
    TaskCrashed,
    TaskTimeout,
    WorkerLost,
)
from starburst_executor.protocol.outcome import Failure, FailureKind
from starburst_executor.serialization.exceptions import describe, rebuild
from starburst_executor.serialization.pickling import dumps, loads
from tests.support.travel import Blobs, Unbuildable, raised, travelled

# --- exceptions --------------------------------------------------------------------


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Refuses to have any attribute set."""


def test_an_exception_comes_back_as_itself_with_its_remote_traceback() -> None:
    back = travelled(raised(KeyError("x")))

    assert type(back) is KeyError
    assert back.args == ("x",)
    assert isinstance(back.__cause__, RemoteTraceback)
    assert "in raised" in str(back.__cause__)
    assert "KeyError: 'x'" in str(back.__cause__)
    assert back.__notes__ == ["task t on worker w"]
    assert back.__traceback__ is None


@pytest.mark.parametrize(
    "exc",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        StopIteration(4),
        OSError(2, "No such file", "/x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        FrozenError(),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_exceptions_of_every_base_come_back(exc: BaseException) -> None:
    back = travelled(raised(exc))

    assert type(back) is type(exc)
    assert back.args == exc.args
    assert str(back) == str(exc)
    assert "task t on worker w" in back.__notes__


def test_an_exception_whose_str_raises_still_comes_back() -> None:
    failure = describe(raised(Unprintable(1)), Blobs().keep)

    assert failure.message == "<no message: its __str__ raised ValueError>"
    assert type(travelled(raised(Unprintable(1)))) is Unprintable


def test_causes_contexts_and_notes_come_along() -> None:
    def fail() -> NoReturn:
        try:
            try:
                raise KeyError("first")
            except KeyError as first:
                first.add_note("on the first")
                raise ValueError("second") from first
        except ValueError:
            raise RuntimeError("third")  # noqa: B904  the context is what is tested

    with pytest.raises(RuntimeError) as caught:
        fail()
    caught.value.add_note("on the third")
    back = travelled(caught.value)

    assert back.__notes__ == ["on the third", "task t on worker w"]
    second = back.__context__
    assert type(second) is ValueError
    assert type(second.__cause__) is KeyError
    assert second.__cause__.__notes__ == ["on the first"]
    text = str(back.__cause__)
    for part in ("first", "on the first", "direct cause", "second", "During", "third"):
        assert part in text


def test_the_cause_it_had_is_the_cause_of_the_remote_traceback() -> None:
    exc = ValueError("v")
    exc.__cause__ = KeyError("k")

    back = travelled(raised(exc))

    assert isinstance(back.__cause__, RemoteTraceback)
    assert isinstance(back.__cause__.__cause__, KeyError)


def test_an_exception_group_comes_back_whole() -> None:
    inner = KeyError("k")
    inner.__cause__ = ZeroDivisionError("z")
    group = ExceptionGroup("two", [inner, ExceptionGroup("deep", [OSError(1, "o")])])

    back = travelled(raised(group))

    assert isinstance(back, ExceptionGroup)
    first, deep = back.exceptions
    assert isinstance(first.__cause__, ZeroDivisionError)
    assert isinstance(deep, ExceptionGroup)
    assert "PermissionError" in str(back.__cause__)
    assert "ZeroDivisionError" in str(back.__cause__)


def test_a_context_that_leads_back_to_itself_does_no_harm() -> None:
    a, b = ValueError("a"), ValueError("b")
    a.__context__, b.__context__ = b, a

    back = travelled(raised(a))

    assert back.__context__ is not None
    assert back.__context__.__context__ is back


def test_a_class_that_exists_only_here_comes_back() -> None:
    class LocalError(Exception):
        pass

    assert type(travelled(raised(LocalError("x")))).__name__ == "LocalError"


def test_a_large_array_in_an_exception_travels_as_a_blob() -> None:
    blobs = Blobs()
    failure = describe(raised(ValueError(np.arange(20_000))), blobs.keep)

    assert len(blobs.kept) == 1
    assert np.array_equal(rebuild(failure, blobs.fetch, "t").args[0], np.arange(20_000))


def test_text_that_is_no_unicode_can_be_stored() -> None:
    back = travelled(raised(FileNotFoundError("/tmp/\udcff")))

    assert type(back) is FileNotFoundError
    assert "\\udcff" in str(back.__cause__)


def test_a_long_traceback_keeps_its_head_and_its_tail() -> None:
    failure = describe(raised(ValueError("x" * 200_000 + "the end")), Blobs().keep)

    assert len(failure.traceback) <= 64 * 1024
    assert failure.traceback.startswith("Traceback (most recent call last)")
    assert failure.traceback.endswith("the end\n")
    assert "characters left out" in failure.traceback
    assert len(failure.message) <= 8 * 1024


def test_our_own_frames_are_not_shown() -> None:
    blobs = Blobs()
    cargo = dumps(Unbuildable(), blobs.keep)
    with pytest.raises(SerializationError) as caught:
        loads(cargo, blobs.fetch)
    assert caught.value.__cause__ is not None

    text = describe(caught.value.__cause__, blobs.keep).traceback

    assert "in _explode" in text
    assert str(Path(starburst_executor.__file__).parent) not in text


def test_a_deep_recursion_is_described() -> None:
    def dive() -> int:
        return 1 + dive()

    with pytest.raises(RecursionError) as caught:
        dive()

    assert type(travelled(caught.value)) is RecursionError


def test_rebuilding_never_raises() -> None:
    def gone(*_: object) -> NoReturn:
        raise StoreUnavailable("away")

    big = describe(raised(ValueError(np.zeros(20_000))), Blobs().keep)
    back = rebuild(big, gone, "task t")
    assert type(back) is ValueError
    assert "An argument was left out" in "".join(back.__notes__)
    junk = Failure(kind="raised", type="E", message="m", cargo=b"junk")
    back = rebuild(junk, gone, "task t")
    assert type(back) is RemoteError
    assert "could not be restored" in "".join(back.__notes__)


def test_a_failing_task_leaves_no_cycle_behind() -> None:
    class Big:
        pass

    freed: list[int] = []

    def fail() -> None:
        big = Big()
        weakref.finalize(big, freed.append, 1)
        raise ValueError("x")

    gc.disable()
    try:
        try:
            fail()
        except ValueError as error:
            describe(error, Blobs().keep)
        assert freed == [1]
    finally:
        gc.enable()


# --- failures that are no exceptions -----------------------------------------------


@pytest.mark.parametrize(
    ("failure", "kind", "says"),
    [
        (
            Failure(kind="crashed", signal=signal.SIGKILL, stderr="last words\n"),
            TaskCrashed,
            ["task t", "SIGKILL", "out of memory", "last words"],
        ),
        (
            Failure(kind="crashed", signal=signal.SIGSEGV),
            TaskCrashed,
            ["SIGSEGV", "compiled extension"],
        ),
        (
            Failure(kind="crashed", exit_code=3),
            TaskCrashed,
            ["code 3", "os._exit"],
        ),
        (Failure(kind="crashed", exit_code=0), TaskCrashed, ["code 0"]),
        (Failure(kind="crashed", signal=63), TaskCrashed, ["63"]),
        (Failure(kind="crashed"), TaskCrashed, ["task t", "died"]),
        (
            Failure(kind="timeout", message="stopped after 5 s"),
            TaskTimeout,
            ["task t", "stopped after 5 s"],
        ),
        (Failure(kind="timeout"), TaskTimeout, ["task_timeout"]),
        (Failure(kind="lost"), WorkerLost, ["task t", "worker died or vanished"]),
        (
            Failure(kind="initializer", type="KeyError", message="'k'", traceback="tb"),
            InitializerFailed,
            ["task t", "initializer", "KeyError: 'k'"],
        ),
        (
            Failure(kind="initializer", signal=signal.SIGABRT),
            InitializerFailed,
            ["SIGABRT"],
        ),
        (
            Failure(kind="unserializable", type="OSError", message="disk full"),
            SerializationError,
            ["OSError: disk full"],
        ),
        (Failure(kind="damaged", message="torn"), DamagedObject, ["torn"]),
    ],
)
def test_each_kind_of_failure_has_its_exception(
    failure: Failure, kind: type[Exception], says: list[str]
) -> None:
    back = rebuild(failure, Blobs().fetch, "task t on worker w")

    assert type(back) is kind
    for part in says:
        assert part in str(back)
    assert "task t on worker w" in str(back) + str(getattr(back, "__notes__", ""))
    assert str(pickle.loads(pickle.dumps(back))) == str(back)


@pytest.mark.parametrize("kind", ["unserializable", "initializer"])
def test_a_described_failure_of_another_kind_keeps_its_traceback(
    kind: FailureKind,
) -> None:
    blobs = Blobs()
    with pytest.raises(SerializationError) as caught:
        dumps([threading.Lock()], blobs.keep, what="result")

    failure = describe(caught.value, blobs.keep, kind)
    back = rebuild(failure, blobs.fetch, "task t")

    assert failure.cargo is None
    assert "cannot pickle result [0], of type _thread.lock" in str(back)
    assert isinstance(back.__cause__, RemoteTraceback)
    assert "starburst_executor.errors.SerializationError" not in str(back) or (
        kind == "initializer"
    )

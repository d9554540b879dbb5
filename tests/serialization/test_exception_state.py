"""Exceptions: what comes back is what was raised, whatever its class takes to be made."""

from __future__ import annotations

import email.message
import importlib
import io
import sys
import threading
import urllib.error
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import pytest

from starburst_executor.errors import RemoteError, RemoteTraceback
from starburst_executor.protocol.outcome import Outcome, decode_outcome, encode_outcome
from starburst_executor.serialization.exceptions import describe, rebuild
from tests.support.travel import Blobs, raised, travelled

CONTEXT = "task t on worker w"


class NeedsTwo(Exception):
    def __init__(self, code: int, why: str) -> None:
        super().__init__(f"{why} ({code})")
        self.code = code


class CannotRead(Exception):
    def __init__(self, path: str) -> None:
        super().__init__(f"cannot read {path}")


class StatusError(Exception):
    """Made like httpx.HTTPStatusError."""

    def __init__(self, message: str, *, request: object, response: object) -> None:
        super().__init__(message)
        self.request = request
        self.response = response


class Slotted(Exception):
    __slots__ = ("__hidden", "code", "unset")

    def __init__(self, code: int) -> None:
        self.code = code
        self.__hidden = [code]

    def __str__(self) -> str:
        return f"code {self.code}, hidden {self.__hidden}"


class Locked(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text
        self.lock = threading.Lock()


class GrumpyError(Exception):
    def __reduce__(self) -> NoReturn:
        raise LookupError("not today")


class ImpostorError(Exception):
    def __reduce__(self) -> Any:
        return str, ("no exception",)


class ExitingError(Exception):
    def __reduce__(self) -> Any:
        return sys.exit, ("in the middle of it",)


class PickyNew(Exception):
    def __new__(cls, *, code: int) -> PickyNew:
        return super().__new__(cls, code)

    def __init__(self, *, code: int) -> None:
        pass


class OwnErrno(OSError):
    def __init__(self, path: str) -> None:
        super().__init__(2, f"no {path} here", path)


class TwoBases(KeyError, OSError):
    pass


class Derived(ExceptionGroup[Exception]):
    def __new__(cls, excs: list[Exception], *, code: int) -> Derived:
        made = super().__new__(cls, f"code {code}", excs)
        made.code = code
        return made

    def __init__(self, excs: list[Exception], *, code: int) -> None:
        pass

    code: int


class Reads:
    """Its pickle is fine and cannot be unpickled."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def blocking() -> BlockingIOError:
    exc = BlockingIOError(11, "would block")
    exc.characters_written = 7
    return exc


def http_error() -> urllib.error.HTTPError:
    headers = email.message.Message()
    headers["Retry-After"] = "3"
    body = io.BytesIO(b"no such page")
    return urllib.error.HTTPError("http://x/y", 404, "Not Found", headers, body)


@pytest.mark.parametrize(
    "exc",
    [
        NeedsTwo(7, "bad"),
        CannotRead("/a"),
        StatusError("404", request={"url": "/"}, response=[1]),
        Slotted(5),
        GrumpyError("x"),
        ImpostorError("y"),
        ExitingError("z"),
        PickyNew(code=3),
        OwnErrno("/a"),
        TwoBases(2, "x", "/a"),
        KeyError("k"),
        KeyError(1, 2),
        OSError(),
        OSError("text"),
        OSError(None, "text"),
        OSError(2, "No such file", "/x"),
        OSError(18, "cross-device", "/a", None, "/b"),
        OSError(99999, "of no class"),
        blocking(),
        ConnectionResetError(104, "reset"),
        UnicodeDecodeError("utf-8", b"\xff\x00", 0, 1, "bad"),
        UnicodeEncodeError("ascii", "h\xe9", 1, 2, "bad"),
        SystemExit(),
        SystemExit(3),
        SystemExit("words", 2),
        StopIteration(4),
        ImportError("m", name="n", path="p"),
        SyntaxError("bad", ("f.py", 3, 4, "x = = 1", 3, 5)),
        AttributeError("no", name="n", obj=threading.Lock()),
        RemoteError("of an executor in a task"),
        http_error(),
    ],
    ids=repr,
)
def test_class_args_and_text_are_the_same_on_both_sides(exc: BaseException) -> None:
    back = travelled(raised(exc))

    assert type(back) is type(exc)
    assert back.args == exc.args
    assert str(back) == str(exc)
    assert repr(back) == repr(exc)
    assert isinstance(back.__cause__, RemoteTraceback)
    assert back.__notes__ == [CONTEXT]


def test_what_builtin_classes_know_comes_along() -> None:
    missing = travelled(OSError(2, "No such file", "/x"))
    assert isinstance(missing, FileNotFoundError)
    assert (missing.errno, missing.strerror, missing.filename) == (2, "No such file", "/x")
    moved = travelled(OSError(18, "cross-device", "/a", None, "/b"))
    assert isinstance(moved, OSError)
    assert (moved.filename, moved.filename2) == ("/a", "/b")
    short = travelled(blocking())
    assert isinstance(short, BlockingIOError)
    assert short.characters_written == 7
    bad = travelled(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"))
    assert isinstance(bad, UnicodeDecodeError)
    assert (bad.object, bad.start, bad.end) == (b"\xff", 0, 1)
    end = travelled(SystemExit(3))
    assert isinstance(end, SystemExit)
    assert end.code == 3
    lacking = travelled(ImportError("m", name="n", path="p"))
    assert isinstance(lacking, ImportError)
    assert (lacking.name, lacking.path) == ("n", "p")


def test_attributes_come_along() -> None:
    back = travelled(StatusError("404", request={"url": "/"}, response=[1]))
    assert isinstance(back, StatusError)
    assert (back.request, back.response) == ({"url": "/"}, [1])
    slotted = travelled(Slotted(5))
    assert isinstance(slotted, Slotted)
    assert slotted.code == 5
    assert not hasattr(slotted, "unset")
    answer = travelled(raised(http_error()))
    assert isinstance(answer, urllib.error.HTTPError)
    assert (answer.code, answer.headers["Retry-After"]) == (404, "3")
    assert answer.read() == b"no such page"


def test_an_attribute_that_cannot_be_pickled_stays_behind_alone() -> None:
    back = travelled(raised(Locked("held")))

    assert isinstance(back, Locked)
    assert str(back) == back.text == "held"
    assert not hasattr(back, "lock")
    said, context = back.__notes__
    assert "attribute 'lock' was left out" in said
    assert "_thread.lock" in said
    assert context == CONTEXT


def test_an_attribute_that_cannot_be_unpickled_stays_behind_alone() -> None:
    exc: Any = ValueError("v")
    exc.reads = Reads()
    exc.fine = 1

    back: Any = travelled(raised(exc))

    assert back.fine == 1
    assert "attribute 'reads' was left out" in back.__notes__[0]
    assert type(back) is ValueError


def test_an_http_error_with_an_open_connection_keeps_its_class() -> None:
    exc = http_error()
    exc.fp = exc.file = threading.Lock()  # type: ignore[assignment]

    back = travelled(raised(exc))

    assert isinstance(back, urllib.error.HTTPError)
    assert str(back) == "HTTP Error 404: Not Found"
    assert "attribute 'fp' was left out" in "".join(back.__notes__)


def test_an_argument_that_cannot_be_pickled_leaves_its_text() -> None:
    exc = ValueError(threading.Lock(), 2)

    back = travelled(raised(exc))

    assert type(back) is ValueError
    assert str(back) == str(exc)
    assert repr(back) == repr(exc)
    assert back.args[1] == 2
    assert "An argument was left out" in back.__notes__[0]


def test_the_class_is_never_called_and_sees_no_pickling() -> None:
    calls: list[str] = []

    class Counts(Exception):
        def __init__(self) -> None:
            calls.append("init")

        def __setstate__(self, state: object) -> None:
            calls.append("setstate")

    exc = Counts()
    back = travelled(raised(exc))

    assert type(back).__name__ == "Counts"
    assert calls == ["init"]


def test_a_class_that_cannot_travel_leaves_its_text() -> None:
    class Stuck(Exception):
        lock = threading.Lock()

    back = travelled(raised(Stuck("held")))

    assert type(back) is RemoteError
    assert str(back).endswith("Stuck: held")
    said, context = back.__notes__
    assert "could not be restored" in said
    assert "_thread.lock" in said
    assert context == CONTEXT
    assert isinstance(back.__cause__, RemoteTraceback)
    assert "in raised" in str(back.__cause__)


def test_a_class_that_is_missing_here_leaves_its_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "only_there.py").write_text("class OddError(Exception): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    there: Any = importlib.import_module("only_there")
    exc = ExceptionGroup("two", [there.OddError("odd"), KeyError("k")])
    blobs = Blobs()
    failure = describe(raised(exc), blobs.keep)
    (tmp_path / "only_there.py").unlink()
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "only_there")

    back = rebuild(failure, blobs.fetch, CONTEXT)

    assert isinstance(back, ExceptionGroup)
    odd, key = back.exceptions
    assert type(odd) is RemoteError
    assert str(odd) == "only_there.OddError: odd"
    assert "'only_there' is not installed here" in odd.__notes__[0]
    assert type(key) is KeyError


def test_the_members_of_a_group_are_treated_each_by_itself() -> None:
    class Stuck(Exception):
        lock = threading.Lock()

    inner = BaseExceptionGroup("deep", [SystemExit(2), CannotRead("/a")])
    group = BaseExceptionGroup(
        "all", [Stuck("s"), StatusError("404", request=1, response=2), inner]
    )

    back = travelled(raised(group))

    assert type(back) is BaseExceptionGroup
    assert str(back) == str(group)
    stuck, status, deep = back.exceptions
    assert type(stuck) is RemoteError
    assert isinstance(status, StatusError)
    assert type(deep) is BaseExceptionGroup
    assert [str(e) for e in deep.exceptions] == ["2", "cannot read /a"]


def test_a_class_of_groups_with_its_own_new_comes_back() -> None:
    back = travelled(raised(Derived([KeyError("k")], code=4)))

    assert isinstance(back, Derived)
    assert (back.code, back.message) == (4, "code 4")
    assert type(back.exceptions[0]) is KeyError


def test_causes_and_contexts_are_treated_each_by_itself() -> None:
    class Stuck(Exception):
        lock = threading.Lock()

    exc = ValueError("v")
    exc.__cause__ = stuck = Stuck("s")
    stuck.__context__ = StatusError("404", request=1, response=2)
    exc.add_note("kept")

    back = travelled(raised(exc))

    assert back.__notes__ == ["kept", CONTEXT]
    assert back.__cause__ is not None
    cause = back.__cause__.__cause__
    assert type(cause) is RemoteError
    assert isinstance(cause.__context__, StatusError)


def test_an_exception_in_an_attribute_is_the_one_in_the_chain() -> None:
    reason = StatusError("404", request=1, response=2)
    exc = ValueError("gave up", [reason])
    exc.reason = reason  # type: ignore[attr-defined]
    exc.itself = exc  # type: ignore[attr-defined]
    exc.__cause__ = reason

    back: Any = travelled(raised(exc))

    assert isinstance(back.reason, StatusError)
    assert back.args[1][0] is back.reason is back.__cause__.__cause__
    assert back.itself is back


def test_a_state_that_python_cannot_see_is_left_to_reduce() -> None:
    class Native(Exception):
        """Its text lies where only the class finds it, as in a compiled extension."""

        texts: ClassVar[dict[int, str]] = {}

        def __init__(self, text: str) -> None:
            self.texts[id(self)] = text

        def __str__(self) -> str:
            return self.texts[id(self)]

        def __reduce__(self) -> Any:
            return type(self), (str(self),)

    Native.__module__ = __name__
    back = travelled(raised(Native("seen by few")))

    assert str(back) == "seen by few"


def test_a_text_that_cannot_be_kept_is_told_in_a_note() -> None:
    class Asks(Exception):
        def __str__(self) -> str:
            return "locked" if hasattr(self, "lock") else "free"

    exc = Asks()
    exc.lock = threading.Lock()  # type: ignore[attr-defined]
    back = travelled(raised(exc))

    assert type(back).__name__ == "Asks"
    assert "Where it was raised, its text was: locked" in back.__notes__


@pytest.mark.parametrize("end", [SystemExit, GeneratorExit, KeyboardInterrupt])
def test_whatever_code_of_the_user_raises_the_exception_comes_back(
    end: type[BaseException],
) -> None:
    class Ends:
        def __reduce__(self) -> NoReturn:
            raise end

    exc = ValueError("v")
    exc.ends = Ends()  # type: ignore[attr-defined]
    back = travelled(raised(exc))

    assert type(back) is ValueError
    assert "attribute 'ends' was left out" in back.__notes__[0]


def test_a_large_array_travels_as_a_blob_once() -> None:
    array = np.arange(20_000)
    exc = ValueError(array)
    exc.array = array  # type: ignore[attr-defined]
    blobs = Blobs()
    outcome = Outcome(failure=describe(raised(exc), blobs.keep))
    encoded = encode_outcome(outcome)
    failure = decode_outcome(encoded).failure
    assert failure is not None

    assert len(encoded) < 10_000
    assert len(blobs.kept) == 1
    assert np.array_equal(rebuild(failure, blobs.fetch, "t").args[0], array)


def test_a_store_that_fails_is_no_fault_of_the_exception() -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        describe(raised(ValueError(np.arange(20_000))), full)


def test_what_came_back_can_be_sent_on() -> None:
    back = travelled(travelled(raised(CannotRead("/a"))))

    assert str(back) == "cannot read /a"
    assert cloudpickle.dumps(back)

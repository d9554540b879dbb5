"""Objects to bytes and back, and exceptions to records and back."""

from __future__ import annotations

import dataclasses
import functools
import gc
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle  # type: ignore[import-untyped]
import msgspec
import numpy as np
import pytest

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
from starburst_executor.protocol.outcome import (
    Failure,
    FailureKind,
    Outcome,
    decode_outcome,
    encode_outcome,
)
from starburst_executor.protocol.payload import BUFFER_MIN, digest_of, references
from starburst_executor.serialization.exceptions import describe, rebuild
from starburst_executor.serialization.pickling import dumps, loads, pack_call, unpack_call
from starburst_executor.serialization.scripts import Pickler


class Blobs:
    """Keeps blobs in memory and gives each fetch a copy of its own."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.kept: list[str] = []

    def keep(self, digest: str, data: memoryview) -> None:
        self.kept.append(digest)
        self.data[digest] = bytes(data)

    def fetch(self, digest: str, size: int) -> bytearray:
        return bytearray(self.data[digest])


@pytest.fixture
def blobs() -> Blobs:
    return Blobs()


def round_trip(obj: object, blobs: Blobs) -> Any:
    return loads(dumps(obj, blobs.keep), blobs.fetch)


# --- cargos -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "obj",
    [
        None,
        True,
        -(10**40),
        2.5,
        1j,
        "\N{SNOWMAN}",
        b"\0",
        (1, [2, {"a": (None,)}]),
        {(1, 2): [b"x"]},
        {1, 2},
        range(3),
        list(range(1000)),
        [[[[[[[[1]]]]]]]],
        bytearray(b"abc"),
    ],
    ids=repr,
)
def test_a_value_survives_the_round_trip(obj: object, blobs: Blobs) -> None:
    back = round_trip(obj, blobs)

    assert (back, type(back)) == (obj, type(obj))
    assert blobs.kept == []


def test_a_lambda_with_a_closure_travels_by_value(blobs: Blobs) -> None:
    step = 3

    assert round_trip(lambda x: x + step, blobs)(4) == 7


def test_a_class_defined_in_a_function_travels_by_value(blobs: Blobs) -> None:
    class Local:
        def __init__(self, x: int) -> None:
            self.x = x

    assert round_trip(Local(5), blobs).x == 5


def test_a_class_of_main_travels_to_another_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from starburst_executor.serialization.pickling import dumps
        class Point:
            def __init__(self, x): self.x = x
            def double(self): return factor() * self.x
        def factor(): return 2
        sys.stdout.buffer.write(dumps(Point(21), None))
        """)
    )
    cargo = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, check=True).stdout

    assert loads(cargo, Blobs().fetch).double() == 42


def test_an_object_with_slots_comes_back_from_where_its_class_was_made_anew(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import dataclasses, subprocess, sys
        from starburst_executor.serialization.pickling import dumps, loads

        @dataclasses.dataclass(slots=True)
        class Point:
            x: int
            y: int = 2

        class Private(Point):
            __slots__ = ("__kept", "__weakref__")

            def keep(self, value):
                self.__kept = value
                return self

            def kept(self):
                return self.__kept

        ECHO = '''
        import sys
        from starburst_executor.serialization.pickling import dumps, loads
        made = loads(sys.stdin.buffer.read(), None)()
        assert not hasattr(made[0], "__dict__")
        sys.stdout.buffer.write(dumps(made, None))
        '''
        make = dumps(lambda: (Point(1), Private(3).keep(4)), None)
        done = subprocess.run(
            [sys.executable, "-c", ECHO], input=make, stdout=subprocess.PIPE, check=True
        )
        point, private = loads(done.stdout, None)
        assert type(point) is Point and point == Point(1)
        assert type(private) is Private and (private.x, private.kept()) == (3, 4)
        """)
    )
    subprocess.run([sys.executable, str(script)], check=True)


def test_plain_values_do_without_cloudpickle(monkeypatch: pytest.MonkeyPatch, blobs: Blobs) -> None:
    made = []

    class Counting(Pickler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(1)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("starburst_executor.serialization.pickling.Pickler", Counting)
    for i in range(100):
        pack_call((i, "text", [1.0, None]), {"option": {"deep": (b"x", i)}}, blobs.keep)
    assert made == []

    pack_call((len, 1), {}, blobs.keep)
    assert made == [1]


def test_a_plain_value_gives_the_bytes_that_cloudpickle_gives(
    monkeypatch: pytest.MonkeyPatch, blobs: Blobs
) -> None:
    plain = pack_call((1, "a", [2.0]), {"b": {"c": b"d"}}, blobs.keep)
    monkeypatch.setattr("starburst_executor.serialization.pickling.is_plain", lambda _: False)

    assert pack_call((1, "a", [2.0]), {"b": {"c": b"d"}}, blobs.keep) == plain


def test_a_subclass_of_a_builtin_keeps_its_class(blobs: Blobs) -> None:
    class Name(str):
        __slots__ = ()

    args, _ = unpack_call(pack_call((Name("x"),), {}, blobs.keep), blobs.fetch)

    assert type(args[0]).__name__ == "Name"


def test_a_small_array_stays_in_the_cargo(blobs: Blobs) -> None:
    array = np.arange(BUFFER_MIN // 8 - 1)

    cargo = dumps(array, blobs.keep)

    assert references(cargo) == []
    assert np.array_equal(loads(cargo, blobs.fetch), array)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_large_array_travels_as_a_blob(order: Any, blobs: Blobs) -> None:
    array = np.asarray(np.arange(30_000.0).reshape(100, 300), order=order)

    cargo = dumps(array, blobs.keep)
    back = loads(cargo, blobs.fetch)

    raw = array.tobytes(order="A")
    assert references(cargo) == [(digest_of(raw), len(raw))]
    assert blobs.data == {digest_of(raw): raw}
    assert len(cargo) < 1000
    assert np.array_equal(back, array)
    back[0, 0] = 5  # its memory is writable
    assert not back.flags.owndata


def test_a_read_only_array_stays_read_only(blobs: Blobs) -> None:
    array = np.arange(30_000)
    array.flags.writeable = False

    assert not round_trip(array, blobs).flags.writeable


@pytest.mark.parametrize(
    "array",
    [
        np.arange(300_000)[::3],
        np.zeros((0, 5)),
        np.array(7),
        np.array([{"a": 1}, None], dtype=object),
        np.zeros(20_000, dtype=[("x", "f8"), ("y", "i4")]),
    ],
    ids=["strided", "empty", "scalar", "objects", "records"],
)
def test_arrays_of_every_kind_survive(array: Any, blobs: Blobs) -> None:
    assert np.array_equal(round_trip(array, blobs), array)


def test_equal_arrays_are_stored_once_and_come_back_apart(blobs: Blobs) -> None:
    a, b = np.zeros(20_000), np.zeros(20_000)

    cargo = dumps([a, b, a], blobs.keep)
    x, y, z = loads(cargo, blobs.fetch)

    assert len(blobs.kept) == 1
    assert len(references(cargo)) == 1
    x[0] = 1
    assert (y[0], z[0]) == (0, 1)


def test_large_bytes_are_named_by_their_own_content_in_every_call(blobs: Blobs) -> None:
    data = b"x" * BUFFER_MIN

    cargos = [pack_call((data, i), {"again": data}, blobs.keep) for i in range(3)]

    assert {name for cargo in cargos for name in references(cargo)} == {
        (digest_of(data), len(data))
    }
    assert unpack_call(cargos[2], blobs.fetch) == ((data, 2), {"again": data})
    assert round_trip(data, blobs) == data


def test_a_large_pickle_becomes_a_blob(blobs: Blobs) -> None:
    text = "x" * 2_000_000

    cargo = dumps(text, blobs.keep)

    assert len(cargo) < 200
    [(digest, size)] = references(cargo)
    assert (digest_of(blobs.data[digest]), len(blobs.data[digest])) == (digest, size)
    assert loads(cargo, blobs.fetch) == text


def test_nothing_is_kept_of_an_object_that_cannot_be_pickled(blobs: Blobs) -> None:
    with pytest.raises(SerializationError):
        dumps([np.zeros(20_000), threading.Lock()], blobs.keep)

    assert blobs.kept == []


def test_a_store_that_fails_is_no_serialization_error(blobs: Blobs) -> None:
    def unavailable(digest: str, data: object) -> NoReturn:
        raise StoreUnavailable("away")

    with pytest.raises(StoreUnavailable):
        dumps(np.zeros(20_000), unavailable)
    cargo = dumps(np.zeros(20_000), blobs.keep)
    with pytest.raises(StoreUnavailable):
        loads(cargo, unavailable)


MEMORY_SCRIPT = """
import hashlib, resource, sys
import numpy as np
from starburst_executor.serialization.pickling import pack_call
big = np.ones(256 * 2**20, dtype=np.uint8)
scale = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
seen = []
make = {"array": lambda: big, "bytes": lambda: raw}[sys.argv[1]]
if sys.argv[1] == "bytes":
    del big
    raw = bytes(256 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
cargo = pack_call((make(),), {}, lambda digest, data: seen.append(data.nbytes))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
assert seen == [256 * 2**20], seen
print(after - before)
"""


@pytest.mark.parametrize("kind", ["array", "bytes"])
def test_256_mib_are_pickled_without_a_copy(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, kind],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )

    assert int(done.stdout) < 32 * 2**20


def test_a_cargo_cut_anywhere_is_damaged(blobs: Blobs) -> None:
    cargo = dumps([np.zeros(20_000), "text"], blobs.keep)

    for end in range(len(cargo)):
        with pytest.raises(DamagedObject):
            references(cargo[:end])
        with pytest.raises(DamagedObject):
            loads(cargo[:end], blobs.fetch)


@pytest.mark.parametrize("garbage", [b"", b"\xc1", b"hello", b"\x92\xc4\x03abc\x90"])
def test_garbage_is_damaged(garbage: bytes) -> None:
    with pytest.raises(DamagedObject):
        loads(garbage, Blobs().fetch)


def test_a_blob_name_that_is_a_path_is_refused() -> None:
    for name in ("../" * 20 + "etcc", "a" * 64 + "\n", "A" * 64):
        with pytest.raises(DamagedObject):
            references(msgspec.msgpack.encode((b"", [(name, 1)])))


def test_a_blob_of_another_size_is_damaged(blobs: Blobs) -> None:
    cargo = dumps(np.zeros(20_000), blobs.keep)

    with pytest.raises(DamagedObject, match="has 3 bytes instead of 160000"):
        loads(cargo, lambda *_: bytearray(3))


# --- errors of pickling -----------------------------------------------------------


class Holder:
    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("lock", "name")

    def __init__(self) -> None:
        self.name = "x"
        self.lock = threading.Lock()


class Choosy:
    """Leaves its lock out, but not what else it holds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stream = threading.Event()

    def __getstate__(self) -> object:
        return {"stream": self.stream}


class Words(dict[str, object]):
    lock: object


class Grumpy:
    def __reduce__(self) -> NoReturn:
        raise LookupError("not today")


class Nonsense:
    def __reduce__(self) -> Any:
        return 42


def words_with_lock() -> Words:
    words = Words(a=1)
    words.lock = threading.Lock()
    return words


def cyclic() -> Holder:
    parent = Holder()
    parent.child = Holder(parent=parent)  # type: ignore[attr-defined]
    parent.lock = threading.Lock()  # type: ignore[attr-defined]
    return parent


def numbers() -> Iterator[int]:
    yield 1


def function_with(lock: object) -> Callable[[], object]:
    return lambda: lock


def function_defaulting_to_a_lock() -> Callable[..., object]:
    def work(x: int = 1, *, lock: object = threading.Lock()) -> object:
        return lock

    return work


@pytest.mark.parametrize(
    ("make", "where", "kind"),
    [
        (threading.Lock, "argument 1", "_thread.lock"),
        (numbers, "argument 1", "generator"),
        (lambda: {"cfg": Holder(lock=threading.Lock())}, "argument 1 ['cfg'].lock", ""),
        (lambda: [0, (1, threading.Lock())], "argument 1 [1][1]", "_thread.lock"),
        (lambda: {Grumpy(): 1}, "argument 1 key <", "Grumpy"),
        (lambda: {Grumpy()}, "argument 1 element <", "Grumpy"),
        (Slotted, "argument 1 .lock", "_thread.lock"),
        (Choosy, "argument 1 .stream._cond._lock", "_thread.lock"),
        (words_with_lock, "argument 1 .lock", "_thread.lock"),
        (cyclic, "argument 1 .lock", "_thread.lock"),
        (
            lambda: function_with(threading.Lock()),
            "argument 1 closure variable 'lock'",
            "_thread.lock",
        ),
        (
            function_defaulting_to_a_lock,
            "argument 1 default of 'lock'",
            "_thread.lock",
        ),
        (
            lambda: functools.partial(print, threading.Lock()),
            "argument 1 ",
            "_thread.lock",
        ),
        (
            lambda: Holder(x=threading.Lock()).__init__,  # type: ignore[misc]
            "argument 1 .__self__.x",
            "_thread.lock",
        ),
        (lambda: [Grumpy()], "argument 1 [0]", "Grumpy"),
        (lambda: [Nonsense()], "argument 1 [0]", "Nonsense"),
        (
            lambda: type("Local", (), {"lock": threading.Lock()}),
            "argument 1 .lock",
            "_thread.lock",
        ),
        (
            lambda: np.array([1, threading.Lock()], dtype=object),
            "argument 1 ",
            "_thread.lock",
        ),
    ],
)
def test_the_part_that_cannot_be_pickled_is_named(
    make: Callable[[], object], where: str, kind: str, blobs: Blobs
) -> None:
    with pytest.raises(SerializationError) as caught:
        pack_call(("fine", make()), {"also": "fine"}, blobs.keep)

    message = str(caught.value)
    assert message.startswith(f"cannot pickle {where}")
    assert kind in message
    assert isinstance(caught.value.__cause__, Exception)
    assert "\n" not in message


def test_a_keyword_argument_is_named(blobs: Blobs) -> None:
    with pytest.raises(SerializationError, match="cannot pickle argument 'n', of type"):
        pack_call((), {"m": 1, "n": threading.Lock()}, blobs.keep)


def test_a_result_is_called_what_the_caller_calls_it(blobs: Blobs) -> None:
    with pytest.raises(SerializationError, match=r"cannot pickle result \[0\], of type"):
        dumps([threading.Lock()], blobs.keep, what="result")


def test_a_global_that_a_function_of_main_uses_is_named() -> None:
    script = textwrap.dedent("""
        import threading
        from starburst_executor.serialization.pickling import dumps
        lock = threading.Lock()
        def work():
            return [lock for _ in range(3)]
        try:
            dumps(work, None, what="function work")
        except TypeError as error:
            print(error)
        """)
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True
    )

    assert done.stdout.startswith(
        "cannot pickle function work global variable 'lock', of type _thread.lock"
    )


def test_a_nest_that_is_too_deep_is_a_serialization_error(blobs: Blobs) -> None:
    nest: list[Any] = []
    for _ in range(100_000):
        nest = [nest]

    with pytest.raises(SerializationError, match=r"argument 1, .*nested too deeply"):
        pack_call((1, nest), {}, blobs.keep)


def test_the_search_for_the_culprit_is_bounded(
    monkeypatch: pytest.MonkeyPatch, blobs: Blobs
) -> None:
    tries = []
    real = cloudpickle.Pickler.dump

    def counting(self: Any, obj: object) -> None:
        tries.append(1)
        real(self, obj)

    monkeypatch.setattr(cloudpickle.Pickler, "dump", counting)
    crowd = [Holder(i=i) for i in range(20_000)]

    with pytest.raises(SerializationError, match="argument 0, of type list"):
        pack_call(([*crowd, threading.Lock()],), {}, blobs.keep)
    assert len(tries) < 6000


@pytest.mark.parametrize("signal_like", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_pickling_passes_through(
    signal_like: type[BaseException], blobs: Blobs
) -> None:
    class Interrupted:
        def __reduce__(self) -> NoReturn:
            raise signal_like

    with pytest.raises(signal_like):
        dumps(Interrupted(), blobs.keep)


# --- errors of unpickling ---------------------------------------------------------


def test_a_missing_module_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blobs: Blobs
) -> None:
    (tmp_path / "here_only.py").write_text("def work(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import here_only  # type: ignore[import-not-found]

    cargo = dumps(here_only.work, blobs.keep)
    assert loads(cargo, blobs.fetch) is here_only.work
    monkeypatch.delitem(sys.modules, "here_only")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])

    with pytest.raises(SerializationError) as caught:
        loads(cargo, blobs.fetch, "function")
    assert "cannot unpickle the function" in str(caught.value)
    assert "modules=['here_only']" in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_function_that_is_gone_hints_at_versions(
    monkeypatch: pytest.MonkeyPatch, blobs: Blobs
) -> None:
    cargo = dumps(numbers, blobs.keep)
    monkeypatch.delattr(sys.modules[__name__], "numbers")

    with pytest.raises(SerializationError, match="of another version"):
        loads(cargo, blobs.fetch)


class Unbuildable:
    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> NoReturn:
    raise RuntimeError("boom")


def test_a_constructor_that_raises_is_a_serialization_error(blobs: Blobs) -> None:
    cargo = dumps(Unbuildable(), blobs.keep)

    with pytest.raises(SerializationError, match="RuntimeError: boom") as caught:
        loads(cargo, blobs.fetch)
    assert isinstance(caught.value.__cause__, RuntimeError)


class Ends:
    """Raises, when it is unpickled, what no `except Exception` catches."""

    def __init__(self, end: type[BaseException]) -> None:
        self.end = end

    def __reduce__(self) -> Any:
        return _raise, (self.end,)


def _raise(end: type[BaseException]) -> NoReturn:
    raise end


@pytest.mark.parametrize("end", [SystemExit, GeneratorExit, KeyboardInterrupt])
def test_an_end_while_unpickling_is_a_serialization_error(
    end: type[BaseException], blobs: Blobs
) -> None:
    cargo = dumps(Ends(end), blobs.keep)

    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(loads, cargo, blobs.fetch).exception()
    assert isinstance(error, SerializationError)
    assert end.__name__ in str(error)
    assert type(error.__cause__) is end


def test_ctrl_c_while_unpickling_on_the_main_thread_interrupts(blobs: Blobs) -> None:
    cargo = dumps(Ends(KeyboardInterrupt), blobs.keep)
    with pytest.raises(KeyboardInterrupt):
        loads(cargo, blobs.fetch)

    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    failure = describe(raised(ValueError(np.zeros(20_000))), blobs.keep)
    with pytest.raises(KeyboardInterrupt):
        rebuild(failure, interrupted, "task t")


# --- exceptions -------------------------------------------------------------------


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Refuses to have any attribute set."""


def raised(exc: BaseException) -> BaseException:
    try:
        raise exc
    except BaseException as caught:
        return caught


def travelled(exc: BaseException, context: str = "task t on worker w") -> BaseException:
    blobs = Blobs()
    outcome = Outcome(failure=describe(exc, blobs.keep))
    failure = decode_outcome(encode_outcome(outcome)).failure
    assert failure is not None
    return rebuild(failure, blobs.fetch, context)


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
    assert "serialize.py" not in text.replace("test_serialize.py", "")


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
    assert "An argument stayed behind" in "".join(back.__notes__)
    junk = Failure(kind="raised", type="E", message="m", cargo=b"junk")
    back = rebuild(junk, gone, "task t")
    assert type(back) is RemoteError
    assert "could not be brought back as itself" in "".join(back.__notes__)


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


# --- failures that are no exceptions ----------------------------------------------


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


# --- outcomes ---------------------------------------------------------------------


def test_an_outcome_survives_the_round_trip() -> None:
    for outcome in (
        Outcome(value=b"cargo"),
        Outcome(failure=Failure(kind="crashed", exit_code=1, stderr="\N{SNOWMAN}")),
    ):
        assert decode_outcome(encode_outcome(outcome)) == outcome


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"junk", encode_outcome(Outcome(value=b"x" * 50))[:-1]]
)
def test_a_damaged_outcome_is_recognised(data: bytes) -> None:
    with pytest.raises(DamagedObject, match="outcome of a task"):
        decode_outcome(data)


def test_an_outcome_is_never_both_and_never_neither() -> None:
    with pytest.raises(ValueError, match="either a value or a failure"):
        Outcome()
    with pytest.raises(ValueError, match="either a value or a failure"):
        Outcome(value=b"", failure=Failure(kind="lost"))

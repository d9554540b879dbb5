"""Objects to bytes and back."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import pytest

from starburst_executor.errors import DamagedObject, SerializationError, StoreUnavailable
from starburst_executor.protocol.payload import BUFFER_MIN, digest_of, references
from starburst_executor.serialization.pickling import dumps, loads, pack_call, unpack_call
from starburst_executor.serialization.scripts import Pickler
from tests.support.travel import Blobs, round_trip


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

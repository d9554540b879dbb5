"""Pickles and unpickles objects."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from starburst_executor.errors import (
    DamagedObject,
    SerializationError,
)
from starburst_executor.protocol.payload import BUFFER_MIN, Data, Fetch, Keep, fetched, frame, parse
from starburst_executor.serialization.diagnosis import hint, is_plain, refusal
from starburst_executor.serialization.exception_state import is_interrupt, one_line
from starburst_executor.serialization.scripts import Pickler

__all__ = ["dumps", "loads", "pack_call", "unpack_call"]


"""`fetch(digest, size)`: a blob as a separate writable buffer (bytearray, private mmap)."""


def dumps(obj: object, keep: Keep, what: str = "argument") -> bytes:
    """Pickle an object; its large buffers are passed to `keep` without copying.

    Nothing is stored before the whole object has been pickled.

    Args:
        obj: The object. Functions and classes of `__main__`, lambdas and anything else that cannot
            be imported are pickled by value.
        keep: Stores the blobs. Its exceptions propagate.
        what: What to call the object in an error message.

    Raises:
        SerializationError: it cannot be pickled; the message names the part.
    """
    return _dump(obj, keep, lifted, lambda: [(what, obj)])


def pack_call(args: Sequence[Any], kwargs: Mapping[str, Any], keep: Keep) -> bytes:
    """Pickle a call's arguments as one cargo; errors name the argument.

    Raises:
        SerializationError: an argument cannot be pickled.
    """
    call = (tuple(args), dict(kwargs))
    return _dump(call, keep, _lifted_call, lambda: _named(*call))


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    positional = [(f"argument {i}", value) for i, value in enumerate(args)]
    return positional + [(f"argument {k!r}", value) for k, value in kwargs.items()]


def _dump(
    obj: Any,
    keep: Keep,
    lift: Callable[[Any], Any],
    parts: Callable[[], list[tuple[str, Any]]],
) -> bytes:
    try:
        if is_plain(obj):  # takes a tenth of cloudpickle's time, with the same result
            stream: Data = pickle.dumps(obj, protocol=5)
            buffers: Sequence[memoryview] = ()
        else:
            stream, buffers = pickle_out_of_band(lift(obj))
    except Exception as error:
        raise refusal(error, parts()) from error
    return frame(stream, buffers, keep)


class _Bytes:
    """Large `bytes` to be pickled out of band: pickle itself would copy them inline."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[type[bytes], tuple[pickle.PickleBuffer]]:
        return bytes, (pickle.PickleBuffer(self.data),)


def lifted(obj: Any) -> Any:
    return _Bytes(obj) if type(obj) is bytes and len(obj) >= BUFFER_MIN else obj


def _lifted_call(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = call
    return tuple(map(lifted, args)), {k: lifted(v) for k, v in kwargs.items()}


def pickle_out_of_band(obj: object) -> tuple[bytes, list[memoryview]]:
    buffers: list[memoryview] = []

    def goes_inline(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < BUFFER_MIN:
            return True
        buffers.append(raw)
        return False

    stream = io.BytesIO()
    Pickler(stream, goes_inline).dump(obj)
    return stream.getvalue(), buffers


def loads(cargo: Data, fetch: Fetch, what: str = "object") -> Any:
    """Unpickle a cargo. Arrays use the fetched buffers as their memory.

    Args:
        cargo: The result of `dumps`.
        fetch: Returns a blob. Its exceptions propagate.
        what: What to call the object in an error message.

    Raises:
        SerializationError: its code is missing here or raised; the message has a hint.
        DamagedObject: the bytes are not a cargo, or a blob has the wrong size.
    """
    stream, names = parse(cargo)
    head = stream if isinstance(stream, bytes) else fetched(stream, fetch)
    return _unpickle(head, [fetched(name, fetch) for name in names], what)


def unpack_call(cargo: Data, fetch: Fetch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments from `pack_call`; raises like `loads`."""
    args, kwargs = loads(cargo, fetch, "arguments")
    return args, kwargs


def _unpickle(stream: Any, buffers: Iterable[Any], what: str) -> Any:
    try:
        return pickle.loads(stream, buffers=buffers)
    except pickle.UnpicklingError as error:
        raise DamagedObject(f"the pickle of the {what} is damaged: {error}") from error
    except BaseException as error:  # e.g. from a module that calls sys.exit
        if is_interrupt(error):
            raise
        raise SerializationError(
            f"cannot unpickle the {what}: {one_line(error)}. {hint(error)}"
        ) from error

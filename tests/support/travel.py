"""There and back: values by way of bytes, exceptions by way of records."""

from __future__ import annotations

from typing import Any, NoReturn

from starburst_executor.protocol.outcome import Outcome, decode_outcome, encode_outcome
from starburst_executor.serialization.exceptions import describe, rebuild
from starburst_executor.serialization.pickling import dumps, loads


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


def round_trip(obj: object, blobs: Blobs) -> Any:
    return loads(dumps(obj, blobs.keep), blobs.fetch)


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


class Unbuildable:
    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> NoReturn:
    raise RuntimeError("boom")

"""The frame of a pickle: its bytes, and the names of its large buffers.

A *cargo* is one pickled object: a small msgpack frame with the pickle and the names of its
*blobs*. Large buffers (the data of a NumPy array) are kept out of the pickle: each is a blob, named
by the SHA-256 of its content and stored once per content. A pickle that is itself large becomes a
blob too, so that a cargo is always small enough for a record. Nothing here unpickles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol, TypeAlias

import msgspec

from starburst_executor.errors import (
    DamagedObject,
)

__all__ = ["BUFFER_MIN", "Fetch", "Keep", "digest_of", "references"]


BUFFER_MIN = 64 * 1024  # bytes; below this a request of its own costs more than the copy

STREAM_MAX = 1024 * 1024  # bytes of pickle that may stay in the cargo

Data: TypeAlias = bytes | bytearray | memoryview


class Keep(Protocol):
    """Stores one blob; called once per distinct content in a cargo."""

    def __call__(self, digest: str, data: memoryview, /) -> None:
        """Store `data` under `digest`; the view is valid only until this returns."""


Fetch: TypeAlias = Callable[[str, int], Any]

# The pattern keeps a damaged or forged name from becoming a path.
_Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]

_Blob: TypeAlias = tuple[_Digest, Annotated[int, msgspec.Meta(ge=0, le=2**62)]]

_Frame: TypeAlias = tuple[bytes | _Blob, tuple[_Blob, ...]]

ENCODER = msgspec.msgpack.Encoder()

_frames: msgspec.msgpack.Decoder[_Frame] = msgspec.msgpack.Decoder(_Frame)


def digest_of(data: Data) -> str:
    """The SHA-256 of `data` in hexadecimal: the name of a blob."""
    return hashlib.sha256(data).hexdigest()


def frame(stream: Data, buffers: Sequence[memoryview], keep: Keep) -> bytes:
    if not buffers and len(stream) <= STREAM_MAX:
        return ENCODER.encode((stream, ()))
    blobs = [(digest_of(raw), raw) for raw in buffers]
    head: Data | tuple[str, int] = stream
    if len(stream) > STREAM_MAX:
        head = (digest_of(stream), len(stream))
        blobs.append((head[0], memoryview(stream)))
    for digest, data in dict(blobs).items():
        keep(digest, data)
    names = [(digest, data.nbytes) for digest, data in blobs[: len(buffers)]]
    return ENCODER.encode((head, names))


def references(cargo: Data) -> list[tuple[str, int]]:
    """Digest and size of each blob that a cargo needs; unpickles nothing.

    Raises:
        DamagedObject: the bytes are not a cargo.
    """
    stream, names = parse(cargo)
    heads = [] if isinstance(stream, bytes) else [stream]
    return list(dict.fromkeys([*heads, *names]))


def parse(cargo: Data) -> _Frame:
    try:
        return _frames.decode(cargo)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedObject(
            f"{len(cargo)} bytes that should be a pickled object are truncated or "
            f"something else ({error})"
        ) from error


def fetched(name: tuple[str, int], fetch: Fetch) -> Any:
    digest, size = name
    data = fetch(digest, size)
    if len(data) != size:
        raise DamagedObject(f"blob {digest} has {len(data)} bytes instead of {size}")
    return data

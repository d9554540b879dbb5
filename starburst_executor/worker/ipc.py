"""The messages between a worker and its children."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from starburst_executor.storage.base import local_disk

__all__ = [
    "CHILD_MODULE",
    "MESSAGE_MAX",
    "Blob",
    "FromChild",
    "Initialized",
    "JobRequest",
    "Kind",
    "Ready",
    "Reply",
    "Spooled",
    "ToChild",
    "Unable",
    "delete_files",
    "frame",
    "spool_file",
    "unspool",
]


CHILD_MODULE = f"{__package__}.child"  # what a child is started as; a worker never imports it
MESSAGE_MAX = 64 * 1024  # bytes; a socket's buffer holds several of these

Kind: TypeAlias = Literal[
    "returned", "raised", "crashed", "timeout", "initializer", "unserializable"
]

Blob: TypeAlias = tuple[str, str, int]  # digest, spool file, bytes


class JobRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Run this."""

    number: int
    function: str  # file with the callable's cargo
    function_digest: str
    call: bytes  # cargo of (args, kwargs)
    blobs: str  # directory of the blobs that the cargos name
    path: tuple[str, ...]  # directories for sys.path


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The child has started and reads orders."""


class Initialized(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The initializer has returned; the run time of the first order counts from here."""


class Reply(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What became of an order."""

    number: int
    seconds: float  # run time, with unpickling and pickling
    kind: Kind
    outcome: bytes  # of `encode_outcome`
    blobs: tuple[Blob, ...]
    stdout: bytes
    stderr: bytes
    unfit: str = ""  # why the child ends after this reply


class Unable(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The child ends, and has not carried out an order, for a reason that is not the task's."""

    number: int
    reason: str
    begun: bool  # the task's own code may have to do with it
    disk: bool = False  # the worker's disk is full or gone


class Spooled(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The message with this number is in a file; whoever reads it deletes it."""

    number: int
    file: str


ToChild: TypeAlias = JobRequest | Spooled

FromChild: TypeAlias = Ready | Initialized | Reply | Unable | Spooled

ENCODER = msgspec.msgpack.Encoder()

ORDERS = msgspec.msgpack.Decoder(JobRequest)
TO_CHILD: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)


def frame(message: JobRequest | Reply, folder: Path) -> bytes:
    """Encode a message; one too large for the socket goes to a file, which the result names.

    Raises:
        LocalDiskError: the file cannot be written.
    """
    data = ENCODER.encode(message)
    if len(data) <= MESSAGE_MAX:
        return data
    file = spool_file(folder, message.number, type(message))
    with local_disk(file):
        file.write_bytes(data)
    return ENCODER.encode(Spooled(message.number, str(file)))


def spool_file(folder: Path, number: int, kind: type[JobRequest | Reply]) -> Path:
    """Where a message goes that is too large for the socket."""
    return folder / f"{number}.{kind.__name__.lower()}"


def unspool(message: Spooled) -> bytes:
    """The bytes of a message that lies in a file; the file is deleted.

    Raises:
        LocalDiskError: the file cannot be read.
    """
    file = Path(message.file)
    with local_disk(file):
        data = file.read_bytes()
        file.unlink()
    return data


def delete_files(files: Iterable[Path]) -> None:
    """Delete spool files as far as that is possible; their folder is removed at the end."""
    for file in files:
        with suppress(OSError):
            file.unlink(missing_ok=True)

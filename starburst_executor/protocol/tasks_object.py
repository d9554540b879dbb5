"""The tasks object of a batch: a header, then the pickled arguments."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

from msgspec import Meta, field

from starburst_executor.errors import DamagedObject
from starburst_executor.protocol.bounds import LARGEST, Count, Digest
from starburst_executor.protocol.codec import SCHEMA, Stored, decodable, decode, encode
from starburst_executor.protocol.keys import MAX_BATCH_TASKS
from starburst_executor.protocol.records import Record
from starburst_executor.protocol.task_names import NO_NAME, Name, encode_names

__all__ = [
    "MAX_BATCH_BYTES",
    "MAX_BATCH_TASKS",
    "Call",
    "Header",
    "Queued",
    "encode_tasks",
    "read_header",
]


MAX_BATCH_BYTES = 4 << 20

_MAGIC = b"SBX1"


class Call(NamedTuple):
    """Index of a task's function, offset and size of its arguments; size -1: withdrawn."""

    function: Count
    start: Count
    size: Annotated[int, Meta(ge=-1, le=10**12)]


@decodable
class Header(Stored, frozen=True, kw_only=True):
    """Header of a tasks object."""

    schema: int = SCHEMA
    functions: tuple[Digest, ...]  # digests under functions/
    # Archives that the pickles need: name -> digest under modules/
    modules: dict[str, Digest] = field(default_factory=dict)
    calls: tuple[Call, ...]
    light: bool = True  # none of its arguments refer to a blob

    def __post_init__(self) -> None:
        if any(call.function >= len(self.functions) for call in self.calls):
            raise ValueError("a call names a function that is not among the header's")

    @property
    def withdrawn(self) -> frozenset[int]:
        """Positions that were cancelled before they were stored."""
        return frozenset(i for i, call in enumerate(self.calls) if call.size < 0)

    @property
    def arguments_size(self) -> int:
        """Bytes of all arguments together; the task names follow them."""
        return sum(call.size for call in self.calls if call.size > 0)

    def fresh_record(self) -> Record:
        """The record of this batch before anyone touched it."""
        return Record.fresh(len(self.calls), self.withdrawn)


class Queued(NamedTuple):
    """One task, as passed to the batch writer."""

    function: str
    arguments: bytes | None  # None: withdrawn
    name: Name = NO_NAME


def encode_tasks(
    calls: Sequence[Queued], modules: Mapping[str, str], *, light: bool = True
) -> bytes:
    """Encode a batch's tasks object: magic, length of the header, header, arguments, names."""
    functions: dict[str, int] = {}
    places: list[Call] = []
    body: list[bytes] = []
    offset = 0
    for function, arguments, _ in calls:
        index = functions.setdefault(function, len(functions))
        if arguments is None:
            places.append(Call(index, offset, -1))
            continue
        places.append(Call(index, offset, len(arguments)))
        body.append(arguments)
        offset += len(arguments)
    header = Header(
        functions=tuple(functions),
        modules=dict(modules),
        calls=tuple(places),
        light=light,
    )
    head = encode(header)
    names = encode_names(call.name for call in calls)
    return b"".join([_MAGIC, struct.pack("<I", len(head)), head, *body, names])


def read_header(data: bytes, key: str) -> tuple[Header, int] | int:
    """Header and offset of the arguments; or, if `data` is too short, how many bytes are needed.

    Raises:
        DamagedObject: it is not a tasks object.
    """
    if len(data) < 8 or data[:4] != _MAGIC:
        raise DamagedObject(f"{key} is not a tasks object ({len(data)} bytes)")
    (length,) = struct.unpack("<I", data[4:8])
    body = 8 + length
    if body > LARGEST:
        raise DamagedObject(f"{key} has a header of {length} bytes, far more than 256 tasks need")
    if len(data) < body:
        return int(body)
    return decode(data[8:body], Header, key), int(body)

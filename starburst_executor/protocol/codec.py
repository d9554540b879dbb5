"""Stored values to JSON and back."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from starburst_executor.errors import DamagedObject, NewerSchema

__all__ = ["decodable", "decode", "encode"]

T = TypeVar("T")

SCHEMA = 1

_decoders: dict[type, msgspec.json.Decoder[Any]] = {}


def decodable(kind: type[T]) -> type[T]:
    """Have `decode` know a class; decorates what is stored, where it is defined.

    A decoder is built here, while its module is imported, and never later: msgspec reads a
    class when it builds the first one, and two threads that do so at once crash the process.
    """
    _decoders[kind] = msgspec.json.Decoder(kind)
    return kind


class Stored(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """Base of what is stored as JSON. Unknown fields are refused: an older program would drop them."""


_encoder = msgspec.json.Encoder()


class _Schema(msgspec.Struct):
    schema: int = 0


_schemas = msgspec.json.Decoder(_Schema)


def encode(value: msgspec.Struct) -> bytes:
    """The JSON that is stored."""
    return _encoder.encode(value)


def decode(data: bytes, kind: type[T], key: str) -> T:
    """What `encode` made of it.

    Raises:
        NewerSchema: a newer version of this package wrote it.
        DamagedObject: it is not such an object.
    """
    try:
        value = _decoders[kind].decode(data)
        schema = getattr(value, "schema", SCHEMA)
    except msgspec.DecodeError as error:  # ValidationError is one
        schema = _schema_of(data)
        if schema <= SCHEMA:
            raise DamagedObject(f"{key} cannot be read: {error} ({len(data)} bytes)") from error
    if schema > SCHEMA:
        raise NewerSchema(
            f"{key} has schema {schema}; this version of starburst_executor knows {SCHEMA}. "
            "A newer version wrote it: upgrade with pip install -U starburst-executor."
        )
    assert isinstance(value, kind)
    return value


def _schema_of(data: bytes) -> int:
    try:
        return _schemas.decode(data).schema
    except msgspec.DecodeError:
        return 0

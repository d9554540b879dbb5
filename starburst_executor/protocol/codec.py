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
    """Register a stored class with `decode`; a decorator.

    The decoder is built here, while the module is imported, and never later: msgspec inspects a
    class when it builds its first decoder, and two threads doing so at once crash the process.
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
    """Base of what is stored as JSON; refuses unknown fields, which an older program would drop."""


_encoder = msgspec.json.Encoder()


class _Schema(msgspec.Struct):
    schema: int = 0


_schemas = msgspec.json.Decoder(_Schema)


def encode(value: msgspec.Struct) -> bytes:
    """Encode a value as the JSON that is stored."""
    return _encoder.encode(value)


def decode(data: bytes, kind: type[T], key: str) -> T:
    """Decode what `encode` wrote.

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
            f"{key} has schema {schema}; this version of starburst_executor supports {SCHEMA}. "
            "A newer version wrote it: upgrade with `pip install -U starburst-executor`."
        )
    assert isinstance(value, kind)
    return value


def _schema_of(data: bytes) -> int:
    try:
        return _schemas.decode(data).schema
    except msgspec.DecodeError:
        return 0

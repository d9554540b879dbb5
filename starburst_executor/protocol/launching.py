"""`launching`: who may start workers, and why some are missing."""

from __future__ import annotations

from typing import NamedTuple

from starburst_executor.errors import ObjectNotFound
from starburst_executor.protocol import codec
from starburst_executor.protocol.bounds import LARGEST, Seconds
from starburst_executor.protocol.codec import Stored
from starburst_executor.protocol.session import Session

__all__ = ["LAUNCHING_KEY", "Launching", "StoredLaunching", "read_launching"]

LAUNCHING_KEY = "launching"


@codec.decodable
class Launching(Stored, frozen=True, kw_only=True):
    """Who holds the lease, for how many seconds from when it was written."""

    schema: int = codec.SCHEMA
    nonce: str
    by: str
    seconds: Seconds
    shortage: str = ""  # why fewer workers could be started than wanted; for people


class StoredLaunching(NamedTuple):
    """The object as it was read."""

    value: Launching
    version: str
    age: float  # seconds, by the store's clock


def read_launching(session: Session) -> StoredLaunching | None:
    """The object as it is now; None if nobody has ever started workers."""
    try:
        got = session.store.get(session.key(LAUNCHING_KEY), stop=LARGEST)
    except ObjectNotFound:
        return None
    assert got is not None
    value = codec.decode(got.data, Launching, LAUNCHING_KEY)
    return StoredLaunching(value, got.version, got.now - got.modified)

"""The store's promise."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias

__all__ = [
    "Bytes",
    "ListedObject",
    "StoredObject",
    "ListingPage",
    "Store",
    "RequestCounter",
    "appearing",
    "check_key",
    "check_listing",
]


Bytes: TypeAlias = bytes | bytearray | memoryview

_BAD_KEY = re.compile(r"(?:\A|/)(?:[./]|\Z)|\0")

_BAD_PREFIX = re.compile(r"(?:\A|/)[./]|\0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedObject:
    """One object of a listing."""

    key: str
    size: int  # bytes
    version: str
    modified: float  # UTC seconds, by the store's clock


@dataclass(frozen=True, slots=True, kw_only=True)
class ListingPage:
    """One page of a listing."""

    entries: list[ListedObject]
    prefixes: list[str]  # with a delimiter: what lies below, each ending in it
    now: float  # the store's clock when it answered
    truncated: bool  # more follows after the last key or prefix of this page


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """One object, or the part of it that was asked for."""

    data: bytes
    size: int  # of the whole object
    version: str
    modified: float
    now: float


class RequestCounter:
    """Requests that one store object has made, in the two classes that S3 prices; many threads may count.

    Deletions are free and not counted. Those of a directory cost nothing, and are counted all the same: one
    for each call.

    Attributes:
        writes: PUT, COPY, POST and LIST.
        reads: GET and HEAD.
    """

    def __init__(self) -> None:
        self.writes = 0
        self.reads = 0
        self._lock = threading.Lock()

    def wrote(self) -> None:
        """One more PUT, COPY, POST or LIST."""
        with self._lock:
            self.writes += 1

    def read(self) -> None:
        """One more GET or HEAD."""
        with self._lock:
            self.reads += 1


class Store(Protocol):
    """A place for objects. Keys are relative to the store's own root, without a leading slash."""

    url: str
    tally: RequestCounter

    def get(
        self,
        key: str,
        *,
        start: int = 0,
        stop: int | None = None,
        unless: str | None = None,
    ) -> StoredObject | None:
        """Read an object, or its bytes `start` to `stop` (exclusive; past the end is no error).

        Returns:
            The object, or None if its version still is `unless`.

        Raises:
            ObjectNotFound: there is none.
            StoreUnavailable: no plain answer.
        """

    def put(self, key: str, data: Bytes) -> None:
        """Write an object whatever was there."""

    def create(self, key: str, data: Bytes) -> str:
        """Write an object that must not exist yet; returns its version.

        Raises:
            Conflict: it exists (perhaps by an earlier try of this very call).
            StoreUnavailable: it may or may not have been written.
        """

    def replace(self, key: str, data: Bytes, version: str) -> str:
        """Write an object that must still have `version`; returns the new version.

        Raises:
            Conflict: it has another version (perhaps by an earlier try of this very call).
            ObjectNotFound: it is gone. Some servers say Conflict for this too.
            StoreUnavailable: it may or may not have been written.
        """

    def list(
        self, prefix: str, *, after: str = "", limit: int = 1000, delimiter: str = ""
    ) -> ListingPage:
        """One page of the objects below `prefix` (a plain string prefix), in key order.

        Args:
            prefix: What the keys begin with.
            after: Begin with the first key, or folded prefix, greater than this. A whole key:
                some servers take a key's folder, without its slash, for all that is in it.
            limit: At most so many entries and prefixes, 1 to 1,000.
            delimiter: If `/`, keys that hold one after `prefix` are folded into `Page.prefixes`.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; one that is not there is no error."""

    def upload(self, key: str, source: Path | Bytes) -> None:
        """Write an object of any size, named after its content, unless it is there already.

        Streams: memory does not grow with the size. The object is seen whole or not at all.
        """

    def download(self, key: str, target: Path) -> None:
        """Write an object into a file, streaming; the file appears whole or not at all."""

    def close(self) -> None:
        """Let go of connections and files; the store cannot be used afterwards."""


def check_key(key: str) -> None:
    """Refuse a key that some store could not hold, or that would lead out of the store.

    Raises:
        ValueError: a name in it is empty or begins with a dot, or it holds a NUL.
    """
    if _BAD_KEY.search(key):
        raise ValueError(
            f"{key!r} is no key: its names, joined by '/', must not be empty nor begin with '.'"
        )


def check_listing(prefix: str, limit: int, delimiter: str) -> None:
    """Refuse a listing that some store could not give.

    Raises:
        ValueError: `prefix` begins no key, `limit` is not 1 to 1,000, or `delimiter` is not `/` or empty.
    """
    if _BAD_PREFIX.search(prefix):
        raise ValueError(
            f"no key begins with {prefix!r}: names in keys are not empty nor begin with '.'"
        )
    if not 1 <= limit <= 1000:
        raise ValueError(f"limit={limit}: a page has 1 to 1000 entries")
    if delimiter not in ("", "/"):
        raise ValueError(f"delimiter={delimiter!r}: only '/' can be one")


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its place at `target` when the block ends well and is removed when not."""
    temporary = target.with_name(f".{target.name}.{os.urandom(6).hex()}")
    try:
        with temporary.open("xb", buffering=0) as file:
            yield file
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

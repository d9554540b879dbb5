"""The store: named byte strings, written once or swapped, with S3's guarantees.

The protocol rests on these, and every store must give them:

* a read sees every write that was answered before it began; nobody sees half an object;
* `create` succeeds for one writer only; `replace` only if nobody wrote since the version was read;
* a listing is ordered by key (as UTF-8 bytes), starts after any given key, and sees every answered
  write;
* there is one clock: `modified` and `now` are the store's own time and may be compared.

A key is one or more names joined by `/`; a name is not empty and does not begin with a dot
(directories keep such names for themselves: `..`, `.nfs0001`, `.DS_Store`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol, TypeAlias

from starburst_executor.errors import LocalDiskError, StarburstError

__all__ = [
    "STARVED",
    "Bytes",
    "ListedObject",
    "ListingPage",
    "LocalFile",
    "RequestCounter",
    "Store",
    "StoredObject",
    "appearing",
    "check_key",
    "check_listing",
    "local_disk",
]


Bytes: TypeAlias = bytes | bytearray | memoryview

# There is too little of something at the moment, which another try or process may have.
STARVED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)

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
    prefixes: list[str]  # with a delimiter: the folded prefixes, each ending in it
    now: float  # the store's clock when it answered
    truncated: bool  # whether more follows the last key or prefix of this page


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """One object, or the requested part of it."""

    data: bytes
    size: int  # of the whole object
    version: str
    modified: float
    now: float


class RequestCounter:
    """Requests made through one store object, in the two classes that S3 prices; thread-safe.

    Deletions are free and not counted. A directory's requests cost nothing but are counted all the
    same, one per call.

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
            The object, or None if its version is still `unless`.

        Raises:
            ObjectNotFound: there is none.
            StoreUnavailable: no definite answer.
        """

    def put(self, key: str, data: Bytes) -> None:
        """Write an object, replacing any that was there."""

    def create(self, key: str, data: Bytes) -> str:
        """Write an object that must not exist yet; return its version.

        Raises:
            Conflict: it exists (perhaps from an earlier try of this very call).
            StoreUnavailable: it may or may not have been written.
        """

    def replace(self, key: str, data: Bytes, version: str) -> str:
        """Write an object that must still have `version`; return the new version.

        Raises:
            Conflict: it has another version (perhaps from an earlier try of this very call).
            ObjectNotFound: it is gone. Some servers answer with a conflict here too.
            StoreUnavailable: it may or may not have been written.
        """

    def list(
        self, prefix: str, *, after: str = "", limit: int = 1000, delimiter: str = ""
    ) -> ListingPage:
        """One page of the objects below `prefix` (a plain string prefix), in key order.

        Args:
            prefix: What the keys start with.
            after: Start with the first key, or folded prefix, greater than this. Pass a whole key:
                some servers take a key's folder, without its slash, for everything in it.
            limit: Most entries and prefixes to return, 1 to 1,000.
            delimiter: If `/`, fold keys that have one after `prefix` into `ListingPage.prefixes`.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; a missing one is no error."""

    def upload(self, key: str, source: Path | Bytes) -> None:
        """Write an object of any size, named after its content, unless it exists already.

        Streams: memory use does not grow with the size. The object appears whole or not at all.
        """

    def download(self, key: str, target: Path) -> None:
        """Stream an object into a file, which appears whole or not at all."""

    def close(self) -> None:
        """Release connections and files; the store cannot be used afterwards."""


def check_key(key: str) -> None:
    """Refuse a key that some store cannot hold, or that would lead out of the store.

    Raises:
        ValueError: a name in it is empty or starts with a dot, or it contains a NUL.
    """
    if _BAD_KEY.search(key):
        raise ValueError(
            f"{key!r} is not a key: its names, joined by '/', must not be empty or start with '.'"
        )


def check_listing(prefix: str, limit: int, delimiter: str) -> None:
    """Refuse a listing that some store cannot give.

    Raises:
        ValueError: no key starts with `prefix`, `limit` is not 1 to 1,000, or `delimiter` is
            neither `/` nor empty.
    """
    if _BAD_PREFIX.search(prefix):
        raise ValueError(
            f"no key starts with {prefix!r}: names in keys are not empty and do not start with '.'"
        )
    if not 1 <= limit <= 1000:
        raise ValueError(f"limit={limit}: a page has 1 to 1000 entries")
    if delimiter not in ("", "/"):
        raise ValueError(f"delimiter={delimiter!r}: only '/' is supported")


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[LocalFile]:
    """A file to write; it moves to `target` when the block succeeds and is removed otherwise.

    Raises:
        LocalDiskError: it cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{os.urandom(6).hex()}")
    try:
        with local_disk(target):
            raw = temporary.open("xb", buffering=0)
        with raw:
            yield LocalFile(raw, target)
        with local_disk(target):
            temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):  # the error that led here matters more
            temporary.unlink(missing_ok=True)
        raise


class LocalFile:
    """A file outside of the store that is being written.

    Args:
        raw: The file, unbuffered.
        path: Its path, for messages.
    """

    def __init__(self, raw: FileIO, path: Path) -> None:
        self._raw = raw
        self._path = path

    def write(self, data: Bytes) -> None:
        """Write all of it after what was written before."""
        rest = memoryview(data).cast("B")
        with local_disk(self._path):
            while rest:
                rest = rest[self._raw.write(rest) :]

    def write_at(self, data: Bytes, offset: int) -> None:
        """Write all of it at an offset; threads may do so at once."""
        rest = memoryview(data).cast("B")
        with local_disk(self._path):
            while rest:
                written = os.pwrite(self._raw.fileno(), rest, offset)
                rest, offset = rest[written:], offset + written


@contextlib.contextmanager
def local_disk(path: Path) -> Iterator[None]:
    """Say of an error with a file outside of the store that it is not the store's.

    Only the want of descriptors or memory, which passes, stays as it is.

    Raises:
        LocalDiskError: the block failed with any other `OSError`.
    """
    try:
        yield
    except StarburstError:
        raise
    except OSError as error:
        if error.errno in STARVED:
            raise
        raise LocalDiskError(
            f"{path} cannot be read or written: {error.strerror or error}"
        ) from error

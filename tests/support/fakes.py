"""Stand-ins that pass the contract suite of what they stand for."""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from pathlib import Path

from starburst_executor.errors import Conflict, ObjectNotFound
from starburst_executor.runtime import Runtime
from starburst_executor.storage.base import (
    Bytes,
    ListedObject,
    ListingPage,
    RequestCounter,
    StoredObject,
    appearing,
    check_key,
    check_listing,
    local_disk,
)

_LAST = "\U0010ffff"  # sorts after every other character


class MemoryStore:
    """A store in memory, made for millions of operations in a simulator.

    Versions are hashes of the content, as S3's are, so that a program which writes the same
    bytes again is found out: nobody can see that it wrote.

    Args:
        runtime: Whose `time` is the store's clock.
        resolution: Seconds to which times are rounded down; S3's is 1, and 0 rounds nothing.
    """

    url = "memory:"

    def __init__(self, runtime: Runtime, resolution: float = 1.0) -> None:
        self.tally = RequestCounter()
        self._runtime = runtime
        self._resolution = resolution
        self._lock = threading.Lock()
        self._keys: list[str] = []  # sorted
        self._data: dict[str, bytes] = {}
        self._entries: dict[str, ListedObject] = {}

    def get(
        self,
        key: str,
        *,
        start: int = 0,
        stop: int | None = None,
        unless: str | None = None,
    ) -> StoredObject | None:
        check_key(key)
        self.tally.read()
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                raise ObjectNotFound(f"{key} is not in memory")
            if entry.version == unless:
                return None
            return StoredObject(
                data=self._data[key][start:stop],
                size=entry.size,
                version=entry.version,
                modified=entry.modified,
                now=self._now(),
            )

    def put(self, key: str, data: Bytes) -> None:
        check_key(key)
        self.tally.wrote()
        with self._lock:
            self._write(key, data)

    def create(self, key: str, data: Bytes) -> str:
        check_key(key)
        self.tally.wrote()
        with self._lock:
            if key in self._entries:
                raise Conflict(f"{key} exists already in memory")
            return self._write(key, data)

    def replace(self, key: str, data: Bytes, version: str) -> str:
        check_key(key)
        self.tally.wrote()
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                raise ObjectNotFound(f"{key} is not in memory")
            if entry.version != version:
                raise Conflict(f"{key} has version {entry.version}, not {version}")
            return self._write(key, data)

    def list(
        self, prefix: str, *, after: str = "", limit: int = 1000, delimiter: str = ""
    ) -> ListingPage:
        check_listing(prefix, limit, delimiter)
        self.tally.wrote()
        with self._lock:
            if delimiter:
                return self._folded(prefix, after, limit)
            begin = self._begin(prefix, after)
            end = bisect_left(self._keys, prefix + _LAST, begin)
            keys = self._keys[begin : min(end, begin + limit)]
            return ListingPage(
                entries=[self._entries[key] for key in keys],
                prefixes=[],
                now=self._now(),
                truncated=end - begin > limit,
            )

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            check_key(key)
            with self._lock:
                if self._entries.pop(key, None) is not None:
                    del self._data[key]
                    del self._keys[bisect_left(self._keys, key)]

    def upload(self, key: str, source: Path | Bytes) -> None:
        if isinstance(source, Path):
            with local_disk(source):
                source = source.read_bytes()
        data = source
        check_key(key)
        self.tally.wrote()
        with self._lock:
            if key not in self._entries:
                self._write(key, data)

    def download(self, key: str, target: Path) -> None:
        got = self.get(key)
        assert got is not None
        with appearing(target) as file:
            file.write(got.data)

    def close(self) -> None:
        pass

    def _now(self) -> float:
        now = self._runtime.time()
        return now - now % self._resolution if self._resolution else now

    def _write(self, key: str, data: Bytes) -> str:
        stored = bytes(data)
        version = hashlib.md5(stored, usedforsecurity=False).hexdigest()
        if key not in self._entries:
            insort(self._keys, key)
        self._data[key] = stored
        self._entries[key] = ListedObject(
            key=key, size=len(stored), version=version, modified=self._now()
        )
        return version

    def _begin(self, prefix: str, after: str) -> int:
        if after >= prefix:
            return bisect_right(self._keys, after)
        return bisect_left(self._keys, prefix)

    def _folded(self, prefix: str, after: str, limit: int) -> ListingPage:
        entries: list[ListedObject] = []
        prefixes: list[str] = []
        at = self._begin(prefix, after)
        while at < len(self._keys) and self._keys[at].startswith(prefix):
            key = self._keys[at]
            end = key.find("/", len(prefix)) + 1
            fold = key[:end]
            if not end or fold > after:
                if len(entries) + len(prefixes) == limit:
                    break
                if end:
                    prefixes.append(fold)
                else:
                    entries.append(self._entries[key])
            at = bisect_left(self._keys, fold + _LAST, at) if end else at + 1
        truncated = at < len(self._keys) and self._keys[at].startswith(prefix)
        return ListingPage(entries=entries, prefixes=prefixes, now=self._now(), truncated=truncated)

"""A session's objects as bytes under keys, read and written with retries.

`session` knows what they mean.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TypeVar

from starburst_executor.errors import (
    Conflict,
    DamagedObject,
    ObjectNotFound,
    StoreUnavailable,
)
from starburst_executor.protocol import codec, records
from starburst_executor.protocol.bounds import LARGEST
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.manifest import LiveLog
from starburst_executor.protocol.patience import Patience
from starburst_executor.protocol.payload import digest_of
from starburst_executor.runtime import Runtime
from starburst_executor.storage.base import ListedObject, Store
from starburst_executor.storage.url import join_url

__all__ = ["SessionObjects"]

_RENEWED = (
    "the credentials are renewed (`aws sso login`, or new keys where the old ones came from) or "
    "the permission is given"
)
_PART = 16 << 20  # bytes read by one request
_Content = TypeVar("_Content", bytes, bytearray)


class SessionObjects(Patience):
    """One session's objects.

    Args:
        store: The store.
        session_id: The session's id.
        runtime: Time, waiting and randomness.
    """

    def __init__(self, store: Store, session_id: str, runtime: Runtime) -> None:
        remedy = _RENEWED if store.url.startswith("s3:") else "the folder can be written again"
        super().__init__(runtime, f"session {session_id}", remedy)
        self.store = store
        self.id = session_id
        self.prefix = f"sessions/{session_id}/"
        self.url = join_url(store.url, self.prefix.rstrip("/"))

    def key(self, name: str) -> str:
        """The store's key of an object of this session."""
        return self.prefix + name

    def put_content(self, folder: str, data: bytes) -> str:
        """Store bytes under their digest in `functions` or `modules`; returns the digest."""
        digest = digest_of(data)
        self.create_once(f"{folder}/{digest}", data)
        return digest

    def get_function(self, digest: str) -> bytes:
        """The cargo of a callable.

        Raises:
            DamagedObject: it is gone, or its content does not match its name.
        """
        key = f"functions/{digest}"
        try:
            return _checked(key, digest, self.get(key))
        except ObjectNotFound as error:
            raise DamagedObject(f"{key} of session {self.id} is gone from the store") from error

    def put_blob(self, digest: str, source: Path | memoryview) -> None:
        """Store a blob under its digest, streaming, unless it already exists."""
        self.patiently(lambda: self.store.upload(self.key(f"blobs/{digest}"), source))

    def get_blob(self, digest: str, size: int) -> bytearray:
        """A blob of a known size in memory, read in parallel parts if it is large.

        Raises:
            DamagedObject: it is gone, or its size or content does not match its name.
        """
        key = f"blobs/{digest}"
        data = bytearray(size)
        reads = [partial(self._get_part, key, data, at) for at in range(0, size, _PART)]
        try:
            self.runtime.gather(reads)
        except ObjectNotFound as error:
            raise DamagedObject(f"{key} of session {self.id} is gone from the store") from error
        return _checked(key, digest, data)

    def _get_part(self, key: str, data: bytearray, start: int) -> None:
        stop = min(start + _PART, len(data))
        got = self.store.get(self.key(key), start=start, stop=stop)
        assert got is not None
        if got.size != len(data):
            raise DamagedObject(f"{key} has {got.size} bytes instead of {len(data)}")
        data[start:stop] = got.data

    def put_pack(self, batch: Batch, nonce: str, data: bytes) -> None:
        """Store outcomes too large for the record, all from one write, under a fresh name."""
        self.create_once(batch.pack_key(nonce), data)

    def put_live_log(self, batch: Batch, position: int, attempt: int, text: LiveLog) -> None:
        """Store what a running task has printed so far."""
        self.store.put(self.key(batch.live_log_key(position, attempt)), codec.encode(text))

    def get_piece(self, batch: Batch, piece: records.Piece) -> bytes:
        """The bytes of a piece, from the record or from its pack.

        Raises:
            DamagedObject: the pack is gone or too short.
        """
        if not piece.pack:
            return piece.inline
        key = batch.pack_key(piece.pack)
        try:
            data = self.get(key, piece.start, piece.start + piece.size)
        except ObjectNotFound as error:
            raise DamagedObject(f"{key} is gone, including a result that it held") from error
        if len(data) < piece.size:
            raise DamagedObject(
                f"{key} is truncated: it ends before byte {piece.start + piece.size}"
            )
        return data

    def list_all(self, prefix: str) -> tuple[list[ListedObject], float]:
        """Every object under a prefix of the store, and the store's time."""
        entries: list[ListedObject] = []
        after = ""
        while True:
            page = self.store.list(prefix, after=after)
            entries += page.entries
            if not page.truncated:
                return entries, page.now
            after = page.entries[-1].key

    def create_once(self, key: str, data: bytes) -> None:
        """Store an object whose key implies its content: an existing one is the same."""

        def once() -> None:
            try:
                self.store.create(self.key(key), data)
            except Conflict as conflict:
                self.get_refused(key, conflict, 1)

        self.patiently(once)

    def get_refused(self, key: str, conflict: Conflict, stop: int | None = None) -> bytes:
        """The existing object after creating it was refused.

        Raises:
            StoreUnavailable: there is none. S3 also refuses (409) while another request for the
                same key is in progress, perhaps an earlier attempt that then fails.
        """
        try:
            return self.get(key, 0, stop)
        except ObjectNotFound:
            raise StoreUnavailable(f"{key} was refused, although it does not exist") from conflict

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of an object from `start` on, up to `stop`."""
        got = self.store.get(self.key(key), start=start, stop=stop)
        assert got is not None
        return got.data

    def live_log(self, batch: Batch, position: int, attempt: int) -> tuple[str, str]:
        """A task's stdout and stderr as of its worker's last heartbeat."""
        try:
            data = self.get(batch.live_log_key(position, attempt), 0, LARGEST)
        except ObjectNotFound:
            return "", ""
        log = codec.decode(data, LiveLog, batch.live_log_key(position, attempt))
        return log.stdout, log.stderr


def _checked(key: str, digest: str, data: _Content) -> _Content:
    if digest_of(data) != digest:
        raise DamagedObject(f"{key} is damaged: its content does not have that digest")
    return data

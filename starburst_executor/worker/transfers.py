"""Moves large objects on another thread, so that the worker's loop never waits for one."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeAlias

from starburst_executor.errors import StoreError
from starburst_executor.protocol.records import Piece
from starburst_executor.protocol.session import Session, damage
from starburst_executor.protocol.transitions import AttemptEnd
from starburst_executor.runtime import Signal
from starburst_executor.worker.assignment import AttemptKey
from starburst_executor.worker.cache import ObjectCache

__all__ = ["ENDURANCE", "Blobs", "Transfers"]

log = logging.getLogger(__name__)

# Tries while the machine has no descriptors, memory or disk left, before a worker gives up.
ENDURANCE = 8

Blobs: TypeAlias = tuple[tuple[str, Path, int], ...]  # digest, file, bytes


class Transfers:
    """Fetches what tasks need and uploads what they returned.

    Args:
        session: Where to and from.
        worker: The worker's id, for the log.
        cache: Where what is fetched is kept.
        aside: Makes a call on another thread.
        signal: Set when something has arrived.

    Attributes:
        fetching: Attempts whose blobs are on their way here.
    """

    def __init__(
        self,
        session: Session,
        worker: str,
        cache: ObjectCache,
        aside: Callable[[Callable[[], None]], object],
        signal: Signal,
    ) -> None:
        self._session = session
        self._runtime = session.runtime
        self._worker = worker
        self._cache = cache
        self._aside = aside
        self._signal = signal
        self._uploaded: deque[tuple[AttemptKey, AttemptEnd]] = deque()
        self._fetched: deque[tuple[AttemptKey, Exception | None]] = deque()
        self.fetching: set[AttemptKey] = set()

    @property
    def arrived(self) -> bool:
        """Whether any transfer has ended that nobody has taken yet."""
        return bool(self._uploaded or self._fetched)

    def fetch(self, key: AttemptKey, blobs: list[str]) -> None:
        """Start to bring the blobs that an attempt needs."""
        self.fetching.add(key)
        self._aside(partial(self._fetch, key, blobs))

    def upload(self, key: AttemptKey, end: AttemptEnd, blobs: Blobs) -> None:
        """Start to store the blobs that an outcome names, before the outcome itself."""
        self._aside(partial(self._upload, key, end, blobs))

    def take_fetched(self) -> list[tuple[AttemptKey, Exception | None]]:
        """The attempts whose blobs are here, or the error because of which they are not."""
        taken = []
        while self._fetched:
            key, error = self._fetched.popleft()
            self.fetching.discard(key)
            taken.append((key, error))
        return taken

    def take_uploaded(self) -> list[tuple[AttemptKey, AttemptEnd]]:
        """The ends whose blobs are stored; failures where they could not be."""
        taken = []
        while self._uploaded:
            taken.append(self._uploaded.popleft())
        return taken

    # --- on the thread of transfers -----------------------------------------------------

    def _fetch(self, key: AttemptKey, blobs: list[str]) -> None:
        error: Exception | None = None
        try:
            self._in_tries(partial(self._cache.fetch, blobs))
        except Exception as caught:
            error = caught
        self._fetched.append((key, error))
        self._signal.set()

    def _upload(self, key: AttemptKey, end: AttemptEnd, blobs: Blobs) -> None:
        try:
            self._in_tries(partial(self._put, blobs))
        except Exception as error:
            if not isinstance(error, StoreError):
                log.exception("worker %s could not store a result", self._worker)
            end = end._replace(ok=False, outcome=Piece(inline=damage(error)))
        with suppress(OSError):  # the folder is removed at the end
            for _, path, _ in blobs:
                path.unlink(missing_ok=True)
        self._uploaded.append((key, end))
        self._signal.set()

    def _put(self, blobs: Blobs) -> None:
        for digest, path, _ in blobs:
            self._session.put_blob(digest, path)

    def _in_tries(self, call: Callable[[], None]) -> None:
        """Repeat a call while this machine is short of something."""
        for _ in range(ENDURANCE - 1):
            try:
                return call()
            except (StoreError, FileNotFoundError):
                raise
            except OSError as error:
                log.warning("worker %s: %s", self._worker, error)
            self._runtime.signal().wait(self._runtime.random.uniform(0.1, 1.0))
        return call()

"""Moves large objects between the store and this worker's disk, off the worker's loop.

    fetch, upload ----> a call on another thread ----> entry ----> take_fetched, take_uploaded
                          ^                              |
                          +--- again later <-------------+ the store is away, or the machine short

Every call leaves an entry, however it ends: without one its task would stay as it is for ever.
The entries wait here until the loop takes them.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

from starburst_executor.errors import StoreDenied
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.transitions import AttemptEnd
from starburst_executor.runtime import Signal
from starburst_executor.worker.assignment import AttemptKey
from starburst_executor.worker.cache import ObjectCache
from starburst_executor.worker.faults import ENDURANCE, Consequence, consequence
from starburst_executor.worker.ipc import delete_files

__all__ = ["Blobs", "Fetched", "Transfers", "Uploaded"]

log = logging.getLogger(__name__)

# Credentials may expire and be renewed; a permission that is missing for longer stays missing.
DENIED_SECONDS = 300.0
LONGEST_PAUSE = 10.0

Blobs: TypeAlias = tuple[tuple[str, Path, int], ...]  # digest, file, bytes


class Fetched(NamedTuple):
    """What an attempt needs is here, or the error because of which it is not."""

    key: AttemptKey
    error: Exception | None


class Uploaded(NamedTuple):
    """What an outcome names is stored, or the error because of which it is not."""

    key: AttemptKey
    end: AttemptEnd
    error: Exception | None


@dataclass(slots=True)
class _Transfer:
    key: AttemptKey
    call: Callable[[], None]
    end: AttemptEnd | None = None  # of an upload
    blobs: Blobs = ()
    tries: int = 0
    since: float = math.inf  # monotonic, of the first refusal in a row
    error: Exception | None = None


class Transfers:
    """Fetches what tasks need and uploads what they returned.

    Args:
        session: Where to and from.
        worker: The worker's id, for the log.
        cache: Where what is fetched is kept.
        aside: Makes a call on another thread.
        signal: Set when something has arrived.
        reachable: Whether the store takes anything else from this worker at present.

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
        reachable: Callable[[], bool],
    ) -> None:
        self._session = session
        self._runtime = session.runtime
        self._worker = worker
        self._cache = cache
        self._aside = aside
        self._signal = signal
        self._reachable = reachable
        self._ended: deque[_Transfer] = deque()  # filled on the threads of transfers
        self._settled: list[_Transfer] = []
        self._later: list[tuple[float, _Transfer]] = []  # and when to try again
        self.fetching: set[AttemptKey] = set()

    @property
    def arrived(self) -> bool:
        """Whether any call has ended that nobody has looked at yet."""
        return bool(self._ended)

    @property
    def due(self) -> float:
        """When the next call is to be repeated, on the monotonic clock."""
        return min((due for due, _ in self._later), default=math.inf)

    def fetch(self, key: AttemptKey, blobs: list[str]) -> None:
        """Start to bring the blobs that an attempt needs."""
        self.fetching.add(key)
        self._begin(_Transfer(key, partial(self._cache.fetch, blobs)))

    def upload(self, key: AttemptKey, end: AttemptEnd, blobs: Blobs) -> None:
        """Start to store the blobs that an outcome names, before the outcome itself."""
        self._begin(_Transfer(key, partial(self._put, blobs), end, blobs))

    def repeat_due(self, wanted: Callable[[AttemptKey], bool]) -> None:
        """Make the calls again whose time has come; forget those for what is not held any more."""
        now = self._runtime.monotonic()
        due = [transfer for when, transfer in self._later if when <= now]
        self._later = [(when, transfer) for when, transfer in self._later if when > now]
        for transfer in due:
            if wanted(transfer.key):
                self._begin(transfer)
            else:
                self._forget(transfer)

    def take_fetched(self) -> list[Fetched]:
        """The attempts whose blobs are here, or cannot be brought here."""
        taken = [Fetched(one.key, one.error) for one in self._take() if one.end is None]
        self._settled = [one for one in self._settled if one.end is not None]
        return taken

    def take_uploaded(self) -> list[Uploaded]:
        """The ends whose blobs are stored, or cannot be."""
        taken = [Uploaded(one.key, one.end, one.error) for one in self._take() if one.end]
        self._settled = [one for one in self._settled if one.end is None]
        return taken

    # --- on the loop's thread -----------------------------------------------------------

    def _take(self) -> list[_Transfer]:
        while self._ended:
            transfer = self._ended.popleft()
            pause = self._pause_after(transfer)
            if pause is None:
                self._forget(transfer)
                self._settled.append(transfer)
            else:
                self._later.append((self._runtime.monotonic() + pause, transfer))
        return self._settled

    def _pause_after(self, transfer: _Transfer) -> float | None:
        """How long to wait before the call is repeated; None if it has had its last try."""
        if transfer.error is None:
            return None
        transfer.tries += 1
        follows = consequence(transfer.error)
        if follows is Consequence.WAIT and not self._is_refused_for_good(transfer):
            ceiling = min(LONGEST_PAUSE, 0.1 * 2.0 ** min(transfer.tries, 10))
        elif follows is Consequence.TRY_AGAIN and transfer.tries < ENDURANCE:
            ceiling = 1.0
        else:
            return None
        if transfer.tries & (transfer.tries - 1) == 0:  # less and less often
            log.warning("worker %s: %s", self._worker, transfer.error)
        return self._runtime.random.uniform(ceiling / 10, ceiling)

    def _is_refused_for_good(self, transfer: _Transfer) -> bool:
        if not isinstance(transfer.error, StoreDenied):
            transfer.since = math.inf
            return False
        now = self._runtime.monotonic()
        transfer.since = min(transfer.since, now)
        return now - transfer.since >= DENIED_SECONDS and self._reachable()

    def _forget(self, transfer: _Transfer) -> None:
        self.fetching.discard(transfer.key)
        delete_files(path for _, path, _ in transfer.blobs)

    def _begin(self, transfer: _Transfer) -> None:
        self._aside(partial(self._make, transfer))

    # --- on the threads of transfers ----------------------------------------------------

    def _make(self, transfer: _Transfer) -> None:
        transfer.error = RuntimeError("a transfer was broken off")
        try:
            transfer.call()
            transfer.error = None
        except Exception as error:
            transfer.error = error
        finally:  # whatever it was: nobody else looks at this thread
            self._ended.append(transfer)
            self._signal.set()

    def _put(self, blobs: Blobs) -> None:
        store = self._session.store
        for digest, path, _ in blobs:
            store.upload(self._session.key(f"blobs/{digest}"), path)

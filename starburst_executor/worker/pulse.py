"""Whether a worker's loop goes on: what its heartbeats rest on.

    each step of the loop, each of      Pulse <---- HeartbeatThread: beats only if the loop goes on
    its calls of the store   ---------> Pulse <---- Watchdog: ends a process whose loop never does

A heartbeat that is sent on behalf of a loop that is dead or stuck would keep its tasks from
everybody else. So each call of the store that the loop makes has a deadline, and so has all that it
does between two of them. Beyond it no heartbeat is sent, others take over, and the loop, if it goes
on after all, reads first what it still holds. If it never does, its process is ended.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from starburst_executor.runtime import Runtime
from starburst_executor.storage.base import Bytes, ListingPage, Store, StoredObject

__all__ = ["Pulse", "Watchdog", "WatchedStore"]

log = logging.getLogger(__name__)

# In which the loop shows that it goes on; four tries of a request that gets no answer take longer,
# but then heartbeats get none either.
PATIENCE = 120.0
# After which a process is ended whose loop does not go on.
STUCK = 600.0
_LOOK = 10.0  # seconds between the watchdog's looks


class Pulse:
    """When the loop last showed that it goes on, and what it was about to do.

    Args:
        runtime: The clock.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._doing = "nothing that is known"
        self._due = runtime.monotonic() + PATIENCE

    def beat(self, pause: float = 0.0) -> None:
        """The loop goes on, and will show so again, after a pause of that many seconds."""
        self._due = self._runtime.monotonic() + pause + PATIENCE

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """The loop makes one call, which has a deadline of its own."""
        self._doing = doing
        self.beat()
        try:
            yield
        finally:
            self.beat()

    @property
    def stopped(self) -> str:
        """What the loop is stuck in; "" if it goes on."""
        late = self._runtime.monotonic() - self._due
        if late < 0:
            return ""
        return f"for {late + PATIENCE:.0f} s, since it began: {self._doing}"


class Watchdog:
    """Ends a process whose loop does not go on, for it would never end by itself.

    Args:
        pulse: The loop's.
        runtime: The clock.
        stuck: For how many seconds the loop may be stuck.
    """

    def __init__(self, pulse: Pulse, runtime: Runtime, stuck: float = STUCK) -> None:
        self._pulse = pulse
        self._runtime = runtime
        self._looks_left = self._looks = max(1, round(stuck / _LOOK))
        self._closed = runtime.signal()

    def run(self) -> None:
        """Watch until `close`; for a thread of its own."""
        while not self.is_too_late():
            if self._closed.wait(_LOOK):
                return
        log.critical("this worker's loop has not gone on %s; it ends", self._pulse.stopped)
        os._exit(os.EX_SOFTWARE)  # nothing else is certain to end a thread that hangs

    def close(self) -> None:
        """Make `run` return."""
        self._closed.set()

    def is_too_late(self) -> bool:
        """Look once. Looks count, not time: this whole process may have been stopped for hours."""
        self._looks_left = self._looks_left - 1 if self._pulse.stopped else self._looks
        return self._looks_left <= 0


class WatchedStore:
    """A store for the loop alone, each call of which shows that it goes on.

    Args:
        store: The store.
        pulse: The loop's.
    """

    def __init__(self, store: Store, pulse: Pulse) -> None:
        self._store = store
        self._during = pulse.during
        self.url = store.url
        self.tally = store.tally

    def get(
        self, key: str, *, start: int = 0, stop: int | None = None, unless: str | None = None
    ) -> StoredObject | None:
        """As the store's."""
        with self._during(f"read {key}"):
            return self._store.get(key, start=start, stop=stop, unless=unless)

    def put(self, key: str, data: Bytes) -> None:
        """As the store's."""
        with self._during(f"write {key}"):
            self._store.put(key, data)

    def create(self, key: str, data: Bytes) -> str:
        """As the store's."""
        with self._during(f"write {key}"):
            return self._store.create(key, data)

    def replace(self, key: str, data: Bytes, version: str) -> str:
        """As the store's."""
        with self._during(f"write {key}"):
            return self._store.replace(key, data, version)

    def list(
        self, prefix: str, *, after: str = "", limit: int = 1000, delimiter: str = ""
    ) -> ListingPage:
        """As the store's."""
        with self._during(f"list {prefix}"):
            return self._store.list(prefix, after=after, limit=limit, delimiter=delimiter)

    def delete(self, keys: Iterable[str]) -> None:
        """As the store's."""
        with self._during("delete objects"):
            self._store.delete(keys)

    def upload(self, key: str, source: Path | Bytes) -> None:
        """As the store's."""
        with self._during(f"upload {key}"):
            self._store.upload(key, source)

    def download(self, key: str, target: Path) -> None:
        """As the store's."""
        with self._during(f"download {key}"):
            self._store.download(key, target)

    def close(self) -> None:
        """As the store's."""
        self._store.close()

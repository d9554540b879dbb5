"""What tests of whole executors share: quick intervals, stores that count, a look at workers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from starburst_executor import Intervals, StarburstExecutor
from starburst_executor.protocol.session import Session
from starburst_executor.storage.base import Bytes, ListingPage, Store, StoredObject
from starburst_executor.storage.url import open_store

QUICK = Intervals(
    lease=2,
    heartbeat=0.25,
    poll_first=0.02,
    poll_last=0.2,
    look_first=0.01,
    look_last=0.1,
    commit=0.2,
    session_check=0.5,
)
"""Workers that are lost are found within seconds."""

Make = Callable[..., StarburstExecutor]
"""Makes an executor; takes down what a failing test leaves."""


class CountingStore:
    """Any store; requests are counted by method and by the key's first folder in the session."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.url = store.url
        self.tally = store.tally
        self.counts: Counter[str] = Counter()

    def _count(self, method: str, key: str) -> None:
        parts = key.split("/")
        self.counts[method] += 1
        self.counts[f"{method} {parts[2] if len(parts) > 2 else key}"] += 1

    def get(
        self,
        key: str,
        *,
        start: int = 0,
        stop: int | None = None,
        unless: str | None = None,
    ) -> StoredObject | None:
        self._count("get", key)
        return self._store.get(key, start=start, stop=stop, unless=unless)

    def put(self, key: str, data: Bytes) -> None:
        self._count("put", key)
        self._store.put(key, data)

    def create(self, key: str, data: Bytes) -> str:
        self._count("create", key)
        return self._store.create(key, data)

    def replace(self, key: str, data: Bytes, version: str) -> str:
        self._count("replace", key)
        return self._store.replace(key, data, version)

    def list(
        self, prefix: str, *, after: str = "", limit: int = 1000, delimiter: str = ""
    ) -> ListingPage:
        self._count("list", prefix)
        return self._store.list(prefix, after=after, limit=limit, delimiter=delimiter)

    def delete(self, keys: Iterable[str]) -> None:
        self._count("delete", "")
        self._store.delete(keys)

    def upload(self, key: str, source: Path | Bytes) -> None:
        self._count("upload", key)
        self._store.upload(key, source)

    def download(self, key: str, target: Path) -> None:
        self._count("download", key)
        self._store.download(key, target)

    def close(self) -> None:
        self._store.close()


class FaultyStore(CountingStore):
    """Any store; `fault` is called with method and key before each request, and may raise."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.fault: Callable[[str, str], None] = lambda method, key: None

    def _count(self, method: str, key: str) -> None:
        super()._count(method, key)
        self.fault(method, key)


class FirstTries:
    """A fault of a `FaultyStore`: the first requests of a kind fail.

    Args:
        error: What they raise.
        method: The kind's method, or several.
        part: What the key contains.
        count: How many fail; by default all.
    """

    def __init__(
        self, error: Exception, method: str | tuple[str, ...], part: str, count: float = math.inf
    ) -> None:
        self.left = count
        self.met = threading.Event()
        self._error = error
        self._methods = (method,) if isinstance(method, str) else method
        self._part = part
        self._lock = threading.Lock()

    def __call__(self, method: str, key: str) -> None:
        with self._lock:
            fails = method in self._methods and self._part in key and self.left > 0
            self.left -= fails
        if fails:
            self.met.set()
            raise type(self._error)(*self._error.args)


def keys(store_url: str, prefix: str = "") -> list[str]:
    """Every key of a store, or those below a prefix."""
    return list(_keys(store_url, prefix))


def _keys(store_url: str, prefix: str) -> Iterator[str]:
    store = open_store(store_url)
    after = ""
    try:
        while True:
            page = store.list(prefix, after=after)
            yield from (entry.key for entry in page.entries)
            if not page.truncated:
                return
            after = page.entries[-1].key
    finally:
        store.close()


def live_workers(executor: StarburstExecutor) -> set[str]:
    """Workers of an executor's session whose processes live."""
    live = executor._engine.launcher.live(executor._engine.session.url)
    assert live is not None
    return live


def worker_pids(executor: StarburstExecutor) -> dict[str, int]:
    """Process ids, by worker id, from the heartbeats."""
    session: Session = executor._engine.session
    beats = {worker: session.heartbeat(worker) for worker in session.beats().entries}
    return {worker: beat.pid for worker, beat in beats.items() if beat is not None}


def is_alive(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return (
            not stat.parent.parent.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
        )
    except FileNotFoundError:
        return False


def run_python(
    *arguments: str | Path, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )

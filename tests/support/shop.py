"""A whole worker within the test's process, whose store and disk fail when a test says so."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from starburst_executor import StarburstExecutor, TaskFuture
from starburst_executor.protocol import records
from starburst_executor.protocol.manifest import Heartbeat
from starburst_executor.protocol.session import Session
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.base import Bytes, ListingPage, Store, StoredObject
from starburst_executor.worker.cache import DiskCache
from starburst_executor.worker.loop import Worker
from starburst_executor.worker.pool import ProcessPool
from tests.support.sessions import QUICK

PATIENCE = 60.0

UNHURRIED = replace(QUICK, lease=60)
"""Quick, but no worker is taken for lost because this machine is busy."""


class FaultyStore:
    """Any store, before which a test may put a fault.

    Attributes:
        fault: Called with the operation and the key of each request; may raise.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.url = store.url
        self.tally = store.tally
        self.fault: Callable[[str, str], None] = lambda *_: None

    def get(
        self, key: str, *, start: int = 0, stop: int | None = None, unless: str | None = None
    ) -> StoredObject | None:
        self.fault("get", key)
        return self._store.get(key, start=start, stop=stop, unless=unless)

    def put(self, key: str, data: Bytes) -> None:
        self.fault("put", key)
        self._store.put(key, data)

    def create(self, key: str, data: Bytes) -> str:
        self.fault("create", key)
        return self._store.create(key, data)

    def replace(self, key: str, data: Bytes, version: str) -> str:
        self.fault("replace", key)
        return self._store.replace(key, data, version)

    def list(
        self, prefix: str, *, after: str = "", limit: int = 1000, delimiter: str = ""
    ) -> ListingPage:
        self.fault("list", prefix)
        return self._store.list(prefix, after=after, limit=limit, delimiter=delimiter)

    def delete(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        for key in keys:
            self.fault("delete", key)
        self._store.delete(keys)

    def upload(self, key: str, source: Path | Bytes) -> None:
        self.fault("upload", key)
        self._store.upload(key, source)

    def download(self, key: str, target: Path) -> None:
        self.fault("download", key)
        self._store.download(key, target)

    def close(self) -> None:
        pass


class Faults:
    """What a test puts before a store: errors for some requests, the first so many of them.

    Args:
        error: What is raised.
        operation: For which method of the store; "" is every one.
        part: For which keys: those that contain this.
        times: For how many requests; None is for all.
    """

    def __init__(
        self, error: Exception, operation: str = "", part: str = "", times: int | None = None
    ) -> None:
        self._error = error
        self._operation = operation
        self._part = part
        self._times = times
        self._lock = threading.Lock()
        self.hits: list[str] = []  # the requests that failed

    def __call__(self, operation: str, key: str) -> None:
        if self._operation not in ("", operation) or self._part not in key:
            return
        with self._lock:
            if self._times is not None and len(self.hits) >= self._times:
                return
            self.hits.append(f"{operation} {key}")
        raise self._error


class Shop:
    """A worker in this process, with all that it takes."""

    def __init__(self, lone: StarburstExecutor, folder: Path) -> None:
        self.folder = folder
        self.runtime = SystemRuntime(width=4)
        self.store = FaultyStore(lone._engine.session.store)
        self.session = Session(self.store, lone.session_id, self.runtime)
        manifest = self.session.load()
        self.library = DiskCache(self.session, folder / "library")
        self.slots = ProcessPool(
            1,
            folder=folder / "slots",
            runtime=self.runtime,
            signal=self.runtime.signal(),
        )
        self.aside = ThreadPoolExecutor(2)
        self.worker = Worker(
            self.session,
            "w-here",
            self.slots,
            self.library,
            self.aside.submit,
            manifest,
            Heartbeat(worker="w-here"),
            folder=folder,
        )
        self.reason = ""
        self._threads = [
            threading.Thread(target=self.worker.heartbeats.run, daemon=True),
            threading.Thread(target=self._run, daemon=True),
        ]

    def _run(self) -> None:
        try:
            self.reason = self.worker.run()
        except RuntimeError as error:
            self.reason = f"raised {error}"

    def open(self) -> None:
        self.worker.heartbeats.beat()
        for thread in self._threads:
            thread.start()

    def wait(self) -> str:
        """Why the worker left, once it has."""
        self._threads[1].join(PATIENCE)
        assert self.reason
        return self.reason

    def left(self) -> Heartbeat:
        """The last heartbeat, once the worker has left."""
        self.wait()
        beat = self.session.heartbeat("w-here", "ended")
        assert beat is not None
        return beat

    def close(self) -> None:
        self.worker.stop("the test is over")
        if self._threads[1].ident is not None:
            self._threads[1].join(PATIENCE)
        self.worker.heartbeats.close()
        self.slots.close()
        self.aside.shutdown()


def task_of(lone: StarburstExecutor, future: TaskFuture[Any]) -> records.Task:
    """A task as its record has it."""
    assert future.batch is not None
    known = lone._engine.session.read(future.batch)
    return known.record.tasks[future.number - future.batch.number]


def raises(error: Exception) -> Callable[..., Any]:
    """A function that raises this, whatever it is given."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def full() -> OSError:
    """What a full disk answers."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

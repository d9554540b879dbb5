"""What a worker keeps on its own disk: callables, blobs and modules of the session.

Everything here is named by the digest of its content, so that it is never stale. It is fetched
once, unless it had to make room meanwhile: what no task here needs is deleted, the longest unused
first. A callable is small (its large buffers are blobs); blobs may be of any size and are fetched
on another thread, so that the worker's loop never waits for them.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from starburst_executor.environment import local_modules
from starburst_executor.errors import DamagedObject, ObjectNotFound
from starburst_executor.protocol.payload import references
from starburst_executor.protocol.session import Session
from starburst_executor.storage.base import local_disk

__all__ = ["DiskCache", "ObjectCache"]

# Each task asks for its callable; a file that a cleaner removed is noticed within this time.
_CHECK_SECONDS = 1.0


class ObjectCache(Protocol):
    """What the worker's loop asks for; the simulator has another."""

    blobs: Path

    def function(self, digest: str) -> Path:
        """The file of a callable's cargo, fetched if it is not here yet."""

    def path(self, archives: dict[str, str]) -> tuple[str, ...]:
        """Folders for `sys.path` of shipped modules, fetched if they are not here yet."""

    def missing(self, function: str, call: bytes = b"") -> list[str]:
        """Digests of the blobs that a callable and its arguments name and that are not here yet."""

    def fetch(self, blobs: Iterable[str]) -> None:
        """Download blobs; this may take long."""

    @property
    def overfull(self) -> bool:
        """Whether more is kept than there should be."""

    def evict(self, in_use: Iterable[tuple[str, bytes]]) -> None:
        """Delete what was not used for longest, except for these callables and arguments."""


class DiskCache:
    """An `ObjectCache` in a folder of the worker's own.

    Args:
        session: Where to fetch from.
        folder: Where things are kept; made if necessary, removed by `close`.
        bytes_max: How much of callables and blobs to keep; what tasks need is kept in any case.
    """

    def __init__(self, session: Session, folder: Path, bytes_max: float = math.inf) -> None:
        self._session = session
        self._folder = folder
        self.blobs = folder / "blobs"
        with local_disk(folder):
            self.blobs.mkdir(parents=True, exist_ok=True)
            (folder / "functions").mkdir(exist_ok=True)
        self._paths: dict[str, str] = {}
        self._functions: dict[str, tuple[Path, float]] = {}  # and when it was last seen
        self._complete: set[str] = set()  # callables all of whose blobs are here
        self._pinned: set[str] = set()  # callables that every new child needs
        self._bytes_max = bytes_max
        self._lock = threading.Lock()  # over what follows
        self._sizes: OrderedDict[Path, int] = OrderedDict()  # the last was used last
        self._total = 0
        self._needed = 0  # what the last eviction left because it was in use

    def function(self, digest: str) -> Path:
        """The file of a callable's cargo.

        Raises:
            DamagedObject: it is gone from the store, or its content does not match its name.
            LocalDiskError: it cannot be kept here.
        """
        target, checked = self._functions.get(digest, (None, 0.0))
        now = self._session.runtime.monotonic()
        if target is None or now >= checked + _CHECK_SECONDS:
            target = self._folder / "functions" / digest
            if not target.exists():
                self._download(f"functions/{digest}", digest, target)
            self._functions[digest] = (target, now)
            self._use(target)
        return target

    def path(self, archives: dict[str, str]) -> tuple[str, ...]:
        """Folders with the shipped modules, one for each archive."""
        return tuple(self._unpacked(digest) for _, digest in sorted(archives.items()))

    def missing(self, function: str, call: bytes = b"") -> list[str]:
        """Blobs that are named and not here."""
        if function not in self._complete:
            file = self.function(function)
            with local_disk(file):
                cargo = file.read_bytes()
            lacking = self._lacking(cargo)
            if not lacking:
                self._complete.add(function)
        else:
            lacking = set()
        return sorted(lacking | self._lacking(call) if call else lacking)

    def fetch(self, blobs: Iterable[str]) -> None:
        """Download blobs, each whole or not at all."""
        for digest in blobs:
            target = self.blobs / digest
            if not target.exists():
                self._download(f"blobs/{digest}", digest, target)

    def pin(self, function: str) -> None:
        """Never delete a callable and its blobs."""
        self._pinned.add(function)

    @property
    def overfull(self) -> bool:
        """Whether more is kept than there should be."""
        return self._total > self._bytes_max and self._total != self._needed

    def evict(self, in_use: Iterable[tuple[str, bytes]]) -> None:
        """Delete what was not used for longest, except for these callables and arguments."""
        used = [*in_use, *((function, b"") for function in self._pinned)]
        kept = {self.function(function) for function, _ in used}
        with local_disk(self._folder):
            cargos = [path.read_bytes() for path in kept] + [call for _, call in used if call]
        kept |= {self.blobs / digest for cargo in cargos for digest, _ in references(cargo)}
        self._complete.clear()
        with self._lock:
            for path in [path for path in self._sizes if path not in kept]:
                if self._total <= self._bytes_max:
                    break
                self._functions.pop(path.name, None)
                path.unlink(missing_ok=True)
                self._total -= self._sizes.pop(path)
            self._needed = self._total

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _lacking(self, cargo: bytes) -> set[str]:
        return {digest for digest, _ in references(cargo) if not self._has(self.blobs / digest)}

    def _has(self, path: Path) -> bool:
        self._use(path)
        return path.exists()

    def _use(self, path: Path) -> None:
        with self._lock:
            if path in self._sizes:
                self._sizes.move_to_end(path)

    def _keep(self, path: Path) -> None:
        with self._lock:
            self._total -= self._sizes.pop(path, 0)
            self._sizes[path] = size = path.stat().st_size
            self._total += size

    def _unpacked(self, digest: str) -> str:
        if digest not in self._paths:
            archive = self._folder / f"{digest}.zip"
            self._download(f"modules/{digest}", digest, archive)
            with local_disk(archive):
                self._paths[digest] = str(local_modules.unpack(archive, self._folder / "modules"))
                archive.unlink()
        return self._paths[digest]

    def _download(self, name: str, digest: str, target: Path) -> None:
        # Two tasks may wait for the same one, each on a thread of its own.
        part = target.with_name(f"{target.name}.{threading.get_ident()}.part")
        try:
            self._session.store.download(self._session.key(name), part)
        except ObjectNotFound as error:
            raise DamagedObject(
                f"{name} of session {self._session.id} is gone, and tasks need it"
            ) from error
        with local_disk(part):
            if _digest_of_file(part) != digest:
                part.unlink()
                raise DamagedObject(f"{name} of session {self._session.id} is damaged: its content "
                                    "does not have the digest that is its name")  # fmt: skip
            part.rename(target)
            if target.parent != self._folder:  # else it is only unpacked
                self._keep(target)


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

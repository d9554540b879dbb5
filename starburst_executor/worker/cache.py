"""What a worker keeps on its own disk: callables, blobs and modules of the session.

Everything here is named by the digest of its content, so that it is fetched once and never
stale. A callable is small (its large buffers are blobs); blobs may be of any size and are
fetched on another thread, so that the worker's loop never waits for them.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
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


class DiskCache:
    """An `ObjectCache` in a folder of the worker's own.

    Args:
        session: Where to fetch from.
        folder: Where things are kept; made if necessary, removed by `close`.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        self._session = session
        self._folder = folder
        self.blobs = folder / "blobs"
        with local_disk(folder):
            self.blobs.mkdir(parents=True, exist_ok=True)
            (folder / "functions").mkdir(exist_ok=True)
        self._paths: dict[str, str] = {}
        self._functions: dict[str, tuple[Path, float]] = {}  # and when it was last seen
        self._complete: set[str] = set()  # callables all of whose blobs are here

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

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _lacking(self, cargo: bytes) -> set[str]:
        return {d for d, _ in references(cargo) if not (self.blobs / d).exists()}

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


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

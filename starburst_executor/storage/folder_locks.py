"""Locks of a directory store, which a stopped process holds up for seconds and not for ever.

What must not interleave (two writes of one key, a write and a deletion) takes a lock. A lock is a
folder below `.locks`, with a file to take `flock` on, and the files that are about to be moved into
place:

    whoever writes an object                      whoever has waited for too long
      1. writes a file into the lock's folder       moves the lock's folder away, with all that
      2. takes `flock` on the file `lock` in it     is in it, and deletes it
      3. looks at the object's version
      4. moves its file into place

A process may be stopped between any two of these steps, for ever or until long after others have
broken its lock. Its step 4 then fails, since its file is gone, and it begins anew. So a lock can be
broken at any time, and nothing depends on how long anybody waits. The order of the first two steps
matters: whoever holds a lock that was broken wrote its file into the same folder, or an older one.
A deletion looks afterwards whether its lock is still in place, and is repeated otherwise.

A killed process gives its lock back at once: the kernel does so, or on NFS the server, once it
knows.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from starburst_executor.errors import StoreError, StoreUnavailable

__all__ = ["Displaced", "FolderLocks", "empty_folder", "refuse_links"]

log = logging.getLogger(__name__)

_LOCKS = 64  # enough that two keys rarely share a lock
_PATIENCE = 5.0  # seconds; a lock is held for the few system calls of steps 3 and 4
_FIRST_PAUSE = 0.0002  # seconds between tries
_LONGEST_PAUSE = 0.01
_OPEN_TRIES = 100  # a lock's folder may be moved away just as it was made
_MISSING = (FileNotFoundError, NotADirectoryError)


class Displaced(StoreUnavailable):
    """Somebody broke the lock that this process held: nothing of its write took effect."""


class FolderLocks:
    """The locks of one directory store.

    Args:
        root: The directory.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._checked: set[str] = set()

    def folder(self, key: str) -> str:
        """The folder of the lock on a key; others share it."""
        # Not by hash(), which differs between processes.
        return f"{self._root}/.locks/{zlib.crc32(key.encode()) % _LOCKS:02d}.d"

    def open(self, folder: str, name: str, flags: int) -> int:
        """Open a file in one of the store's own folders, which is made if it is missing."""
        path = f"{folder}/{name}"
        if folder not in self._checked:
            refuse_links(self._root, path)
            self._checked.add(folder)
        for _ in range(_OPEN_TRIES):
            try:
                return os.open(path, flags | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                with contextlib.suppress(FileNotFoundError, FileExistsError):
                    os.makedirs(folder, exist_ok=True)  # noqa: PTH103
        os.makedirs(folder, exist_ok=True)  # noqa: PTH103  says why it cannot be
        raise StoreUnavailable(f"{path} could not be opened: its folder keeps being removed")

    def all(self) -> Iterator[str]:
        """The folders of all locks that were ever taken."""
        refuse_links(self._root, f"{self._root}/.locks/")
        with contextlib.suppress(*_MISSING), os.scandir(f"{self._root}/.locks") as items:
            for item in items:
                if item.is_dir(follow_symlinks=False):
                    yield item.path

    @contextlib.contextmanager
    def held(self, folder: str) -> Iterator[Callable[[], bool]]:
        """Hold a lock, breaking it if its holder does not give it back.

        Yields a function that tells whether nobody has broken it meanwhile.
        """
        file = self._take(folder)
        try:
            yield partial(_is_at, file, f"{folder}/lock")
        finally:
            # Closing is not enough: a child forked meanwhile shares the file, and so the lock.
            fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)

    def _take(self, folder: str) -> int:
        while True:
            file = self.open(folder, "lock", os.O_RDWR | os.O_CREAT)
            try:
                if _locked_within(file, _PATIENCE):
                    return file
                ours = _is_at(file, f"{folder}/lock")
            except BaseException:
                os.close(file)
                raise
            os.close(file)
            if ours:
                self._break(folder)

    def _break(self, folder: str) -> None:
        log.warning(
            "the lock %s has been held for over %.0f s: whoever holds it was stopped, or is "
            "very slow; it is broken, and the holder will begin its write anew",
            folder,
            _PATIENCE,
        )
        aside = f"{self._root}/.tmp/broken-{os.urandom(12).hex()}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(f"{self._root}/.tmp")  # noqa: PTH102
        try:
            os.rename(folder, aside)  # noqa: PTH104
        except FileNotFoundError:  # somebody else was faster
            return
        # What other machines still see by its old name goes too.
        empty_folder(aside)


def _locked_within(file: int, seconds: float) -> bool:
    """Take the lock on an open file; False if that took too long."""
    end: float | None = None
    pause = _FIRST_PAUSE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            now = time.monotonic()
        else:
            return True
        if end is None:
            end = now + seconds
        elif now >= end:
            return False
        threading.Event().wait(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _is_at(file: int, path: str) -> bool:
    """Whether an open file still has that name."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except _MISSING:
        return False


def empty_folder(folder: str) -> None:
    """Remove a folder of the store's own, with what is in it; follows no link."""
    with contextlib.suppress(*_MISSING):
        shutil.rmtree(Path(folder), ignore_errors=True)


def refuse_links(root: str, path: str) -> None:
    """Refuse a path that leads through a symbolic link below the root.

    What is behind one is not the store's: deleting a session would delete somebody's files.

    Raises:
        StoreError: names the link.
    """
    end = path.find("/", len(root) + 1)
    while end >= 0:
        if os.path.islink(path[:end]):  # noqa: PTH114
            raise StoreError(
                f"{path[:end]} is a symbolic link, and a store follows none: what it leads to may "
                "be anybody's, and deleting a session would delete it. Remove the link, or move "
                "the folder itself to where it is; the store's own directory may be a link."
            )
        end = path.find("/", end + 1)

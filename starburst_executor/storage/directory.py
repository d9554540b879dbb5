"""The store in a directory."""

# Listings are taken 20 times a second: plain calls on strings, not Path objects.
# ruff: noqa: PTH100, PTH102, PTH103, PTH106, PTH108, PTH111, PTH112, PTH116, PTH119, PTH120

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple, TypeVar

from starburst_executor.errors import (
    Conflict,
    LocalDiskError,
    ObjectNotFound,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
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
from starburst_executor.storage.folder_locks import (
    Displaced,
    FolderLocks,
    empty_folder,
    refuse_links,
)

__all__ = ["DirectoryStore", "read_range"]

T = TypeVar("T")

_CHUNK = 1 << 20  # bytes copied at a time

_PLACE_TRIES = 100  # only deleting a folder's last object can interfere

_DISPLACED_TRIES = 20  # each follows a pause of seconds, for which this process was stopped

_STALE_TRIES = 10

_ABANDONED_AFTER = 86_400.0  # seconds since the last byte: nobody is still writing it

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)

_FULL = (errno.ENOSPC, errno.EDQUOT)

_PASSING = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EMFILE,
    errno.ENFILE,
)

# Never through a link, and without waiting for whoever would write to a pipe.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)

_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class _Staged(NamedTuple):
    """A file of the store's own, not yet moved into place."""

    path: str
    stamp: int  # its modification time, in ns


class DirectoryStore:
    """A store in a directory, which many processes and, over a network, machines may share.

    An object is a file at its key. It is written elsewhere and then linked or renamed into place,
    so nobody sees it half-written, and a killed process leaves only a temporary file, which is
    swept away a day later. What must not interleave (`replace`, `put`, `delete` of one key) takes
    a lock, which is broken when its holder was stopped, see `folder_locks`; `create` needs none,
    because `link` has one winner.

    Only files are objects. Symbolic links are never followed: one in place of an object is not
    there, one in place of a folder is refused. The root itself may be one.

    An object's version is its file's modification time in nanoseconds, which increases with each
    write of the key, however coarse the file system's clock. Times are the file system's own, read
    by touching a file: on a network file system, the server's.

    Nothing is fsynced: no acknowledged write is lost when a process is killed, but one may be in a
    power cut. Unlike in S3, a key cannot be both object and folder (`a` beside `a/b`).

    Args:
        root: The directory; the first write creates it if missing.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = os.path.abspath(os.path.expanduser(root))
        self.url = self._root
        self.tally = RequestCounter()
        self._token = os.urandom(6).hex()
        self._locks = FolderLocks(self._root)

    def get(
        self,
        key: str,
        *,
        start: int = 0,
        stop: int | None = None,
        unless: str | None = None,
    ) -> StoredObject | None:
        """Read an object or a range of it; None if its version is `unless`."""
        self.tally.read()
        return _until_fresh(lambda: self._get(key, start, stop, unless))

    def put(self, key: str, data: Bytes) -> None:
        """Write an object, replacing any that was there."""
        self.tally.wrote()
        self._swap(key, data, lambda previous: None)

    def create(self, key: str, data: Bytes) -> str:
        """Write an object that must not exist yet; return its version."""
        self.tally.wrote()
        path = self._path(key)
        with self._writing(key, [data]) as staged:
            if not self._claim(staged, key, path):
                raise Conflict(f"{key} already exists in {self.url}")
        return _version(staged.stamp)

    def replace(self, key: str, data: Bytes, version: str) -> str:
        """Write an object that must still have `version`; return the new version."""
        self.tally.wrote()

        def check(previous: int | None) -> None:
            if previous is None:
                raise ObjectNotFound(f"{key} is not in {self.url} (any more)")
            if _version(previous) != version:
                raise Conflict(
                    f"{key} in {self.url} has version {_version(previous)}, not {version}"
                )

        return _version(self._swap(key, data, check))

    def list(
        self, prefix: str, *, after: str = "", limit: int = 1000, delimiter: str = ""
    ) -> ListingPage:
        """One page of the objects below `prefix`, in key order; stats only what it returns."""
        check_listing(prefix, limit, delimiter)
        self.tally.wrote()
        entries: list[ListedObject] = []
        prefixes: list[str] = []
        truncated = False
        with self._translating("list", prefix):
            for key, item in self._walk(prefix, after, fold=bool(delimiter)):
                if truncated := len(entries) + len(prefixes) == limit:
                    break
                if item is None:
                    prefixes.append(key)
                elif entry := _entry(key, item):
                    entries.append(entry)
        return ListingPage(entries=entries, prefixes=prefixes, now=self._now(), truncated=truncated)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, and the folders that become empty."""
        paths = {key: self._path(key) for key in keys}
        if not os.path.isdir(self._root):
            return
        by_lock: dict[str, list[str]] = {}
        for key, path in paths.items():
            by_lock.setdefault(self._locks.folder(key), []).append(path)
        for lock, some in by_lock.items():
            with self._translating("delete", some[0][len(self._root) + 1 :]):
                _persistently(partial(self._delete, lock, some))
        for folder in {os.path.dirname(path) for path in paths.values()}:
            self._prune(folder)

    def upload(self, key: str, source: Path | Bytes) -> None:
        """Copy a file or buffer in, unless the key exists already.

        Never a hard link to `source`: its owner may go on writing to it.
        """
        self.tally.wrote()
        if _is_object(self._path(key)):
            return
        if not isinstance(source, Path):
            self._upload(key, [source])
            return
        with local_disk(source):
            file = source.open("rb", buffering=0)
        with file:
            self._upload(key, _chunks_of(file, source))

    def download(self, key: str, target: Path) -> None:
        """Copy an object out to `target`, which appears whole or not at all."""
        self.tally.read()
        with self._reading(key) as file, appearing(target) as out:
            size, offset = os.fstat(file).st_size, 0
            while offset < size:
                data = read_range(file, offset, min(offset + _CHUNK, size))
                if not data:
                    raise StoreUnavailable(f"{key} in {self.url} was cut short while it was read")
                out.write(data)
                offset += len(data)

    def close(self) -> None:
        """Remove the file that this store reads the time from."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._clock())

    # Paths and errors

    def _path(self, key: str) -> str:
        check_key(key)
        path = f"{self._root}/{key}"
        refuse_links(self._root, path)
        return path

    @contextlib.contextmanager
    def _translating(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except (StoreError, LocalDiskError):
            raise  # some of these are OSErrors too
        except OSError as error:
            raise _translate(error, doing, f"{self._root}/{key}") from error

    # Reading

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[int]:
        """The object, opened: on NFS only an open is guaranteed to see the last write."""
        path = self._path(key)
        with self._translating("read", key):
            try:
                file = os.open(path, _READ)
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                raise ObjectNotFound(f"{key} is not in {self.url}") from None
            try:
                mode = os.fstat(file).st_mode
                if not stat.S_ISREG(mode):
                    kind = "a folder" if stat.S_ISDIR(mode) else "something else"
                    raise ObjectNotFound(f"{key} is {kind}, not an object, in {self.url}")
                yield file
            finally:
                os.close(file)

    def _get(
        self, key: str, start: int, stop: int | None, unless: str | None
    ) -> StoredObject | None:
        with self._reading(key) as file:
            status = os.fstat(file)
            version = _version(status.st_mtime_ns)
            if version == unless:
                return None
            end = status.st_size if stop is None else min(stop, status.st_size)
            data = read_range(file, start, end)
        modified = status.st_mtime_ns / 1e9
        return StoredObject(
            data=data,
            size=status.st_size,
            version=version,
            modified=modified,
            now=self._now(),
        )

    def _walk(
        self, prefix: str, after: str, *, fold: bool
    ) -> Iterator[tuple[str, os.DirEntry[str] | None]]:
        """Keys with their files, in key order; with `fold`, folders (`name/`) without contents."""
        base = prefix[: prefix.rfind("/") + 1]
        refuse_links(self._root, f"{self._root}/{base}")
        found = _scan(f"{self._root}/{base}", base, prefix, after, fold)
        for key in sorted(found):
            if not key.endswith("/"):
                yield key, found[key]
            elif not fold:
                yield from self._walk(key, after, fold=False)
            elif _holds_object(found[key].path):
                yield key, None

    # Writing

    @contextlib.contextmanager
    def _writing(self, key: str, chunks: Iterable[Bytes], folder: str = "") -> Iterator[_Staged]:
        """Stage the bytes, and clean up if they were not moved into place."""
        with self._translating("write", key):
            staged = self._stage(chunks, folder or f"{self._root}/.tmp")
            try:
                yield staged
            except BaseException:
                _unlink(staged.path)
                raise

    def _stage(self, chunks: Iterable[Bytes], folder: str) -> _Staged:
        noise = os.urandom(12)
        path = f"{folder}/{noise.hex()}"
        file = self._locks.open(folder, noise.hex(), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                for chunk in chunks:
                    _write(file, chunk)
                return _Staged(path, _stamp(file, noise))
            finally:
                os.close(file)  # a network file system may report a full disk only here
        except BaseException:
            _unlink(path)
            raise

    def _swap(self, key: str, data: Bytes, check: Callable[[int | None], None]) -> int:
        """Put an object in the place of what is there, if `check` does not refuse its stamp.

        Returns:
            The new stamp.
        """
        path, lock = self._path(key), self._locks.folder(key)

        def once() -> int:
            with self._writing(key, [data], lock) as staged, self._locks.held(lock):
                previous = _stamp_of(path)
                check(previous)
                return self._supersede(staged, path, previous or 0)

        return _persistently(once)

    def _upload(self, key: str, chunks: Iterable[Bytes]) -> None:
        path = self._path(key)
        with self._writing(key, chunks) as staged:
            if not self._claim(staged, key, path):
                _unlink(staged.path)  # someone else was faster, with the same content

    def _claim(self, staged: _Staged, key: str, path: str) -> bool:
        """Give the file its name unless that is taken; return whether it was free.

        By `link`, not by a check and a rename: an NFS client may remember for half a minute
        that there was no such file, whereas the server decides `link`.
        """
        try:
            self._place(os.link, staged.path, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._claim_without_link(staged, self._locks.folder(key), path)
        os.unlink(staged.path)
        return True

    def _claim_without_link(self, staged: _Staged, lock: str, path: str) -> bool:
        """For file systems without hard links, or without links across folders (AFS, exFAT)."""
        ready = f"{lock}/{os.path.basename(staged.path)}"
        self._place(os.rename, staged.path, ready)
        try:
            with self._locks.held(lock):
                if os.path.lexists(path):
                    _unlink(ready)
                    return False
                self._place(os.rename, ready, path)
                return True
        except BaseException:
            _unlink(ready)
            raise

    def _supersede(self, staged: _Staged, path: str, previous: int) -> int:
        """Move the file over an older one, with a later stamp; call it with the key's lock held."""
        stamp = staged.stamp if staged.stamp > previous else _advance(staged.path, previous)
        self._place(os.rename, staged.path, path)
        return stamp

    def _place(self, move: Callable[[str, str], None], source: str, path: str) -> None:
        for _ in range(_PLACE_TRIES):
            try:
                return move(source, path)
            except FileNotFoundError:
                _must_be_there(source)
                # The folder never existed, or became empty and was removed. It may be removed
                # again while we create it, so neither error of `makedirs` is final.
                with contextlib.suppress(FileNotFoundError, FileExistsError):
                    os.makedirs(os.path.dirname(path), exist_ok=True)
        raise StoreUnavailable(f"{path} could not be written: its folder keeps being removed")

    def _delete(self, lock: str, paths: Iterable[str]) -> None:
        with self._locks.held(lock) as is_ours:
            for path in paths:
                _unlink(path)
            if not is_ours():  # a replacement that found one may have put it back
                raise Displaced(f"the lock {lock} was broken; the deletion is repeated")

    def _prune(self, folder: str) -> None:
        while len(folder) > len(self._root):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                pass  # someone else did; its parent may be empty now
            except OSError:
                return  # not empty: the usual case
            folder = os.path.dirname(folder)

    # Time

    def _clock(self) -> str:
        return f"{self._root}/.tmp/clock-{self._token}-{os.getpid()}"

    def _now(self) -> float:
        path = self._clock()
        try:
            os.utime(path)
            return os.stat(path).st_mtime_ns / 1e9
        except OSError:
            return self._start_clock(path)

    def _start_clock(self, path: str) -> float:
        folder = os.path.dirname(path)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)  # without parents: reading does not create a store
            refuse_links(self._root, path)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))
            now = os.stat(path).st_mtime_ns / 1e9
            for own in (folder, *self._locks.all()):
                _sweep(own, now - _ABANDONED_AFTER)
            return now
        except OSError:
            # The root is missing or read-only, so nothing this process does depends on the time:
            # that of this machine's own temporary files will do.
            return self._time_of_a_temporary_file()

    def _time_of_a_temporary_file(self) -> float:
        try:
            with tempfile.TemporaryFile() as file:
                return os.fstat(file.fileno()).st_mtime_ns / 1e9
        except OSError as error:
            raise LocalDiskError(
                f"the time cannot be told: neither {self._root} nor this machine's temporary "
                f"folder can be written ({error}). Free up space there, or set TMPDIR"
            ) from error


def _until_fresh(read: Callable[[], T]) -> T:
    """Retry while NFS reports a stale file: another machine replaced it after it was opened."""
    for _ in range(_STALE_TRIES):
        try:
            return read()
        except StoreUnavailable as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno != errno.ESTALE:
                raise
    return read()


def _scan(
    folder: str, base: str, prefix: str, after: str, fold: bool
) -> dict[str, os.DirEntry[str]]:
    """A folder's entries in range, by key, with folders as `name/`.

    A dict, because some file systems list a file twice while it is being replaced.
    """
    found = {}
    try:
        with os.scandir(folder) as items:
            for item in items:
                key = base + item.name
                if key < after and not after.startswith(key):
                    continue  # checked first: most names of a long folder end here
                if _is_own(item):
                    continue
                if item.is_dir(follow_symlinks=False):
                    key += "/"
                if key.startswith(prefix) and _reaches(key, after, fold):
                    found[key] = item
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return found


def _is_own(item: os.DirEntry[str]) -> bool:
    """Whether a file belongs to the store or the file system itself and is not an object."""
    return item.name.startswith(".")


def _entry(key: str, item: os.DirEntry[str]) -> ListedObject | None:
    try:
        status = item.stat(follow_symlinks=False)
    except FileNotFoundError:  # deleted since the folder was read
        return None
    if not stat.S_ISREG(status.st_mode):  # a link, a pipe, a device
        return None
    stamp = status.st_mtime_ns
    return ListedObject(key=key, size=status.st_size, version=_version(stamp), modified=stamp / 1e9)


def _version(stamp: int) -> str:
    return f"{stamp:x}"


def _stamp(file: int, noise: bytes) -> int:
    """Set and return a file's modification time: now, minus up to a millisecond of noise.

    The noise keeps a key that is deleted and recreated within one clock tick from getting the same
    version again. It is subtracted, so that no object is younger than now.
    """
    stamp = os.fstat(file).st_mtime_ns - int.from_bytes(noise[-3:]) % 1_000_000
    os.utime(file, ns=(stamp, stamp))
    return os.fstat(file).st_mtime_ns  # as the file system rounds it


def _stamp_of(path: str) -> int | None:
    """An object's modification time, or None; opens it: NFS may answer a plain stat from cache."""
    try:
        file = os.open(path, _READ)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        return None
    try:
        status = os.fstat(file)
        return status.st_mtime_ns if stat.S_ISREG(status.st_mode) else None
    finally:
        os.close(file)


def _advance(path: str, previous: int) -> int:
    """Set a file's modification time just after `previous`, by the file system's smallest step."""
    for step in (1, 1_000, 1_000_000, 1_000_000_000, 2_000_000_000):
        try:
            os.utime(path, ns=(previous + step, previous + step))
        except FileNotFoundError:
            _must_be_there(path)
        if (stamp := os.stat(path).st_mtime_ns) > previous:
            return stamp
    raise StoreError(f"the file system of {path} does not keep modification times that are set")


def _write(file: int, data: Bytes) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(file, rest) :]


def read_range(file: int, start: int, end: int) -> bytes:
    """The bytes from `start` to `end`; a single `pread` may return fewer than asked for."""
    data = os.pread(file, max(end - start, 0), start)
    if len(data) >= end - start:
        return data
    parts = [data]
    while data:
        start += len(data)
        data = os.pread(file, end - start, start)
        parts.append(data)
    return b"".join(parts)


def _chunks_of(file: FileIO, source: Path) -> Iterator[bytes]:
    while True:
        with local_disk(source):
            chunk = file.read(_CHUNK)
        if not chunk:
            return
        yield chunk


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        os.unlink(path)


def _is_object(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _must_be_there(path: str) -> None:
    if not os.path.lexists(path):
        raise Displaced(f"{path} was removed before it was moved into place; the write is repeated")


def _persistently(once: Callable[[], T]) -> T:
    """Begin anew whenever this process was stopped for so long that others broke its lock."""
    for _ in range(_DISPLACED_TRIES):
        with contextlib.suppress(Displaced):
            return once()
    return once()


def _reaches(key: str, after: str, fold: bool) -> bool:
    """Whether a key, or for a folder something in it, comes after `after`."""
    return key > after or (not fold and key.endswith("/") and after.startswith(key))


def _holds_object(folder: str) -> bool:
    """Whether there is any object in a folder: a killed delete leaves empty folders behind."""
    try:
        with os.scandir(folder) as items:
            return any(_is_or_holds_object(item) for item in items if not _is_own(item))
    except FileNotFoundError:
        return False


def _is_or_holds_object(item: os.DirEntry[str]) -> bool:
    if item.is_dir(follow_symlinks=False):
        return _holds_object(item.path)
    return item.is_file(follow_symlinks=False)


def _sweep(folder: str, before: float) -> None:
    """Remove what killed processes left half-written, or of a lock that they broke."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as items:
        for item in items:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if item.name == "lock" or item.stat(follow_symlinks=False).st_mtime >= before:
                    continue
                if item.is_dir(follow_symlinks=False):
                    empty_folder(item.path)
                else:
                    os.unlink(item.path)


def _translate(error: OSError, doing: str, path: str) -> StoreError:
    what = f"could not {doing} {path}: {error.strerror}"
    if error.filename not in (None, path):
        what += f" ({error.filename})"
    if error.errno in _DENIED:
        return StoreDenied(
            f"{what}. Check the owner and mode of the folders, or name another store."
        )
    if error.errno in _FULL:
        return StoreUnavailable(
            f"{what}. Free up space on that file system; the write can then be repeated."
        )
    if error.errno in _PASSING:
        return StoreUnavailable(f"{what}. The file system may be temporarily unavailable.")
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return StoreError(
            f"{what}. A directory cannot hold an object and a folder of the same name."
        )
    return StoreError(what)

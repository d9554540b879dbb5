"""Environments in the store, shared by its sessions.

    environments/<digest>/wheels/<file>   first, created once: the lock says what is in it
    environments/<digest>/lock.json       written by each new session, so its age tells its last use
    environments/<digest>/packing         a worker is packing; may be taken over when it is old
    environments/<digest>/pack            created once, by the first worker that installed it all

A session's manifest names its environment once everything but the pack exists. A process that dies
leaves nothing wrong: what exists is whole, and the next one writes what is missing.
"""

from __future__ import annotations

import compileall
import logging
import re
import tarfile
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from starburst_executor.environment import bootstrap
from starburst_executor.environment.capture import Prepared
from starburst_executor.errors import Conflict, ObjectNotFound
from starburst_executor.storage.base import ListedObject, Store

__all__ = ["pack", "prune", "ship"]

log = logging.getLogger(__name__)

_PREFIX = "environments/"
_PACKING_MAX = 900.0  # seconds; who takes longer is believed dead
_YOUNGEST = 3600.0  # seconds: a session that is just being made may mean to use it
_UNCOMPILED = re.compile(r"/tests?/")  # a third of all bytecode, which no task runs


def ship(store: Store, prepared: Prepared) -> None:
    """Put an environment into the store, unless it is there, and mark it as just used."""
    prefix = f"{_PREFIX}{prepared.digest}/"
    there = {entry.key for entry in _entries(store, prefix)}
    for name, file in prepared.files.items():
        key = f"{prefix}wheels/{name}"
        if key not in there:
            store.upload(key, file)
    store.put(f"{prefix}lock.json", prepared.lock.encode())


def pack(store: Store, digest: str, folder: Path) -> bool:
    """Put what is installed in `folder` into the store, unless it is there or being packed.

    Returns:
        Whether this call did.
    """
    prefix = f"{_PREFIX}{digest}/"
    if any(e.key == f"{prefix}pack" for e in _entries(store, prefix)):
        return False
    if not _is_mine(store, f"{prefix}packing"):
        return False
    with tempfile.TemporaryDirectory(prefix="starburst-pack-") as scratch:
        file = Path(scratch) / "pack"
        # Here and not by whoever waits for the install: it takes longer than that.
        compileall.compile_dir(folder / "lib", quiet=2, rx=_UNCOMPILED)
        write_pack(folder, file)
        store.upload(f"{prefix}pack", file)
    store.delete([f"{prefix}packing"])
    return True


def write_pack(folder: Path, target: Path) -> None:
    """Write the pack of an environment into a file.

    Not compressed: numpy, scipy and pandas with their bytecode then take some 300 MB instead of
    120, and a fraction of the time to unpack.
    """
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in bootstrap.members(folder):
            if ".pyc." not in path.name:  # being written, by the worker that runs on it
                archive.add(path, str(path.relative_to(folder)), recursive=False)
        archive.addfile(tarfile.TarInfo(bootstrap.PACK_END))


def _is_mine(store: Store, key: str) -> bool:
    """Whether this process is the one to pack: of a hundred that install at once, one shall."""
    try:
        store.create(key, b"")
    except Conflict:
        try:
            got = store.get(key)
            if got is None or got.now - got.modified < _PACKING_MAX:
                return False
            store.replace(key, b"taken over", got.version)
        except (Conflict, ObjectNotFound):
            return False
    return True


def prune(
    store: Store, used: Collection[str], older_than: float, *, dry_run: bool = False
) -> Iterator[str]:
    """Delete environments that no session names and none has used for long; yield their digests.

    Args:
        store: The store.
        used: Digests that sessions name.
        older_than: Seconds since a session last started with it, or any of it was written; at least
            an hour.
        dry_run: Delete nothing.
    """
    for digest in _digests(store):
        if digest in used:
            continue
        prefix = f"{_PREFIX}{digest}/"
        page = store.list(prefix)  # at the last moment: a session may just have begun
        newest = max((entry.modified for entry in page.entries), default=page.now)
        if page.now - newest > max(older_than, _YOUNGEST):
            if not dry_run:
                last = f"{prefix}lock.json"
                store.delete(e.key for e in page.entries if e.key != last)
                store.delete([last])
            yield digest


def _digests(store: Store) -> list[str]:
    found: list[str] = []
    after = ""
    while True:
        page = store.list(_PREFIX, after=after, delimiter="/")
        found += page.prefixes
        if not page.truncated:
            break
        after = page.prefixes[-1] + "\U0010ffff"  # behind all that lies below it
    names = (prefix[len(_PREFIX) : -1] for prefix in found)
    return [name for name in names if re.fullmatch(r"[0-9a-f]{64}", name)]


def _entries(store: Store, prefix: str) -> list[ListedObject]:
    return store.list(prefix).entries  # a handful: far from the 1,000 of a page

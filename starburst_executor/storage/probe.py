"""Whether a store honours conditions on writes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from starburst_executor.errors import (
    Conflict,
    ObjectNotFound,
    StoreError,
    StoreNotConditional,
)
from starburst_executor.storage.base import Store

__all__ = ["probe_conditional"]


def probe_conditional(store: Store, key_prefix: str, new_id: Callable[[int], str]) -> None:
    """Check that a store honours conditions on writes; leaves nothing behind.

    Takes six writes, of which two pairs run at once, and a delete.

    Args:
        store: The store to probe.
        key_prefix: Where the probe object may briefly be written; no `/` is appended.
        new_id: `Runtime.new_id`.

    Raises:
        StoreNotConditional: it overwrote what it must not, refused what it must write, or let two
            win who wrote at once.
    """
    key = f"{key_prefix}probe-{new_id(16)}"
    try:
        _probe(store, key)
    except StoreError as error:
        try:
            store.delete([key])
        except StoreError as failure:  # the first error says more about what is wrong
            error.add_note(f"In addition, the probe object was not removed: {failure}")
        raise
    store.delete([key])


def _probe(store: Store, key: str) -> None:
    first = _race(store, key, partial(store.create, key), "If-None-Match")
    _race(store, key, lambda data: store.replace(key, data, first), "If-Match")
    if _attempt(lambda: store.replace(key, b"stale", first)) is not None:
        raise _not_conditional(store, "overwrote an object despite a different version (If-Match)")
    if _attempt(lambda: store.create(key, b"again")) is not None:
        raise _not_conditional(store, "overwrote an existing object on create (If-None-Match)")


def _race(store: Store, key: str, write: Callable[[bytes], str], condition: str) -> str:
    """Write twice at once where one write must be refused; return the version of the other."""
    # Equal bytes would have equal versions, so that a write that was accepted looks undone.
    contents = [f"{condition} {number}".encode() for number in range(2)]
    with ThreadPoolExecutor(2, "starburst-probe") as pool:
        answers = list(pool.map(lambda data: _attempt(lambda: write(data)), contents))
    versions = [version for version in answers if version is not None]
    if len(versions) > 1:
        raise _not_conditional(
            store, f"accepted two writes at once whose condition excludes each other ({condition})"
        )
    # If neither was accepted, one conflicted with an earlier try of itself.
    return versions[0] if versions else _probe_read(store, key, contents)


def _probe_read(store: Store, key: str, contents: Collection[bytes]) -> str:
    got = store.get(key)
    if got is None or got.data not in contents:
        raise _not_conditional(store, "refused a conditional write whose condition held")
    return got.version


def _attempt(write: Callable[[], str]) -> str | None:
    """The version written; None if the write was refused."""
    try:
        return write()
    except (Conflict, ObjectNotFound):
        return None


def _not_conditional(store: Store, what: str) -> StoreNotConditional:
    return StoreNotConditional(
        f"{store.url} {what}. Without conditional writes tasks could be lost or run twice. "
        "Use Amazon S3, a server that supports conditional writes, or a directory."
    )

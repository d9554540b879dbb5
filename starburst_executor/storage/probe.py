"""Whether a store honours conditions on writes."""

from __future__ import annotations

from collections.abc import Callable

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

    Takes four writes and a delete.

    Args:
        store: The store to probe.
        key_prefix: Where the probe object may briefly be written; no `/` is appended.
        new_id: `Runtime.new_id`.

    Raises:
        StoreNotConditional: it overwrote what it must not, or refused what it must write.
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
    first = _probe_create(store, key)
    _probe_replace(store, key, first)
    if not _refuses(lambda: store.replace(key, b"stale", first)):
        raise _not_conditional(store, "overwrote an object despite a different version (If-Match)")
    if not _refuses(lambda: store.create(key, b"again")):
        raise _not_conditional(store, "overwrote an existing object on create (If-None-Match)")


def _probe_create(store: Store, key: str) -> str:
    try:
        return store.create(key, b"first")
    except Conflict:  # the name is new, so only an earlier try of this very write can conflict
        return _probe_read(store, key, b"first")


def _probe_replace(store: Store, key: str, version: str) -> None:
    try:
        store.replace(key, b"second", version)
    except (Conflict, ObjectNotFound):
        _probe_read(store, key, b"second")


def _probe_read(store: Store, key: str, data: bytes) -> str:
    got = store.get(key)
    if got is None or got.data != data:
        raise _not_conditional(store, "refused a conditional write whose condition held")
    return got.version


def _refuses(write: Callable[[], str]) -> bool:
    try:
        write()
    except (Conflict, ObjectNotFound):
        return True
    return False


def _not_conditional(store: Store, what: str) -> StoreNotConditional:
    return StoreNotConditional(
        f"{store.url} {what}. Without conditional writes tasks could be lost or run twice. "
        "Use Amazon S3, a server that supports conditional writes, or a directory."
    )

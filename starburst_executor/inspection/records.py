"""The record of a batch as people are told of it, whether or not anybody has written one."""

from __future__ import annotations

import logging

from starburst_executor.errors import DamagedObject, NewerSchema, ObjectNotFound
from starburst_executor.protocol.listing import BatchListing
from starburst_executor.protocol.records import Record
from starburst_executor.protocol.session import Session, VersionedRecord

__all__ = ["read_record"]

log = logging.getLogger(__name__)


def read_record(
    session: Session, listing: BatchListing, known: VersionedRecord | None = None
) -> VersionedRecord:
    """The record of a batch, read only if the listing shows another than is known.

    Args:
        session: Whose batch it is.
        listing: The batch as it was listed.
        known: Its record as it was read before.
    """
    version = listing.record.version if listing.record else None
    if known is not None and version in (None, known.version):
        return known
    try:
        return session.read(listing.batch, known) if version else session.untouched(listing.batch)
    except NewerSchema:
        raise
    except (DamagedObject, ObjectNotFound) as error:
        # A worker will fail its tasks, or the session is being deleted; until then: pending.
        log.warning("batch %s: %s", listing.batch, error)
        return VersionedRecord(Record.fresh(listing.batch.size), None)

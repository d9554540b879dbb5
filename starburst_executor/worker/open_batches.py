"""The open batches of a session, as a worker last saw them listed."""

from __future__ import annotations

import math

from starburst_executor.protocol.listing import BatchListing
from starburst_executor.protocol.manifest import Manifest
from starburst_executor.protocol.session import Session
from starburst_executor.runtime import Runtime

__all__ = ["LIST_ALL", "OpenBatches"]

# Up to this many workers each list the queue from its front; among more, each lists a part, or
# the pages would be many.
LIST_ALL = 128


class OpenBatches:
    """Lists the queue and remembers what there is to claim from.

    Args:
        session: The session.
        manifest: Its manifest as read at start.

    Attributes:
        queue: Reads the queue.
        window: Open batches that have not been tried since they were listed.
        listed_at: When they were listed, on the monotonic clock.
        unfinished: Whether any batch was unfinished then.
        unseen: Whether the last look found nothing and did not see the whole queue.
    """

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self._runtime: Runtime = session.runtime
        self.queue = session.queue()
        self.queue.learn(manifest.lanes)
        self.window: list[BatchListing] = []
        self.listed_at = -math.inf
        self.unfinished = True
        self.unseen = False
        self._from_front = False
        self._store_time = (manifest.created, self._runtime.monotonic())

    @property
    def store_now(self) -> float:
        """The store's clock, going by the last listing."""
        at, monotonic = self._store_time
        return at + self._runtime.monotonic() - monotonic

    def age(self) -> float:
        """Seconds since the window was listed."""
        return self._runtime.monotonic() - self.listed_at

    def list_some(self, workers: int, *, polled_in_vain: bool) -> None:
        """List the first open batches or, among very many workers, some at a random place.

        Args:
            workers: How many workers there are.
            polled_in_vain: Whether this worker has found nothing for a while.
        """
        if workers <= LIST_ALL:
            found = self.queue.look_for_open(2 * workers)
            self.unseen = False
        else:
            # Finished batches that were seen from the front need not be listed again, so workers
            # that have found nothing for a while look from there every other time.
            self._from_front = polled_in_vain and not self._from_front
            at_random = self._runtime.random.randrange(2 * workers)
            ahead = 0 if self._from_front else at_random
            found = self.queue.look_for_open(16, ahead, untouched=4, pages=3)
            self.unseen = found[1] and not found[0]
        self.window, self.unfinished = found
        self.listed_at = self._runtime.monotonic()
        self._store_time = (self.queue.now, self.listed_at)

    def list_unfinished(self) -> list[BatchListing]:
        """List every unfinished batch; those that are open become the window."""
        listings = [listing for listing in self.queue.look() if listing.done is None]
        self.unfinished = bool(listings)
        self.window = [listing for listing in listings if listing.open]
        self.listed_at = self._runtime.monotonic()
        return listings

    def any_open(self) -> bool:
        """Ask the store whether there is an open batch."""
        found, _ = self.queue.look_for_open(1)
        return bool(found)

"""What listings of a session's queue tell, and where the next one must start.

One LIST shows which batches exist, which have work, which changed (by the version of their
record) and how finished ones ended, because every such fact is in a key:

    queue/0000-00000000.64/done.63.1.0      final counts
    queue/0000-00000000.64/drained.0        nothing to claim in round 0
    queue/0000-00000000.64/record           its version tells whether anything changed
    queue/0000-00000000.64/requeued.1       look here again
    queue/0000-00000000.64/tasks            sorts last: without it the batch does not exist

A batch is *open* unless its highest `drained` is at or above its highest `requeued`. The
*finished prefix* of a lane ends at the first number that is missing or not done: PUTs land in
any order, and a batch that appeared behind a cursor would never be seen.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from starburst_executor.protocol.keys import Batch, before, lane_prefix
from starburst_executor.protocol.manifest import Lane
from starburst_executor.storage.base import ListedObject, ListingPage, Store

__all__ = ["BatchListing", "QueueReader", "Totals"]

PAGE = 1000

_DONE = re.compile(r"done\.([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})")
_ROUND = re.compile(r"(drained|requeued)\.([0-9]{1,9})")

_KEYS_PER_BATCH = 8  # rarely more: tasks, record, done, and two per round
_FEW_RUNS = 8
# Lanes beyond those that are known: each costs a LIST of its own. More clients than that do not
# come within a session check.
_LANES_AHEAD = 256


@dataclass(slots=True)
class BatchListing:
    """One batch as a listing showed it; markers may be late or missing, never wrong."""

    batch: Batch
    record: ListedObject | None = None
    drained: int = -1
    requeued: int = 0
    done: tuple[int, int, int] | None = None
    modified: float = 0
    markers: set[str] = field(default_factory=set)
    complete: bool = False

    @property
    def open(self) -> bool:
        """Whether there may be something to claim."""
        drained = max(self.drained, 0) if self.record and self.batch.size == 1 else self.drained
        return self.done is None and drained < self.requeued

    @property
    def untouched(self) -> bool:
        """Whether no worker has started on it, so that a claim most likely meets no other."""
        return self.record is None and self.done is None

    def add(self, name: str, entry: ListedObject) -> None:
        """Add one object of the batch."""
        self.modified = max(self.modified, entry.modified)
        if name == "record":
            self.record = entry
        elif name == "tasks":
            self.complete = True
        else:
            self._add_marker(name)
        self.markers.add(name)

    def _add_marker(self, name: str) -> None:
        if match := _DONE.fullmatch(name):
            completed, failed, cancelled = map(int, match.groups())
            if completed + failed + cancelled == self.batch.size:
                self.done = completed, failed, cancelled
        elif match := _ROUND.fullmatch(name):
            number = int(match[2])
            if match[1] == "drained":
                self.drained = max(self.drained, number)
            else:
                self.requeued = max(self.requeued, number)


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of final tasks."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.completed + other.completed,
            self.failed + other.failed,
            self.cancelled + other.cancelled,
        )

    @property
    def all(self) -> int:
        """All of them together."""
        return self.completed + self.failed + self.cancelled


class _Progress:
    """Which numbers of one lane are known to be done, as disjoint ranges in order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.totals = Totals()
        self.seen = 0  # the number after the last one that exists
        self.size = 1  # tasks of the batch that was seen last

    @property
    def prefix(self) -> int:
        """The number below which all are done."""
        return self._ends[0] if self._starts and self._starts[0] == 0 else 0

    def end_of_run(self, number: int) -> int:
        """The end of the run of done numbers that contains `number`; else `number` itself."""
        i = bisect.bisect_right(self._starts, number) - 1
        return max(number, self._ends[i]) if i >= 0 else number

    def runs(self) -> list[tuple[int, int]]:
        """The ranges of done numbers."""
        return list(zip(self._starts, self._ends, strict=True))

    def keys_until_done(self, number: int) -> int:
        """About how many keys lie between `number` and the next run of done ones; at most a page.

        A whole page if there are many such runs: listing the gaps one by one would take longer.
        """
        i = bisect.bisect_right(self._starts, number)
        if i == len(self._starts) or i + _FEW_RUNS < len(self._starts):
            return PAGE
        batches = -(-(self._starts[i] - number) // self.size)
        return min(PAGE, _KEYS_PER_BATCH * batches)

    def ahead(self, count: int) -> int:
        """The number with `count` numbers not known to be done before it; capped at those seen."""
        number = self.prefix
        for start, end in zip(self._starts, self._ends, strict=True):
            if start > number:
                if start - number >= count:
                    break
                count -= start - number
            number = end
        return min(number + count, max(self.seen, self.prefix))

    def add(self, start: int, end: int, totals: Totals) -> None:
        """Mark numbers `start` to `end` as done; those known already are not counted again."""
        self.seen = max(self.seen, end)
        if start >= end or self.end_of_run(start) >= end:
            return
        self.totals += totals
        i = bisect.bisect_left(self._ends, start)
        j = bisect.bisect_right(self._starts, end)
        if i < j:
            start, end = min(start, self._starts[i]), max(end, self._ends[j - 1])
        self._starts[i:j], self._ends[i:j] = [start], [end]


class QueueReader:
    """One reader's view of a session's queue, which avoids listing finished batches again.

    Args:
        store: Where the session is.
        prefix: The session's prefix, with its slash.

    Attributes:
        remains: Batches that the last `look` showed without their `tasks`, which were removed.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._lanes: dict[int, _Progress] = {0: _Progress()}
        self.remains: list[BatchListing] = []
        self.now = 0.0  # the store's clock at the last page

    def learn(self, lanes: Iterable[Lane]) -> None:
        """Adopt what the manifest says about finished prefixes."""
        for number, lane in enumerate(lanes):
            progress = self._lane(number)
            if lane.finished > progress.prefix == 0 and not progress.totals.all:
                totals = Totals(lane.completed, lane.failed, lane.cancelled)
                progress.add(0, lane.finished, totals)

    def finished(self, lane: int) -> tuple[int, Totals] | None:
        """Finished prefix and its counts if nothing beyond it is done; else None."""
        progress = self._lanes.get(lane)
        if progress is None or progress.prefix != progress.totals.all:
            return None
        return progress.prefix, progress.totals

    @property
    def totals(self) -> Totals:
        """Final tasks in all batches that were seen done."""
        return sum((p.totals for p in self._lanes.values()), Totals())

    def done(self, batch: Batch) -> bool:
        """Whether the batch was seen done, so that listings may leave it out."""
        progress = self._lanes.get(batch.lane)
        return progress is not None and progress.end_of_run(batch.number) >= batch.end

    def done_runs(self, lane: int) -> list[tuple[int, int]]:
        """The runs of numbers seen done, each as its first number and the one after its last."""
        progress = self._lanes.get(lane)
        return progress.runs() if progress is not None else []

    def look(self) -> list[BatchListing]:
        """All batches not known to be done before this call, in order."""
        self.remains = []
        return [listing for page in self._scan_all(PAGE) for listing in page]

    def look_for_open(
        self,
        enough: int,
        ahead: int = 0,
        *,
        untouched: int = 0,
        pages: int | None = None,
    ) -> tuple[list[BatchListing], bool]:
        """At least `enough` open batches, or all there are; and whether anything is unfinished.

        Args:
            enough: Stop at the end of the page on which this many were found.
            ahead: Start about this many unfinished batches past the finished prefix, as far as is
                known, and come to the skipped ones last.
            untouched: How many of them must be untouched.
            pages: Stop after this many pages in any case; what they did not show may be unfinished.
        """
        # A reader that knows nothing yet uses a whole page to see how much there is to choose from.
        known = any(progress.seen for progress in self._lanes.values())
        first = max(100, min(PAGE, 8 * enough)) if known else PAGE
        found: dict[Batch, BatchListing] = {}
        self.remains = []
        unfinished = False
        for page in self._round(first, ahead):
            unfinished = unfinished or any(listing.done is None for listing in page)
            found |= {listing.batch: listing for listing in page if listing.open}
            if pages is not None:
                pages -= 1
            untouched -= sum(listing.untouched for listing in page)
            if (len(found) >= enough and untouched <= 0) or pages == 0:
                return list(found.values()), True
        return list(found.values()), unfinished

    def _round(self, first: int, ahead: int) -> Iterator[list[BatchListing]]:
        """The pages from `ahead` to the end, then from the finished prefix on."""
        if ahead:
            yield from self._scan_all(first, ahead)
        yield from self._scan_all(first)

    def _scan_all(self, first: int, ahead: int = 0) -> Iterator[list[BatchListing]]:
        lanes = sorted(self._lanes)
        for lane in lanes:
            # The last lane's listing continues into lanes not known yet.
            prefix = "queue/" if lane == lanes[-1] else lane_prefix(lane)
            yield from self._scan(lane, prefix, first, ahead)

    def _scan(self, lane: int, prefix: str, first: int, ahead: int) -> Iterator[list[BatchListing]]:
        """The batches of each page; the first page has at most `first` keys."""
        progress = self._lanes[lane]
        start = progress.ahead(ahead * progress.size)
        after = before(lane, start)
        limit = min(first, progress.keys_until_done(start))
        cut: BatchListing | None = None  # a batch whose keys continue on the next page
        while True:
            page = self._store.list(self._prefix + prefix, after=self._prefix + after, limit=limit)
            self.now = page.now
            listings = self._parse(page, cut)
            complete = [listing for listing in listings if listing.complete]
            for listing in complete:
                self._note(listing)
            yield complete
            torn = [listing for listing in listings if not listing.complete]
            if not page.truncated or not page.entries:
                self.remains += torn
                return
            after = page.entries[-1].key[len(self._prefix) :]
            limit = PAGE
            last = _batch_of(after.split("/")[1])
            if last is not None:
                cut = listings[-1] if listings and listings[-1].batch == last else None
                self.remains += [listing for listing in torn if listing is not cut]
                after, cut, limit = self._skip_finished(last, cut, after)

    def _parse(self, page: ListingPage, cut: BatchListing | None) -> list[BatchListing]:
        """The page's batches except those known to be done; `cut` began on the page before."""
        listings = [cut] if cut else []
        listing = cut
        name = str(cut.batch) if cut else ""
        skip = len(self._prefix) + len("queue/")
        most = len(self._lanes) + _LANES_AHEAD
        for entry in page.entries:
            folder, _, rest = entry.key[skip:].partition("/")
            if folder != name:
                name, listing = folder, None
                batch = _batch_of(folder)
                if batch is not None and batch.lane < most and not self.done(batch):
                    listing = BatchListing(batch)
                    listings.append(listing)
            if listing is not None:
                listing.add(rest, entry)
        return listings

    def _note(self, listing: BatchListing) -> None:
        batch = listing.batch
        progress = self._lane(batch.lane)
        progress.seen = max(progress.seen, batch.end)
        progress.size = batch.size
        if listing.done is not None:
            progress.add(batch.number, batch.end, Totals(*listing.done))

    def _lane(self, number: int) -> _Progress:
        """What is known of a lane; lower ones exist too, even if nothing of them was seen yet."""
        for lane in range(len(self._lanes), number + 1):
            self._lanes[lane] = _Progress()
        return self._lanes[number]

    def _skip_finished(
        self, last: Batch, cut: BatchListing | None, after: str
    ) -> tuple[str, BatchListing | None, int]:
        """Where the next page starts: past any run of batches known to be done; and its limit."""
        if cut is not None and cut.complete:
            cut = None
            number = last.end
        else:
            number = last.number
        progress = self._lane(last.lane)
        end = progress.end_of_run(number)
        limit = progress.keys_until_done(end)
        if end <= number:
            return after, cut, limit
        return max(after, before(last.lane, end)), None, limit


@functools.lru_cache(maxsize=1 << 14)
def _batch_of(name: str) -> Batch | None:
    """The batch with that name, cached: every listing shows the same names again."""
    return Batch.parse(name)

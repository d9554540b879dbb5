"""What a worker keeps on its disk is bounded, and what its tasks need is never deleted."""

from __future__ import annotations

from starburst_executor import StarburstExecutor
from starburst_executor.protocol.payload import digest_of, references
from starburst_executor.serialization.pickling import dumps, pack_call
from starburst_executor.worker.cache import DiskCache
from tests.support.shop import PATIENCE, Shop

SIZE = 1 << 20


class Shelf:
    """A session's objects, and a cache of them that has room for three blobs."""

    def __init__(self, shop: Shop) -> None:
        self._session = shop.session
        self.cache = DiskCache(shop.session, shop.folder / "other", 3.5 * SIZE)
        cargo = dumps(len, self._put)
        self.function = self._session.put_content("functions", cargo)

    def _put(self, digest: str, data: memoryview) -> None:
        self._session.put_blob(digest, data)

    def call(self, number: int) -> bytes:
        """The arguments of a call, one of them a blob of its own."""
        return pack_call((bytes([number]) * SIZE,), {}, self._put)

    def fetch(self, *calls: bytes) -> None:
        for call in calls:
            self.cache.fetch(self.cache.missing(self.function, call))

    def has(self, call: bytes) -> bool:
        [(digest, _)] = references(call)
        return (self.cache.blobs / digest).exists()


def test_what_was_not_used_for_longest_makes_room(lone: StarburstExecutor, shop: Shop) -> None:
    shelf = Shelf(shop)
    calls = [shelf.call(number) for number in range(5)]
    shelf.fetch(*calls)
    assert not shelf.cache.missing(shelf.function, calls[0])  # it is used again
    assert shelf.cache.overfull
    shelf.cache.evict([(shelf.function, b"")])
    assert [shelf.has(call) for call in calls] == [True, False, False, True, True]
    assert not shelf.cache.overfull
    shelf.fetch(calls[1])
    assert shelf.has(calls[1])


def test_what_is_in_use_is_kept_however_much_it_is(lone: StarburstExecutor, shop: Shop) -> None:
    shelf = Shelf(shop)
    calls = [shelf.call(number) for number in range(5)]
    shelf.fetch(*calls)
    shelf.cache.evict([(shelf.function, call) for call in calls])
    assert all(shelf.has(call) for call in calls)
    assert not shelf.cache.overfull  # there is nothing to gain
    assert shelf.cache.function(shelf.function).exists()


def test_a_pinned_callable_is_never_deleted(lone: StarburstExecutor, shop: Shop) -> None:
    shelf = Shelf(shop)
    shelf.cache.pin(shelf.function)
    kept = shelf.cache.function(shelf.function)
    shelf.fetch(*(shelf.call(number) for number in range(5)))
    shelf.cache.evict([])
    assert kept.exists()
    assert digest_of(kept.read_bytes()) == shelf.function


def test_tasks_with_more_arguments_than_there_is_room_for_all_end_well(
    lone: StarburstExecutor, shop: Shop
) -> None:
    shop.library._bytes_max = 2.5 * SIZE
    shop.open()
    for number in range(6):
        assert lone.submit(sum, bytes([number]) * SIZE).result(PATIENCE) == number * SIZE
    assert len(list(shop.library.blobs.iterdir())) <= 3

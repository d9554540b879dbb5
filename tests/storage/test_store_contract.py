"""What every store must do: one suite for the directory, for S3 on two servers, and for the fake.

The two S3 servers differ from one another, and from AWS, in ways that code made for one would
not survive.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from starburst_executor.errors import Conflict, LocalDiskError, ObjectNotFound
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.base import ListingPage, Store
from starburst_executor.storage.probe import probe_conditional
from starburst_executor.storage.url import open_store
from tests.support.fakes import MemoryStore
from tests.support.servers import S3Server

MIB = 1 << 20
PROCESSES, THREADS = 3, 2


@pytest.fixture(params=["directory", "memory", "ministack", "seaweedfs"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def store(
    kind: str, request: pytest.FixtureRequest, s3_env: Callable[..., None]
) -> Iterator[Store]:
    store: Store
    if kind == "memory":
        store = MemoryStore(SystemRuntime())
    elif kind == "directory":
        store = open_store(request.getfixturevalue("directory_url"))
    else:
        server: S3Server = request.getfixturevalue(kind)
        s3_env(server)
        store = open_store(server.fresh_url())
    yield store
    store.close()


def keys_of(page: ListingPage) -> list[str]:
    return [entry.key for entry in page.entries]


def put_all(store: Store, keys: Sequence[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, key.encode()), keys))


def read(store: Store, key: str) -> bytes:
    got = store.get(key)
    assert got is not None
    return got.data


# Reading and writing one object


def test_what_was_created_is_read_back(store: Store) -> None:
    version = store.create("a/b", b"bytes")
    got = store.get("a/b")
    assert got is not None
    assert (got.data, got.size, got.version) == (b"bytes", 5, version)


def test_any_kind_of_bytes_is_written(store: Store) -> None:
    version = store.create("key", bytearray(b"one"))
    assert read(store, "key") == b"one"
    store.replace("key", memoryview(b"-two-")[1:4], version)
    assert read(store, "key") == b"two"


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.put("queue/x/done.1.0.0", b"")
    got = store.get("queue/x/done.1.0.0")
    assert got is not None
    assert (got.data, got.size) == (b"", 0)
    assert [e.size for e in store.list("queue/").entries] == [0]


def test_reading_a_missing_object_says_so(store: Store) -> None:
    with pytest.raises(ObjectNotFound, match="no/such/key"):
        store.get("no/such/key")


def test_an_unchanged_object_is_not_read_again(store: Store) -> None:
    version = store.create("key", b"one")
    assert store.get("key", unless=version) is None
    newer = store.replace("key", b"two", version)
    got = store.get("key", unless=version)
    assert got is not None
    assert (got.data, got.version) == (b"two", newer)


def test_a_missing_object_is_not_unchanged(store: Store) -> None:
    version = store.create("key", b"one")
    store.delete(["key"])
    with pytest.raises(ObjectNotFound):
        store.get("key", unless=version)


@pytest.mark.parametrize(
    ("start", "stop", "data"),
    [
        (0, 3, b"012"),
        (3, None, b"3456789"),
        (9, 10, b"9"),
        (8, 100, b"89"),
        (0, 100, b"0123456789"),
        (10, None, b""),
        (50, 60, b""),
        (4, 4, b""),
    ],
)
def test_a_range_is_read(store: Store, start: int, stop: int, data: bytes) -> None:
    version = store.create("key", b"0123456789")
    got = store.get("key", start=start, stop=stop)
    assert got is not None
    assert (got.data, got.size, got.version) == (data, 10, version)


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (5, None), (0, 0)])
def test_a_range_of_an_empty_object_is_empty(store: Store, start: int, stop: int | None) -> None:
    store.create("key", b"")
    got = store.get("key", start=start, stop=stop)
    assert got is not None
    assert (got.data, got.size) == (b"", 0)


def test_a_range_of_an_unchanged_object_is_not_read_again(store: Store) -> None:
    version = store.create("key", b"0123456789")
    assert store.get("key", start=2, stop=4, unless=version) is None
    assert store.get("key", start=20, unless=version) is None


def test_a_range_of_a_missing_object_is_missing(store: Store) -> None:
    with pytest.raises(ObjectNotFound):
        store.get("key", start=2, stop=4)
    with pytest.raises(ObjectNotFound):
        store.get("key", start=2, stop=2)


def test_put_overwrites(store: Store) -> None:
    store.put("key", b"one")
    store.put("key", b"three")
    assert read(store, "key") == b"three"


# Conditions


def test_create_refuses_an_object_that_exists(store: Store) -> None:
    store.create("key", b"mine")
    with pytest.raises(Conflict, match="key"):
        store.create("key", b"other")
    assert read(store, "key") == b"mine"


def test_replace_gives_a_new_version(store: Store) -> None:
    first = store.create("key", b"one")
    second = store.replace("key", b"two", first)
    assert second != first
    assert store.replace("key", b"three", second) not in (first, second)
    assert read(store, "key") == b"three"


def test_replace_refuses_an_older_version(store: Store) -> None:
    first = store.create("key", b"one")
    store.replace("key", b"two", first)
    with pytest.raises(Conflict, match="key"):
        store.replace("key", b"late", first)
    assert read(store, "key") == b"two"


def test_replace_refuses_after_an_unconditional_write(store: Store) -> None:
    version = store.create("key", b"one")
    store.put("key", b"two")
    with pytest.raises(Conflict):
        store.replace("key", b"late", version)


def test_replace_never_creates(store: Store) -> None:
    version = store.create("key", b"one")
    store.delete(["key"])
    with pytest.raises((Conflict, ObjectNotFound)):
        store.replace("key", b"two", version)
    with pytest.raises(ObjectNotFound):
        store.get("key")


def test_a_deleted_object_can_be_created_again(store: Store) -> None:
    store.create("a/b", b"one")
    store.delete(["a/b"])
    store.create("a/b", b"two")
    assert read(store, "a/b") == b"two"


def test_versions_of_a_listing_are_those_of_reads_and_writes(store: Store) -> None:
    created = store.create("key", b"one")
    assert [e.version for e in store.list("").entries] == [created]
    replaced = store.replace("key", b"two", created)
    assert [e.version for e in store.list("").entries] == [replaced]
    store.put("key", b"three")
    got = store.get("key")
    assert got is not None
    assert [e.version for e in store.list("").entries] == [got.version]
    assert got.version not in (created, replaced)


def test_a_store_that_keeps_conditions_passes_the_probe(store: Store) -> None:
    probe_conditional(store, "sessions/x/", SystemRuntime().new_id)
    assert keys_of(store.list("")) == []


# Time


def test_no_object_is_younger_than_the_store_says_it_is_now(store: Store) -> None:
    earlier = store.list("").now
    for number in range(20):
        store.put("key", b"%d" % number)
        got = store.get("key")
        assert got is not None
        page = store.list("")
        assert page.entries[0].modified == got.modified
        assert earlier - 1 <= got.modified <= got.now <= page.now
        earlier = page.now


# Listing


def test_keys_are_listed_in_order_with_their_sizes(store: Store) -> None:
    put_all(store, ["b/2", "a", "b/10", "c/d/e", "b/1"])
    page = store.list("")
    assert [(e.key, e.size) for e in page.entries] == [
        ("a", 1),
        ("b/1", 3),
        ("b/10", 4),
        ("b/2", 3),
        ("c/d/e", 5),
    ]
    assert (page.prefixes, page.truncated) == ([], False)


def test_order_is_that_of_whole_keys_not_of_folders(store: Store, kind: str) -> None:
    if kind == "seaweedfs":
        pytest.skip("this server orders a/b before a-b, as AWS does not")
    keys = ["a-b", "a.b/c", "a/b.c/d", "a/b/c", "a0", "aa", "z", "ä"]
    put_all(store, keys)
    assert keys_of(store.list("")) == keys
    for after, limit in itertools.product([*keys, "a", "a/b"], (1, 3)):
        follow = [key for key in keys if key > after]
        page = store.list("", after=after, limit=limit)
        assert keys_of(page) == follow[:limit]
        assert page.truncated == (len(follow) > limit)


def test_a_prefix_is_a_string_not_a_folder(store: Store) -> None:
    put_all(store, ["lane1/a", "lane10/a", "lane2/a", "lane"])
    assert keys_of(store.list("lane1")) == ["lane1/a", "lane10/a"]
    assert keys_of(store.list("lane1/")) == ["lane1/a"]
    assert keys_of(store.list("lane1/b")) == []
    assert keys_of(store.list("none/")) == []


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("", ["q/1/r", "q/1/t", "q/2/r", "q/2/t"]),
        ("q/", ["q/1/r", "q/1/t", "q/2/r", "q/2/t"]),
        ("a", ["q/1/r", "q/1/t", "q/2/r", "q/2/t"]),
        ("q/1/r", ["q/1/t", "q/2/r", "q/2/t"]),
        ("q/1/s", ["q/1/t", "q/2/r", "q/2/t"]),
        ("q/1/t", ["q/2/r", "q/2/t"]),
        ("q/1/zzz", ["q/2/r", "q/2/t"]),
        ("q/15", ["q/2/r", "q/2/t"]),
        ("q/2/t", []),
        ("r", []),
    ],
)
def test_a_listing_begins_after_any_key(store: Store, after: str, expected: list[str]) -> None:
    put_all(store, ["p/1", "q/1/r", "q/1/t", "q/2/r", "q/2/t", "s/1"])
    assert keys_of(store.list("q/", after=after)) == expected


def test_pages_follow_one_another_without_gap_or_repetition(store: Store) -> None:
    keys = [f"queue/{batch:04d}/{name}" for batch in range(9) for name in "abc"]
    put_all(store, keys)
    found: list[str] = []
    page = store.list("queue/", limit=7)
    while page.truncated:
        assert len(page.entries) == 7
        found += keys_of(page)
        page = store.list("queue/", after=found[-1], limit=7)
    assert found + keys_of(page) == keys
    assert len(page.entries) == len(keys) % 7


def test_a_page_that_is_just_full_is_the_last(store: Store) -> None:
    put_all(store, ["a/1", "a/2", "a/3", "b"])
    page = store.list("a/", limit=3)
    assert (keys_of(page), page.truncated) == (["a/1", "a/2", "a/3"], False)


def test_a_delimiter_folds_what_lies_below(store: Store) -> None:
    put_all(store, ["sessions/a/x", "sessions/a/y/z", "sessions/b/x", "sessions/c"])
    page = store.list("sessions/", delimiter="/")
    assert page.prefixes == ["sessions/a/", "sessions/b/"]
    assert keys_of(page) == ["sessions/c"]
    assert store.list("", delimiter="/").prefixes == ["sessions/"]
    assert store.list("sessions/b", delimiter="/").prefixes == ["sessions/b/"]


def test_folded_pages_follow_one_another(store: Store) -> None:
    names = [f"s/{number}" for number in range(5)]
    put_all(store, [f"{name}/{end}" for name in names for end in ("session", "z")])
    found: list[str] = []
    page = store.list("s/", delimiter="/", limit=2)
    while page.truncated:
        assert len(page.prefixes) == 2
        found += page.prefixes
        page = store.list("s/", delimiter="/", limit=2, after=found[-1])
    assert found + page.prefixes == [f"{name}/" for name in names]


def test_a_folded_prefix_stands_before_a_key_that_lies_in_it(store: Store) -> None:
    put_all(store, ["s/a/x", "s/a/y", "s/b/x"])
    page = store.list("s/", delimiter="/", after="s/a/x")
    assert page.prefixes == ["s/b/"]


def test_a_listing_sees_each_answered_write_and_delete(store: Store, kind: str) -> None:
    for number in range(10):
        store.create(f"q/{number}/tasks", b"x")
        assert len(store.list("q/").entries) == number + 1
    for number in range(10):
        store.delete([f"q/{number}/tasks"])
        assert len(store.list("q/").entries) == 9 - number
    if kind != "seaweedfs":  # which removes empty folders a little later
        assert store.list("", delimiter="/").prefixes == []


def test_odd_names_come_back_as_they_were(store: Store) -> None:
    keys = ["a b", "a&<b>", 'a"b', "a%2Fb", "a+b", "a=b?c#d", "naïve/日本", "~"]
    for key in keys:
        store.put(key, key.encode())
        assert read(store, key) == key.encode()
    assert sorted(keys_of(store.list(""))) == sorted(keys)
    store.delete(keys)
    assert keys_of(store.list("")) == []


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b"])
def test_a_key_that_some_store_cannot_hold_is_refused(store: Store, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        store.put(key, b"x")
    with pytest.raises(ValueError, match="key"):
        store.get(key)
    with pytest.raises(ValueError, match="key"):
        store.delete([key])


def test_a_listing_that_some_store_cannot_give_is_refused(store: Store) -> None:
    for prefix in ("../", "/a", "a//", "a/../"):
        with pytest.raises(ValueError, match="no key starts"):
            store.list(prefix)
    for limit in (0, 1001):
        with pytest.raises(ValueError, match="limit"):
            store.list("a/", limit=limit)
    with pytest.raises(ValueError, match="delimiter"):
        store.list("a/", delimiter="-")


# Deleting


def test_deleting_what_is_not_there_is_no_error(store: Store) -> None:
    store.put("a", b"x")
    store.delete(["b/c", "a", "d"])
    store.delete([])
    assert keys_of(store.list("")) == []


def test_more_keys_are_deleted_than_one_request_takes(store: Store) -> None:
    keys = [f"q/{number:04d}" for number in range(1_003)]
    put_all(store, [*keys, "r"])
    store.delete(iter(keys))
    assert keys_of(store.list("")) == ["r"]


# Files and large objects


def test_a_file_goes_up_and_comes_down(store: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    store.upload("blobs/abc", source)
    store.download("blobs/abc", target)
    assert target.read_bytes() == b"content"
    source.write_bytes(b"changed")
    assert read(store, "blobs/abc") == b"content"
    target.write_bytes(b"changed")
    assert read(store, "blobs/abc") == b"content"


def test_an_empty_file_goes_up_and_comes_down(store: Store, tmp_path: Path) -> None:
    store.upload("blobs/abc", b"")
    store.download("blobs/abc", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b""


@pytest.mark.parametrize("size", [10, 2 * MIB])
def test_what_is_there_is_not_uploaded_again(store: Store, size: int) -> None:
    store.upload("blobs/abc", bytes(size))
    before = store.get("blobs/abc")
    store.upload("blobs/abc", b"\1" * size)
    assert before is not None
    assert store.get("blobs/abc", unless=before.version) is None


def test_a_failed_download_leaves_nothing(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "target").write_bytes(b"old")
    with pytest.raises(ObjectNotFound):
        store.download("blobs/abc", tmp_path / "out" / "target")
    assert [p.read_bytes() for p in (tmp_path / "out").iterdir()] == [b"old"]


@pytest.mark.parametrize("size", [10, 2 * MIB])
def test_a_local_file_that_fails_is_no_error_of_the_store(
    store: Store, tmp_path: Path, size: int
) -> None:
    store.upload("blobs/abc", bytes(size))
    with pytest.raises(LocalDiskError, match=r"none.*No such file"):
        store.download("blobs/abc", tmp_path / "none" / "target")
    with pytest.raises(LocalDiskError, match=r"none.*No such file"):
        store.upload("blobs/def", tmp_path / "none")


@pytest.mark.parametrize("from_file", [True, False])
def test_a_large_object_passes_through_little_memory(
    store_url: str, from_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starburst_executor.aws.s3_transfer.PART", 5 * MIB)  # S3's least
    size = 48 * MIB + 12_345
    content = os.urandom(MIB) * 49
    content = content[:size]
    (tmp_path / "source").write_bytes(content)
    source = tmp_path / "source" if from_file else memoryview(content)
    store = open_store(store_url)
    store.list("")  # loads what only the first request does
    tracemalloc.start()
    try:
        store.upload("blobs/abc", source)
        store.download("blobs/abc", tmp_path / "target")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * MIB
    assert (tmp_path / "target").read_bytes() == content
    assert [e.size for e in store.list("blobs/").entries] == [size]
    got = store.get("blobs/abc", start=size - 3)
    assert got is not None
    assert got.data == content[-3:]
    store.close()


# Many at once


def test_the_url_opens_the_same_store_again(store_url: str) -> None:
    one = open_store(store_url)
    two = open_store(one.url)
    one.create("a/b", b"x")
    assert read(two, "a/b") == b"x"
    assert two.url == one.url
    one.close()
    two.close()


def test_of_many_that_create_one_key_one_wins(store_url: str) -> None:
    won = _race(_create_all, store_url)
    keys = [f"race/{number:03d}/record" for number in range(RACES)]
    assert sorted(itertools.chain(*won)) == keys
    store = open_store(store_url)
    assert keys_of(store.list("race/")) == keys
    store.close()


def test_no_increment_is_lost(store_url: str) -> None:
    store = open_store(store_url)
    store.create("race/counter", b"0")
    versions = _race(_increment, store_url)
    total = PROCESSES * THREADS * INCREMENTS
    assert read(store, "race/counter").split()[0] == b"%d" % total
    seen = list(itertools.chain(*versions))
    assert len(seen) == len(set(seen)) == total
    store.close()


def test_a_listing_never_misses_what_is_being_replaced(directory_url: str) -> None:
    store = open_store(directory_url)
    keys = [f"q/{number}/{name}" for number in range(3) for name in ("record", "tasks")]
    put_all(store, keys)
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(_rewrite, store, keys, stop) for _ in range(2)]
        try:
            for _ in range(200):
                assert keys_of(store.list("q/")) == keys
        finally:
            stop.set()
        assert all(writer.result() > 0 for writer in writers)
    store.close()


def test_folders_that_come_and_go_lose_no_write(directory_url: str) -> None:
    store = open_store(directory_url)

    def come_and_go(name: str) -> None:
        for _ in range(150):
            store.create(f"q/batch/{name}", b"x")
            assert read(store, f"q/batch/{name}") == b"x"
            store.delete([f"q/batch/{name}"])

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(come_and_go, name) for name in "abcd"]:
            done.result()
    assert list(Path(directory_url).glob("[!.]*")) == []
    store.close()


RACES, INCREMENTS = 25, 15


def _rewrite(store: Store, keys: Sequence[str], stop: threading.Event) -> int:
    rounds = 0
    while not stop.is_set():
        for key in keys:
            store.put(key, b"%d" % rounds)
        rounds += 1
    return rounds


def _create_all(store: Store, me: str) -> list[str]:
    won = []
    for number in range(RACES):
        key = f"race/{number:03d}/record"
        try:
            store.create(key, me.encode())
        except Conflict:
            assert read(store, key) != me.encode()
        else:
            assert read(store, key) == me.encode()
            won.append(key)
    return won


def _increment(store: Store, me: str) -> list[str]:
    versions: list[str] = []
    while len(versions) < INCREMENTS:
        got = store.get("race/counter")
        assert got is not None
        count = int(got.data.split()[0]) + 1
        try:
            # Equal bytes have equal versions in S3, so each write has a name in it.
            data = f"{count} {me}".encode()
            versions.append(store.replace("race/counter", data, got.version))
        except Conflict:
            pass
    return versions


Racer = Callable[[Store, str], list[str]]
Outcome = list[str] | BaseException


def _race(racer: Racer, url: str) -> list[list[str]]:
    """Run it in several processes with several threads each, all let loose at once."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES * THREADS)
    outcomes: Queue[list[Outcome]] = context.Queue()
    processes = [
        context.Process(target=_race_here, args=(racer, url, barrier, outcomes))
        for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    found = [outcome for _ in processes for outcome in outcomes.get(timeout=100)]
    for process in processes:
        process.join()
    errors = [outcome for outcome in found if isinstance(outcome, BaseException)]
    if errors:
        raise errors[0]
    return [outcome for outcome in found if not isinstance(outcome, BaseException)]


def _race_here(racer: Racer, url: str, barrier: Barrier, outcomes: Queue[list[Outcome]]) -> None:
    store = open_store(url)

    def run(number: int) -> Outcome:
        try:
            store.list("none/")  # connects
            barrier.wait(60)
            return racer(store, f"{os.getpid()}-{number}")
        except BaseException as error:  # shown by the test
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        outcomes.put(list(pool.map(run, range(THREADS))))
    store.close()


# What it costs


def test_requests_are_counted_in_the_classes_in_which_they_are_priced(
    store: Store, tmp_path: Path
) -> None:
    version = store.create("key", b"one")
    store.put("other", b"two")
    store.replace("key", b"three", version)
    store.upload("small", b"content")
    store.list("")
    assert (store.tally.writes, store.tally.reads) == (5, 0)
    store.get("key")
    store.download("small", tmp_path / "small")
    store.delete(["key", "other"])
    assert (store.tally.writes, store.tally.reads) == (5, 2)


def test_requests_that_come_to_nothing_are_counted_too(store: Store) -> None:
    with pytest.raises(ObjectNotFound):
        store.get("nowhere")
    store.create("key", b"one")
    with pytest.raises(Conflict):
        store.create("key", b"two")
    assert (store.tally.writes, store.tally.reads) == (2, 1)

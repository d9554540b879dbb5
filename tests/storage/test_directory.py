"""URLs of stores, the probe, and what only a store in a directory can get wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from starburst_executor.aws.s3 import S3Store
from starburst_executor.errors import (
    Conflict,
    LocalDiskError,
    ObjectNotFound,
    StoreDenied,
    StoreError,
    StoreNotConditional,
    StoreUnavailable,
)
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage import folder_locks
from starburst_executor.storage.base import Bytes
from starburst_executor.storage.directory import DirectoryStore, _translate
from starburst_executor.storage.probe import probe_conditional
from starburst_executor.storage.url import join_url, open_store, split_session_url
from tests.support.fakes import MemoryStore
from tests.support.tasks import DEADLINE

StoppedChild = Callable[[str, str], "subprocess.Popen[bytes]"]

KMS_ARN = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab"


# URLs


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("/a/dir", "/a/dir"),
        ("/a/./dir/../other/", "/a/other"),
        ("file:///a/dir", "/a/dir"),
        ("file:///a%20dir", "/a dir"),
        (Path("/a/dir"), "/a/dir"),
        ("/a/dir?x", "/a/dir?x"),
    ],
)
def test_a_path_or_file_url_names_a_directory(url: str | Path, canonical: str) -> None:
    store = open_store(url)
    assert isinstance(store, DirectoryStore)
    assert store.url == canonical


def test_relative_and_home_directories_get_absolute_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert open_store("store").url == str(tmp_path / "store")
    assert open_store("~/store").url == "/home/someone/store"


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket?", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://my.bucket-1/p?region=eu-west-1", "s3://my.bucket-1/p?region=eu-west-1"),
        (
            f"s3://bucket/p?kms_key_id={KMS_ARN}&sse=aws:kms&region=eu-west-1",
            f"s3://bucket/p?region=eu-west-1&sse=aws:kms&kms_key_id={KMS_ARN}",
        ),
        ("s3://bucket?sse=AES256", "s3://bucket?sse=AES256"),
    ],
)
def test_an_s3_url_is_canonical_and_opens_the_same_store(url: str, canonical: str) -> None:
    store = open_store(url)
    assert isinstance(store, S3Store)
    assert store.url == canonical
    assert open_store(canonical).url == canonical


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://bucket/prefix",
        "s3:/bucket/prefix",
        "s3://",
        "s3:///prefix",
        "s3://buck et/prefix",
        "s3://bucket--usw2-az1--x-s3/prefix",
        "s3://bucket/a//b",
        "s3://bucket/../b",
        "s3://bucket?zone=1",
        "s3://bucket?region",
        "s3://bucket?region=a&region=b",
        "s3://bucket?sse=none",
        "s3://bucket?kms_key_id=abc",
        "s3://bucket?sse=AES256&kms_key_id=abc",
        "file:relative",
        "file://host/dir",
    ],
)
def test_a_malformed_url_is_refused_with_the_right_forms(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not a store URL|does not name a store") as caught:
        open_store(url)
    assert repr(url) in str(caught.value)
    assert "s3://bucket/prefix" in str(caught.value)


@pytest.mark.parametrize(
    ("store_url", "session_url"),
    [
        ("/a/dir", "/a/dir/sessions/x1"),
        ("/", "/sessions/x1"),
        ("/odd?dir", "/odd?dir/sessions/x1"),
        ("s3://bucket", "s3://bucket/sessions/x1"),
        ("s3://bucket/p?region=r", "s3://bucket/p/sessions/x1?region=r"),
    ],
)
def test_a_session_url_is_the_stores_with_the_session_in_its_path(
    store_url: str, session_url: str
) -> None:
    assert join_url(store_url, "sessions/x1") == session_url
    assert split_session_url(session_url) == (store_url, "x1")


@pytest.mark.parametrize(
    "url", ["/a/dir", "x1", "s3://bucket/sessions/", "/a/sessions/x/y", "s3://b?r=1"]
)
def test_what_is_not_the_url_of_a_session_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="<store>/sessions/<session id>"):
        split_session_url(url)


# The probe


class Forgetful(MemoryStore):
    """Ignores conditions of one kind, as some servers do."""

    ignored = ""

    def create(self, key: str, data: Bytes) -> str:
        if self.ignored == "create":
            self.put(key, data)
        return super().create(key, data) if self.ignored != "create" else "version"

    def replace(self, key: str, data: Bytes, version: str) -> str:
        if self.ignored == "refuses":
            raise Conflict(key)
        if self.ignored != "replace":
            return super().replace(key, data, version)
        self.put(key, data)
        return "version"


@pytest.mark.parametrize(
    ("ignored", "what"),
    [("create", "If-None-Match"), ("replace", "If-Match"), ("refuses", "refused")],
)
def test_the_probe_refuses_a_store_that_ignores_conditions(ignored: str, what: str) -> None:
    store = Forgetful(SystemRuntime())
    store.ignored = ignored
    with pytest.raises(StoreNotConditional, match=what) as caught:
        probe_conditional(store, "sessions/", SystemRuntime().new_id)
    assert store.url in str(caught.value)
    assert store.list("").entries == []


class Hasty(MemoryStore):
    """Checks one kind of condition and then writes: two at once both find that it holds."""

    def __init__(self, hasty: str) -> None:
        super().__init__(SystemRuntime())
        self._hasty = hasty
        self._both_checked = threading.Barrier(2)

    def create(self, key: str, data: Bytes) -> str:
        if self._hasty != "create" or key in self._entries:
            return super().create(key, data)
        return self._write_late(key, data)

    def replace(self, key: str, data: Bytes, version: str) -> str:
        if self._hasty != "replace" or self._entries[key].version != version:
            return super().replace(key, data, version)
        return self._write_late(key, data)

    def _write_late(self, key: str, data: Bytes) -> str:
        self._both_checked.wait(DEADLINE)
        with self._lock:
            return self._write(key, data)


@pytest.mark.parametrize(
    ("hasty", "condition"), [("create", "If-None-Match"), ("replace", "If-Match")]
)
def test_the_probe_refuses_a_store_whose_conditions_are_not_atomic(
    hasty: str, condition: str
) -> None:
    store = Hasty(hasty)
    with pytest.raises(StoreNotConditional, match=rf"two writes at once.*{condition}"):
        probe_conditional(store, "sessions/", SystemRuntime().new_id)
    assert store.list("").entries == []


class LosesReplies(MemoryStore):
    """Applies each write, and then says what a repeated try of it would be told."""

    def create(self, key: str, data: Bytes) -> str:
        super().create(key, data)
        raise Conflict(key)

    def replace(self, key: str, data: Bytes, version: str) -> str:
        super().replace(key, data, version)
        raise Conflict(key)


def test_the_probe_knows_its_own_writes_when_their_replies_were_lost() -> None:
    store = LosesReplies(SystemRuntime())
    probe_conditional(store, "sessions/", SystemRuntime().new_id)
    assert store.list("").entries == []


# The directory


@pytest.fixture
def root(directory_url: str) -> Path:
    return Path(directory_url)


@pytest.fixture
def store(directory_url: str) -> DirectoryStore:
    return DirectoryStore(directory_url)


def test_looking_into_a_missing_directory_does_not_make_it(
    store: DirectoryStore, root: Path
) -> None:
    page = store.list("")
    assert (page.entries, page.truncated) == ([], False)
    with pytest.raises(ObjectNotFound):
        store.get("key")
    store.delete(["key"])
    store.close()
    assert not root.exists()


def test_versions_never_repeat_within_a_tick_of_the_clock(
    store: DirectoryStore,
) -> None:
    versions = []
    for _ in range(300):
        versions.append(store.create("key", b"same"))
        versions.append(store.replace("key", b"same", versions[-1]))
        store.put("key", b"same")
        versions.append(store.list("").entries[0].version)
        store.delete(["key"])
    assert len(set(versions)) == len(versions)


def test_a_version_is_newer_though_the_clock_went_back(store: DirectoryStore, root: Path) -> None:
    store.create("key", b"one")
    future = 4_000_000_000 * 10**9
    os.utime(root / "key", ns=(future, future))
    version = f"{future:x}"
    newer = store.replace("key", b"two", version)
    assert int(newer, 16) == future + 1
    store.put("key", b"three")
    assert int(store.list("").entries[0].version, 16) == future + 2


def test_the_files_of_the_system_and_of_the_store_are_no_objects(
    store: DirectoryStore, root: Path
) -> None:
    store.put("a/b", b"x")
    (root / "a" / ".nfs0001").touch()
    (root / ".DS_Store").touch()
    (root / "empty" / "folder").mkdir(parents=True)
    assert [e.key for e in store.list("").entries] == ["a/b"]
    assert store.list("", delimiter="/").prefixes == ["a/"]


def test_deleting_the_last_object_removes_its_folders(store: DirectoryStore, root: Path) -> None:
    store.put("a/b/c", b"x")
    store.put("a/d", b"x")
    store.delete(["a/b/c"])
    assert [p.name for p in (root / "a").iterdir()] == ["d"]
    store.delete(["a/d"])
    assert not (root / "a").exists()


def test_an_object_in_the_place_of_a_folder_is_told(store: DirectoryStore) -> None:
    store.put("a", b"x")
    with pytest.raises(StoreError, match="object and a folder"):
        store.put("a/b", b"x")
    with pytest.raises(ObjectNotFound):
        store.get("a/b")
    store.put("c/d", b"x")
    with pytest.raises(ObjectNotFound, match="folder"):
        store.get("c")
    store.delete(["c", "a/b"])
    assert [e.key for e in store.list("").entries] == ["a", "c/d"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_one_may_not_write_is_denied_by_name(store: DirectoryStore, root: Path) -> None:
    root.mkdir()
    root.chmod(0o500)
    with pytest.raises(StoreDenied, match=str(root)):
        store.put("key", b"x")
    assert store.list("").entries == []
    root.chmod(0o700)


@pytest.mark.parametrize(
    ("number", "kind", "advice"),
    [
        (errno.EACCES, StoreDenied, "owner and mode"),
        (errno.EROFS, StoreDenied, "owner and mode"),
        (errno.ENOSPC, StoreUnavailable, "Free up space"),
        (errno.EDQUOT, StoreUnavailable, "Free up space"),
        (errno.EIO, StoreUnavailable, "temporarily unavailable"),
        (errno.ENAMETOOLONG, StoreError, "/a/key"),
    ],
)
def test_errors_of_the_file_system_say_what_to_do(
    number: int, kind: type[StoreError], advice: str
) -> None:
    error = _translate(OSError(number, os.strerror(number)), "write", "/a/key")
    assert type(error) is kind
    assert "/a/key" in str(error)
    assert os.strerror(number) in str(error)
    assert advice in str(error)


def test_a_key_too_long_for_the_file_system_is_told(store: DirectoryStore) -> None:
    with pytest.raises(StoreError, match="too long"):
        store.put("x" * 300, b"x")


def test_without_hard_links_one_creator_wins_too(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: str, target: str) -> None:
        raise OSError(errno.EXDEV, "links stay within a folder here")

    monkeypatch.setattr("os.link", link)
    store.create("a/b", b"one")
    with pytest.raises(Conflict):
        store.create("a/b", b"two")
    store.upload("a/b", b"three")
    got = store.get("a/b")
    assert got is not None
    assert got.data == b"one"
    assert _leftovers(store) == []


def test_a_file_gone_stale_over_nfs_is_opened_again(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create("key", b"data")
    pread, tries = os.pread, []

    def stale_twice(file: int, length: int, offset: int) -> bytes:
        tries.append(file)
        if len(tries) < 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(file, length, offset)

    monkeypatch.setattr("os.pread", stale_twice)
    got = store.get("key")
    assert got is not None
    assert got.data == b"data"


def test_a_refused_write_leaves_no_temporary_file(store: DirectoryStore) -> None:
    version = store.create("key", b"one")
    with pytest.raises(Conflict):
        store.create("key", b"two")
    with pytest.raises(Conflict):
        store.replace("key", b"two", "1")
    with pytest.raises(ObjectNotFound):
        store.replace("other", b"two", version)
    store.upload("key", b"two")
    assert _leftovers(store) == []


def test_closing_leaves_nothing_but_the_objects(store: DirectoryStore, root: Path) -> None:
    store.put("key", b"x")
    store.list("")
    store.close()
    assert list((root / ".tmp").iterdir()) == []


def test_a_missing_store_without_a_temporary_folder_names_the_latter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(LocalDiskError, match=r"temporary folder.*TMPDIR"):
        DirectoryStore(tmp_path / "missing").list("")


def test_the_clock_starts_again_when_its_file_was_removed(
    store: DirectoryStore, root: Path
) -> None:
    store.put("key", b"x")
    before = store.list("").now
    for file in (root / ".tmp").iterdir():
        file.unlink()
    (root / ".tmp").rmdir()
    assert store.list("").now >= before
    store.close()


def test_what_a_killed_writer_left_is_never_seen_and_swept_a_day_later(
    store: DirectoryStore, root: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    uploading = f"store.upload('blob', Path({str(pipe)!r}))"
    with _child(uploading, root) as writer, pipe.open("wb", buffering=0) as file:
        file.write(bytes(300_000))  # far more than a pipe holds: some of it was stored
        writer.kill()
        writer.wait()
    assert store.list("").entries == []
    [left] = _leftovers(store)
    assert left.stat().st_size > 0
    DirectoryStore(root).list("")
    assert left.exists()
    os.utime(left, (0, left.stat().st_mtime - 90_000))
    DirectoryStore(root).list("")
    assert not left.exists()


def test_a_killed_process_gives_its_lock_back(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_locks, "_PATIENCE", 600.0)
    version = store.create("key", b"one")
    lock = "store._locks.folder('key')"
    holding = f"with store._locks.held({lock}): print(flush=True); sys.stdin.read()"
    with _child(holding, root) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        waiter = threading.Thread(target=store.replace, args=("key", b"two", version))
        waiter.start()
        waiter.join(0.2)
        assert waiter.is_alive()
        holder.send_signal(signal.SIGKILL)
        waiter.join(60)
    assert not waiter.is_alive()


def test_a_child_forked_under_a_lock_does_not_keep_it(store: DirectoryStore) -> None:
    version = store.create("key", b"one")
    read_end, write_end = os.pipe()
    with store._locks.held(store._locks.folder("key")):
        child = os.fork()
        if child == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(0)
    store.replace("key", b"two", version)
    os.close(write_end)
    os.close(read_end)
    os.waitpid(child, 0)


def test_a_listing_looks_only_at_the_files_it_returns(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        store.put(f"q/{number:02d}/record", b"x")
    (root / "q" / "05").rename(root / "q" / ".hidden")
    (root / "q" / "05").symlink_to("nowhere")  # cannot be stat'ed
    assert len(store.list("q/", after="q/06/record", limit=5).entries) == 5
    scanned: list[str] = []
    scandir: Callable[[str], object] = os.scandir

    def recording(folder: str) -> object:
        scanned.append(Path(folder).name)
        return scandir(folder)

    monkeypatch.setattr("os.scandir", recording)
    store.list("q/", after="q/17/record", limit=1)
    assert scanned == ["q", "17", "18", "19"]
    store.close()


STOPPED_AT_THE_LAST_STEP = """
import os, signal
step = os.{step}

def stopped(*arguments, **options):
    os.{step} = step
    os.kill(os.getpid(), signal.SIGSTOP)
    return step(*arguments, **options)

os.{step} = stopped
try:
    {write}
except Exception as error:
    print(type(error).__name__)
"""


@pytest.fixture
def stopped_child(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoppedChild]:
    """A process that is stopped where it holds the lock and has looked at the version."""
    monkeypatch.setattr(folder_locks, "_PATIENCE", 0.1)
    made: list[subprocess.Popen[bytes]] = []

    def make(step: str, write: str) -> subprocess.Popen[bytes]:
        made.append(_child(STOPPED_AT_THE_LAST_STEP.format(step=step, write=write), root))
        assert os.WIFSTOPPED(os.waitpid(made[-1].pid, os.WUNTRACED)[1])
        return made[-1]

    yield make
    for child in made:
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    ("step", "write"),
    [
        ("rename", "store.replace('key', b'late', {version!r})"),
        ("rename", "store.put('key', b'late')"),
        ("unlink", "store.delete(['key'])"),
    ],
)
def test_whoever_is_stopped_for_ever_with_a_lock_holds_up_nobody(
    store: DirectoryStore, stopped_child: StoppedChild, step: str, write: str
) -> None:
    version = store.create("key", b"one")
    stopped_child(step, write.format(version=version))
    version = store.replace("key", b"two", version)
    store.put("key", b"three")
    store.delete(["key"])
    store.create("key", b"four")
    assert [entry.key for entry in store.list("").entries] == ["key"]
    assert _leftovers(store) == []


def test_a_replacement_that_goes_on_after_its_lock_was_broken_is_refused(
    store: DirectoryStore, stopped_child: StoppedChild
) -> None:
    version = store.create("key", b"one")
    child = stopped_child("rename", f"store.replace('key', b'late', {version!r})")
    newer = store.replace("key", b"two", version)
    child.send_signal(signal.SIGCONT)
    assert child.communicate(timeout=60)[0] == b"Conflict\n"
    got = store.get("key")
    assert got is not None
    assert (got.data, got.version) == (b"two", newer)
    assert _leftovers(store) == []


def test_a_write_that_goes_on_after_its_lock_was_broken_takes_effect_then(
    store: DirectoryStore, stopped_child: StoppedChild
) -> None:
    version = store.create("key", b"one")
    child = stopped_child("rename", "store.put('key', b'late')")
    newer = store.replace("key", b"two", version)
    child.send_signal(signal.SIGCONT)
    assert child.communicate(timeout=60)[0] == b""
    got = store.get("key")
    assert got is not None
    assert got.data == b"late"
    assert int(got.version, 16) > int(newer, 16)


def test_a_deletion_that_goes_on_after_its_lock_was_broken_leaves_nothing(
    store: DirectoryStore, stopped_child: StoppedChild
) -> None:
    version = store.create("key", b"one")
    child = stopped_child("unlink", "store.delete(['key'])")
    store.replace("key", b"two", version)
    child.send_signal(signal.SIGCONT)
    assert child.communicate(timeout=60)[0] == b""
    assert store.list("").entries == []


# Links and other things that are no objects


@pytest.fixture
def precious(tmp_path: Path) -> Iterator[Path]:
    """A folder of somebody else's, which stays as it is whatever the test does."""
    folder = tmp_path / "precious"
    (folder / "deep").mkdir(parents=True)
    for file in (folder / "session.json", folder / "deep" / "file"):
        file.write_bytes(b"precious")
        os.utime(file, (0, 0))
    yield folder
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert files == {"session.json": b"precious", "deep/file": b"precious"}


def test_a_link_in_place_of_an_object_is_not_followed(
    store: DirectoryStore, root: Path, precious: Path
) -> None:
    store.put("a/b", b"x")
    (root / "a" / "link").symlink_to(precious / "session.json")
    (root / "a" / "folder").symlink_to(precious)
    os.mkfifo(root / "a" / "pipe")
    assert [entry.key for entry in store.list("").entries] == ["a/b"]
    assert store.list("a/", delimiter="/").prefixes == []
    for name in ("link", "folder", "pipe"):
        with pytest.raises(ObjectNotFound):
            store.get(f"a/{name}")
    with pytest.raises(ObjectNotFound):
        store.replace("a/link", b"y", "0")
    with pytest.raises(Conflict):
        store.create("a/link", b"y")
    store.delete(["a/b", "a/link", "a/folder", "a/pipe"])
    assert not (root / "a").exists()


def test_a_link_that_is_written_to_is_replaced_itself(
    store: DirectoryStore, root: Path, precious: Path
) -> None:
    store.put("a/b", b"x")
    (root / "a" / "link").symlink_to(precious / "session.json")
    store.put("a/link", b"y")
    got = store.get("a/link")
    assert got is not None
    assert got.data == b"y"


@pytest.mark.parametrize("use", [
    lambda store: store.get("sessions/x/session.json"),
    lambda store: store.put("sessions/x/session.json", b"x"),
    lambda store: store.create("sessions/x/other", b"x"),
    lambda store: store.upload("sessions/x/session.json", b"x"),
    lambda store: store.list("sessions/x/"),
    lambda store: store.delete(["sessions/x/session.json"]),
    lambda store: store.delete(["sessions/x/deep/file"]),
])  # fmt: skip
@pytest.mark.parametrize("where", ["sessions", "sessions/x"])
def test_a_link_in_place_of_a_folder_is_refused(
    store: DirectoryStore, root: Path, precious: Path, where: str,
    use: Callable[[DirectoryStore], object],
) -> None:  # fmt: skip
    link = root / where
    link.parent.mkdir(parents=True)
    link.symlink_to(precious)
    if where == "sessions":
        (precious / "x").symlink_to(".")
    with pytest.raises(StoreError, match=r"symbolic link.*Remove the link") as caught:
        use(store)
    assert f"{link} is" in str(caught.value)


@pytest.mark.parametrize("own", [".tmp", ".locks"])
def test_a_link_in_place_of_a_folder_of_the_stores_own_is_refused(
    store: DirectoryStore, root: Path, precious: Path, own: str
) -> None:
    root.mkdir()
    (root / own).symlink_to(precious)
    with pytest.raises(StoreError, match=rf"{own} is a symbolic link"):
        store.list("")
    with pytest.raises(StoreError, match=rf"{own} is a symbolic link"):
        {".tmp": store.create, ".locks": store.put}[own]("key", b"x")


def test_a_session_of_links_is_deleted_alone(
    store: DirectoryStore, root: Path, precious: Path
) -> None:
    """What a listing shows is what is deleted: nothing behind a link."""
    store.put("sessions/x/session.json", b"x")
    (root / "sessions" / "x" / "queue").symlink_to(precious)
    (root / "sessions" / "y").symlink_to(precious)
    entries = store.list("sessions/").entries
    assert [entry.key for entry in entries] == ["sessions/x/session.json"]
    store.delete(entry.key for entry in entries)
    assert store.list("sessions/", delimiter="/").prefixes == []


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    store = DirectoryStore(tmp_path / "link")
    store.put("a/b", b"x")
    assert [entry.key for entry in DirectoryStore(tmp_path / "real").list("").entries] == ["a/b"]


def _leftovers(store: DirectoryStore) -> list[Path]:
    own = [Path(store.url) / ".tmp", *Path(store.url).glob(".locks/*")]
    files = [file for folder in own if folder.is_dir() for file in folder.iterdir()]
    return [f for f in files if f.name != "lock" and not f.name.startswith("clock-")]


def _child(code: str, root: Path) -> subprocess.Popen[bytes]:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from starburst_executor.storage.directory import DirectoryStore\n"
        f"store = DirectoryStore({str(root)!r})\n"
        f"{code}\n"
    )
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

"""Local modules: which travel, how they are packed, and how they arrive."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import threading
import types
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starburst_executor.environment import local_modules
from starburst_executor.environment.local_modules import (
    Extra,
    Source,
    Tracker,
    build_archive,
    find_local_modules,
    unpack,
)
from starburst_executor.environment.shipped_modules import ORIGINS
from starburst_executor.errors import DamagedObject
from starburst_executor.protocol.payload import digest_of
from starburst_executor.serialization.pickling import dumps, loads


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on `sys.path`; what is imported from it is forgotten afterwards."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def imported(name: str) -> types.ModuleType:
    importlib.invalidate_caches()
    return importlib.import_module(name)


def found(*extra: Extra) -> dict[str, tuple[Path, ...]]:
    return {source.name: source.paths for source in find_local_modules(extra)}


def members(data: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [name for name in archive.namelist() if name != ORIGINS]


# --- which ------------------------------------------------------------------------


def test_an_imported_module_and_package_are_local(root: Path) -> None:
    file = write(root / "one_file.py")
    write(root / "a_package" / "__init__.py")
    write(root / "a_package" / "inner.py")
    imported("one_file")
    imported("a_package.inner")

    assert found()["one_file"] == (file,)
    assert found()["a_package"] == (root / "a_package",)
    assert "a_package.inner" not in found()


def test_what_is_installed_and_ourselves_and_main_stay_behind() -> None:
    import json

    assert np.__file__
    assert json.__file__
    assert (
        found()
        .keys()
        .isdisjoint({"numpy", "json", "pytest", "starburst_executor", "__main__", "sys", "os"})
    )


def test_this_test_module_is_local() -> None:
    assert Path(__file__).parents[1] in found()[__name__.partition(".")[0]]


def test_a_namespace_package_is_local(root: Path) -> None:
    write(root / "spacious" / "part.py")
    imported("spacious.part")

    assert found()["spacious"] == (root / "spacious",)


def test_of_a_namespace_only_the_local_directories_travel(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "lib" / "site-packages"
    write(installed / "shared" / "theirs.py")
    write(root / "shared" / "ours.py")
    monkeypatch.syspath_prepend(installed)
    imported("shared.ours")
    imported("shared.theirs")

    assert found()["shared"] == (root / "shared",)


def test_a_link_into_an_installation_stays_behind(root: Path, tmp_path: Path) -> None:
    target = write(tmp_path / "lib" / "dist-packages" / "linked.py")
    (root / "linked.py").symlink_to(target)
    imported("linked")

    assert "linked" not in found()


def test_a_module_in_a_zip_file_is_skipped(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "zipped.zip"
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("zipped.py", "x = 1")
        target.writestr("zipped_package/__init__.py", "")
    monkeypatch.syspath_prepend(archive)
    imported("zipped")
    imported("zipped_package")

    assert found().keys().isdisjoint({"zipped", "zipped_package"})


def test_odd_entries_of_sys_modules_do_no_harm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    odd: dict[str, object] = {
        "odd_none": None,
        "odd_object": object(),
        "odd_empty": types.ModuleType("odd_empty"),
        "odd_text": types.ModuleType("odd_text"),
        "odd_cwd": types.ModuleType("odd_cwd"),
    }
    odd["odd_text"].__path__ = "/"  # type: ignore[attr-defined]
    odd["odd_cwd"].__path__ = [""]  # type: ignore[attr-defined]
    for name, module in odd.items():
        monkeypatch.setitem(sys.modules, name, module)

    assert found().keys().isdisjoint(odd)


def test_a_lazy_module_is_not_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sleepy")

    def wake(name: str) -> object:
        raise AssertionError(name)

    module.__getattr__ = wake  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "sleepy", module)

    assert "sleepy" not in found()


def test_a_file_that_claims_a_path_travels_as_a_file(root: Path) -> None:
    file = write(root / "sixlike.py", "__path__ = []")
    imported("sixlike")

    assert found()["sixlike"] == (file,)


def test_a_module_travels_by_the_name_it_was_imported_as(root: Path) -> None:
    spec = importlib.util.spec_from_file_location("renamed", write(root / "original.py"))
    assert spec is not None
    sys.modules["renamed"] = importlib.util.module_from_spec(spec)
    [source] = [s for s in find_local_modules() if s.name == "renamed"]

    assert members(build_archive(source).data) == ["renamed.py"]


def test_an_extension_module_keeps_its_suffix(root: Path) -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (root / f"native{suffix}").write_bytes(b"machine code")
    write(root / "with_native" / "__init__.py")
    (root / "with_native" / f"inner{suffix}").write_bytes(b"machine code")

    archives = {
        source.name: members(build_archive(source).data)
        for source in find_local_modules(["native", "with_native"])
    }

    assert archives["native"] == [f"native{suffix}"]
    assert f"with_native/inner{suffix}" in archives["with_native"]


# --- extra ------------------------------------------------------------------------


def test_an_extra_may_be_a_name_a_module_or_a_path(root: Path, tmp_path: Path) -> None:
    named = write(root / "by_name.py")
    write(root / "by_dotted" / "__init__.py")
    write(root / "by_dotted" / "inner.py")
    file = write(tmp_path / "by_file.py")
    write(tmp_path / "by_folder" / "__init__.py")

    got = found("by_name", "by_dotted.inner", str(file), tmp_path / "by_folder", np.linalg)

    assert "by_name" not in sys.modules
    assert got["by_name"] == (named,)
    assert got["by_dotted"] == (root / "by_dotted",)
    assert got["by_file"] == (file,)
    assert got["by_folder"] == (tmp_path / "by_folder",)
    assert got["numpy"] == (Path(np.__file__).parent,)  # asked for, so it travels


def test_a_relative_path_is_taken_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "here" / "__init__.py")
    write(tmp_path / "single.py")
    monkeypatch.chdir(tmp_path / "here")

    got = found(".", "../single.py")

    assert got["here"] == (tmp_path / "here",)
    assert got["single"] == (tmp_path / "single.py",)


@pytest.mark.parametrize(
    ("extra", "error", "says"),
    [
        ("no_such_module_at_all", ModuleNotFoundError, "no_such_module_at_all"),
        ("json.no_such_part", ModuleNotFoundError, "json.no_such_part"),
        ("os.path.deeper", ModuleNotFoundError, "os.path.deeper"),
        ("no/such/file.py", ValueError, "no/such/file.py"),
        ("sys", ValueError, "'sys' cannot be shipped"),
        (sys, ValueError, "'sys' cannot be shipped"),
        ("__main__", ValueError, "'__main__' cannot be shipped"),
        ("starburst_executor.environment.local_modules", ValueError, "starburst_executor"),
        (types.ModuleType("made_by_hand"), ValueError, "made_by_hand"),
        ("", ValueError, "neither a module name nor a path"),
        ("not a name", ValueError, "not a name"),
    ],
    ids=repr,
)
def test_an_extra_that_cannot_travel_is_named_at_once(
    extra: Extra, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        find_local_modules([extra])
    with pytest.raises(error, match=says):
        Tracker(lambda digest, data: None, [extra])


def test_a_path_that_holds_no_module_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt")
    write(tmp_path / "data_only" / "table.csv")
    write(tmp_path / "with-hyphen.py")

    for name, says in [
        ("notes.txt", "not a .py file"),
        ("data_only", "no module in it"),
        ("with-hyphen.py", "nothing can import"),
    ]:
        with pytest.raises(ValueError, match=says):
            find_local_modules([tmp_path / name])


# --- packing ----------------------------------------------------------------------


def package(folder: Path) -> Source:
    write(folder / "__init__.py", "x = 1")
    write(folder / "inner" / "__init__.py")
    write(folder / "data" / "table.csv", "1,2")
    return Source(name=folder.name, paths=(folder,))


def test_data_files_travel_and_litter_stays_behind(tmp_path: Path) -> None:
    source = package(tmp_path / "tidy")
    for litter in [
        "__pycache__/a.pyc",
        "inner/__pycache__/b.pyc",
        ".git/config",
        ".venv/lib/x.py",
        ".hidden.py",
        "node_modules/m/index.js",
        "old.pyc",
        "myenv/pyvenv.cfg",
        "myenv/lib/y.py",
    ]:
        write(tmp_path / "tidy" / litter)

    assert members(build_archive(source).data) == [
        "tidy/__init__.py",
        "tidy/data/table.csv",
        "tidy/inner/__init__.py",
    ]


def test_the_same_files_give_the_same_archive(tmp_path: Path) -> None:
    source = package(tmp_path / "same")
    first = build_archive(source)

    os.utime(tmp_path / "same" / "__init__.py", (0, 0))
    (tmp_path / "same" / "__init__.py").chmod(0o700)
    second = build_archive(source)

    assert (second.digest, second.data) == (first.digest, first.data)
    assert first.digest == digest_of(first.data)


def test_links_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    source = package(tmp_path / "loop")
    (tmp_path / "loop" / "inner" / "up").symlink_to(tmp_path / "loop")
    (tmp_path / "loop" / "broken.py").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "elsewhere" / "more.py")
    (tmp_path / "loop" / "linked").symlink_to(tmp_path / "elsewhere")

    assert members(build_archive(source).data) == [
        "loop/__init__.py",
        "loop/data/table.csv",
        "loop/inner/__init__.py",
        "loop/linked/more.py",
    ]


def test_a_namespace_of_two_directories_is_one_archive(tmp_path: Path) -> None:
    write(tmp_path / "a" / "ns" / "x.py")
    write(tmp_path / "b" / "ns" / "y.py")
    source = Source(name="ns", paths=(tmp_path / "a" / "ns", tmp_path / "b" / "ns"))

    assert members(build_archive(source).data) == ["ns/x.py", "ns/y.py"]


def test_too_much_is_refused_and_the_biggest_is_named(tmp_path: Path) -> None:
    package(tmp_path / "small")
    package(tmp_path / "big")
    with (tmp_path / "big" / "model.bin").open("wb") as file:
        file.truncate(local_modules.UNPACKED_MAX)  # sparse: it costs no disk

    tracker = Tracker(Shipped(), [tmp_path / "small", tmp_path / "big"])
    with pytest.raises(ValueError, match=r"biggest is 'big': 64\.0 MiB in 4 files"):
        tracker.refresh()
    assert "small" in Tracker(Shipped(), [tmp_path / "small"]).refresh()


def test_two_that_are_too_much_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        write(package(tmp_path / name).paths[0] / "model.txt", "x" * 600_000)
    monkeypatch.setattr(local_modules, "find_local_modules", list)
    monkeypatch.setattr(local_modules, "UNPACKED_MAX", 1_000_000)

    with pytest.raises(ValueError, match="the local modules total"):
        Tracker(Shipped(), [tmp_path / "one", tmp_path / "two"]).refresh()


def test_files_that_come_and_go_while_packing_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = package(tmp_path / "busy")
    for i in range(3):
        write(tmp_path / "busy" / "out" / f"{i}.txt", "result")
    walk, size = local_modules._walk, local_modules._size

    def busy_walk(*args: Any) -> Iterator[tuple[str, Path]]:
        for name, path in walk(*args):
            if name == "out/0.txt":
                path.unlink(missing_ok=True)
            yield name, path

    def busy_size(path: Path) -> int:
        if path.name == "1.txt":
            path.unlink(missing_ok=True)
        if path.name == "2.txt":
            (tmp_path / "busy" / "out" / "3.txt").touch()
        return size(path)

    monkeypatch.setattr(local_modules, "_walk", busy_walk)
    monkeypatch.setattr(local_modules, "_size", busy_size)

    assert [m for m in members(build_archive(source).data) if "out" in m] == ["busy/out/2.txt"]


def test_a_directory_that_vanishes_while_packing_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = package(tmp_path / "busy")
    write(tmp_path / "busy" / "aside" / "x.txt")
    entries = local_modules._entries

    def busy_entries(folder: Path) -> list[Path]:
        if folder.name == "aside":
            shutil.rmtree(folder)
        return entries(folder)

    monkeypatch.setattr(local_modules, "_entries", busy_entries)

    assert "busy/__init__.py" in members(build_archive(source).data)


# --- keeping up -------------------------------------------------------------------


class Shipped:
    def __init__(self) -> None:
        self.digests: list[str] = []
        self.data: dict[str, bytes] = {}
        self.failures = 0

    def __call__(self, digest: str, data: bytes) -> None:
        assert digest_of(data) == digest
        if self.failures:
            self.failures -= 1
            raise OSError("no store")
        self.digests.append(digest)
        self.data[digest] = data


def test_a_new_import_is_shipped_once(root: Path) -> None:
    write(root / "early.py")
    imported("early")
    shipped = Shipped()
    tracker = Tracker(shipped)
    before = tracker.refresh()
    write(root / "late.py", "late = True")
    imported("late")

    after = tracker.refresh()

    assert "early" in before
    assert "late" not in before
    assert after == {**before, "late": after["late"]}
    assert shipped.digests.count(after["late"]) == 1
    assert tracker.refresh() is after
    assert len(shipped.digests) == len(set(after.values()))


def test_nothing_is_looked_at_while_nothing_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracker = Tracker(Shipped())
    tracker.refresh()
    scans: list[int] = []

    def counting() -> list[Source]:
        scans.append(1)
        return []

    monkeypatch.setattr(local_modules, "find_local_modules", counting)

    for _ in range(1000):
        tracker.refresh()
    assert scans == []

    monkeypatch.setitem(sys.modules, "brand_new", types.ModuleType("brand_new"))
    tracker.refresh()
    assert scans == [1]


def test_a_module_imported_anew_is_shipped_anew(root: Path) -> None:
    file = write(root / "again.py", "x = 1")
    imported("again")
    tracker = Tracker(Shipped())
    before = tracker.refresh()["again"]

    write(file, "x = 22")
    del sys.modules["again"]
    imported("again")

    assert tracker.refresh()["again"] != before


def text_of(tracker: Tracker, shipped: Shipped, name: str, member: str) -> str:
    with zipfile.ZipFile(io.BytesIO(shipped.data[tracker.refresh()[name]])) as archive:
        return archive.read(member).decode()


def reload(module: types.ModuleType) -> None:
    importlib.invalidate_caches()
    importlib.reload(module)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_each_reload_is_shipped(root: Path, times: int) -> None:
    file = write(root / "again.py", "x = 0")
    again = imported("again")
    shipped = Shipped()
    tracker = Tracker(shipped)
    tracker.refresh()

    for i in range(1, times + 1):
        write(file, f"x = {i} + 0 * {'1' * i}")  # of another size: .pyc go by the second
        reload(again)
        assert again.x == i
        assert text_of(tracker, shipped, "again", "again.py").startswith(f"x = {i} ")


def test_an_edit_without_a_reload_is_not_shipped_with_the_next_import(
    root: Path,
) -> None:
    write(root / "edited" / "__init__.py", "x = 1")
    write(root / "edited" / "inner.py", "y = 1")
    write(root / "edited" / "later.py", "z = 1")
    imported("edited.inner")
    shipped = Shipped()
    tracker = Tracker(shipped)
    before = tracker.refresh()["edited"]

    write(root / "edited" / "inner.py", "y = 2")
    write(root / "unrelated.py")
    imported("unrelated")
    assert tracker.refresh()["edited"] == before
    imported("edited.later")
    assert tracker.refresh()["edited"] == before
    write(root / "edited" / "added.py", "from edited import later")
    imported("edited.added")

    assert tracker.refresh()["edited"] != before
    assert text_of(tracker, shipped, "edited", "edited/inner.py") == "y = 1"
    assert text_of(tracker, shipped, "edited", "edited/added.py")


def test_a_reload_of_one_module_leaves_its_siblings_as_they_were(root: Path) -> None:
    write(root / "family" / "__init__.py")
    write(root / "family" / "one.py", "x = 1")
    write(root / "family" / "other.py", "x = 1")
    write(root / "family" / "table.csv", "1")
    one = imported("family.one")
    imported("family.other")
    shipped = Shipped()
    tracker = Tracker(shipped)
    tracker.refresh()

    write(root / "family" / "one.py", "x = 22")
    write(root / "family" / "other.py", "x = 22")
    write(root / "family" / "fresh.py", "x = 22")
    reload(one)

    assert text_of(tracker, shipped, "family", "family/one.py") == "x = 22"
    assert text_of(tracker, shipped, "family", "family/other.py") == "x = 1"
    assert text_of(tracker, shipped, "family", "family/fresh.py") == "x = 22"


def test_what_a_run_writes_beside_its_code_never_reaches_the_limit(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / "runs" / "__init__.py", "x = 1")
    module = imported("runs")
    shipped = Shipped()
    tracker = Tracker(shipped)
    tracker.refresh()

    with (root / "runs" / "results.bin").open("wb") as file:
        file.truncate(2 * local_modules.UNPACKED_MAX)
    write(root / "unrelated.py")
    imported("unrelated")
    tracker.refresh()
    write(root / "runs" / "__init__.py", "x = 22")
    reload(module)

    assert text_of(tracker, shipped, "runs", "runs/__init__.py") == "x = 22"
    assert members(shipped.data[tracker.refresh()["runs"]]) == ["runs/__init__.py"]


def test_a_module_whose_file_is_gone_still_travels(root: Path) -> None:
    file = write(root / "fleeting.py")
    imported("fleeting")
    tracker = Tracker(Shipped())
    before = tracker.refresh()["fleeting"]

    file.unlink()
    write(root / "unrelated.py")
    imported("unrelated")

    assert tracker.refresh()["fleeting"] == before


def test_a_module_of_the_same_name_from_elsewhere_is_shipped_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / "moved" / "__init__.py", "x = 1")
    write(root / "moved" / "old.py")
    imported("moved")
    shipped = Shipped()
    tracker = Tracker(shipped)
    tracker.refresh()

    write(tmp_path / "elsewhere" / "moved" / "__init__.py", "x = 2")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    del sys.modules["moved"]
    imported("moved")

    assert members(shipped.data[tracker.refresh()["moved"]]) == ["moved/__init__.py"]


def test_extras_travel_though_nobody_imported_them(tmp_path: Path) -> None:
    tracker = Tracker(Shipped(), [write(tmp_path / "unseen.py")])

    assert "unseen" in tracker.refresh()


def test_an_archive_that_could_not_be_shipped_is_tried_again(tmp_path: Path) -> None:
    shipped = Shipped()
    tracker = Tracker(shipped, [write(tmp_path / "unlucky.py")])
    shipped.failures = 1
    with pytest.raises(OSError, match="no store"):
        tracker.refresh()

    assert set(tracker.refresh().values()) == set(shipped.digests)


def test_whoever_refreshes_meanwhile_waits_for_the_shipping(tmp_path: Path) -> None:
    entered, release = threading.Event(), threading.Event()
    done: list[str] = []

    def slow(digest: str, data: bytes) -> None:
        entered.set()
        assert release.wait(60)
        done.append(digest)

    tracker = Tracker(slow, [write(tmp_path / "slow_one.py")])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(tracker.refresh)
        assert entered.wait(60)
        second = pool.submit(lambda: (tracker.refresh(), list(done)))
        release.set()
        digests, done_by_then = second.result()
        assert set(digests.values()) == set(done_by_then)
        assert first.result() == digests
    assert len(done) == len(set(done))


# --- on the worker ----------------------------------------------------------------


def test_a_function_of_a_shipped_module_runs_in_another_process(root: Path, tmp_path: Path) -> None:
    write(root / "sums" / "__init__.py")
    write(root / "sums" / "plus.py", "from sums_helper import one\ndef f(x): return x + one()\n")
    write(root / "sums_helper.py", "def one(): return 1\n")
    cargo = dumps(imported("sums.plus").f, lambda digest, data: None)
    path = [
        str(unpack(build_archive(source).data, tmp_path / "unpacked"))
        for source in find_local_modules()
        if source.name in ("sums", "sums_helper")
    ]
    script = (
        "import sys; from starburst_executor.serialization.pickling import loads\n"
        "sys.path[:0] = sys.argv[1:]\n"
        "print(loads(sys.stdin.buffer.read(), None)(41))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *path],
        input=cargo,
        stdout=subprocess.PIPE,
        check=True,
    )

    assert done.stdout == b"42\n"
    assert loads(cargo, lambda digest, size: None)(1) == 2


@pytest.mark.parametrize("same_machine", [True, False])
def test_a_package_finds_its_data_and_shows_its_path_wherever_it_arrives(
    root: Path, tmp_path: Path, same_machine: bool
) -> None:
    write(root / "tabled" / "__init__.py")
    write(root / "tabled" / "table.csv", "1,2")
    file = write(
        root / "tabled" / "reader.py",
        """
        import importlib.resources
        from pathlib import Path
        def read():
            return Path(__file__).with_name("table.csv").read_text()
        def resource():
            return importlib.resources.files("tabled").joinpath("table.csv").read_text()
        """,
    )
    imported("tabled.reader")
    [source] = [s for s in find_local_modules() if s.name == "tabled"]
    folder = unpack(build_archive(source).data, tmp_path / "unpacked")
    if not same_machine:
        shutil.rmtree(root)
    script = (
        "import sys; from starburst_executor.environment import shipped_modules\n"
        "shipped_modules.add_to_path(sys.argv[1:])\n"
        "from tabled import reader\n"
        "print(reader.read(), reader.resource(), reader.read.__code__.co_filename, reader.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, folder],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )

    here = file if same_machine else folder / "tabled" / "reader.py"
    assert done.stdout == f"1,2 1,2 {file} {here}\n"


def test_unpacking_gives_the_same_directory_each_time(tmp_path: Path) -> None:
    archive = build_archive(package(tmp_path / "src" / "pack"))
    digest, data = archive.digest, archive.data
    file = tmp_path / "pack.zip"
    file.write_bytes(data)

    first = unpack(data, tmp_path / "to")
    (first / "marker").touch()
    second = unpack(file, tmp_path / "to")

    assert first == second == tmp_path / "to" / digest
    assert (second / "marker").exists()
    assert (first / "pack" / "data" / "table.csv").read_text() == "1,2"
    assert [p.name for p in (tmp_path / "to").iterdir()] == [digest]


def test_many_may_unpack_at_once(tmp_path: Path) -> None:
    archive = build_archive(package(tmp_path / "src" / "pack"))
    digest, data = archive.digest, archive.data
    barrier = threading.Barrier(8)

    def one(_: int) -> bool:
        barrier.wait(60)
        return (unpack(data, tmp_path / "to") / "pack" / "__init__.py").is_file()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(8)))
    assert [p.name for p in (tmp_path / "to").iterdir()] == [digest]


def test_losing_the_race_to_unpack_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = build_archive(package(tmp_path / "src" / "pack"))
    digest, data = archive.digest, archive.data
    real = local_modules._extract

    def overtaken(data: bytes, draft: Path) -> None:
        real(data, draft)
        real(data, draft.parent / digest)

    monkeypatch.setattr(local_modules, "_extract", overtaken)

    assert unpack(data, tmp_path / "to") == tmp_path / "to" / digest
    assert [p.name for p in (tmp_path / "to").iterdir()] == [digest]


@pytest.mark.parametrize("name", ["../evil.py", "/evil.py", "a/../../evil.py", "..\\e"])
def test_an_archive_that_reaches_outside_is_refused(tmp_path: Path, name: str) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("fine.py", "")
        archive.writestr(name, "")

    with pytest.raises(DamagedObject, match="outside"):
        unpack(target.getvalue(), tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []
    assert not (tmp_path / "evil.py").exists()


def test_a_damaged_archive_is_recognised_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "big" / "__init__.py", "".join(f"x{i} = {i}\n" for i in range(999)))
    data = build_archive(Source(name="big", paths=(tmp_path / "big",))).data
    middle = 500
    flipped = data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]

    for damaged in (b"", b"junk", data[:-30], flipped):
        with pytest.raises(DamagedObject):
            unpack(damaged, tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []

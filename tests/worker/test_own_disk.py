"""A worker whose own disk is full or gone: its tasks go elsewhere, and it says why it leaves."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from starburst_executor import ExecutorBroken, LocalDiskError, StarburstExecutor
from starburst_executor.client import creation
from starburst_executor.launchers.local import LocalLauncher
from starburst_executor.worker.ipc import MESSAGE_MAX
from starburst_executor.worker.pool import ProcessPool, SlotsBroken
from tests.support.bench import PATIENCE, Bench, same
from tests.support.shop import UNHURRIED

pytestmark = pytest.mark.usefixtures("functions_travel_by_value")

LARGE = 2 * MESSAGE_MAX  # travels in a file
BLOB = 1 << 20  # is stored beside the record


# --- what a task may do to the folder, as a full disk or a cleaner would --------------


def remove_then(folder: str, act: Callable[[], object]) -> object:
    shutil.rmtree(folder)
    return act()


def return_blob() -> bytes:
    return b"1" * BLOB


def return_much() -> list[str]:
    return [f"{i}" for i in range(LARGE // 4)]


def raise_blob() -> None:
    raise LookupError(b"1" * BLOB)


def print_a_line() -> None:
    sys.stdout.write("a line\n")


def full_output() -> None:
    """Let what this process prints go to a device that is always full."""
    file = os.open("/dev/full", os.O_WRONLY)
    os.dup2(file, 1)


def print_in_vain() -> None:
    full_output()
    print_a_line()


def print_in_vain_and_say_so() -> None:
    full_output()
    try:
        print_a_line()
    except OSError as error:
        raise RuntimeError("could not print") from error


def write_in_vain() -> None:
    with open("/dev/full", "w") as file:  # noqa: PTH123
        file.write("no line")


# --- the pool -----------------------------------------------------------------------


def why_broken(bench: Bench) -> LocalDiskError:
    """What the pool says once it is broken; fails if a job ended instead."""
    pool = bench.slots
    assert isinstance(pool, ProcessPool)
    pool._thread.join(PATIENCE)
    with pytest.raises(SlotsBroken) as caught:
        pool.take()
    assert isinstance(caught.value.__cause__, LocalDiskError)
    return caught.value.__cause__


@pytest.mark.parametrize("act", [return_blob, return_much, raise_blob])
def test_a_result_that_finds_no_folder_any_more_ends_no_job(
    bench: Bench, act: Callable[[], object]
) -> None:
    bench.open()
    bench.start(remove_then, str(bench.spool), act)
    assert "No such file" in str(why_broken(bench))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("act", [print_in_vain, print_in_vain_and_say_so])
def test_what_a_task_prints_in_vain_is_no_error_of_the_task(
    bench: Bench, act: Callable[[], object]
) -> None:
    bench.open()
    bench.start(act)
    assert "No space left" in str(why_broken(bench))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_file_that_a_task_writes_in_vain_is_the_tasks_error(bench: Bench) -> None:
    bench.open()
    ended = bench.run(write_in_vain)
    assert ended.kind == "raised"


def test_a_child_that_cannot_be_started_for_want_of_a_folder_is_said(bench: Bench) -> None:
    bench.open()
    assert bench.result(same, 1) == 1
    shutil.rmtree(bench.spool)
    assert bench.run(os._exit, 1).kind == "crashed"  # and another child is needed
    assert "No such file" in str(why_broken(bench))


def test_arguments_that_find_no_folder_any_more_end_no_job(bench: Bench) -> None:
    bench.open()
    assert bench.result(same, 1) == 1
    shutil.rmtree(bench.spool)
    bench.start(same, return_much())
    assert "No such file" in str(why_broken(bench))


# --- whole workers ------------------------------------------------------------------


NO_TEMP = [
    sys.executable,
    "-P",
    "-c",
    (
        "import sys, tempfile; tempfile._candidate_tempdir_list = lambda: ['/none'];"
        "sys.argv[1:1] = ['worker'];"
        "from starburst_executor.cli.main import main; main()"
    ),
]


def test_a_worker_that_cannot_make_its_temp_folder_says_so_to_the_client(
    directory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(creation, "open_launcher", lambda *_: LocalLauncher(command=NO_TEMP))
    one = StarburstExecutor(1, store=directory_url, intervals=UNHURRIED)
    future = one.submit(same, 1)
    with pytest.raises(ExecutorBroken, match=r"(?s)3 workers .* left: this worker's temp folder"):
        future.result(PATIENCE)
    one.cleanup(force=True)


def remove_temp_folders(root: str) -> bytes:
    for folder in Path(root).glob("starburst-*"):
        shutil.rmtree(folder)
    return return_blob()


def test_workers_whose_temp_folder_goes_break_the_executor_and_fail_no_task(
    directory_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = tmp_path / "temp"
    root.mkdir()
    monkeypatch.setenv("TMPDIR", str(root))
    one = StarburstExecutor(1, store=directory_url, intervals=UNHURRIED)
    assert one.submit(same, 1).result(PATIENCE) == 1
    future = one.submit(remove_temp_folders, str(root))
    with pytest.raises(ExecutorBroken, match=r"left: this worker's temp folder .*starburst-"):
        future.result(PATIENCE)
    assert one.status().failed == 0
    one.cleanup(force=True)

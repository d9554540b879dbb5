"""Real file systems that are full, without inodes or read-only: of a worker, and of a store.

They take the right to mount one; what errors they give is tested without in `test_own_disk`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from starburst_executor import StarburstExecutor
from starburst_executor.protocol import records
from starburst_executor.protocol.manifest import WorkerState
from tests.support.shop import PATIENCE, UNHURRIED, Shop, task_of
from tests.support.tasks import Gate, double, until

pytestmark = pytest.mark.usefixtures("functions_travel_by_value")

BLOB = 1 << 20  # is stored beside the record


class Disk:
    """A small file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mounts: list[Path] = []
        folder.mkdir()
        self._mount(folder, "size=64m,nr_inodes=2000")

    def _mount(self, folder: Path, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("may not mount a file system here")
        self._mounts.append(folder)

    def fill(self) -> None:
        """Leave no room."""
        with suppress(OSError), (self.folder / "ballast").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def empty(self) -> None:
        """Make room again."""
        (self.folder / "ballast").unlink()

    def use_up_inodes(self) -> None:
        """Leave no room for another file, however small."""
        with suppress(OSError):
            for number in range(3000):
                (self.folder / f"ballast-{number}").touch()

    def turn_read_only(self) -> None:
        """Put a file system over the folder that is empty and read-only."""
        self._mount(self.folder, "ro")

    def close(self) -> None:
        for folder in reversed(self._mounts):
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    disk = Disk(folder)
    yield disk
    disk.close()


def make(length: int) -> bytes:
    return b"1" * length


def make_much(count: int) -> list[int]:
    return list(range(count, 2 * count))


def speak() -> None:
    sys.stdout.write("a line\n")


FAULTS: dict[str, Callable[[Disk], None]] = {
    "full": Disk.fill,
    "no inodes": Disk.use_up_inodes,
    "read-only": Disk.turn_read_only,
}
SUBMIT = {
    "argument": lambda lone: lone.submit(len, bytes(BLOB)),
    "result": lambda lone: lone.submit(make, BLOB),
    "function": lambda lone: lone.submit(lambda: BLOB),
    "reply": lambda lone: lone.submit(make_much, 50_000),
    "log": lambda lone: lone.submit(speak),
}


@pytest.mark.parametrize(
    ("fault", "what"),
    [(f, w) for f in FAULTS for w in SUBMIT if w != "log" or f == "full"],
)
def test_a_worker_whose_disk_fails_hands_back_and_leaves_whatever_it_was_to_write(
    lone: StarburstExecutor, disk: Disk, fault: str, what: str
) -> None:
    with closing(Shop(lone, disk.folder / "shop")) as shop:
        # What all of them take is here already, so that only what is tested fails.
        warm = [lone.submit(f, *a) for f, *a in ((len, ""), (make, 1), (make_much, 1), (speak,))]
        shop.open()
        for future in warm:
            future.result(PATIENCE)
        FAULTS[fault](disk)
        future = SUBMIT[what](lone)
        beat = shop.left()
    assert beat.state is WorkerState.BROKEN
    assert f"this worker's temp folder {shop.folder} is full or gone" in beat.reason
    task = task_of(lone, future)
    assert (task.state, task.losses) == (records.State.PENDING, 0)
    assert {past.how for past in task.past} <= {"handed back"}


def test_results_wait_for_a_directory_store_that_is_full(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "starburst_executor.coordination.autoscaler.Autoscaler._fill", lambda *_: None
    )
    gate = Gate(tmp_path / "gate")
    lone = StarburstExecutor(1, store=disk.folder / "store", intervals=UNHURRIED)
    with closing(Shop(lone, tmp_path / "shop")) as shop:
        held, large = lone.submit(gate.hold, 1), lone.submit(make, BLOB)
        shop.open()
        gate.await_arrivals()
        disk.fill()
        gate.open()
        until(lambda: "Free up space" in caplog.text, "the store is full")
        assert f"{disk.folder}/store" in caplog.text
        disk.empty()
        assert (held.result(PATIENCE), len(large.result(PATIENCE))) == (1, BLOB)
        assert lone.submit(double, 2).result(PATIENCE) == 4
        assert task_of(lone, held).past == ()
    lone.cleanup(force=True)

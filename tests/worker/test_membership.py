"""What a worker does, given who else is alive: a pure function."""

from __future__ import annotations

import pytest

from starburst_executor.protocol.manifest import Intervals, Limits, Manifest
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.worker.membership import Decision, decide

LIVE = ["w-0", "w-1", "w-2", "w-3", "w-4"]


def manifest(workers: int, min_workers: int = 0) -> Manifest:
    return Manifest(
        session_id="20250101-120000-aaaaaa", python="3.11", package="0", created=0, deadline=9e9,
        workers=workers, min_workers=min_workers, spec=WorkerSpec(), limits=Limits(),
        intervals=Intervals(),
    )  # fmt: skip


def decisions(workers: int, min_workers: int = 0, *, unfinished: bool = True) -> list[Decision]:
    return [decide(one, LIVE, manifest(workers, min_workers), unfinished) for one in LIVE]


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_of_too_many_workers_exactly_the_last_by_id_leave(workers: int) -> None:
    surplus = [one.surplus for one in decisions(workers)]
    assert surplus == [rank >= workers for rank in range(5)]


def test_a_second_worker_stays_beside_the_only_one_wanted_while_anything_is_unfinished() -> None:
    assert [one.surplus for one in decisions(1)] == [False, False, True, True, True]
    finished = decisions(1, unfinished=False)
    assert [one.surplus for one in finished] == [False, True, True, True, True]


def test_idle_workers_attend_to_unfinished_work_by_twos_or_as_many_as_are_kept() -> None:
    assert [one.attends for one in decisions(5)] == [True, True, False, False, False]
    assert [one.attends for one in decisions(5, 3)] == [True, True, True, False, False]
    assert not any(one.attends for one in decisions(5, 3, unfinished=False))


def test_no_more_workers_are_kept_than_are_wanted() -> None:
    assert [one.kept for one in decisions(2, 4)] == [True, True, False, False, False]


def test_workers_are_short_only_if_fewer_are_alive_than_are_kept() -> None:
    assert not any(one.short for one in decisions(5, 5))
    assert all(one.short for one in decisions(6, 6))


def test_a_worker_that_is_not_listed_ranks_by_its_id_all_the_same() -> None:
    assert decide("w-25", LIVE, manifest(5), True).rank == 3

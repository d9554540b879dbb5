"""In which order tasks begin, in virtual time: see `planner` for what is promised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from starburst_executor.protocol.manifest import Limits
from tests.simulation.kernel import EPOCH
from tests.simulation.world import Body, Settings, SimClient, Work, World


def begun(bodies: Sequence[Body]) -> list[int]:
    """Numbers of tasks in the order in which they first began."""
    return list(dict.fromkeys(int(body.label.split("-")[1]) for body in bodies))


def overtaken(order: Sequence[int]) -> int:
    """How many earlier tasks had at most not begun when a task began."""
    seen: set[int] = set()
    first = most = 0  # all below `first` have begun
    for number in order:
        most = max(most, number - first - sum(n < number for n in seen))
        seen.add(number)
        while first in seen:
            seen.remove(first)
            first += 1
    return most


def run(works: Sequence[Work], workers: int, seed: int = 1, **settings: Any) -> World:
    """All submitted at once, and run by so many workers that are there from the start."""

    def script(client: SimClient) -> None:
        client.create()
        client.submitter.announce(len(works))
        for work in works:
            client.submit([work])
            client.submitter.announce(-1)
        client.wait()
        client.exit()

    world = World(seed, Settings(workers=workers, checked=False, **settings))
    world.launcher.launch = lambda session_url, count: []  # type: ignore[method-assign]
    with world:
        client = world.client("c", script)
        for number in range(workers):
            world.start_worker(delay=1 + number / workers)
        world.run_until(lambda: client.dead, 10_000)
    return world


@pytest.mark.parametrize("seconds", [0.3, 1, 7])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_few_workers_begin_tasks_in_submission_order(workers: int, seconds: float) -> None:
    for seed in range(3):
        world = run([Work(seconds=seconds)] * 80, workers, seed)
        # A worker claims about a second of work at a time, and the next before that has ended.
        held = 2 * (math.ceil(1 / seconds) + 1)
        assert overtaken(begun(world.bodies)) <= held * (workers - 1), seed


@pytest.mark.parametrize("seconds", [0.3, 1, 3])
def test_four_workers_overtake_only_what_another_of_them_has_claimed(seconds: float) -> None:
    for seed in range(2):
        world = run([Work(seconds=seconds)] * 24, 4, seed)
        tasks = [task for _, task in sorted(world.tasks().items())]
        bodies = [(int(body.label.split("-")[1]), body) for body in world.bodies]
        for number, body in bodies:
            for earlier, later in bodies:
                if earlier < number and later.began > body.began:
                    assert later.worker != body.worker, seed
                    assert tasks[earlier].claimed - EPOCH < body.began, seed


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_fast_tasks_do_not_wait_behind_slow_ones_that_were_submitted_later(
    workers: int,
) -> None:
    for seed in range(4):
        works = [Work(seconds=1)] * 40 + [Work(seconds=300)] * 8
        world = run(works, workers, seed)
        first_slow = min(b.began for b in world.bodies if begun([b])[0] >= 40)
        late = [b for b in world.bodies if begun([b])[0] < 40 and b.began > first_slow]
        assert all(body.began < first_slow + 6 for body in late), seed


def test_what_was_sent_back_is_again_the_first_in_order() -> None:
    works = [Work(seconds=10)] * 100
    limits = Limits(idle_timeout=10_000)
    with World(3, Settings(workers=2, limits=limits, knows=False)) as world:
        world.launcher.launch = lambda session_url, count: []  # type: ignore[method-assign]

        def script(client: SimClient) -> None:
            client.create()
            client.submit(works)
            client.wait()

        world.client("c", script)
        leaver = world.start_worker("w-a", delay=1)
        world.start_worker("w-b", delay=1)
        world.run(65)
        held = {b.label for b in world.bodies if b.worker == "w-a" and b.began > 55}
        assert held
        leaver.stop("it got SIGTERM")
        world.run(65 + 25)
        assert {b.label for b in world.bodies if b.worker == "w-b" and b.began > 65} & held


@pytest.mark.parametrize(("workers", "tasks"), [(16, 1600), (100, 2000), (150, 2400)])
def test_many_workers_overtake_no_more_than_is_promised(workers: int, tasks: int) -> None:
    world = run([Work(seconds=1)] * tasks, workers)
    batch = max(batch.size for batch in world.ledger.batches())
    assert overtaken(begun(world.bodies)) <= 2 * workers * batch

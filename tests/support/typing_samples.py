"""What a type checker must find out, and what it must refuse; checked, never run.

Each `type: ignore` marks a mistake: with unused ones reported, a mistake that is not noticed is an
error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, as_completed
from typing import assert_type

from starburst_executor import StarburstExecutor, TaskFuture


def scale(value: int, factor: float = 2.0) -> str:
    return str(value * factor)


def choose(name: str, size: int, weight: float) -> list[str]:
    return [name] * int(size * weight)


class Account:
    def __init__(self, owner: str) -> None:
        self.owner = owner

    def holds(self, amount: int) -> bool:
        return amount < 10


def submit_keeps_result_types(executor: StarburstExecutor) -> None:
    future = executor.submit(scale, 3, factor=0.5)
    assert_type(future, TaskFuture[str])
    assert_type(future.result(), str)
    assert_type(future.exception(), BaseException | None)
    assert_type(executor.submit(Account, "me").result(), Account)
    assert_type(executor.submit(Account("me").holds, 3).result(), bool)
    assert_type(executor.submit(lambda: 1.5).result(), float)
    assert_type([f.result() for f in as_completed([future])], list[str])


def submit_checks_arguments(executor: StarburstExecutor) -> None:
    executor.submit(scale)  # type: ignore[call-arg]
    executor.submit(scale, "3")  # type: ignore[arg-type]
    executor.submit(scale, 3, 0.5, 7)  # type: ignore[call-arg]
    executor.submit(scale, 3, factor="half")  # type: ignore[arg-type]
    executor.submit(scale, 3, factors=0.5)  # type: ignore[call-arg]
    executor.submit(3)  # type: ignore[arg-type]


def map_keeps_result_types(executor: StarburstExecutor) -> None:
    assert_type(executor.map(scale, range(3)), Iterator[str])
    assert_type(executor.map(scale, [1], [0.5], timeout=3), Iterator[str])
    assert_type(executor.map(Account, {"me", "you"}, chunksize=2), Iterator[Account])
    assert_type(
        executor.map(choose, "ab", [1, 2], iter([0.5, 1.0]), buffersize=4),
        Iterator[list[str]],
    )
    assert_type(list(executor.map(lambda x: x * 0.5, range(3))), list[float])


def many(a: int, b: int, c: int, d: int, e: int, f: int, g: int) -> bytes:
    return bytes([a, b, c, d, e, f, g])


def map_takes_any_number_of_iterables(
    executor: StarburstExecutor, columns: list[list[int]]
) -> None:
    n = [1]
    assert_type(executor.map(many, n, n, n, n, n, n, n), Iterator[bytes])
    assert_type(executor.map(scale, *columns), Iterator[str])


def map_checks_arguments(executor: StarburstExecutor) -> None:
    executor.map(scale, ["3"])  # type: ignore[arg-type]
    executor.map(scale, [3], ["half"])  # type: ignore[arg-type]
    executor.map(scale, [3], [0.5], [7])  # type: ignore[arg-type]
    executor.map(choose, "ab")  # type: ignore[arg-type]
    executor.map(scale, 3)  # type: ignore[call-overload]
    executor.map(scale, range(3), timeout="soon")  # type: ignore[call-overload]
    executor.map(scale, range(3), workers=3)  # type: ignore[call-overload]


def the_rest_keeps_types(executor: StarburstExecutor) -> None:
    assert_type(executor.detach(), str)
    attached = StarburstExecutor.attach("20260131-120000-abcdef")
    assert_type(attached, StarburstExecutor)
    with attached as same:
        assert_type(same, StarburstExecutor)


def it_stands_in_for_any_executor(executor: StarburstExecutor) -> Executor:
    def doubled(pool: Executor, values: Iterable[int]) -> list[Future[int]]:
        return [pool.submit(lambda value: 2 * value, value) for value in values]

    doubled(executor, range(3))
    return executor


async def asyncio_keeps_types(executor: StarburstExecutor) -> None:
    loop = asyncio.get_running_loop()
    assert_type(await loop.run_in_executor(executor, scale, 3), str)
    assert_type(await asyncio.wrap_future(executor.submit(scale, 3)), str)

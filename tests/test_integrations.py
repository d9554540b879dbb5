"""Libraries that take an executor, or something like `map`, take this one.

They are imported by their tests alone: workers import this module too, for the functions in it.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import pytest

from starburst_executor import RemoteTraceback, StarburstExecutor
from tests.support.servers import S3Server
from tests.support.sessions import QUICK
from tests.support.tasks import Gate, add, fail, process_id, until


@pytest.fixture(params=["directory"])
def store(request: pytest.FixtureRequest, s3_env: Callable[..., None]) -> str:
    """The URL of a store: a directory, or what a test asks for instead."""
    if request.param == "directory":
        url: str = request.getfixturevalue("directory_url")
        return url
    server: S3Server = request.getfixturevalue(request.param)
    s3_env(server)
    return server.fresh_url()


on_s3_too = pytest.mark.parametrize("store", ["directory", "ministack"], indirect=True)


@pytest.fixture
def executor(store: str) -> Iterator[StarburstExecutor]:
    with StarburstExecutor(max_workers=2, store=store, intervals=QUICK) as executor:
        yield executor


@pytest.fixture
def gate(tmp_path: Path, executor: StarburstExecutor) -> Iterator[Gate]:
    """Opened before the executor waits for its tasks."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


# --- asyncio ---------------------------------------------------------------------


@on_s3_too
def test_run_in_executor_gives_results_and_exceptions(
    executor: StarburstExecutor,
) -> None:
    async def run() -> tuple[Any, ...]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(
            loop.run_in_executor(executor, add, 2, 5),
            loop.run_in_executor(executor, fail, "there"),
            loop.run_in_executor(executor, process_id),
            return_exceptions=True,
        )

    total, error, pid = asyncio.run(run())
    assert total == 7
    assert isinstance(error, ValueError)
    assert isinstance(error.__cause__, RemoteTraceback)
    assert pid != os.getpid()


@on_s3_too
def test_cancelling_who_awaits_cancels_the_pending_task(
    executor: StarburstExecutor, gate: Gate
) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        for i in range(2):
            executor.submit(gate.hold, i)
        await asyncio.to_thread(gate.await_arrivals, 2)  # no worker is free any more
        called = loop.run_in_executor(executor, gate.arrive, "called")
        wrapped = asyncio.wrap_future(executor.submit(gate.arrive, "wrapped"))

        async def wait_for(future: asyncio.Future[int]) -> int:
            return await future

        waiting = [asyncio.create_task(wait_for(one)) for one in (called, wrapped)]
        await asyncio.to_thread(executor.flush)
        for task in waiting:
            task.cancel()
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(end) for end in ends] == [asyncio.CancelledError] * 2

    asyncio.run(run())
    until(lambda: executor.status().cancelled == 2)
    gate.open()
    assert [outcome.state for outcome in executor.collect(wait=True)] == [
        *["completed"] * 2,
        *["cancelled"] * 2,
    ]
    assert len(gate.arrivals()) == 2


def test_a_time_out_cancels_the_pending_task(executor: StarburstExecutor, gate: Gate) -> None:
    async def run() -> None:
        for i in range(2):
            executor.submit(gate.hold, i)
        await asyncio.to_thread(gate.await_arrivals, 2)
        pending = executor.submit(gate.arrive)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(pending), timeout=0.05)
        assert pending.cancelled()

    asyncio.run(run())


def test_cancelling_who_awaits_lets_a_running_task_run(
    executor: StarburstExecutor, gate: Gate
) -> None:
    """As with the standard library's executors: what runs is not interrupted."""
    future = executor.submit(gate.hold, "kept")

    async def run() -> None:
        until(future.running, "running, as far as the client knows")
        waiting = asyncio.ensure_future(asyncio.wrap_future(future))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())
    gate.open()
    assert future.result(60) == "kept"


def test_a_failure_in_a_task_group_cancels_what_waits_there(
    executor: StarburstExecutor, gate: Gate
) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()

        async def call() -> None:
            await loop.run_in_executor(executor, gate.arrive, "never")

        async def go_wrong() -> None:
            await asyncio.to_thread(executor.flush)
            raise LookupError("nothing there")

        for i in range(2):
            executor.submit(gate.hold, i)
        await asyncio.to_thread(gate.await_arrivals, 2)
        async with asyncio.TaskGroup() as group:
            group.create_task(call())
            group.create_task(go_wrong())

    with pytest.raises(ExceptionGroup):
        asyncio.run(run())
    gate.open()
    until(lambda: executor.status().finished == 3)
    assert executor.status().cancelled == 1
    assert len(gate.arrivals()) == 2


def test_the_event_loop_runs_while_tasks_do(executor: StarburstExecutor) -> None:
    async def run() -> int:
        task = asyncio.wrap_future(executor.submit(time.sleep, 0.3))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.01)
            turns += 1
        return turns

    assert asyncio.run(run()) > 5


# --- dask ------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["processes", "threads"])
def test_dask_runs_a_graph(executor: StarburstExecutor, scheduler: str) -> None:
    import dask.config
    from dask.delayed import delayed

    leaves = [delayed(add)(i, 1) for i in range(10)]
    total = delayed(add)(*leaves)
    where = delayed(process_id)(total)
    with dask.config.set(scheduler=scheduler, pool=executor):
        assert total.compute() == sum(range(11))
        assert where.compute() != os.getpid()
    assert executor.status().completed > 0


def test_dask_raises_what_a_piece_raised(executor: StarburstExecutor) -> None:
    import dask.config
    from dask.delayed import delayed

    graph = delayed(fail)("cannot do it")
    with (
        dask.config.set(scheduler="processes", pool=executor),
        pytest.raises(ValueError, match="cannot do it"),
    ):
        graph.compute()


# --- scipy -----------------------------------------------------------------------


def test_scipy_evaluates_populations_and_intervals_by_map(
    executor: StarburstExecutor,
) -> None:
    import numpy as np
    from scipy.integrate import quad_vec  # type: ignore[import-untyped]
    from scipy.optimize import (  # type: ignore[import-untyped]
        differential_evolution,
        rosen,
    )

    options = {"updating": "deferred", "rng": 1, "maxiter": 3, "polish": False}
    bounds = [(-2, 2), (-2, 2)]
    here = differential_evolution(rosen, bounds, **options)
    there = differential_evolution(rosen, bounds, workers=executor.map, **options)
    assert there.fun == here.fun
    assert np.array_equal(there.x, here.x)
    integral, _ = quad_vec(np.cos, 0, np.pi / 2, workers=executor.map)
    assert integral == pytest.approx(1)


# --- adaptive --------------------------------------------------------------------


def test_adaptive_learns_a_function(executor: StarburstExecutor) -> None:
    import adaptive  # type: ignore[import-untyped]
    import numpy as np

    learner = adaptive.Learner1D(np.square, bounds=(-1, 1))
    adaptive.BlockingRunner(learner, npoints_goal=20, executor=executor, ntasks=3)
    assert learner.npoints >= 20
    assert all(y == x * x for x, y in learner.data.items())
    assert executor.submit(process_id).result() != os.getpid()  # it is open still


# --- emcee -----------------------------------------------------------------------


def log_probability(x: Any) -> float:
    return float(-0.5 * (x @ x))


def test_emcee_samples_as_it_does_here(executor: StarburstExecutor) -> None:
    import emcee  # type: ignore[import-untyped]
    import numpy as np

    def chain(pool: StarburstExecutor | None) -> Any:
        sampler = emcee.EnsembleSampler(8, 2, log_probability, pool=pool)
        sampler.random_state = np.random.RandomState(3).get_state()
        start = np.random.default_rng(1).normal(size=(8, 2))
        sampler.run_mcmc(start, 4)
        return sampler.get_chain()

    assert np.array_equal(chain(executor), chain(None))


# --- tqdm ------------------------------------------------------------------------


def test_tqdm_counts_results(executor: StarburstExecutor) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped]

    shown = io.StringIO()
    futures = [executor.submit(abs, -i) for i in range(20)]
    bar = tqdm(as_completed(futures), total=20, file=shown)
    assert sorted(future.result() for future in bar) == list(range(20))
    assert list(tqdm(executor.map(abs, range(7)), total=7, file=shown)) == [*range(7)]
    assert "20/20" in shown.getvalue()
    assert "7/7" in shown.getvalue()

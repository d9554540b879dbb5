"""What a run would cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from starburst_executor.costs.prices import Cost, Prices, spent, worker_hour
from starburst_executor.protocol.worker_spec import WorkerSpec

__all__ = ["Estimate", "estimate_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run would take and cost.

    Attributes:
        workers: Workers at once, as many as are wanted, needed and fit.
        waves: How often each of their slots is filled.
        seconds: From the start to the last result.
        hourly: Dollars an hour while all of them run.
        cost: What it comes to.
    """

    workers: int
    waves: int
    seconds: float
    hourly: float
    cost: Cost


# The requests that the protocol makes, as the table in docs/explanation/costs.md has them.
_TASK_WRITES = 5.0  # of a task stored on its own: 4 PUT, 1 LIST

_TASK_READS = 3.0

_BUSIEST_WRITES = 1.0  # a second and worker, however many tasks end in it

_WORKER_WRITES = 4 / 60  # a second; heartbeats, and a look at who lives

_WORKER_READS = 4 / 60

_CLIENT_WRITES = 13 / 60  # a second; listings by a client that waits

_CLIENT_READS = 1 / 60


def estimate_run(
    spec: WorkerSpec,
    prices: Prices,
    *,
    tasks: int,
    task_seconds: float,
    workers: int,
    fit: int | None = None,
    startup: float = 60.0,
    idle_timeout: float = 300.0,
    public_ip: bool = True,
) -> Estimate:
    """What a run of equal tasks would take and cost, nothing being lost or retried.

    Args:
        spec: The workers' size.
        prices: What to reckon with.
        tasks: How many.
        task_seconds: How long each takes.
        workers: Most workers at once.
        fit: How many the quota allows at once; None if that is not known.
        startup: Seconds from a worker's start, when it begins to cost, to its first task.
        idle_timeout: Seconds after which a worker with nothing to do leaves.
        public_ip: Whether workers have public addresses.

    Raises:
        ValueError: nothing to do, or no worker fits.
    """
    _check_run(tasks, task_seconds, workers, fit)
    needed = math.ceil(tasks / spec.slots)
    at_once = min(workers, needed, fit or workers)
    waves = math.ceil(tasks / (at_once * spec.slots))
    last = math.ceil((tasks - (waves - 1) * at_once * spec.slots) / spec.slots)
    busy = startup + waves * task_seconds
    idle = busy - task_seconds + min(idle_timeout, task_seconds)
    stays = [busy] * last + [idle] * (at_once - last)
    seconds = math.fsum(stays)
    # Tasks of one batch share their writes, up to one a second and worker.
    shared = min(_TASK_WRITES * tasks, _BUSIEST_WRITES * seconds + _TASK_WRITES)
    cost = spent(
        spec,
        prices,
        stays,
        writes=shared + _WORKER_WRITES * seconds + _CLIENT_WRITES * busy,
        reads=_TASK_READS * tasks + _WORKER_READS * seconds + _CLIENT_READS * busy,
        public_ip=public_ip,
    )
    return Estimate(
        workers=at_once,
        waves=waves,
        seconds=busy,
        hourly=at_once * worker_hour(spec, prices, public_ip=public_ip),
        cost=cost,
    )


def _check_run(tasks: int, task_seconds: float, workers: int, fit: int | None) -> None:
    if tasks < 1 or workers < 1 or not 0 <= task_seconds < math.inf:
        raise ValueError(
            f"{tasks} tasks of {task_seconds:g} s on {workers} workers: each must be positive"
        )
    if fit == 0:
        raise ValueError(
            "no worker fits within the quota while what runs now runs; "
            "`starburst-executor quota` shows it and can ask for more"
        )

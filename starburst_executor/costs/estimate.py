"""What a run would cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from starburst_executor.costs.prices import Cost, Prices, spent, worker_hour
from starburst_executor.protocol.worker_spec import WorkerSpec

__all__ = ["Estimate", "estimate_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """How long a run would take and what it would cost.

    Attributes:
        workers: Concurrent workers: as many as are requested, needed and fit.
        waves: How often each slot is filled.
        seconds: Time from the start to the last result.
        hourly: Dollars per hour while all of them run.
        cost: Total cost.
    """

    workers: int
    waves: int
    seconds: float
    hourly: float
    cost: Cost


# The protocol's requests, as tabulated in docs/explanation/costs.md.
_TASK_WRITES = 5.0  # for a task stored on its own: 4 PUT, 1 LIST

_TASK_READS = 3.0

_BUSIEST_WRITES = 1.0  # per second and worker, however many tasks end in it

_WORKER_WRITES = 4 / 60  # per second: heartbeats, and checking who is alive

_WORKER_READS = 4 / 60

_CLIENT_WRITES = 13 / 60  # per second: listings by a waiting client

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
    """Estimate time and cost of a run of equal tasks, assuming nothing is lost or retried.

    Args:
        spec: The workers' size.
        prices: Prices to apply.
        tasks: Number of tasks.
        task_seconds: Duration of each.
        workers: Maximum number of workers.
        fit: How many workers the quota allows; None if unknown.
        startup: Seconds from a worker's start, when billing begins, to its first task.
        idle_timeout: Seconds after which a worker with nothing to do leaves.
        public_ip: Whether workers have public addresses.

    Raises:
        ValueError: there is nothing to do, or no worker fits.
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
    # Tasks of one batch share their writes: at most one per second and worker.
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
            "no worker fits into what running tasks leave of the quota; "
            "`starburst-executor quota` shows it and can request more"
        )

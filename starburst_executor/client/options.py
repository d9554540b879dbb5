"""The arguments of `StarburstExecutor`, checked before any work starts."""

from __future__ import annotations

import getpass
import logging
import math
import numbers
import operator
import os
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import msgspec

from starburst_executor import config
from starburst_executor.environment.capture import Wishes
from starburst_executor.protocol.bounds import FOREVER
from starburst_executor.protocol.manifest import Intervals, Limits
from starburst_executor.protocol.task_names import label_of
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.runtime import Runtime
from starburst_executor.storage.base import Store

__all__ = [
    "Options",
    "check_session_id",
    "check_store_reachable",
    "cost_limits",
    "default_intervals",
    "deployment",
    "label",
    "launcher_name",
    "limits",
    "new_session_id",
    "owner",
    "scaled_workers",
    "with_region",
    "worker_count",
    "worker_spec",
]

log = logging.getLogger(__name__)

_MOST_WORKERS = 10_000  # anything beyond is more likely a typo


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The constructor's arguments with defaults filled in; checked on creation.

    Attributes:
        depth: How many sessions this one is nested in.
        spec: What a worker is; only the kind of its environment is known yet.
        wishes: What to install, if the environment is captured.
        limits: The session's limits.
        store: Where the session is kept, including the region.
        max_workers: Maximum number of workers at once.
        min_workers: Minimum.
        initializer: Called first in each process that runs tasks.
        initargs: Its arguments.
        name: Shown in lists of sessions.
        modules: Modules to ship to the workers.
        max_hourly_cost: Dollars an hour; None: no limit.
        cost_alert: Dollars in total; None: no alert.
        intervals: How often clients and workers poll; None: a default for the store.
    """

    depth: int
    spec: WorkerSpec
    wishes: Wishes
    limits: Limits
    store: str | Path
    max_workers: int
    min_workers: int
    initializer: Callable[..., object] | None
    initargs: tuple[Any, ...]
    name: str | None
    modules: Iterable[str | Path | ModuleType]
    max_hourly_cost: float | None
    cost_alert: float | None
    intervals: Intervals | None

    def __post_init__(self) -> None:
        _check_min_workers(self.min_workers, self.max_workers)
        _check_initializer(self.initializer, self.initargs)
        _check_name(self.name)
        _check_intervals(self.intervals)
        check_store_reachable(self.spec.launcher, self.store)


def worker_spec(
    *,
    launcher: str | None,
    cpu: float,
    memory: str,
    launch_type: Literal["FARGATE", "EC2"] | None,
    instance_type: str | None,
    use_spot: bool,
    spot_fallback: bool,
    region: str | None,
    slots: int,
) -> WorkerSpec:
    """What a worker is, apart from its environment."""
    spec = WorkerSpec(
        launcher=launcher_name(launcher),
        cpu=cpu,
        memory=memory,
        launch_type="FARGATE" if launch_type is None else launch_type,
        instance_type=instance_type,
        use_spot=use_spot,
        spot_fallback=spot_fallback,
        region=region,
        slots=slots,
    )
    _check_of_ecs(spec, launch_type)
    return spec


def limits(
    *,
    task_timeout: float | None,
    max_attempts: int,
    max_tasks_per_child: int | None,
    idle_timeout: float,
    session_timeout: float,
    absolute_timeout: float,
) -> Limits:
    """The limits of a session and its tasks."""
    return Limits(
        task_timeout=None if task_timeout is None else _seconds("task_timeout", task_timeout),
        max_attempts=_whole_number("max_attempts", max_attempts),
        max_tasks_per_child=None
        if max_tasks_per_child is None
        else _whole_number("max_tasks_per_child", max_tasks_per_child),
        idle_timeout=_seconds("idle_timeout", idle_timeout),
        session_timeout=_seconds("session_timeout", session_timeout),
        absolute_timeout=_seconds("absolute_timeout", absolute_timeout),
    )


def launcher_name(launcher: str | None) -> Any:
    """The given launcher, else the configured one."""
    return launcher or config.load().settings.launcher


def _whole_number(name: str, value: object) -> int:
    """A whole number of 1 or more."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    count = operator.index(value)
    if count < 1:
        raise ValueError(f"{name} must be 1 or more, not {value}")
    if name in ("max_workers", "workers") and count > _MOST_WORKERS:
        raise ValueError(f"{name}={count} is too large; at most {_MOST_WORKERS} are allowed")
    return count


def worker_count(value: int | None) -> int:
    """How many workers; by default one per CPU of this machine."""
    return (os.cpu_count() or 1) if value is None else _whole_number("max_workers", value)


def _check_min_workers(value: object, most: int) -> None:
    """Refuse anything but a number of workers from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"min_workers must be a whole number, not {value!r}")
    if not 0 <= value <= most:
        raise ValueError(f"min_workers={value} must be from 0 to max_workers, which is {most}")


def scaled_workers(value: object) -> int | None:
    """How many workers at once; None for "auto"."""
    if value == "auto":
        return None
    if isinstance(value, str):
        raise TypeError(f'workers must be a whole number or "auto", not {value!r}')
    return _whole_number("workers", value)


def deployment(spec: WorkerSpec, store_url: str) -> dict[str, Any] | None:
    """Where workers on ECS run, as stored in the session; None if not configured."""
    found = config.load_deployment() if spec.launcher == "ecs" else None
    return None if found is None else {**msgspec.structs.asdict(found), "store": store_url}


def _seconds(name: str, value: object) -> float:
    """A positive, finite number of seconds."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive number of seconds, not {value!r}")
    return min(number, FOREVER)


def cost_limits(max_hourly_cost: object, cost_alert: object) -> tuple[float | None, float | None]:
    """Dollars an hour, by default as configured, and dollars in total; None: no limit."""
    hourly = max_hourly_cost
    if hourly is None:
        hourly = config.load().settings.max_hourly_cost or None
    return _dollars("max_hourly_cost", hourly), _dollars("cost_alert", cost_alert)


def _dollars(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number of US dollars, not {value!r}")
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive number of US dollars, not {value!r}")
    return min(number, FOREVER)


def _check_initializer(initializer: object, initargs: object) -> None:
    """Refuse an initializer that is not callable, or arguments that are not a tuple."""
    if initializer is not None and not callable(initializer):
        raise TypeError(f"initializer must be callable, not {initializer!r}")
    if not isinstance(initargs, tuple):
        raise TypeError(
            f"initargs must be a tuple of arguments, such as (1, 2) or (1,), not {initargs!r}"
        )


def _check_name(name: object) -> None:
    """Refuse a name that is not a string."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a string or None, not {name!r}")


def label(value: object) -> str:
    """A label, normalized for storage."""
    if not isinstance(value, str):
        raise TypeError(f"label must be a string, not {value!r}")
    if not value.strip():
        raise ValueError(
            f"label={value!r} is empty; leave it out to show the function and arguments"
        )
    return label_of(value)


def check_session_id(session_id: object) -> None:
    """Refuse what cannot be the id of a session: it becomes part of a key."""
    if not isinstance(session_id, str):
        raise TypeError(f"session_id must be a string, as returned by `detach`, not {session_id!r}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", session_id):
        raise ValueError(
            f"{session_id!r} is not a session id, which looks like '20260131-120000-abcdef'; "
            "list_sessions() lists those in a store"
        )


def _check_intervals(intervals: object) -> None:
    """Refuse intervals that would make live workers look lost."""
    if intervals is None:
        return
    if not isinstance(intervals, Intervals):
        raise TypeError(f"intervals must be Intervals(...), or None, not {intervals!r}")
    for name in intervals.__struct_fields__:
        _seconds(f"intervals.{name}", getattr(intervals, name))
    if intervals.heartbeat > intervals.lease / 4:
        raise ValueError(
            f"intervals.heartbeat={intervals.heartbeat:g} must be at most a quarter of "
            f"intervals.lease={intervals.lease:g}, or live workers look lost"
        )


def with_region(store: str | Path, region: str | None) -> str | Path:
    """The store's URL including the region, which workers need."""
    text = str(store)
    if region is None or not text.startswith("s3://") or "region=" in text:
        return store
    return f"{text}{'&' if '?' in text else '?'}region={region}"


def check_store_reachable(launcher: str, store: str | Path) -> None:
    """Refuse workers that could not reach the store."""
    if launcher == "ecs" and not str(store).startswith("s3://"):
        raise ValueError(
            f'launcher="ecs" with store={str(store)!r}: workers on ECS cannot reach a directory '
            'on this machine. Use store="s3://bucket/prefix", or launcher="local"'
        )


def _check_of_ecs(spec: WorkerSpec, launch_type: str | None) -> None:
    """Refuse ECS options for local workers, and warn about sizes that have no effect on them.

    Args:
        spec: What a worker is.
        launch_type: As given by the caller.
    """
    if spec.launcher != "local":
        return
    given = _given(
        launch_type=launch_type,
        instance_type=spec.instance_type,
        use_spot=spec.use_spot or None,
        spot_fallback=spec.spot_fallback or None,
    )
    if given:
        raise ValueError(
            f'{", ".join(given)} {"needs" if len(given) == 1 else "need"} launcher="ecs": these '
            "options are for workers on AWS, but workers would run on this machine. Set "
            'launcher="ecs" or STARBURST_LAUNCHER=ecs (`starburst-executor setup` configures it), '
            "or leave them out"
        )
    sized = _given(
        cpu=None if spec.cpu == WorkerSpec().cpu else spec.cpu,
        memory=None if spec.memory == WorkerSpec().memory else spec.memory,
    )
    if sized:
        log.warning(
            "%s have no effect on this machine, which all its workers share: they size workers of "
            'launcher="ecs"',
            ", ".join(sized),
        )


def _given(**options: object) -> list[str]:
    return [f"{name}={value!r}" for name, value in options.items() if value is not None]


def new_session_id(runtime: Runtime) -> str:
    """An id that sorts by time and is easy to read out."""
    return f"{datetime.fromtimestamp(runtime.time(), UTC):%Y%m%d-%H%M%S}-{runtime.new_id(6)}"


def owner() -> str:
    """User and host, shown in lists of sessions."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):
        return f"{os.getuid()}@{socket.gethostname()}"  # in a container the user may have no name


def default_intervals(store: Store, spec: WorkerSpec) -> Intervals:
    """Listing a directory is free, so workers there poll every second at least.

    Workers on this machine serve a waiting user: on S3 too they poll often at first.
    """
    if not store.url.startswith("s3:"):
        return Intervals(poll_first=0.02, poll_last=1.0, look_first=0.01, look_last=1.0)
    return Intervals(poll_first=0.2) if spec.launcher == "local" else Intervals()

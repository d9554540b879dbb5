"""A `concurrent.futures.Executor` that survives the laptop.

Names are loaded when they are first asked for: the processes that run tasks import this package
too, and need none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starburst_executor.client.future import TaskFuture
    from starburst_executor.client.outcomes import TaskOutcome
    from starburst_executor.errors import (
        AccountDenied,
        AccountError,
        ConfigError,
        DamagedObject,
        ExecutorBroken,
        InitializerFailed,
        LaunchFailed,
        LocalDiskError,
        NestingError,
        NewerSchema,
        PackageError,
        RemoteError,
        RemoteTraceback,
        SerializationError,
        SessionDetached,
        SessionError,
        SessionNotFound,
        SessionTerminated,
        StarburstError,
        StoreDenied,
        StoreError,
        StoreMissing,
        StoreNotConditional,
        StoreUnavailable,
        TaskCrashed,
        TaskTimeout,
        VersionMismatch,
        WorkerLost,
    )
    from starburst_executor.executor import StarburstExecutor, list_sessions
    from starburst_executor.inspection.status import SessionStatus, SessionSummary
    from starburst_executor.protocol.manifest import Intervals

    __version__: str

__all__ = [
    "AccountDenied",
    "AccountError",
    "ConfigError",
    "DamagedObject",
    "ExecutorBroken",
    "InitializerFailed",
    "Intervals",
    "LaunchFailed",
    "LocalDiskError",
    "NestingError",
    "NewerSchema",
    "PackageError",
    "RemoteError",
    "RemoteTraceback",
    "SerializationError",
    "SessionDetached",
    "SessionError",
    "SessionNotFound",
    "SessionStatus",
    "SessionSummary",
    "SessionTerminated",
    "StarburstError",
    "StarburstExecutor",
    "StoreDenied",
    "StoreError",
    "StoreMissing",
    "StoreNotConditional",
    "StoreUnavailable",
    "TaskCrashed",
    "TaskFuture",
    "TaskOutcome",
    "TaskTimeout",
    "VersionMismatch",
    "WorkerLost",
    "__version__",
    "list_sessions",
]

_HOME = {
    "Intervals": "protocol.manifest",
    "SessionStatus": "inspection.status",
    "SessionSummary": "inspection.status",
    "StarburstExecutor": "executor",
    "TaskFuture": "client.future",
    "TaskOutcome": "client.outcomes",
    "list_sessions": "executor",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version  # slow to import, and seldom asked for

        return version("starburst-executor")
    home = import_module(f"{__name__}.{_HOME.get(name, 'errors')}")
    value = globals()[name] = getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Every exception that this package raises.

    StarburstError
    ├── SessionError
    │   ├── SessionNotFound            the store has no such session
    │   ├── SessionDetached            this executor was detached
    │   └── SessionTerminated          the session was terminated while in use
    ├── VersionMismatch                pickles of another Python minor version
    ├── SerializationError             (also TypeError) something cannot be pickled
    ├── StoreError
    │   ├── ObjectNotFound             no object under that key
    │   ├── Conflict                   a conditional write lost: read back and decide
    │   ├── StoreUnavailable           no definite answer; a write may have taken effect
    │   ├── StoreDenied                credentials or permissions
    │   ├── StoreMissing               the bucket or directory does not exist
    │   ├── StoreNotConditional        the store ignores conditions on writes
    │   └── DamagedObject              a stored object cannot be read
    │       └── NewerSchema            written by a newer version of this package
    ├── ConfigError                    (also ValueError) a setting, or the configuration file
    ├── AccountError                   an AWS service other than the store refused or did not answer
    │   └── AccountDenied              (also PermissionError) credentials or permissions
    ├── NestingError                   (also RuntimeError) nested too deep, or created by an import
    ├── LocalDiskError                 (also OSError) a file on this machine, outside of the store
    ├── PackageError                   a local package cannot be provided to the workers
    ├── TaskTimeout                    (also TimeoutError) over `task_timeout`
    ├── RemoteError                    stands in for a remote exception that cannot be rebuilt
    └── ExecutorBroken                 (also BrokenExecutor)
        ├── WorkerLost                 the worker died with the task running, `max_attempts` times
        ├── TaskCrashed                the process running the task died
        ├── LaunchFailed               no worker can be started until something is fixed
        └── InitializerFailed          `initializer` raised in a worker

Exceptions that tasks raise come back as themselves, with `RemoteTraceback` as their cause.
"""

from __future__ import annotations

from concurrent.futures import BrokenExecutor

__all__ = [
    "AccountDenied",
    "AccountError",
    "ConfigError",
    "Conflict",
    "DamagedObject",
    "ExecutorBroken",
    "InitializerFailed",
    "LaunchFailed",
    "LocalDiskError",
    "NestingError",
    "NewerSchema",
    "ObjectNotFound",
    "PackageError",
    "RemoteError",
    "RemoteTraceback",
    "SerializationError",
    "SessionDetached",
    "SessionError",
    "SessionNotFound",
    "SessionTerminated",
    "StarburstError",
    "StoreDenied",
    "StoreError",
    "StoreMissing",
    "StoreNotConditional",
    "StoreUnavailable",
    "TaskCrashed",
    "TaskTimeout",
    "VersionMismatch",
    "WorkerLost",
]


class StarburstError(Exception):
    """Base of all errors of this package: `except StarburstError` catches them all."""


class SessionError(StarburstError):
    """An error that concerns a session as a whole."""


class SessionNotFound(SessionError, LookupError):
    """The store has no session with that id; the message names the store and region searched."""


class SessionDetached(SessionError):
    """This executor was detached: its session carries on, but not through this executor."""


class SessionTerminated(SessionError):
    """The session was terminated (by `cleanup` or another client) while it was in use."""


class VersionMismatch(StarburstError):
    """Pickles from one Python minor version cannot be used in another; the message names both."""


class SerializationError(StarburstError, TypeError):
    """An object cannot be pickled or unpickled; the message names it and where it sits."""


class StoreError(StarburstError):
    """An error from the store."""


class ObjectNotFound(StoreError, LookupError):
    """No object is stored under the key."""


class Conflict(StoreError):
    """A conditional write was refused, perhaps due to its own earlier try: read back and decide."""


class StoreUnavailable(StoreError):
    """The store gave no definite answer (5xx, timeout, connection lost).

    A write that ends this way may or may not have taken effect, now or a little later.
    """


class StoreDenied(StoreError, PermissionError):
    """The store refused: credentials or a permission are missing. The message names which."""


class StoreMissing(StoreError):
    """The bucket or directory that the store's URL names does not exist."""


class StoreNotConditional(StoreError):
    """The store ignores `If-Match` or `If-None-Match`, so tasks could be lost or run twice."""


class DamagedObject(StoreError):
    """A stored object is truncated or not what its key says."""


class NewerSchema(DamagedObject):
    """A stored object was written by a newer version of this package."""


class ConfigError(StarburstError, ValueError):
    """A setting is wrong or missing; the message names it, its source, and what would be right."""


class AccountError(StarburstError):
    """An AWS service other than the store refused, failed or gave no answer."""


class AccountDenied(AccountError, PermissionError):
    """AWS refused: credentials or a permission are missing. The message names which."""


class NestingError(StarburstError, RuntimeError):
    """No executor may be created here: nested too deep, or while a worker imports for a task."""


class LocalDiskError(StarburstError, OSError):
    """A file on this machine's own disk, outside of the store, cannot be read or written."""


class PackageError(StarburstError):
    """A package that is installed here, or was requested, cannot be provided to the workers."""


class TaskTimeout(StarburstError, TimeoutError):
    """The task ran for longer than `task_timeout` and was stopped."""


class RemoteError(StarburstError):
    """Stands in for a remote exception whose class is unavailable here.

    Carries its name, text and traceback.
    """


class ExecutorBroken(StarburstError, BrokenExecutor):
    """Something around the task broke; the task itself did not raise."""


class WorkerLost(ExecutorBroken):
    """The worker that ran the task died or vanished, `max_attempts` times."""


class TaskCrashed(ExecutorBroken):
    """The process that ran the task died.

    The message has its exit code or signal, and the tail of its stderr.
    """


class LaunchFailed(ExecutorBroken):
    """No worker can be started, now or later, until something is fixed; the message says what."""


class InitializerFailed(ExecutorBroken):
    """The `initializer` raised in a worker, so no task can run there."""


class RemoteTraceback(Exception):
    """The traceback of a remote exception as text, set as the exception's `__cause__`.

    Not a `StarburstError`: it is never raised, only shown.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'

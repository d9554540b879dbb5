"""Every exception that this package raises.

    StarburstError
    ├── SessionError
    │   ├── SessionNotFound            no such session in the store that was looked in
    │   ├── SessionDetached            this object let go of the session
    │   └── SessionTerminated          the session was ended while it was in use
    ├── VersionMismatch                pickles of another Python minor version
    ├── SerializationError             (also TypeError) something cannot be pickled
    ├── StoreError
    │   ├── ObjectNotFound             no object under that key
    │   ├── Conflict                   a conditional write lost: read back and decide
    │   ├── StoreUnavailable           no plain answer; a write may have taken effect
    │   ├── StoreDenied                credentials or permissions
    │   ├── StoreMissing               the bucket or directory is not there
    │   ├── StoreNotConditional        the store ignores conditions on writes
    │   └── DamagedObject              an object that cannot be read
    │       └── NewerSchema            written by a newer version of this package
    ├── ConfigError                    (also ValueError) a setting, or the file of settings
    ├── AccountError                   an AWS service other than the store refused or did not answer
    │   └── AccountDenied              (also PermissionError) credentials or permissions
    ├── NestingError                   (also RuntimeError) an executor inside too many others, or while importing
    ├── PackageError                   a package of this machine cannot be brought to the workers
    ├── TaskTimeout                    (also TimeoutError) over `task_timeout`
    ├── RemoteError                    a remote exception that could not be brought back as itself
    └── ExecutorBroken                 (also BrokenExecutor)
        ├── WorkerLost                 the worker died, `max_attempts` times, with the task running
        ├── TaskCrashed                the task's own process died under it
        ├── LaunchFailed               no worker can be started until something is mended
        └── InitializerFailed          `initializer` raised in a worker

A user's own exception comes back as itself, with `RemoteTraceback` as its cause.
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
    """Base of all errors of this package: `except StarburstError` catches each of them."""


class SessionError(StarburstError):
    """Something about a session as a whole."""


class SessionNotFound(SessionError, LookupError):
    """No session of that id is in the store; the message names the store and region looked in."""


class SessionDetached(SessionError):
    """This executor was detached: its session goes on, but not through this object."""


class SessionTerminated(SessionError):
    """The session was terminated (by `cleanup` or another client) while it was in use."""


class VersionMismatch(StarburstError):
    """Pickles of one Python minor version cannot be used in another; the message names both."""


class SerializationError(StarburstError, TypeError):
    """An object cannot be pickled or unpickled; the message names it and where it sits."""


class StoreError(StarburstError):
    """Something about the store."""


class ObjectNotFound(StoreError, LookupError):
    """No object is stored under the key."""


class Conflict(StoreError):
    """A conditional write was refused, perhaps by an earlier try of itself: read back and decide."""


class StoreUnavailable(StoreError):
    """The store gave no plain answer (5xx, time-out, connection lost).

    A write that ends so may or may not have taken effect, now or a little later.
    """


class StoreDenied(StoreError, PermissionError):
    """The store refused for want of credentials or of a permission; the message names it."""


class StoreMissing(StoreError):
    """The bucket or directory that the store's URL names does not exist."""


class StoreNotConditional(StoreError):
    """The store ignores `If-Match` or `If-None-Match`, so tasks could be lost or run twice."""


class DamagedObject(StoreError):
    """A stored object is truncated or not what its key says."""


class NewerSchema(DamagedObject):
    """A stored object was written by a newer version of this package."""


class ConfigError(StarburstError, ValueError):
    """A setting is wrong or lacking; the message names it, where it came from and what would be right."""


class AccountError(StarburstError):
    """An AWS service other than the store refused, failed or gave no answer."""


class AccountDenied(AccountError, PermissionError):
    """AWS refused for want of credentials or of a permission; the message names it."""


class NestingError(StarburstError, RuntimeError):
    """An executor may not be made here: inside too many others, or while a worker imports for a task."""


class PackageError(StarburstError):
    """A package that is installed here, or was asked for, cannot be brought to the workers."""


class TaskTimeout(StarburstError, TimeoutError):
    """The task ran for longer than `task_timeout` and was stopped."""


class RemoteError(StarburstError):
    """Stands for a remote exception whose class cannot be had here; carries its name, text and traceback."""


class ExecutorBroken(StarburstError, BrokenExecutor):
    """Something around the task broke, as opposed to the task raising."""


class WorkerLost(ExecutorBroken):
    """The worker that ran the task died or vanished, as often as `max_attempts` allows."""


class TaskCrashed(ExecutorBroken):
    """The process that ran the task died: the message has its exit code or signal, and its stderr's tail."""


class LaunchFailed(ExecutorBroken):
    """No worker can be started, now or later, until something is mended; the message says what."""


class InitializerFailed(ExecutorBroken):
    """The `initializer` raised in a worker, so that no task can run there."""


class RemoteTraceback(Exception):
    """The traceback of a remote exception, as text; set as the exception's `__cause__`.

    Not a `StarburstError`: it is never raised, only shown.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'

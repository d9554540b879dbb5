"""The client's pickles: outgoing calls and incoming outcomes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from msgspec.structs import replace

from starburst_executor.client.future import Settled
from starburst_executor.environment.local_modules import Tracker
from starburst_executor.errors import VersionMismatch
from starburst_executor.protocol.keys import Batch, task_id
from starburst_executor.protocol.outcome import Failure, decode_outcome
from starburst_executor.protocol.patience import CALL_SECONDS, Consequence, consequence
from starburst_executor.protocol.payload import digest_of
from starburst_executor.protocol.records import Task
from starburst_executor.protocol.session import Session
from starburst_executor.serialization.exception_state import is_interrupt
from starburst_executor.serialization.exceptions import rebuild
from starburst_executor.serialization.namespace import definitions
from starburst_executor.serialization.pickling import dumps, loads, pack_call
from starburst_executor.serialization.signature import signature

__all__ = ["PayloadCodec", "python_version"]


def python_version() -> str:
    """The minor version whose pickles this process can read, such as "3.11"."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


class PayloadCodec:
    """Pickles calls for one session and decodes its outcomes.

    Args:
        session: The session.
        python: Minor version of the Python whose pickles the session holds.
        modules: Modules to ship in addition to those found.
    """

    def __init__(
        self, session: Session, python: str, modules: Iterable[str | Path | ModuleType]
    ) -> None:
        self._session = session
        self._python = python
        self._stored: set[str] = set()
        self._simple: WeakKeyDictionary[object, tuple[object, str, bytes]]
        self._simple = WeakKeyDictionary()
        self._defined: dict[str, object] = {}  # keeps their classes alive
        self._tracker = Tracker(self._ship, modules)

    def check_python(self) -> None:
        """Refuse to pickle or unpickle under another minor version.

        Raises:
            VersionMismatch: the versions differ; names both.
        """
        if self._python != python_version():
            raise VersionMismatch(
                f"session {self._session.id} was created with Python {self._python} and this is "
                f"Python {python_version()}: their pickles are not compatible. Attach with Python "
                f"{self._python}; status, logs, extend and cleanup work with any version."
            )

    def function(self, function: object, what: str = "callable") -> tuple[str, bytes]:
        """Digest and cargo of a callable, pickled again unless it certainly has not changed."""
        now = signature(function)
        if now is not None:
            then, digest, cargo = self._simple.get(function, (None, "", b""))
            if then == now:
                return digest, cargo
        cargo = dumps(function, self._keep, what)
        digest = digest_of(cargo)
        if now is not None:
            self._simple[function] = now, digest, cargo
        return digest, cargo

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bytes, bool]:
        """Cargo of a call's arguments, and whether it references no blob."""
        kept: list[str] = []

        def keep(digest: str, data: memoryview) -> None:
            kept.append(digest)
            self._keep(digest, data)

        return pack_call(args, kwargs, keep), not kept

    def modules(self) -> Mapping[str, str]:
        """Archives of the local modules that a worker needs, stored before this returns."""
        return self._tracker.refresh()

    def open_outcome(
        self, batch: Batch, position: int, task: Task, data: bytes, name: str = ""
    ) -> Settled:
        """A task's value or exception, which says what task it is of.

        Raises:
            StoreError: the store is away, and what the outcome consists of could not be read.
        """
        outcome = decode_outcome(data)
        where = _where(batch, position, task, name)
        reading = _Reading(self._session, self._defined)
        with definitions(reading.define):
            if outcome.failure is not None:
                settled = False, self._error(outcome.failure, reading, where)
            else:
                assert outcome.value is not None
                settled = self._value(outcome.value, reading, where)
        if reading.unread is not None:
            raise reading.unread
        return settled

    def _value(self, cargo: bytes, reading: _Reading, where: str) -> Settled:
        try:
            self.check_python()
            return True, loads(cargo, reading.fetch, "result")
        except BaseException as error:  # the user's own unpickling code runs here
            if is_interrupt(error):
                raise
            error.add_note(where)
            return False, error

    def _error(self, failure: Failure, reading: _Reading, where: str) -> BaseException:
        """The exception that a failure represents."""
        if self._python != python_version():
            failure = _without_pickle(failure)
        return rebuild(failure, reading.fetch, where)

    def _ship(self, digest: str, data: bytes) -> None:
        self._session.outlast(
            partial(self._session.put_content, "modules", data), seconds=CALL_SECONDS
        )

    def _keep(self, digest: str, data: memoryview) -> None:
        """Store a large buffer now: the caller may modify it after `submit`."""
        if digest not in self._stored:
            self._session.outlast(
                partial(self._session.put_blob, digest, data), seconds=CALL_SECONDS
            )
            self._stored.add(digest)


class _Reading:
    """What one outcome is read with; remembers that the store was away.

    Whatever unpickling makes of such an error, it says nothing about the outcome.

    Args:
        session: The session.
        defined: Callables unpickled before, by digest; more are added.

    Attributes:
        unread: Why something could not be read for now; None if nothing was missing.
    """

    def __init__(self, session: Session, defined: dict[str, object]) -> None:
        self._session = session
        self._defined = defined
        self.unread: Exception | None = None

    def fetch(self, digest: str, size: int) -> bytearray:
        """A blob."""
        with self._remembering():
            return self._session.get_blob(digest, size)

    def define(self, function: str) -> object:
        """Unpickle a callable of the session for the classes it defines."""
        if function not in self._defined:
            with self._remembering():
                cargo = self._session.get_function(function)
            with definitions(self.define):
                self._defined[function] = loads(cargo, self.fetch, "callable")
        return self._defined[function]

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if consequence(error) is Consequence.WAIT:
                self.unread = error
            raise


def _where(batch: Batch, position: int, task: Task, name: str) -> str:
    text = f"task {task_id(batch.lane, batch.number + position)} {name}".rstrip()
    return f"{text}, attempt {task.attempt} on worker {task.worker}" if task.worker else text


def _without_pickle(failure: Failure) -> Failure:
    return replace(failure, cargo=None)

"""A lease on starting workers: of all processes that could, one at a time does.

Clients and the first worker all notice that workers are missing, and each would start all of them.
So a process first writes who it is and how long it will take, and only then checks who is alive:

    one process                       launching                         another
      take: none there, or expired
      create / replace  ------------>  by, seconds  <-----------------  take: not expired, leave it
      check who is alive, start the rest
      give back  ------------------->  seconds until others             take: expired; check who is
                                       can see what was started         alive, start few or none

Time is the store's. If the holder dies, it has started some workers, and the lease expires by
itself. If it is held up for longer than it announced (a laptop asleep), it may start what another
has started meanwhile: at most what was missing when it checked, once. Surplus workers leave.
"""

from __future__ import annotations

import math

import msgspec

from starburst_executor.errors import Conflict, ObjectNotFound
from starburst_executor.protocol import codec
from starburst_executor.protocol.session import Session

__all__ = ["LaunchLease"]

_KEY = "launching"


@codec.decodable
class _Launching(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """What is stored: who holds the lease, for how many seconds from when it was written."""

    schema: int = codec.SCHEMA
    nonce: str
    by: str
    seconds: float


class LaunchLease:
    """One process's view of the right to start workers of a session.

    Args:
        session: The session.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._by = session.runtime.new_id(10)
        self._version: str | None = None
        self._until = -math.inf  # on the monotonic clock

    def take(self, seconds: float) -> bool:
        """Try to get the lease for `seconds` from now; return whether this process holds it."""
        if self._session.runtime.monotonic() + seconds <= self._until:
            return True
        try:
            got = self._session.store.get(self._session.key(_KEY))
        except ObjectNotFound:
            return self._write(seconds, None)
        assert got is not None
        now = codec.decode(got.data, _Launching, _KEY)
        if now.by != self._by and got.now - got.modified < now.seconds:
            return False
        return self._write(seconds, got.version)

    def give_back(self, seconds: float) -> None:
        """Let others take it in `seconds`, when they can see what was started."""
        self._write(seconds, self._version)
        self._until = -math.inf

    def _write(self, seconds: float, version: str | None) -> bool:
        began = self._session.runtime.monotonic()
        nonce = self._session.runtime.new_id(8)
        data = codec.encode(_Launching(nonce=nonce, by=self._by, seconds=seconds))
        store, key = self._session.store, self._session.key(_KEY)
        try:
            self._version = (
                store.create(key, data) if version is None else store.replace(key, data, version)
            )
        except (Conflict, ObjectNotFound):
            # Another was faster, or the session is being deleted; or this process's own earlier
            # try won and its answer was lost: then it finds at the next try that it holds it.
            return False
        self._until = began + seconds
        return True

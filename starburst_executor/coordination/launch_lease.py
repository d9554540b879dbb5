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

from starburst_executor.errors import Conflict, ObjectNotFound
from starburst_executor.protocol import codec
from starburst_executor.protocol.launching import LAUNCHING_KEY, Launching, read_launching
from starburst_executor.protocol.session import Session

__all__ = ["LaunchLease"]


_NOTE_AGAIN = 300.0  # seconds


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
        self._noted = -math.inf  # when this process last wrote why workers are missing
        self._shortage = ""  # as stored, when this process last read or wrote it

    def take(self, seconds: float) -> bool:
        """Try to get the lease for `seconds` from now; return whether this process holds it."""
        if self._session.runtime.monotonic() + seconds <= self._until:
            return True
        return self._is_free() and self._write(seconds)

    def give_back(self, seconds: float) -> None:
        """Let others take it in `seconds`, when they can see what was started."""
        self._write(seconds)
        self._until = -math.inf

    def note_shortage(self, shortage: str) -> None:
        """Tell `status` why workers are missing, or with "" that none are.

        Written when it changes, and again now and then so that it does not look outdated; only
        while no other process holds the lease, for that one notes its own.
        """
        now = self._session.runtime.monotonic()
        if shortage == self._shortage and not (shortage and now >= self._noted + _NOTE_AGAIN):
            return
        if not self._is_free():
            return
        before, self._shortage = self._shortage, shortage
        if self._write(max(0.0, self._until - now)):
            self._noted = now
        else:
            self._shortage = before

    def _is_free(self) -> bool:
        """Read what is stored; whether no other process holds the lease."""
        stored = read_launching(self._session)
        if stored is None:
            self._version = None
            return True
        self._version, self._shortage = stored.version, stored.value.shortage
        return stored.value.by == self._by or stored.age >= stored.value.seconds

    def _write(self, seconds: float) -> bool:
        began = self._session.runtime.monotonic()
        value = Launching(
            nonce=self._session.runtime.new_id(8),
            by=self._by,
            seconds=seconds,
            shortage=self._shortage,
        )
        store, key = self._session.store, self._session.key(LAUNCHING_KEY)
        data, version = codec.encode(value), self._version
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

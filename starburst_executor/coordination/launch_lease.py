"""Whose turn it is to start workers: of all who could, one at a time.

Clients and the first worker each see that workers lack, and each would start all that lack. So whoever
wants to writes first who it is and how long it will take, and looks again who lives after that:

    one launcher                      launching                         another
      take: nothing there, or its time is over
      create / replace  ------------>  by, seconds  <-----------------  take: not over yet, leave it
      look who lives, start the rest
      give back  ------------------->  seconds it takes until others    take: over; look who lives,
                                       can see what was started         start nothing, or little

Time is the store's own. A launcher that dies in its turn has started some, and its turn ends by itself.
One that is held up in its turn for longer than it said (a laptop asleep) may start what another has
started meanwhile: at most what lacked when it looked, once. Those too many leave.
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
    """What is stored: who has the turn, for how many seconds since it was written."""

    schema: int = codec.SCHEMA
    nonce: str
    by: str
    seconds: float


class LaunchLease:
    """The right to start workers of one session, as one process sees it.

    Args:
        session: The session.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._by = session.runtime.new_id(10)
        self._version: str | None = None
        self._until = -math.inf  # on the monotonic clock

    def take(self, seconds: float) -> bool:
        """Whether this process may start workers, for so many seconds from now."""
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
        """Let others have it in so many seconds: when they can see what was started."""
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
            # Another was faster, or the session is being deleted; or it is this one's own try whose
            # answer was lost: then it is still its turn when it looks again.
            return False
        self._until = began + seconds
        return True

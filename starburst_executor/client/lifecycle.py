"""How far one client is on its way from open to ended: the state machine, and nothing else.

                    detach              all is stored           the lane is given back
          OPEN -------------> DETACHING -------------> LEAVING -----------------------> DETACHED
          | |  <- - failed - -
          | |
          | +--- something broke ---> BROKEN        takes no more calls; nothing is ended yet
          |                             |
          | shutdown, dropped, exit     |
          v                             v
        ENDING <------------------------+           waits until every task has ended
          |
          |        cleanup and interrupts come here from any state above
          v
        TAKEN_DOWN ---> REMOVED                     the session's objects are gone too

The first thread to move a client to TAKEN_DOWN or LEAVING takes it down; all others wait, or have
nothing to do. `refusal` says why no more calls are accepted. The first reason stays, whatever
happens afterwards, so that users are told what went wrong first. Once the interpreter exits, an
open client accepts no calls either, but can still be detached or ended.

Two locks. `admission` is held while a call is being submitted and while submissions are stopped:
what was admitted before is then complete and can be waited for. The other guards the state itself,
for an instant at a time, so that a failure is never held up by a call that is being pickled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum, auto

from starburst_executor.errors import SessionDetached, SessionTerminated

__all__ = ["Lifecycle", "Phase"]


class Phase(Enum):
    """Where a client is; see the drawing above."""

    OPEN = auto()
    BROKEN = auto()
    DETACHING = auto()
    LEAVING = auto()
    DETACHED = auto()
    ENDING = auto()
    TAKEN_DOWN = auto()
    REMOVED = auto()


_DOWN = frozenset({Phase.LEAVING, Phase.DETACHED, Phase.TAKEN_DOWN, Phase.REMOVED})


class Lifecycle:
    """The state of one client.

    Attributes:
        admission: Held while a call is submitted; see the module.
        refusal: Why no more calls are taken; None while they are.
        exiting: Whether the interpreter came to its exit while this client was open.
    """

    def __init__(self) -> None:
        self.admission = threading.RLock()
        self.refusal: Exception | None = None
        self.exiting = False
        self._lock = threading.RLock()  # a signal handler may end it too
        self._phase = Phase.OPEN
        # Here and not in a global, which is gone when the last finalizers ask.
        self._untended = (Phase.OPEN, Phase.BROKEN, Phase.DETACHING)
        self._failure: Exception | None = None

    # --- asking -------------------------------------------------------------------------

    @property
    def detached(self) -> bool:
        """Whether the session was let go of, even if `detach` has not come to its end."""
        return isinstance(self.refusal, SessionDetached)

    @property
    def left(self) -> bool:
        """Whether `detach` has done all it does."""
        return self._phase is Phase.DETACHED

    @property
    def gone(self) -> bool:
        """Whether there is no session left to come back to."""
        return self._phase is Phase.REMOVED or isinstance(self.refusal, SessionTerminated)

    @property
    def taken_down(self) -> bool:
        """Whether this client was taken down, or is about to be."""
        return self._phase in _DOWN

    @property
    def untended(self) -> bool:
        """Whether no thread is about to end it. Takes no lock, since finalizers call it."""
        return not self.exiting and self._phase in self._untended

    def check_open(self) -> None:
        """Raise the refusal, if there is one."""
        if self.refusal is not None:
            # Without the traceback of the last time it was raised.
            raise self.refusal.with_traceback(None)

    def check_admission(self) -> None:
        """Raise unless calls are taken."""
        if self.exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        self.check_open()

    # --- transitions --------------------------------------------------------------------

    def fail(self, error: Exception) -> None:
        """Something broke; no more calls are taken."""
        with self._lock:
            self._failure = self._failure or error
            self.refusal = self.refusal or error
            if self._phase is Phase.OPEN:
                self._phase = Phase.BROKEN

    def begin_detach(self, refusal: SessionDetached) -> None:
        """`detach` begins.

        Raises:
            Exception: the refusal, if no calls were taken any more.
        """
        with self.admission, self._lock:
            self.check_open()
            self.refusal = refusal
            self._phase = Phase.DETACHING

    def undo_detach(self) -> None:
        """`detach` has failed: all is as before, unless it failed because something broke."""
        with self.admission, self._lock:
            if self._phase is Phase.DETACHING:
                self.refusal = self._failure
                self._phase = Phase.OPEN if self._failure is None else Phase.BROKEN

    def leave(self) -> None:
        """All is stored: `detach` takes this client down, and cannot be undone."""
        with self._lock:
            self._phase = Phase.LEAVING

    def note_left(self) -> None:
        """`detach` has done all it does."""
        with self._lock:
            self._phase = Phase.DETACHED

    def begin_end(self, start: Callable[[], None], refusal: Exception) -> bool:
        """Start what ends this client once all is done, unless it was detached or taken down.

        Raises:
            RuntimeError: from `start`, a thread's; then nothing has changed.
        """
        with self.admission, self._lock:
            if self._phase not in (Phase.OPEN, Phase.BROKEN, Phase.ENDING):
                return False
            before = self._phase, self.refusal
            self._phase, self.refusal = Phase.ENDING, self.refusal or refusal
            try:
                start()
            except RuntimeError:
                self._phase, self.refusal = before
                raise
            return True

    def end_here(self, refusal: Exception) -> None:
        """The caller itself ends this client: the interpreter starts no more threads."""
        with self.admission, self._lock:
            self.refusal = self.refusal or refusal
            if self._phase in (Phase.OPEN, Phase.BROKEN):
                self._phase = Phase.ENDING

    def claim(self, refusal: Exception | None = None) -> bool:
        """Whether the caller is the first to take this client down, and so the one to do it.

        Args:
            refusal: Given by callers that do not wait for what was submitted.
        """
        if refusal is None:
            return self._claim()
        with self.admission:
            self.refusal = self.refusal or refusal
            return self._claim()

    def _claim(self) -> bool:
        with self._lock:
            first = self._phase not in _DOWN
            if first:
                self._phase = Phase.TAKEN_DOWN
            return first

    def note_removed(self) -> None:
        """The session's objects are gone."""
        with self._lock:
            self._phase = Phase.REMOVED

    def note_exit(self) -> None:
        """The interpreter exits."""
        with self.admission, self._lock:
            self.exiting = self.refusal is None

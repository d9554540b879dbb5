"""How many workers there should be, and starting those that lack.

A client stores first and looks who lives after, and a leaving worker deletes its heartbeat first and
lists after: so one of the two sees the other.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from starburst_executor.errors import ExecutorBroken, LaunchFailed
from starburst_executor.launch import Launcher
from starburst_executor.ledger import affordable_workers
from starburst_executor.records import Manifest
from starburst_executor.session import Session

__all__ = ["Staff"]

log = logging.getLogger(__name__)

# So many workers in a row that end before their first heartbeat mean that none ever will work.
_STILLBORN_MAX = 3


class Staff:
    """Starts workers for one session as one client sees it.

    Args:
        session: The session.
        launcher: What starts them.
        manifest: How many, and of what size.
        broken: Called with an error when no worker can start.
    """

    def __init__(
        self,
        session: Session,
        launcher: Launcher,
        manifest: Manifest,
        broken: Callable[[Exception], None],
    ) -> None:
        self._session = session
        self._launcher = launcher
        self._broken = broken
        self._lock = threading.RLock()  # `broken` may close this again
        self._started: set[str] = set()  # by this client, and not yet heard of
        self._stillborn = 0
        self.manifest = manifest
        self.closed = False

    def need(self, unfinished: int) -> None:
        """Start as many workers as so many unfinished tasks lack."""
        with self._lock:
            if self.closed:
                return
            slots = self.manifest.spec.slots
            wanted = min(affordable_workers(self.manifest), -(-unfinished // slots))
            ended = self._launcher.ended(self._session.url)
            self._check_started(ended)
            known = self._launcher.live(self._session.url)
            if known is not None and len(known) >= wanted:
                return
            beats = self._session.beats()
            if beats.now >= self.manifest.deadline or self._stillborn >= _STILLBORN_MAX:
                return
            half = self.manifest.intervals.lease / 2
            fresh = {
                w for w, e in beats.entries.items() if beats.now - e.modified <= half
            }
            live = (fresh - ended) | (known or set())
            if len(live) < wanted:
                # One that was ended meanwhile needs none: they would only find that out themselves.
                self.manifest = self._session.check_open()
                self._launch(wanted - len(live))

    def close(self) -> None:
        """Start no more."""
        with self._lock:
            self.closed = True

    def _launch(self, count: int) -> None:
        try:
            started = self._launcher.launch(self._session.url, count)
        except OSError as error:
            broken = ExecutorBroken(
                f"workers of session {self._session.id} cannot be started: {error}"
            )
            broken.__cause__ = error
            self._broken(broken)
            return
        except LaunchFailed as error:
            self._broken(error)
            return
        if not started:  # the launcher says why
            return
        log.info("session %s: started workers %s", self._session.id, ", ".join(started))
        self._started.update(started)

    def _check_started(self, ended: set[str]) -> None:
        """Notice workers that ended before their first heartbeat: a hang must not say nothing."""
        for worker in sorted(self._started & ended):
            if self._session.heartbeat(worker) or self._session.heartbeat(
                worker, "ended"
            ):
                self._started.discard(worker)
                self._stillborn = 0
                continue
            self._session.check_open()  # else they had a good reason
            self._started.discard(worker)
            self._stillborn += 1
            tail = self._launcher.log_tail(self._session.url, worker)
            log.warning("worker %s ended before its first heartbeat: %s", worker, tail)
            if self._stillborn == _STILLBORN_MAX:
                self._broken(
                    ExecutorBroken(
                        f"{_STILLBORN_MAX} workers of session {self._session.id} in a row ended before "
                        f"their first heartbeat; the last, {worker}, printed:\n{tail}\n"
                        "Most likely they cannot reach the store or cannot import starburst_executor."
                    )
                )

"""The child processes of a worker: how they come and go."""

from __future__ import annotations

import logging
import math
import selectors
import sys
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

from starburst_executor.errors import LocalDiskError
from starburst_executor.runtime import Runtime
from starburst_executor.worker.child_handle import ChildHandle, Ruling

__all__ = ["LEAVE", "Children", "SlotsBroken"]

log = logging.getLogger(__name__)

STARTS_MAX = 5  # children in a row that die before they can read: then it is the machine

READY = 60.0  # seconds in which a child must be able to read; the initializer's time is free

PAUSE = 0.05  # seconds before the second try to start a child, then twice that, ...

LEAVE = 1.0  # seconds that idle children have for their own clean-up


class SlotsBroken(RuntimeError):
    """No jobs can be run here any more, whatever they are."""


class Children:
    """Starts and ends child processes; iterates over those that there are.

    Args:
        size: How many there are to be.
        folder: Where their files go.
        initializer: File with the cargo of (initializer, initargs), if there is one.
        runtime: The clock.
        jobs_max: How many jobs a child runs before it is replaced.
        memory_max: Bytes of memory that a child may keep between jobs before it is replaced.
        wake: Called when a child is to be buried.

    Attributes:
        spawn_at: No child is started before, on the monotonic clock.
    """

    def __init__(
        self,
        size: int,
        folder: Path,
        initializer: Path | None,
        runtime: Runtime,
        jobs_max: float,
        memory_max: float,
        wake: Callable[[], None],
    ) -> None:
        self._size = size
        self._folder = folder
        self._initializer = initializer
        self._runtime = runtime
        self._jobs_max = jobs_max
        self._memory_max = memory_max
        self._wake = wake
        self._all: list[ChildHandle] = []
        self._spawned = 0  # in all
        self._stillborn = 0  # in a row that died before they were ready
        self.spawn_at = -math.inf

    def __iter__(self) -> Iterator[ChildHandle]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, child: object) -> bool:
        return child in self._all

    # --- they come --------------------------------------------------------------------

    @property
    def lacking(self) -> bool:
        """Whether there are fewer than there are to be."""
        return sum(not child.leaving for child in self._all) < self._size

    def spawn(self) -> ChildHandle | None:
        """Start a child, which takes milliseconds; None if that must wait for a moment.

        Raises:
            SlotsBroken: too many in a row could not start.
            LocalDiskError: the files for its output cannot be made.
        """
        if self._runtime.monotonic() < self.spawn_at:
            return None
        self._spawned += 1
        stem = self._folder / f"child-{self._spawned}"
        outputs = (stem.with_suffix(".stdout"), stem.with_suffix(".stderr"))
        initializer = str(self._initializer or "")
        arguments = [str(self._folder), initializer, str(self._memory_max)]
        try:
            child = ChildHandle(outputs, arguments, self._jobs_max)
        except LocalDiskError:
            raise
        except OSError as error:  # out of processes, memory or descriptors
            self.count_stillborn(str(error))
            return None
        child.initialized = self._initializer is None
        child.ready_by = self._runtime.monotonic() + READY
        return child

    def add(self, child: ChildHandle) -> None:
        """Count a child among those that there are."""
        self._all.append(child)

    def running(self, key: Hashable) -> ChildHandle | None:
        """The child that runs a job."""
        for child in self._all:
            if child.sent and child.sent[0].job.key == key:
                return child
        return None

    def shorten_output(self) -> int:
        """Keep what running jobs print from filling the disk; the bytes left of the largest."""
        busy = [child for child in self._all if child.sent]
        try:
            return max((child.shorten_output() for child in busy), default=0)
        except OSError as error:
            log.warning("what tasks print cannot be cut to its end: %s", error)
            return 0

    def note_ready(self, child: ChildHandle) -> None:
        """A child has started and reads its messages."""
        child.ready = True
        self._stillborn = 0

    def count_stillborn(self, reason: str) -> None:
        """A child could not start, or died before it was ready.

        Raises:
            SlotsBroken: too many in a row did.
        """
        self._stillborn += 1
        if self._stillborn == STARTS_MAX:
            raise SlotsBroken(
                f"{STARTS_MAX} child processes in a row could not start; is"
                f" {sys.executable} complete, and is there memory left?\n{reason}"
            )
        pause = PAUSE * 2 ** (self._stillborn - 1)
        self.spawn_at = self._runtime.monotonic() + pause

    # --- they go ----------------------------------------------------------------------

    def condemn(self, child: ChildHandle, verdict: Ruling) -> None:
        """Have a child end at once, of what it is condemned for first."""
        if child.verdict is None:
            child.verdict = verdict
            if verdict != "gone":
                child.kill()  # else it is seen first how it ended
            self._wake()

    @property
    def dying(self) -> list[ChildHandle]:
        """Those that are to be buried."""
        return [child for child in self._all if child.verdict]

    def remove(self, child: ChildHandle) -> None:
        """Count a child no longer."""
        self._all.remove(child)

    def dismiss(self) -> None:
        """Ask idle children to leave, and kill the others."""
        for child in self._all:
            if child.ready and not child.sent:
                child.leave()
            else:
                child.kill()

    def reap(self) -> None:
        """Wait a moment for those that leave, then kill all that are left."""
        self._wait_for_ends()
        for child in self._all:
            child.kill()  # those that did not leave, and what others left running
            child.reap()

    def clear(self) -> None:
        """Close their files; there are none any more."""
        for child in self._all:
            child.close()
        self._all.clear()

    def _wait_for_ends(self) -> None:
        until = self._runtime.monotonic() + LEAVE
        with selectors.DefaultSelector() as lives:
            for child in self._all:
                lives.register(child.life, selectors.EVENT_READ)
            while lives.get_map():
                patience = until - self._runtime.monotonic()
                if patience <= 0:
                    return
                for key, _ in lives.select(patience):
                    lives.unregister(key.fileobj)

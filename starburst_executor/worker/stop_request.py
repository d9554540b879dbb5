"""Why a worker should leave, whoever says so."""

from __future__ import annotations

from starburst_executor.runtime import Signal

__all__ = ["StopRequest"]


class StopRequest:
    """The first reason to leave, and whether this worker could run tasks at all.

    Args:
        signal: Wakes the worker.
    """

    def __init__(self, signal: Signal) -> None:
        self._signal = signal
        self.reason: str | None = None
        self.broken = False  # no task can be run here

    def make(self, reason: str, *, broken: bool = False) -> None:
        """Have the worker hand back and leave soon; may be called on any thread."""
        self.broken = self.broken or broken
        self.reason = self.reason or reason
        self._signal.set()

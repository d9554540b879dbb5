"""Retrying calls to a store that reports conflicts or is unavailable for a while."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
)

from starburst_executor.errors import Conflict, StoreUnavailable
from starburst_executor.runtime import Runtime

__all__ = ["Patience"]

T = TypeVar("T")

# Hours of work may depend on a store that is briefly unavailable: 70 attempts, randomly up to
# 10 s apart, take about five minutes.
_TRIES = 70
_LONGEST_PAUSE = 10.0

log = logging.getLogger(__name__)


class Patience:
    """Retries idempotent calls for about five minutes.

    Args:
        runtime: Waiting and randomness.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def patiently(self, once: Callable[[], T]) -> T:
        """Retry an idempotent call until the store answers, for about five minutes."""
        try:
            return once()
        except StoreUnavailable:
            return self._retrying(StoreUnavailable)(once)

    def through_conflicts(self, once: Callable[[], T]) -> T:
        """Retry on conflicts too, with full jitter that grows with their number."""
        try:
            return once()
        except (Conflict, StoreUnavailable):
            return self._retrying(Conflict, StoreUnavailable)(once)

    def _retrying(self, *kinds: type[Exception]) -> Retrying:
        return Retrying(
            retry=retry_if_exception_type(kinds),
            wait=self._full_jitter,
            stop=stop_after_attempt(_TRIES),
            sleep=self._pause,
            before_sleep=_note_retry,
            reraise=True,
        )

    def _full_jitter(self, state: RetryCallState) -> float:
        ceiling = min(_LONGEST_PAUSE, 0.02 * 2.0 ** min(state.attempt_number, 20))
        return self.runtime.random.uniform(0, ceiling)

    def _pause(self, seconds: float) -> None:
        self.runtime.signal().wait(seconds)


def _note_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.debug("try %d: %s", state.attempt_number, error)

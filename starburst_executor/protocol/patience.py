"""What an error of the store means for a client, and how long the store is waited for.

    WAIT      away for now, or refusing for now      try again, and tell people now and then
    DAMAGE    one object is gone or unreadable       what depends on it fails, and nothing else
    END       it cannot be put right by waiting      whoever needs the store ends

What is not understood counts as away. Every wait has an end. What a worker does about an error is
decided in `worker.faults`.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from enum import Enum, auto
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
)

from starburst_executor.errors import (
    Conflict,
    DamagedObject,
    LocalDiskError,
    NewerSchema,
    ObjectNotFound,
    StarburstError,
    StoreDenied,
    StoreError,
    StoreMissing,
    StoreNotConditional,
    StoreUnavailable,
)
from starburst_executor.formatting import duration
from starburst_executor.runtime import Runtime, Signal

__all__ = ["CALL_SECONDS", "Consequence", "Outage", "Patience", "consequence"]

T = TypeVar("T")

# Hours of work may depend on a store that is briefly unavailable: 70 attempts, randomly up to
# 10 s apart, take about five minutes.
_TRIES = 70
_LONGEST_PAUSE = 10.0

CALL_SECONDS = 300.0
"""How long somebody who called and waits for the answer waits for the store."""

# Credentials that expire at night are renewed in the morning, and then everything goes on.
_OUTAGE_SECONDS = 86_400.0

_WARN_FROM = 8  # tries, some five seconds after the first
_WARN_AGAIN = 60.0  # seconds

log = logging.getLogger(__name__)


class Consequence(Enum):
    """What an error means; see the module."""

    WAIT = auto()
    DAMAGE = auto()
    END = auto()


_CONSEQUENCES: tuple[tuple[type[Exception], Consequence], ...] = (
    (NewerSchema, Consequence.END),
    (StoreMissing, Consequence.END),
    (StoreNotConditional, Consequence.END),
    (DamagedObject, Consequence.DAMAGE),
    (ObjectNotFound, Consequence.DAMAGE),
    (StoreError, Consequence.WAIT),
    (LocalDiskError, Consequence.WAIT),
)
"""The first class that fits counts; what fits none ends whoever met it."""


def consequence(error: BaseException) -> Consequence:
    """What an error means for whoever met it."""
    return next((what for kind, what in _CONSEQUENCES if isinstance(error, kind)), Consequence.END)


class Patience:
    """Retries idempotent calls, and says now and then what is waited for.

    Args:
        runtime: Waiting and randomness.
        what: What the calls concern, for warnings.
        remedy: What to do about a refusal, for warnings.
    """

    def __init__(self, runtime: Runtime, what: str, remedy: str = "this is put right") -> None:
        self.runtime = runtime
        self._what = what
        self._remedy = remedy
        self._warned: dict[type[Exception], float] = {}
        self._warning = threading.Lock()

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

    def outlast(
        self,
        once: Callable[[], T],
        seconds: float = _OUTAGE_SECONDS,
        stop: Signal | None = None,
    ) -> T:
        """Retry an idempotent call through whatever may pass, also a refusal; by default for a day.

        Args:
            once: The call.
            seconds: For how long.
            stop: Once set, the last error is raised.
        """
        outage = Outage(self, seconds, self.runtime.monotonic())
        stop = stop or self.runtime.signal()
        tries = 0
        while True:
            try:
                return once()
            except StarburstError as error:
                if stop.is_set() or consequence(error) is not Consequence.WAIT:
                    raise
                outage.note(error)
            tries += 1
            stop.wait(self._full_jitter(tries))

    def warn(self, error: Exception) -> None:
        """Say what is waited for, and what to do about it; at most once a minute for its kind."""
        now = self.runtime.monotonic()
        with self._warning:
            if now < self._warned.get(type(error), -math.inf) + _WARN_AGAIN:
                return
            self._warned[type(error)] = now
        text = str(error).rstrip(".")
        if isinstance(error, StoreDenied):
            advice = f"Nothing is lost: it goes on by itself once {self._remedy}."
        else:
            advice = "Nothing is lost: it is tried again until it succeeds."
        log.warning("%s: %s. %s", self._what, text, advice)

    def _retrying(self, *kinds: type[Exception]) -> Retrying:
        return Retrying(
            retry=retry_if_exception_type(kinds),
            wait=lambda state: self._full_jitter(state.attempt_number),
            stop=stop_after_attempt(_TRIES),
            sleep=self._pause,
            before_sleep=self._note_retry,
            reraise=True,
        )

    def _full_jitter(self, tries: int) -> float:
        ceiling = min(_LONGEST_PAUSE, 0.02 * 2.0 ** min(tries, 20))
        return self.runtime.random.uniform(0, ceiling)

    def _pause(self, seconds: float) -> None:
        self.runtime.signal().wait(seconds)

    def _note_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.debug("try %d: %s", state.attempt_number, error)
        if isinstance(error, StoreUnavailable) and state.attempt_number >= _WARN_FROM:
            self.warn(error)


class Outage:
    """One loop's view of a store that may be away: since when, and whether to wait on.

    Args:
        patience: Warns.
        seconds: How long an outage may last.
        since: When it began, if it has.
    """

    def __init__(
        self, patience: Patience, seconds: float = _OUTAGE_SECONDS, since: float | None = None
    ) -> None:
        self._patience = patience
        self._seconds = seconds
        self._since = since

    def note(self, error: Exception | None) -> None:
        """What the last try met; None ends the outage.

        Raises:
            Exception: the error, if waiting is of no use, or has been for too long.
        """
        if error is None:
            self._since = None
            return
        if consequence(error) is Consequence.END:
            raise error
        now = self._patience.runtime.monotonic()
        if self._since is None:
            self._since = now
        if now - self._since >= self._seconds:
            error.add_note(f"It was given up after {duration(self._seconds)}.")
            raise error
        self._patience.warn(error)

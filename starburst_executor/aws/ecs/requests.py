"""AWS calls for starting workers: paced, and retried while their error is transient."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from botocore.exceptions import BotoCoreError, ClientError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from starburst_executor.aws.ecs.diagnosis import (
    Diagnosis,
    NotYet,
    is_passing,
    judge_error,
)
from starburst_executor.runtime import Runtime

__all__ = ["PacedRequests", "RequestRefused", "TokenBucket"]

T = TypeVar("T")

# The only retry policy for starting workers: botocore tries once. Transient errors (throttling,
# 5xx, no connection, new resources not yet known everywhere, a cluster that another client is
# changing) are tried 6 times; the pauses of half a second to 8 s add up to at most 16 s. RunTask
# carries a client token, everything else is idempotent.
_TRIES = 6
_FIRST_PAUSE, _LAST_PAUSE = 0.5, 8.0


class RequestRefused(Exception):
    """A call that AWS refused for good, or until the retries were used up."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        super().__init__(diagnosis.text)
        self.diagnosis = diagnosis


class PacedRequests:
    """Makes calls with the one retry policy.

    Args:
        runtime: Waits, and random pauses.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._policy = Retrying(
            retry=retry_if_exception(is_passing),
            stop=stop_after_attempt(_TRIES),
            wait=self._pause_after,
            sleep=self.sleep,
            reraise=True,
        )

    def make(self, call: Callable[..., T], **request: Any) -> T:
        """Make a call, or several that belong together, and retry while the error is transient.

        Raises:
            RequestRefused: with a diagnosis of the error.
        """
        try:
            return self._policy(call, **request)
        except (ClientError, BotoCoreError, NotYet) as error:
            raise RequestRefused(judge_error(error)) from error

    def sleep(self, seconds: float) -> None:
        """Wait."""
        self._runtime.signal().wait(seconds)

    def _pause_after(self, state: RetryCallState) -> float:
        longest = min(_LAST_PAUSE, _FIRST_PAUSE * 2.0 ** (state.attempt_number - 1))
        return longest * self._runtime.random.uniform(0.5, 1.0)


class TokenBucket:
    """A token bucket: `burst` tokens at once, then `rate` per second; taking waits for them."""

    def __init__(self, runtime: Runtime, burst: int, rate: float) -> None:
        self._runtime = runtime
        self._burst = float(burst)
        self._rate = rate
        self._left = float(burst)
        self._at = runtime.monotonic()
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Take `count` tokens; the balance may be negative until the wait is over."""
        with self._lock:
            now = self._runtime.monotonic()
            self._left = min(self._burst, self._left + (now - self._at) * self._rate)
            self._at = now
            self._left -= count
            wait = -self._left / self._rate
        if wait > 0:
            self._runtime.signal().wait(wait)

"""Watching a session until it is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import click

from starburst_executor.cli.exits import Exit, Failed
from starburst_executor.cli.output import document, echo
from starburst_executor.inspection.status import SessionStatus
from starburst_executor.inspection.stuck import Stuck
from starburst_executor.inspection.terminal import Display, Gauge, Meter, Progress
from starburst_executor.protocol.session import Session

__all__ = ["EchoJson", "Watch", "seconds_option"]

F = TypeVar("F", bound=Callable[..., Any])


def seconds_option(command: F) -> F:
    """`--timeout SECONDS`."""
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="Give up after this long, with exit code 5.",
    )(command)


class EchoJson:
    """A display for programs: a JSON document per line, whenever anything has changed."""

    def __init__(self) -> None:
        self._last: SessionStatus | None = None

    def show(self, progress: Progress) -> None:
        """Print the status unless it is the one printed last."""
        # The cost changes every second, and is not news by itself.
        status = replace(progress.status, cost=None)
        if status != self._last:
            self._last = status
            echo(document("status", progress.status))

    def close(self) -> None:
        """Nothing to do: the last status is already printed."""


class Watch:
    """Watches a session until it is finished, and shows its progress.

    Args:
        session: The session.
        display: Where to show it; always closed at the end.
        timeout: Seconds to wait at most.
    """

    def __init__(self, session: Session, display: Display, timeout: float | None) -> None:
        self._session = session
        self._runtime = session.runtime
        self._display = display
        self._timeout = timeout
        self._meter = Meter()
        self._reported: Stuck | None = None

    def until_finished(
        self, each: Callable[[SessionStatus], None] = lambda _: None
    ) -> SessionStatus:
        """Watch until no task is unfinished, or the session was terminated.

        Args:
            each: Called with each status.

        Raises:
            Failed: the timeout or the session's own time limit expired.
        """
        began = self._runtime.monotonic()
        try:
            gauge = Gauge(self._session)
            pause = self._session.load().intervals.look_last
            while True:
                status = gauge.look()
                now = self._runtime.monotonic()
                self._display.show(self._meter.take_in(status, now))
                self._advise(status)
                if status.finished == status.total or status.state == "terminated":
                    return status
                self._check_time(status, gauge.now, now - began)
                each(status)
                left = None if self._timeout is None else began + self._timeout - now
                self._runtime.signal().wait(pause if left is None else min(pause, left))
        finally:
            self._display.close()

    def _advise(self, status: SessionStatus) -> None:
        """Print once what to do about a session that makes no progress."""
        if status.stuck is not None and status.stuck != self._reported:
            echo(f"{status.session_id}: {status.stuck}", err=True)
        self._reported = status.stuck

    def _check_time(self, status: SessionStatus, now: float, waited: float) -> None:
        left = status.total - status.finished
        if self._timeout is not None and waited >= self._timeout:
            raise Failed(
                f"{left} of {status.total} tasks of session {status.session_id} are unfinished "
                f"after {self._timeout:g} s; they continue without this command",
                Exit.TIMED_OUT,
            )
        if now >= status.deadline.timestamp() and not status.workers:
            raise Failed(
                f"session {status.session_id} is past its absolute time limit: its workers have "
                f"left and {left} of {status.total} tasks are unfinished. Nothing is lost; "
                f"`starburst-executor extend {status.session_id} SECONDS` carries on.",
                Exit.TIMED_OUT,
            )

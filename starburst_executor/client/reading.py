"""What a client can tell about its session: futures, progress, outcomes, output.

Whatever is queued here is stored first, so that it is counted too. All of it still works after the
session was left; the store is then opened for the call and closed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

from starburst_executor.client.engine import Engine
from starburst_executor.client.future import TaskFuture
from starburst_executor.client.outcomes import Collector, TaskOutcome
from starburst_executor.client.resubmit import healed, retried
from starburst_executor.costs.bill import CostTracker
from starburst_executor.inspection import logs, status

__all__ = ["SessionReader"]


class SessionReader:
    """Reads one session for one client; its methods do what those of `StarburstExecutor` do.

    Args:
        engine: The client.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._session = engine.session
        self._registry = engine.registry
        self._lifecycle = engine.lifecycle
        self._costs = CostTracker(self._session, client=True)
        self._collector = Collector(self._session, engine.codec)

    def futures(self) -> list[TaskFuture[Any]]:
        """The futures of all tasks, in submission order."""
        self._engine.check_process()
        if self._lifecycle.refusal is not None:
            return self._registry.living()
        self._engine.flush()
        return self._registry.all()

    def status(self) -> status.SessionStatus:
        """How far the session is."""
        with self._reading():
            # What this client asked for is added to its lane when it leaves.
            left = self._lifecycle.refusal is not None
            costs = CostTracker(self._session) if left else self._costs
            return status.read_status(self._session, reckon=costs.look)

    def report(self, path: str | Path) -> None:
        """Write a page about the session."""
        from starburst_executor.inspection.report import page

        with self._reading():
            page.write(self._session, path)

    def collect(self, *, wait_for_all: bool, timeout: float | None) -> list[TaskOutcome]:
        """One outcome for each finished task, in submission order."""
        if wait_for_all:
            wait(self.futures(), timeout)
        with self._reading():
            self._session.load()
            self._registry.take_in_others()
            outcomes: list[TaskOutcome] = []
            for batch in self._registry.batches():
                first = self._registry.first_index(batch)
                gone = self._registry.lost(batch)
                outcomes += self._collector.collect(batch, first, gone=gone)
            return healed(outcomes, retried(self._session))

    def logs(self, task: TaskFuture[Any] | str | None) -> str:
        """What tasks have printed."""
        with self._reading():
            if task is None:
                return logs.all_logs(self._session)
            name = self._engine.own(task).task_id if isinstance(task, TaskFuture) else task
            return logs.task_log(self._session, name)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        if self._lifecycle.refusal is None:
            self._engine.flush()
        self._engine.check_process()
        try:
            yield
        finally:
            if self._lifecycle.taken_down:
                self._engine.close()  # of a session that was left, nothing stays open

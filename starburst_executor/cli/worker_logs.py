"""What workers themselves printed, which shows why one never started work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from starburst_executor.cli.exits import Exit, Failed
from starburst_executor.cli.logs import added
from starburst_executor.cli.options import launcher_of
from starburst_executor.cli.output import document, echo, styled
from starburst_executor.launchers.base import Launcher
from starburst_executor.protocol.session import Session

__all__ = ["WorkerPrinter"]


class _Logs(Protocol):
    def more(self, worker_id: str) -> Iterable[str]:
        """Lines since the last call."""


class _Tails:
    """Logs of workers on this machine, of which only the end is kept."""

    def __init__(self, launcher: Launcher, session_url: str) -> None:
        self._launcher = launcher
        self._url = session_url
        self._seen: dict[str, str] = {}

    def more(self, worker_id: str) -> list[str]:
        before = self._seen.get(worker_id, "")
        self._seen[worker_id] = now = self._launcher.log_tail(self._url, worker_id)
        return added(before, now).splitlines()


def _logs_of(launcher: Launcher, session_url: str) -> _Logs:
    if launcher.name != "ecs":
        return _Tails(launcher, session_url)
    from starburst_executor.aws.account import Clients
    from starburst_executor.aws.ecs.logs import WorkerLogs
    from starburst_executor.config import load_deployment

    deployment = load_deployment()
    assert deployment is not None  # or there would be no ECS launcher
    return WorkerLogs(Clients(deployment.region), deployment.log_group)


class WorkerPrinter:
    """Prints the logs of a session's workers.

    Args:
        session: The session.
        only: Id of the one worker to print; None for all.
        as_json: Print a JSON document per line of log.
    """

    def __init__(self, session: Session, only: str | None, as_json: bool) -> None:
        self._session = session
        self._only = only
        self._as_json = as_json
        self._launcher = launcher_of(session.load())
        self._logs = _logs_of(self._launcher, session.url)
        self._current = only
        self._printed: set[str] = set()
        self._without: set[str] = set()  # reported as having no log

    def run(self) -> None:
        """Print everything new.

        Raises:
            Failed: the requested worker never printed anything.
        """
        self._look()
        if self._only is not None and self._only not in self._printed:
            raise Failed(self._why_nothing(self._only), Exit.NOT_FOUND)

    def follow(self, pause: float) -> None:
        """Print until the workers have ended, polling every `pause` seconds."""
        self._look()
        while self._any_lives():
            self._session.runtime.signal().wait(pause)
            self._look()
        self._session.runtime.signal().wait(pause)  # the last lines arrive with some delay
        self.run()

    def _look(self) -> None:
        for worker in self._workers():
            self._print_new(worker)

    def _workers(self) -> list[str]:
        if self._only is not None:
            return [self._only]
        return sorted(self._known())

    def _known(self) -> set[str]:
        """Ids of all workers known to the store or the launcher."""
        session = self._session
        folder = session.key("ended/")
        left = {entry.key[len(folder) :] for entry in session.list_all(folder)[0]}
        live = self._launcher.live(session.url) or set()
        ended = self._launcher.ended(session.url)
        return left | session.beats().entries.keys() | live | ended

    def _any_lives(self) -> bool:
        live = self._launcher.live(self._session.url)
        if live is None:  # unknown right now
            return True
        return bool(live) if self._only is None else self._only in live

    def _print_new(self, worker: str) -> None:
        for line in self._lines(worker):
            self._printed.add(worker)
            self._print(worker, line)

    def _lines(self, worker: str) -> Iterator[str]:
        try:
            yield from self._logs.more(worker)
        except ValueError as error:
            if self._only is not None:
                raise Failed(str(error), Exit.NOT_FOUND) from error
            if worker not in self._without:
                self._without.add(worker)
                echo(str(error), err=True)

    def _print(self, worker: str, line: str) -> None:
        if self._as_json:
            echo(document("worker_log", {"worker": worker, "text": line}))
            return
        if worker != self._current:
            self._current = worker
            echo(styled(f"--- worker {worker}", bold=True))
        echo(line)

    def _why_nothing(self, worker: str) -> str:
        live = self._launcher.live(self._session.url) or set()
        if worker in live:
            return f"worker {worker} has printed nothing yet: it is starting; --follow waits for it"
        reason = self._launcher.log_tail(self._session.url, worker)
        if reason:
            return f"worker {worker} printed nothing: {reason}"
        return (
            f"worker {worker} left no output: it may belong to another session or machine, or have "
            "ended too long ago (ECS reports a stopped task for about an hour). --workers prints "
            "everything available"
        )

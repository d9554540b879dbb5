"""Rounds of chaos with real processes: clients and workers are killed and stopped, stores go away.

Left out unless asked for, since each takes half a minute:

    pytest -m chaos                    30 rounds, 15 on each kind of store, and a table of counts
    CHAOS_SEED=7 pytest -m chaos       others than usual
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from starburst_executor import SessionNotFound, StarburstExecutor
from starburst_executor.launchers.local import LocalLauncher
from starburst_executor.storage.url import join_url
from tests.support import servers
from tests.support.servers import S3Server
from tests.support.sessions import is_alive, keys
from tests.support.tasks import until

SEED = os.environ.get("CHAOS_SEED", "0")
ROUNDS = 15
MISCHIEF = 8.0  # seconds of it
PATIENCE = 300.0  # seconds in which everything must have ended; only a failing round waits so long

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


@dataclasses.dataclass
class Place:
    """A store, and the server that keeps it if there is one."""

    url: str
    server: int | None = None


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[S3Server, int]]:
    before = set(servers.running)
    with servers.ministack(tmp_path_factory.mktemp("chaos-s3")) as server:
        [pid] = servers.running - before
        yield server, pid


@pytest.fixture(params=["directory", "s3"])
def place(
    request: pytest.FixtureRequest, directory_url: str, s3_env: Callable[[S3Server], None]
) -> Place:
    if request.param == "directory":
        return Place(directory_url)
    server, pid = request.getfixturevalue("s3")
    s3_env(server)
    return Place(server.fresh_url(), pid)


class Client:
    """A client process, and what it said is stored."""

    def __init__(self, place: Place, session_id: str, folder: Path, name: str, seed: str) -> None:
        program = [sys.executable, "-m", "tests.support.chaos_client"]
        self.name = name
        self.process = subprocess.Popen(
            [*program, place.url, session_id, str(folder), name, seed],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.session_id = self.process.stdout.readline().strip()
        self.stored = 0
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip().isdecimal():
                self.stored = int(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Mischief:
    """Kills, stops and continues what is there, from one seed."""

    def __init__(self, place: Place, rng: random.Random, clients: list[Client]) -> None:
        self.counts: Counter[str] = Counter()
        self._place = place
        self._rng = rng
        self._clients = clients
        self._url = join_url(place.url, f"sessions/{clients[0].session_id}")
        self._stopped: dict[int, float] = {}  # and when each goes on

    def workers(self) -> list[int]:
        """Process ids of the workers that live, the stopped ones too."""
        launcher = LocalLauncher()
        folder = launcher._session_folder(self._url)
        texts = [(folder / worker).read_text().strip() for worker in launcher.live(self._url)]
        return [int(text) for text in texts if text]

    def run(self, seconds: float) -> None:
        pause, end = threading.Event(), time.monotonic() + seconds
        while time.monotonic() < end:
            pause.wait(self._rng.uniform(0.1, 0.8))
            self._continue()
            self._do_something()
        self._continue(everybody=self._rng.random() < 0.5)

    def _do_something(self) -> None:
        rng = self._rng
        worker = rng.choice([None, *self.workers()])
        client = rng.choice(self._clients).process.pid
        what = rng.choice(["kill", "stop", "stop", "tell", "client", "outage", "nothing"])
        if what == "outage":
            self._signal("outages", self._place.server, signal.SIGSTOP, rng.uniform(0.5, 3))
        elif what == "client":
            number = rng.choice([signal.SIGSTOP, signal.SIGSTOP, signal.SIGKILL])
            name = "clients killed" if number == signal.SIGKILL else "clients stopped"
            self._signal(name, client, number, rng.uniform(0.5, 6))
        elif what == "kill":
            self._signal("workers killed", worker, signal.SIGKILL)
        elif what == "stop":
            long = rng.choice([0.3, 3.0, 8.0, 1e9])
            self._signal("workers stopped", worker, signal.SIGSTOP, long)
        elif what == "tell":
            self._signal("workers told to end", worker, signal.SIGTERM)

    def _signal(self, name: str, pid: int | None, number: int, seconds: float = 0.0) -> None:
        if pid is None or pid in self._stopped or not is_alive(pid):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            self.counts[name] += 1
            if number == signal.SIGSTOP:
                self._stopped[pid] = time.monotonic() + seconds

    def _continue(self, *, everybody: bool = False) -> None:
        for pid, end in list(self._stopped.items()):
            if everybody or time.monotonic() >= end:
                self._go_on(pid)

    def _go_on(self, pid: int) -> None:
        self._stopped.pop(pid, None)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        """The store is back, and no client is stopped any more; workers may be, for ever."""
        for pid in [self._place.server, *(client.process.pid for client in self._clients)]:
            if pid is not None:
                self._go_on(pid)


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_what_was_stored_ends_once_whatever_happens(
    place: Place,
    round_: int,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    seed = f"{SEED}/{round_}"
    rng = random.Random(seed)
    folder = tmp_path / "begun"
    folder.mkdir()
    clients = [Client(place, "-", folder, "a", f"{seed}/a")]
    clients.append(Client(place, clients[0].session_id, folder, "b", f"{seed}/b"))
    mischief = Mischief(place, rng, clients)
    try:
        mischief.run(MISCHIEF)
        mischief.close()
        if rng.random() < 0.5:
            for client in clients:
                client.process.wait(PATIENCE)
        for client in clients:
            client.close()
        ended = _finish(place, clients[0].session_id, clients)
    finally:
        mischief.close()
        for client in clients:
            client.close()
        for pid in mischief.workers():  # if the round has failed
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    begun = Counter(file.name.partition(".")[0] for file in folder.iterdir())
    lost = [name for name in _promised(clients) if name not in ended]
    found = {
        "rounds": 1,
        "tasks": len(ended),
        "executions": begun.total(),
        "doubles": sum(count - 1 for count in begun.values()),
        "losses": len(lost),
    }
    record_property("chaos", found | mischief.counts)
    assert not lost, f"stored, as their client was told, and gone: {lost}"
    assert set(ended) <= set(begun)


def _promised(clients: list[Client]) -> Iterator[str]:
    for client in clients:
        yield from (f"{client.name}-{number}" for number in range(client.stored))


def _finish(place: Place, session_id: str, clients: list[Client]) -> list[str]:
    """Come back, wait for everything, and delete it; returns which tasks have ended."""
    executor = StarburstExecutor.attach(session_id, store=place.url)
    try:
        ended = [
            _name(future.exception(PATIENCE) or future.result()) for future in executor.futures
        ]
        assert len(set(ended)) == len(ended), "a task was stored twice"
        assert executor.status().finished == len(ended)
    finally:
        with contextlib.suppress(SessionNotFound):
            executor.cleanup(force=True)
    url = join_url(place.url, f"sessions/{session_id}")
    until(lambda: not LocalLauncher().live(url), "all workers have ended")
    assert keys(place.url, f"sessions/{session_id}/") == []
    return ended


def _name(outcome: object) -> str:
    if isinstance(outcome, ValueError):
        return str(outcome)
    assert isinstance(outcome, tuple), f"not what the task returns: {outcome!r}"
    name, number = outcome
    assert number % 10 != 9, "it raises"
    return f"{name}-{number}"

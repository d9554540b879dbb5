"""Where a benchmark runs: a fresh directory, or S3 with latency added to each reply."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.servers import LatencyProxy, S3Server, latency_proxy, ministack

__all__ = ["S3Place", "directory", "s3"]

_HOOK = Path(__file__).with_name("hook")


@dataclass(frozen=True, slots=True)
class S3Place:
    """An empty store on an S3 server, and the requests sent to it."""

    url: str
    counts: Path
    proxy: LatencyProxy | None

    def begin(self) -> None:
        """Start counting."""
        from starburst_executor.aws import clients

        clients.requests.clear()
        for file in self.counts.glob("*.json"):
            file.unlink()
        if self.proxy is not None:
            self.proxy.counts()

    def requests(self) -> Counter[str]:
        """Requests by operation, of this process and of all workers that have ended."""
        from starburst_executor.aws import clients

        total = Counter(clients.requests)
        for file in self.counts.glob("*.json"):
            total += Counter(json.loads(file.read_text()))
        return total

    def on_the_wire(self) -> int | None:
        """Requests that went through the proxy; the counts must agree with it."""
        return self.proxy.counts()["requests"] if self.proxy else None


@contextlib.contextmanager
def directory() -> Iterator[str]:
    """A directory store that is removed afterwards."""
    with _home() as home:
        yield str(home / "store")


@contextlib.contextmanager
def s3(milliseconds: float = 0) -> Iterator[S3Place]:
    """A store on the server that `STARBURST_BENCHMARK_STORE` names, or on its own ministack."""
    with _home() as home, contextlib.ExitStack() as stack:
        counts = home / "counts"
        counts.mkdir()
        path = os.pathsep.join(filter(None, [str(_HOOK), os.environ.get("PYTHONPATH")]))
        settings = {"STARBURST_BENCHMARK_COUNTS": str(counts), "PYTHONPATH": path}
        url = os.environ.get("STARBURST_BENCHMARK_STORE")
        proxy = None
        if url is None:
            folder = home / "server"
            folder.mkdir()
            server: S3Server = stack.enter_context(ministack(folder))
            proxy = stack.enter_context(latency_proxy(server, milliseconds))
            settings |= server.environment(proxy.endpoint)
            url = server.fresh_url()
        stack.enter_context(_environment(settings))
        yield S3Place(url, counts, proxy)


@contextlib.contextmanager
def _home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="starburst-benchmark-"))
    try:
        with _environment({"STARBURST_HOME": str(folder / "home")}):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""A session behind faulty connections, and counts of what its tasks did."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from starburst_executor.errors import SessionNotFound, StoreError
from starburst_executor.launchers import local
from tests.support import quick_retries
from tests.support.fault_proxy import FaultProxy, Plan, fault_proxy
from tests.support.servers import S3Server

__all__ = ["Scene", "Tally", "scene_at", "told_or_done"]


class Tally:
    """Counts how often each task began."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def begin(self, name: object) -> int:
        """One more; returns how often, with this one."""
        descriptor = os.open(self._folder / str(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, b".")
        size = os.fstat(descriptor).st_size
        os.close(descriptor)
        return size

    def counts(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self._folder.iterdir()}


class Scene:
    """An empty store, to which clients and workers have a faulty connection each.

    Attributes:
        url: The store's URL.
        sides: The proxies, "client" and "worker".
    """

    def __init__(self, server: S3Server, sides: dict[str, FaultProxy]) -> None:
        self.url = server.fresh_url()
        self.sides = sides
        self._server = server
        self._bucket, _, self._prefix = self.url.removeprefix("s3://").partition("/")

    def plan(self, make: Callable[[], Plan]) -> None:
        """Give each side a plan of its own."""
        for proxy in self.sides.values():
            proxy.plan = make()

    def stored(self) -> list[str]:
        """Names of the session's objects, as the server has them."""
        with contextlib.closing(self._server.client()) as client:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        return [key.split("/", 4)[-1] for key in keys]

    def kinds_seen(self) -> set[str]:
        """Kinds of the session's objects that were asked for."""
        seen = {kind for proxy in self.sides.values() for _, kind in proxy.seen}
        return seen - {"", self._prefix.partition("/")[0]}  # the session as a whole, the probe


@contextlib.contextmanager
def scene_at(server: S3Server, patch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Set a scene. boto3 repeats failed requests almost at once, on both sides."""
    plugins = f"{os.environ['BOTOCORE_EXPERIMENTAL__PLUGINS']},quick={quick_retries.__name__}"
    patch.setenv("BOTOCORE_EXPERIMENTAL__PLUGINS", plugins)
    patch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", quick_retries.pause)
    with fault_proxy(server) as client, fault_proxy(server) as workers:
        for name, value in server.environment(client.endpoint).items():
            patch.setenv(name, value)
        inherited = local._worker_environment
        elsewhere = server.environment(workers.endpoint)
        patch.setattr(local, "_worker_environment", lambda fd: {**inherited(fd), **elsewhere})
        yield Scene(server, {"client": client, "worker": workers})


def told_or_done(call: Callable[[], object]) -> bool:
    """Make a call that says at once when the store is away; whether it was done."""
    try:
        call()
    except StoreError:
        return False
    except SessionNotFound:  # an earlier try got to its end
        pass
    return True

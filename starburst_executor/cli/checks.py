"""Checks that everything a session needs is there, each with a fix."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

from starburst_executor import config
from starburst_executor.config import Configuration
from starburst_executor.errors import ConfigError, StarburstError
from starburst_executor.executor import StarburstExecutor
from starburst_executor.launchers.base import open_launcher
from starburst_executor.launchers.local import LocalLauncher
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.runtime import Runtime
from starburst_executor.storage.base import Store
from starburst_executor.storage.probe import probe_conditional
from starburst_executor.storage.url import join_url, open_store

__all__ = ["Check", "examine"]

_LOOKS = 5  # listings whose median is the round-trip time
_CLOCK_OFF = 60.0  # seconds; at 15 minutes AWS refuses every request
_TASK_SECONDS = 60.0  # a worker starts in one or two seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        ok: Whether it is as it should be.
        found: What was found.
        mend: How to fix it; "" if it is fine.
    """

    name: str
    ok: bool
    found: str
    mend: str = ""


def examine(store_url: str | None, runtime: Runtime) -> Iterator[Check]:
    """Run all checks in order, skipping those that cannot pass after a failure.

    Runs one task on one worker, in a session of its own that it removes again.

    Args:
        store_url: As given on the command line; None for the default.
        runtime: Clock and ids.
    """
    yield _python()
    yield _package()
    try:
        found = config.load(arguments={"store": store_url or None})
    except ConfigError as error:
        yield _wrong("settings", error, "Correct the variable or file named there.")
        return
    url = found.settings.store
    yield Check(name="store", ok=True, found=f"{url} ({_source(found, 'store')})")
    launcher = _launcher(found)
    yield launcher
    try:
        store = open_store(url)
    except ValueError as error:
        yield _wrong("store's URL", error, "Correct the setting it comes from.")
        return
    with contextlib.closing(store):
        well = launcher.ok
        for check in _store_checks(store, runtime):
            yield check
            well = well and check.ok
    if well:
        yield _task(url)


def _python() -> Check:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    return Check(name="Python", ok=True, found=found)


def _package() -> Check:
    found = f"starburst-executor {version('starburst-executor')}"
    return Check(name="package", ok=True, found=found)


def _source(found: Configuration, setting: str) -> str:
    source = found.sources[setting]
    if source == "argument":
        return f"from --{setting}"
    if source == "built in":
        return "the default; nothing else is set"
    return f"from {source}"


def _launcher(found: Configuration) -> Check:
    name = found.settings.launcher
    text = f"{name} ({_source(found, 'launcher')})"
    try:
        open_launcher(WorkerSpec(launcher=cast(Any, name)))
    except (ValueError, StarburstError) as error:
        mend = "Set STARBURST_LAUNCHER=local to run workers on this machine."
        return Check(name="launcher", ok=False, found=f"{text}: {error}", mend=mend)
    return Check(name="launcher", ok=True, found=text)


def _wrong(name: str, error: Exception, mend: str) -> Check:
    return Check(name=name, ok=False, found=str(error), mend=mend)


def _store_checks(store: Store, runtime: Runtime) -> Iterator[Check]:
    if store.url.startswith("s3://"):
        credentials = _credentials()
        yield credentials
        if not credentials.ok:
            return
    try:
        yield from _reach(store, runtime)
        probe_conditional(store, "probe/", runtime.new_id)
    except (StarburstError, OSError) as error:
        mend = "Fix what it names, or use another store with --store or STARBURST_STORE."
        yield _wrong("store works", error, mend)
        return
    found = "conflicting writes are refused"
    yield Check(name="conditional writes", ok=True, found=found)


def _credentials() -> Check:
    from starburst_executor.aws import account

    name = "credentials"
    mend = (
        "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or log in with "
        "`aws sso login`."
    )
    try:
        found = account.find_credentials()
    except StarburstError as error:
        return _wrong(name, error, mend)
    if found is None:
        return Check(name=name, ok=False, found="none found", mend=mend)
    text = f"{found.key_id} from {found.source}"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        # The key belongs to a server that stands in for S3, so AWS STS would not know it.
        return Check(name=name, ok=True, found=f"{text}, for {endpoint}")
    try:
        return Check(name=name, ok=True, found=f"{text}: {account.identity()}")
    except StarburstError as error:
        return _wrong(name, error, mend)


def _reach(store: Store, runtime: Runtime) -> Iterator[Check]:
    trips: list[float] = []
    off = 0.0
    for _ in range(_LOOKS):
        began = runtime.monotonic()
        now = store.list("sessions/", limit=1).now
        trips.append(runtime.monotonic() - began)
        off = runtime.time() - trips[-1] / 2 - now
    trip = statistics.median(trips)
    yield Check(name="store answers", ok=True, found=f"within {trip * 1000:.3g} ms")
    found = f"this machine's is {abs(off):.1f} s {'ahead' if off > 0 else 'behind'}"
    if abs(off) < 1.5:  # S3 reports whole seconds
        found = "the same as the store's"
    well = abs(off) < _CLOCK_OFF
    mend = "" if well else "Set this machine's clock: enable NTP."
    yield Check(name="clock", ok=well, found=found, mend=mend)


def _task(url: str) -> Check:
    executor = StarburstExecutor(1, store=url, launcher="local", name="doctor")
    try:
        answer = executor.submit(sum, (1, 2)).result(_TASK_SECONDS)
    except TimeoutError:
        found = f"no worker finished it within {_TASK_SECONDS:.0f} s"
        mend = _last_words(url, executor.session_id)
        executor.cleanup(force=True)
        return Check(name="task", ok=False, found=found, mend=mend)
    except StarburstError as error:
        executor.cleanup(force=True)
        return _wrong("task", error, "Fix what it names.")
    executor.shutdown()
    found = f"a worker on this machine ran it (1 + 2 = {answer})"
    return Check(name="task", ok=answer == 3, found=found)


def _last_words(url: str, session_id: str) -> str:
    """What the session's workers printed last."""
    launcher = LocalLauncher()
    session_url = join_url(open_store(url).url, f"sessions/{session_id}")
    workers = launcher.live(session_url) | launcher.ended(session_url)
    tails = [launcher.log_tail(session_url, worker) for worker in sorted(workers)]
    return "Its worker printed: " + ("\n".join(filter(None, tails)) or "nothing")

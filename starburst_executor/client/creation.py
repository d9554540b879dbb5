"""Sessions made and picked up again: everything that happens before a client begins to work on one.

    create    open launcher and store, see that the store honours conditions, capture the
              environment, store what the manifest names, then the manifest: the session exists
    attach    find the session, read its manifest, write back what is to be different from now on

Whatever fails on the way leaves no session behind, and the store closed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from msgspec.structs import replace

from starburst_executor.client.codec import PayloadCodec, python_version
from starburst_executor.client.environment_options import on_launcher, prepare_environment
from starburst_executor.client.options import (
    Options,
    check_session_id,
    check_store_reachable,
    cost_limits,
    default_intervals,
    deployment,
    launcher_name,
    new_session_id,
    owner,
    worker_count,
)
from starburst_executor.costs.limits import check_workers
from starburst_executor.costs.session_prices import rate_for
from starburst_executor.environment.local_modules import is_local
from starburst_executor.environment.repository import ship
from starburst_executor.inspection.status import resolve
from starburst_executor.launchers.base import Launcher, open_launcher
from starburst_executor.protocol.bounds import LATEST
from starburst_executor.protocol.manifest import Lane, Manifest
from starburst_executor.protocol.origin import Origin
from starburst_executor.protocol.session import Session
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.base import Store
from starburst_executor.storage.probe import probe_conditional
from starburst_executor.storage.url import open_store

__all__ = ["OpenSession", "attach", "create"]

_probed: set[str] = set()  # URLs of stores that were seen to honour conditions


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A session, and what a client needs to work on it.

    Attributes:
        session: The session; its store is open.
        manifest: Its manifest.
        launcher: What starts its workers.
        codec: Pickles calls for it and opens its outcomes.
    """

    session: Session
    manifest: Manifest
    launcher: Launcher
    codec: PayloadCodec


def create(options: Options) -> OpenSession:
    """Make a session.

    Raises:
        LaunchFailed, ConfigError: the launcher cannot be used.
        StoreDenied, StoreMissing, StoreNotConditional: the store cannot be used.
        PackageError: a package of this machine cannot be brought to the workers.
        ValueError: so many workers cost more than is allowed.
    """
    spec = options.spec
    origin = Origin.of_here(is_local)
    store = open_store(options.store)
    with _closed_on_error(store):
        where = deployment(spec, store.url)
        launcher = open_launcher(spec, where, origin)
        runtime = SystemRuntime()
        session = Session(store, new_session_id(runtime), runtime)
        codec = PayloadCodec(session, python_version(), options.modules)
        manifest = _manifest(options, session, runtime, where, origin)
        check_workers(manifest)
        spec, prepared = prepare_environment(spec, options.wishes, launcher.platform)
        _probe(store, runtime)
        if prepared is not None:
            launcher = open_launcher(spec, where, origin)
            ship(store, prepared)
            manifest = replace(manifest, spec=spec)
        manifest = _store(session, manifest, codec, options)
    return OpenSession(session, manifest, launcher, codec)


def _manifest(
    options: Options,
    session: Session,
    runtime: SystemRuntime,
    where: dict[str, Any] | None,
    origin: Origin,
) -> Manifest:
    spec, store = options.spec, session.store
    return Manifest(
        session_id=session.id,
        depth=options.depth,
        name=options.name,
        owner=owner(),
        python=python_version(),
        package=version("starburst-executor"),
        created=0,
        deadline=0,
        workers=options.max_workers,
        min_workers=options.min_workers,
        spec=spec,
        deployment=where,
        limits=options.limits,
        intervals=options.intervals or default_intervals(store, spec),
        lanes=(Lane(client=runtime.new_id(8)),),
        rate=rate_for(spec, store.url, runtime),
        max_hourly_cost=options.max_hourly_cost,
        cost_alert=options.cost_alert,
        origin=origin,
    )


def _probe(store: Store, runtime: SystemRuntime) -> None:
    if store.url not in _probed:
        probe_conditional(store, "probe/", runtime.new_id)
        _probed.add(store.url)


def _store(session: Session, manifest: Manifest, codec: PayloadCodec, options: Options) -> Manifest:
    """Store what the manifest names, then the manifest."""
    if options.initializer is not None:
        _, cargo = codec.function((options.initializer, options.initargs), "initializer")
        digest = session.put_content("functions", cargo)
        manifest = replace(manifest, initializer=digest, modules=dict(codec.modules()))
    now = session.store.list(session.prefix, limit=1).now
    deadline = min(now + manifest.limits.absolute_timeout, LATEST)
    manifest = replace(manifest, created=now, deadline=deadline)
    Session.create(session.store, manifest, session.runtime)
    return manifest


def attach(
    session_id: str,
    store: str | Path,
    *,
    launcher: str | None,
    max_workers: int | None,
    modules: Iterable[str | Path | ModuleType],
    max_hourly_cost: float | None,
    cost_alert: float | None,
) -> OpenSession:
    """Pick up a session; see `StarburstExecutor.attach`."""
    check_session_id(session_id)
    workers = None if max_workers is None else worker_count(max_workers)
    hourly, alert = cost_limits(max_hourly_cost, cost_alert)
    opened = open_store(store)
    with _closed_on_error(opened):
        session = Session(opened, resolve(opened, session_id), SystemRuntime())
        manifest = session.load()
        spec = manifest.spec
        if launcher is not None:
            spec = on_launcher(spec, launcher_name(launcher))
        check_store_reachable(spec.launcher, opened.url)
        launches = open_launcher(spec, manifest.deployment, manifest.origin)
        codec = PayloadCodec(session, manifest.python, modules)
        amended = partial(
            _amended, workers=workers, asked=max_hourly_cost, hourly=hourly, alert=alert
        )
        if amended(manifest) != manifest:
            manifest = session.amend(amended)
    return OpenSession(session, manifest, launches, codec)


def _amended(
    manifest: Manifest,
    *,
    workers: int | None,
    asked: float | None,
    hourly: float | None,
    alert: float | None,
) -> Manifest:
    """With what `attach` was asked for; the session's own limit takes precedence over settings."""
    limit = hourly if asked is not None else manifest.max_hourly_cost or hourly
    amended = replace(
        manifest,
        workers=manifest.workers if workers is None else workers,
        unscaled=manifest.unscaled if workers is None else 0,
        max_hourly_cost=limit,
        cost_alert=manifest.cost_alert if alert is None else alert,
    )
    check_workers(amended)
    return amended


@contextlib.contextmanager
def _closed_on_error(store: Store) -> Iterator[None]:
    try:
        yield
    except BaseException:
        store.close()
        raise

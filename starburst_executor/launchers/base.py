"""The interface of launchers, and opening the one that a session uses."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from starburst_executor.environment import bootstrap
from starburst_executor.launchers.local import LocalLauncher
from starburst_executor.protocol.origin import Origin
from starburst_executor.protocol.worker_spec import WorkerSpec

__all__ = ["Launcher", "open_launcher"]


class Launcher(Protocol):
    """Starts workers, and tells which of a session's workers are alive."""

    name: str
    lag: float
    """Seconds until a started worker shows up in everybody's `live`."""

    def launch(self, session_url: str, count: int) -> list[str]:
        """Start `count` workers.

        Each runs `python -m starburst_executor worker SESSION_URL --id WORKER_ID`.

        Returns:
            Their worker ids, fewer than `count` if there is no room for more at the moment. They
            need not be looking for work yet.

        Raises:
            LaunchFailed, OSError: none can be started; retrying is pointless.
        """

    def live(self, session_url: str) -> set[str] | None:
        """Ids of the workers known to be alive, including those starting; None if unknown."""

    def ended(self, session_url: str) -> set[str]:
        """Ids of the workers known to have ended, so nobody has to wait for their leases."""

    def stop(
        self,
        session_url: str,
        worker_ids: Collection[str] | None = None,
        *,
        grace: float,
    ) -> None:
        """Stop the given workers, or all: SIGTERM, then SIGKILL after `grace` seconds.

        Returns when they are gone. Ids that are unknown or have ended are no error.
        """

    def forget(self, session_url: str) -> None:
        """Remove the traces of workers that have ended; for a session that is over."""

    def platform(self) -> str:
        """The platform of its workers, for which binaries must be built: say, "linux-x86_64"."""

    def log_tail(self, session_url: str, worker_id: str) -> str:
        """The last lines that the worker's own process printed, which tell why it died; or ""."""

    def taken_away(self, session_url: str, worker_id: str) -> bool:
        """Whether an ended worker is known to have been ended by others: a reclaim, or a stop."""

    def shortage(self, session_url: str) -> str:
        """Why fewer workers could be started than wanted; "" if all could, or nobody knows."""

    def halt(self) -> None:
        """Start no more workers; a `launch` in progress returns soon, with those it has started."""


def open_launcher(
    spec: WorkerSpec,
    deployment: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
) -> Launcher:
    """The launcher that `spec` asks for.

    Args:
        spec: What each worker is.
        deployment: Where workers on ECS run, from the manifest; defaults to the configuration.
        origin: Where the session was created, from the manifest.
    """
    if spec.launcher == "local":
        return LocalLauncher(command=_bootstrap_command(spec), origin=origin)
    from starburst_executor.aws.ecs.launcher import open_ecs

    return open_ecs(spec, deployment)


def _bootstrap_command(spec: WorkerSpec) -> list[str] | None:
    """The command that starts a worker in its session's environment; None for the caller's own."""
    if spec.lock is None:
        return None
    # Not the caller's own interpreter: a virtual environment would bring its packages along.
    base = str(getattr(sys, "_base_executable", sys.executable))
    return [base, "-I", bootstrap.__file__, spec.lock]

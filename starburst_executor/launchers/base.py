"""The launcher's promise, and opening the one that a session asks for."""

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
    """Starts workers, and says which of those that were started for a session still live."""

    name: str
    lag: float
    """Seconds until `live` shows, to anybody, what somebody else has started."""

    def launch(self, session_url: str, count: int) -> list[str]:
        """Start `count` workers, each as `python -m starburst_executor worker SESSION_URL --id WORKER_ID`.

        Returns:
            Their worker ids, fewer than `count` if there is no room for more at the moment. That they
            have begun to look for work is not promised.

        Raises:
            LaunchFailed, OSError: none can be started; to try again is of no use.
        """

    def live(self, session_url: str) -> set[str] | None:
        """Ids of the workers known to be alive, those that are starting included; None: cannot tell."""

    def ended(self, session_url: str) -> set[str]:
        """Ids of the workers known to have ended, so that nobody need wait for their lease."""

    def stop(
        self,
        session_url: str,
        worker_ids: Collection[str] | None = None,
        *,
        grace: float,
    ) -> None:
        """End workers, those named or all: SIGTERM, and SIGKILL for what is left after `grace` seconds.

        Returns when they are gone. Ids that are unknown or have ended are no error.
        """

    def forget(self, session_url: str) -> None:
        """Remove what is noted of workers that have ended; for a session that has ended itself."""

    def platform(self) -> str:
        """What binaries must be built for to run in its workers, such as "linux-x86_64"."""

    def log_tail(self, session_url: str, worker_id: str) -> str:
        """The last lines that the worker's own process printed, which say why it died; "" if there are none."""

    def taken_away(self, session_url: str, worker_id: str) -> bool:
        """Whether a worker that has ended is known to have been ended by others: a reclaim, or a stop."""

    def halt(self) -> None:
        """Start none from now on; a `launch` under way returns soon, with those that it has started."""


def open_launcher(
    spec: WorkerSpec,
    deployment: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
) -> Launcher:
    """The launcher that `spec` asks for.

    Args:
        spec: What a worker shall be.
        deployment: Where workers on ECS are, as a manifest has it; default as configured.
        origin: Where the session was made, as a manifest has it.
    """
    if spec.launcher == "local":
        return LocalLauncher(command=_bootstrap_command(spec), origin=origin)
    from starburst_executor.aws.ecs.launcher import open_ecs

    return open_ecs(spec, deployment)


def _bootstrap_command(spec: WorkerSpec) -> list[str] | None:
    """What brings a worker into its session's environment; None if it runs in the caller's."""
    if spec.lock is None:
        return None
    # Not the caller's own interpreter: a virtual environment's would bring its packages along.
    base = str(getattr(sys, "_base_executable", sys.executable))
    return [base, "-I", bootstrap.__file__, spec.lock]

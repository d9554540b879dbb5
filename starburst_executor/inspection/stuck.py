"""Why nothing moves in a session, and what to do: for `status`, and for waiting clients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from starburst_executor.formatting import utc
from starburst_executor.launchers.local import LocalLauncher
from starburst_executor.protocol.launching import read_launching
from starburst_executor.protocol.manifest import Manifest, SessionState
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import HeartbeatListing, Session

__all__ = ["Stuck", "explain", "known_to_have_ended", "past_limit"]

# Workers on this machine start work within a second or two, on Fargate within a minute or two.
_START_SECONDS = {"local": 10.0, "ecs": 240.0}
_SHORTAGE_KEPT = 900.0  # seconds; a client or a worker that lacks workers tries again each minute
_PRINTED = 300  # characters shown of a worker's last output


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """Why unfinished tasks make no progress.

    Attributes:
        reason: In a few words, for a progress line.
        advice: What else is known, and what to do.
    """

    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.reason}. {self.advice}"


def past_limit(manifest: Manifest) -> Stuck:
    """Why nothing moves past the absolute time limit."""
    since = utc(manifest.deadline)
    return Stuck(
        reason=f"past its limit since {since:%Y-%m-%d %H:%M} UTC: extend",
        advice="Workers have left and none are started. Nothing is lost: to continue, call "
        f"extend(seconds) or run `starburst-executor extend {manifest.session_id} SECONDS`",
    )


def known_to_have_ended(session: Session, manifest: Manifest) -> set[str]:
    """Workers on this machine that have ended; a killed one may still have a fresh heartbeat."""
    if manifest.spec.launcher != "local":
        return set()
    return LocalLauncher().ended(session.url)


def explain(
    session: Session,
    manifest: Manifest,
    counts: Mapping[State, int],
    heartbeats: HeartbeatListing,
    live: Collection[str],
    gone: Collection[str],
    last_activity: float,
) -> Stuck | None:
    """Why nothing moves; None if something does, as far as is known, or all is finished.

    Args:
        session: The session.
        manifest: Its manifest.
        counts: Tasks by state.
        heartbeats: A listing of the heartbeats.
        live: The live workers.
        gone: Workers known to have ended.
        last_activity: When something last changed, by the store's clock.
    """
    unfinished = sum(count for state, count in counts.items() if not state.final)
    if not unfinished:
        return None
    if manifest.state is SessionState.TERMINATED:
        return Stuck(
            reason="terminated",
            advice=f"Its unfinished tasks ({unfinished}) will not run: submit them to a new "
            "session",
        )
    if heartbeats.now >= manifest.deadline:
        return past_limit(manifest)
    if live:
        return None
    held = counts[State.CLAIMED] + counts[State.RUNNING]
    if stillborn := _stillborn(session, heartbeats, gone):
        return _dying(session, manifest, stillborn)
    if held and heartbeats.entries.keys() & set(gone):
        return _unattended(manifest, f"its workers have died (tasks they had: {held})")
    if shortage := _shortage(session):
        return Stuck(reason="no capacity for workers", advice=shortage)
    if heartbeats.now - last_activity <= _START_SECONDS[manifest.spec.launcher]:
        return None
    return _unattended(manifest, "it has no workers")


def _stillborn(session: Session, heartbeats: HeartbeatListing, gone: Collection[str]) -> list[str]:
    """Workers that ended before their first heartbeat."""
    silent = set(gone) - heartbeats.entries.keys()
    return sorted(w for w in silent if session.heartbeat(w, "ended") is None)


def _shortage(session: Session) -> str:
    """What the last process that tried to start workers was lacking, unless that was long ago."""
    launching = read_launching(session)
    if launching is None or launching.age > _SHORTAGE_KEPT:
        return ""
    return launching.value.shortage


def _dying(session: Session, manifest: Manifest, stillborn: list[str]) -> Stuck:
    printed = LocalLauncher().log_tail(session.url, stillborn[-1]).strip()
    last = f"; the last printed: {printed[-_PRINTED:]}" if printed else ""
    return Stuck(
        reason="its workers die on startup",
        advice=f"Ended before their first heartbeat: {len(stillborn)}{last}. Most likely they "
        "cannot reach the store or import starburst_executor; `starburst-executor logs "
        f"{manifest.session_id} --workers` shows all their output",
    )


def _unattended(manifest: Manifest, reason: str) -> Stuck:
    name = manifest.session_id
    advice = (
        f"To start workers and wait for results, call StarburstExecutor.attach({name!r}) or run "
        f"`starburst-executor collect --wait {name}`"
    )
    if manifest.spec.launcher == "ecs":
        advice += (
            ". If a client is attached, capacity or quota is lacking (its log says so, and "
            "`starburst-executor quota` shows it), or workers die on startup "
            f"(`starburst-executor logs {name} --workers` shows what they printed)"
        )
    return Stuck(reason=reason, advice=advice)

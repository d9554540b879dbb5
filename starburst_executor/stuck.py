"""Why nothing moves in a session, and what to do: for `status`, and for whoever waits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from starburst_executor.launch import LocalLauncher
from starburst_executor.records import Manifest, SessionState, State
from starburst_executor.session import Beats, Session

__all__ = ["Stuck", "explain", "known_to_have_ended", "past_limit"]

# Workers on this machine are at work within a second or two, on Fargate within a minute or two.
_START_SECONDS = {"local": 10.0, "ecs": 240.0}
_PRINTED = 300  # characters of what a worker printed last


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """Why unfinished tasks do not get on.

    Attributes:
        reason: In a few words, for a line of progress.
        advice: What more is known, and what to do.
    """

    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.reason}. {self.advice}"


def past_limit(manifest: Manifest) -> Stuck:
    """What there is to say past the absolute time limit."""
    since = datetime.fromtimestamp(manifest.deadline, UTC)
    return Stuck(
        reason=f"past its limit since {since:%Y-%m-%d %H:%M} UTC: extend",
        advice="Workers have left and none are started. Nothing is lost: extend(seconds), or "
        f"`starburst-executor extend {manifest.session_id} SECONDS`, goes on",
    )


def known_to_have_ended(session: Session, manifest: Manifest) -> set[str]:
    """Workers of this machine that have ended, however they did: a killed one has a fresh heartbeat still."""
    if manifest.spec.launcher != "local":
        return set()
    return LocalLauncher().ended(session.url)


def explain(
    session: Session,
    manifest: Manifest,
    counts: Mapping[State, int],
    beats: Beats,
    live: Collection[str],
    gone: Collection[str],
    last_activity: float,
) -> Stuck | None:
    """Why nothing moves; None if something does, as far as is known, or all is finished.

    Args:
        session: Which.
        manifest: Its manifest.
        counts: Tasks by state.
        beats: A listing of the heartbeats.
        live: The workers that live.
        gone: Those known to have ended.
        last_activity: When something last changed, by the store's clock.
    """
    unfinished = sum(count for state, count in counts.items() if not state.final)
    if not unfinished:
        return None
    if manifest.state is SessionState.TERMINATED:
        return Stuck(
            reason="terminated",
            advice=f"Its unfinished tasks ({unfinished}) will not run: submit them to a new session",
        )
    if beats.now >= manifest.deadline:
        return past_limit(manifest)
    if live:
        return None
    held = counts[State.CLAIMED] + counts[State.RUNNING]
    if stillborn := _stillborn(session, beats, gone):
        return _dying(session, manifest, stillborn)
    if held and beats.entries.keys() & set(gone):
        return _unattended(manifest, f"its workers have died (tasks they had: {held})")
    if beats.now - last_activity <= _START_SECONDS[manifest.spec.launcher]:
        return None
    return _unattended(manifest, "no workers are at it")


def _stillborn(session: Session, beats: Beats, gone: Collection[str]) -> list[str]:
    """Workers that ended before their first heartbeat."""
    silent = set(gone) - beats.entries.keys()
    return sorted(w for w in silent if session.heartbeat(w, "ended") is None)


def _dying(session: Session, manifest: Manifest, stillborn: list[str]) -> Stuck:
    printed = LocalLauncher().log_tail(session.url, stillborn[-1]).strip()
    said = f"; the last printed: {printed[-_PRINTED:]}" if printed else ""
    return Stuck(
        reason="its workers die at their start",
        advice=f"Ended before their first heartbeat: {len(stillborn)}{said}. Most likely they cannot reach the store "
        f"or import starburst_executor; `starburst-executor logs {manifest.session_id} --workers` has all of it",
    )


def _unattended(manifest: Manifest, reason: str) -> Stuck:
    name = manifest.session_id
    advice = (
        f"StarburstExecutor.attach({name!r}) starts workers and waits for results, `starburst-executor collect --wait "
        f"{name}` too"
    )
    if manifest.spec.launcher == "ecs":
        advice += (
            ". If a client is attached, capacity or quota lacks (its log says so, `starburst-executor quota` shows "
            f"it), or they end at their start (`starburst-executor logs {name} --workers` has what they printed)"
        )
    return Stuck(reason=reason, advice=advice)

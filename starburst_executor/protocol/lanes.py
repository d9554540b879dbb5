"""Lanes: the numbered tasks of one submitting client, taken and given back in the manifest.

With its lane, a client also returns its count of store requests, for the session's cost.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from starburst_executor.errors import SessionTerminated
from starburst_executor.protocol.listing import Totals
from starburst_executor.protocol.manifest import Lane, Manifest, SessionState
from starburst_executor.protocol.session import Session

__all__ = ["give_back", "take"]


def take(session: Session) -> tuple[Manifest, int]:
    """Take a free lane, continuing at the number it was given back with, or a new one.

    This reopens a session that was shut down.

    Raises:
        SessionTerminated: the session takes no more tasks.
    """
    client = session.runtime.new_id(8)

    def edit(manifest: Manifest) -> Manifest:
        if manifest.state is SessionState.TERMINATED:
            raise SessionTerminated(
                f"session {session.id} was terminated; its results stay readable, but new tasks "
                "need a new session"
            )
        lanes = list(manifest.lanes)
        if any(lane.client == client for lane in lanes):
            return manifest
        free = next((i for i, lane in enumerate(lanes) if not lane.taken), None)
        if free is None:
            lanes.append(Lane(client=client))
        else:
            lanes[free] = replace(lanes[free], client=client, taken=True)
        return replace(manifest, lanes=tuple(lanes), state=SessionState.OPEN)

    manifest = session.amend(edit)
    lane = next(i for i, one in enumerate(manifest.lanes) if one.client == client)
    return manifest, lane


def give_back(
    session: Session,
    lane: int | None,
    number: int,
    state: SessionState | None = None,
    finished: Callable[[int], tuple[int, Totals] | None] = lambda _: None,
) -> None:
    """Give a lane back with the number reached.

    Args:
        session: The session.
        lane: The lane; None if none was taken or it must not be given back.
        number: The number after its last task.
        state: The session's new state, unless it was terminated; unchanged by default.
        finished: Known finished prefixes of lanes, written at the same time.
    """
    holders: list[str] = []
    writes, reads = session.store.tally.writes, session.store.tally.reads

    def edit(manifest: Manifest) -> Manifest:
        lanes = [_progressed(one, finished(i)) for i, one in enumerate(manifest.lanes)]
        if lane is not None:
            # On a retry the first attempt may have succeeded, and another client may have it now.
            holders.append(lanes[lane].client)
            if holders[0] == holders[-1]:
                lanes[lane] = _left(lanes[lane], number, writes, reads)
        ends = manifest.state
        if state is not None and ends is not SessionState.TERMINATED:
            ends = state
        return replace(manifest, lanes=tuple(lanes), state=ends)

    session.amend(edit)


def _left(lane: Lane, number: int, writes: int, reads: int) -> Lane:
    """The lane, given back with its client's request counts; idempotent."""
    if not lane.taken:
        return replace(lane, number=number)
    return replace(
        lane,
        taken=False,
        number=number,
        writes=lane.writes + writes,
        reads=lane.reads + reads,
    )


def _progressed(lane: Lane, finished: tuple[int, Totals] | None) -> Lane:
    if finished is None or finished[0] <= lane.finished:
        return lane
    number, totals = finished
    return replace(
        lane,
        finished=number,
        completed=totals.completed,
        failed=totals.failed,
        cancelled=totals.cancelled,
    )

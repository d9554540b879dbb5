"""A warning once a session has cost more than its `cost_alert`."""

from __future__ import annotations

import logging
import math

from starburst_executor.costs.bill import CostSummary, CostTracker
from starburst_executor.errors import SessionError, StoreError
from starburst_executor.formatting import dollars
from starburst_executor.protocol.manifest import Manifest
from starburst_executor.protocol.session import Session

__all__ = ["CostAlert", "warning"]

log = logging.getLogger(__name__)

_CHECK_SECONDS = 60.0  # between checks


class CostAlert:
    """Warns once in the log when a session has cost more than its `cost_alert`.

    Args:
        session: The session.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._tracker = CostTracker(session, client=True)
        self._next = -math.inf
        self._warned = False

    def look(self, manifest: Manifest) -> None:
        """Check the cost, if there is an alert to give and the last check was a minute ago."""
        now = self._session.runtime.monotonic()
        if manifest.cost_alert is None or self._warned or now < self._next:
            return
        self._next = now + _CHECK_SECONDS
        try:
            found = self._tracker.look(manifest, self._session.beats())
        except (StoreError, SessionError) as error:
            log.info(
                "the cost of session %s cannot be determined right now: %s",
                self._session.id,
                error,
            )
            return
        if found is not None and found.alert:
            self._warned = True
            log.warning("%s", warning(self._session.id, found))


def warning(session_id: str, found: CostSummary) -> str:
    """The warning for a session that has cost more than its `cost_alert`."""
    now = f", now {dollars(found.hourly)} an hour" if found.hourly else ""
    return (
        f"session {session_id} has cost {found}{now}: more than its cost_alert of "
        f"{dollars(found.cost_alert or 0.0)}. The alert stops nothing; to stop, use "
        f"`starburst-executor scale` or `cleanup`. ({found.prices})"
    )

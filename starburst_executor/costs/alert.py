"""A warning once a session has cost what its owner asked to be warned of."""

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

_ALARM_SECONDS = 60.0  # between looks for the alarm


class CostAlert:
    """Warns once in the log when a session has cost more than its `cost_alert`.

    Args:
        session: Which.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._ledger = CostTracker(session, client=True)
        self._next = -math.inf
        self._rang = False

    def look(self, manifest: Manifest) -> None:
        """Look, if there is anything to look for and the last look is a minute ago."""
        now = self._session.runtime.monotonic()
        if manifest.cost_alert is None or self._rang or now < self._next:
            return
        self._next = now + _ALARM_SECONDS
        try:
            found = self._ledger.look(manifest, self._session.beats())
        except (StoreError, SessionError) as error:
            log.info(
                "what session %s costs cannot be told just now: %s",
                self._session.id,
                error,
            )
            return
        if found is not None and found.alert:
            self._rang = True
            log.warning("%s", warning(self._session.id, found))


def warning(session_id: str, found: CostSummary) -> str:
    """What is said of a session that has cost more than its `cost_alert`."""
    now = f", now {dollars(found.hourly)} an hour" if found.hourly else ""
    return (
        f"session {session_id} has cost {found}{now}: more than its cost_alert of "
        f"{dollars(found.cost_alert or 0.0)}. That stops nothing; `starburst-executor scale` and `cleanup` do. "
        f"({found.prices})"
    )

"""The progress of a session, to be displayed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starburst_executor.inspection.status import SessionStatus
from starburst_executor.inspection.terminal import Progress

WHEN = datetime(2025, 1, 31, 9, 45, tzinfo=UTC)


def status(finished: int = 0, total: int = 10, **changes: Any) -> SessionStatus:
    fields: dict[str, Any] = {
        "session_id": "20250131-094500-k7mw3x",
        "name": None,
        "state": "open",
        "total": total,
        "pending": total - finished,
        "claimed": 0,
        "running": 0,
        "completed": finished,
        "failed": 0,
        "cancelled": 0,
        "workers": 1,
        "workers_wanted": 2,
        "created_at": WHEN,
        "last_activity": WHEN,
        "deadline": WHEN,
    }
    return SessionStatus(**{**fields, **changes})


def at(finished: int = 0, **changes: Any) -> Progress:
    return Progress(status=status(finished, **changes), rate=None, left=None)

"""What a session's workers and requests cost, as it was when the session was made; stored with it.

A session is billed by one set of prices from its beginning to its end, whoever looks at it, with or without
the right to ask AWS for prices.
"""

from __future__ import annotations

from datetime import date

import msgspec

__all__ = ["SessionPrices"]


class SessionPrices(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """Prices in US dollars.

    Attributes:
        worker_hour: One worker for an hour, in the market that was asked for; 0 on this machine.
        fallback_hour: One that was started on demand where Spot was asked for; 0 where it was not.
        write: One PUT, COPY, POST or LIST; 0 for a directory.
        read: One GET or HEAD.
        market: "spot" or "on-demand"; "" for workers that cost nothing.
        region: Of the prices.
        source: Where they are from, for people.
        taken: When they were taken down.
    """

    worker_hour: float = 0.0
    fallback_hour: float = 0.0
    write: float = 0.0
    read: float = 0.0
    market: str = ""
    region: str = ""
    source: str
    taken: date

    def hour(self, market: str) -> float:
        """Dollars an hour for a worker that says it is of that market; "" if it does not say."""
        fell_back = self.market == "spot" and market == "on-demand"
        return self.fallback_hour if fell_back else self.worker_hour

    def __str__(self) -> str:
        kind = {"spot": "Spot", "on-demand": "on-demand"}.get(self.market, "S3")
        return f"{kind} prices of {self.region} from {self.source}, {self.taken:%Y-%m-%d}"

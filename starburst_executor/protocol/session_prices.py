"""What a session's workers and requests cost, as of its creation; stored with it.

One set of prices applies to a session from start to end, whoever looks at it, and whether or not
they may ask AWS for prices.
"""

from __future__ import annotations

from datetime import date

import msgspec

from starburst_executor.protocol.bounds import Amount

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
        worker_hour: One worker for an hour, in the requested market; 0 on this machine.
        fallback_hour: The same for one started on demand although Spot was requested; else 0.
        write: One PUT, COPY, POST or LIST; 0 for a directory.
        read: One GET or HEAD.
        market: "spot" or "on-demand"; "" for workers that cost nothing.
        region: The region that the prices are for.
        source: Where they are from, for people.
        taken: The date they were recorded.
    """

    worker_hour: Amount = 0.0
    fallback_hour: Amount = 0.0
    write: Amount = 0.0
    read: Amount = 0.0
    market: str = ""
    region: str = ""
    source: str
    taken: date

    def hour(self, market: str) -> float:
        """Dollars per hour for a worker in that market; "" if the worker does not report one."""
        fell_back = self.market == "spot" and market == "on-demand"
        return self.fallback_hour if fell_back else self.worker_hour

    def __str__(self) -> str:
        kind = {"spot": "Spot", "on-demand": "on-demand"}.get(self.market, "S3")
        return f"{kind} prices of {self.region} from {self.source}, {self.taken:%Y-%m-%d}"

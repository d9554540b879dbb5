"""How large numbers, and how long names, may be in what is stored.

Anybody who may write to a store may have written an object. Whatever is decoded is within these
bounds, or is refused as damaged: a date that exists, a wait that can be waited, a name that leads
nowhere else.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta

__all__ = [
    "EARLIEST",
    "FOREVER",
    "LARGEST",
    "LATEST",
    "Amount",
    "Count",
    "Digest",
    "Moment",
    "Seconds",
]

EARLIEST, LATEST = -1e10, 1e11  # the years 1653 and 5138

LARGEST = 32 << 20  # bytes of an object that is read as a whole to be decoded

Moment: TypeAlias = Annotated[float, Meta(ge=EARLIEST, le=LATEST)]  # UTC seconds

FOREVER = 1e15  # seconds, and dollars

Seconds: TypeAlias = Annotated[float, Meta(ge=-FOREVER, le=FOREVER)]

Count: TypeAlias = Annotated[int, Meta(ge=0, le=10**12)]

Amount: TypeAlias = Annotated[float, Meta(ge=0, le=FOREVER)]

# The last part of a key, and of a path on workers.
Digest: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9A-Za-z]{1,64}\Z")]

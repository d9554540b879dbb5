"""Functions that stored pickles name: their names here are part of the wire format."""

from __future__ import annotations

from typing import NoReturn

from starburst_executor.errors import (
    SerializationError,
)

__all__ = ["refuse"]


def refuse(error: SerializationError) -> NoReturn:
    """Stand in, on the worker, for a call that could not be pickled."""
    raise error

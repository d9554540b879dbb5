"""The caller's installed packages, captured here and installed again by the workers.

capture      what is installed here, and where it came from          -> Lock, with a digest
wheels       what no index has (checkouts, local files) is built     -> wheels, kept by their source
resolve      versions for another platform, or for asked changes; what has no distribution is named
shelf        lock and wheels in the store, below environments/<digest>, shared by sessions
`bootstrap`  on the worker: unpacks what another has packed, else installs; then `python -m` this packs it
"""

from __future__ import annotations

from starburst_executor.environment.capture import Prepared, Wishes, prepare
from starburst_executor.environment.lock import Lock, Wheel
from starburst_executor.environment.repository import prune, ship

__all__ = ["Lock", "Prepared", "Wheel", "Wishes", "prepare", "prune", "ship"]

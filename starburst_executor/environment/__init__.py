"""The caller's installed packages, captured here and installed again by the workers.

capture      what is installed here, and where it came from          -> Lock, with a digest
wheels       builds what no index has (checkouts, local files)       -> wheels, kept by their source
resolve      versions for another platform, or for requested changes; names what has no distribution
repository   lock and wheels in the store, below environments/<digest>, shared by sessions
`bootstrap`  on the worker: unpacks another's pack, or installs and runs `python -m` this to pack it
"""

from __future__ import annotations

from starburst_executor.environment.capture import Prepared, Wishes, prepare
from starburst_executor.environment.lock import Lock, Wheel
from starburst_executor.environment.repository import prune, ship

__all__ = ["Lock", "Prepared", "Wheel", "Wishes", "prepare", "prune", "ship"]

"""The seed that whoever repeats one random schedule has chosen."""

import os

# Read at import: no test sees such variables later.
SEED = os.environ.get("STARBURST_SEED")

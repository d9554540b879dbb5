"""Your modules and installed packages: captured here, installed again by the workers.

capture      what is installed here, and where it came from            -> Lock, with a digest
wheels       what no index has (checkouts, local files), built         -> wheels, kept by source
resolve      versions for another platform or requested changes; names what has no distribution
repository   lock and wheels in the store, under environments/<digest>, shared by sessions
bootstrap    on the worker: unpacks what another worker packed, or installs; `__main__` then packs
"""

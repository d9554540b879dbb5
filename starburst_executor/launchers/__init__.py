"""Start workers and know which are alive: the launcher's interface, and workers on this machine."""

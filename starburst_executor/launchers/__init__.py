"""Starting workers and knowing which are alive: the seam, and workers on this machine."""

"""What clients and workers both do: recover lost tasks, keep workers running, end sessions."""

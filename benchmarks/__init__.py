"""Measures what this package promises about speed, in one run: `python -m benchmarks`."""

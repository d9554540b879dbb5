"""What this package promises about speed, measured in one run: `python -m benchmarks`."""

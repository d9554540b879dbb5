"""What workers and requests cost: prices, estimates, the running total, limits and alerts."""

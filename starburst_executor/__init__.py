"""A `concurrent.futures.Executor` that survives the laptop."""

"""Python objects to bytes and back. Nothing else in this package unpickles."""

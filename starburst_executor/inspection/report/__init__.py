"""The report of a session: figures, charts and one HTML page."""

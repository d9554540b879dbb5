"""The records of a session and every hand-over between clients and workers. Never unpickles."""

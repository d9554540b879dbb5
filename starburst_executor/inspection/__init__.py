"""Reads sessions for people; changes nothing and never unpickles."""

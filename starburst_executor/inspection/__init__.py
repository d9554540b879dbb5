"""Reading a session for people. Changes nothing and never unpickles."""

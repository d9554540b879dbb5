"""Exit codes of the command, and the exception that ends it with one."""

from __future__ import annotations

from enum import IntEnum

import click

from starburst_executor.formatting import printable

__all__ = ["MEANINGS", "Exit", "Failed"]


class Exit(IntEnum):
    """Exit codes; their meaning never changes."""

    OK = 0
    OTHER = 1
    USAGE = 2  # click's own
    NOT_FOUND = 3
    CREDENTIALS = 4
    TIMED_OUT = 5
    TASKS_FAILED = 6
    INTERRUPTED = 130  # 128 + SIGINT, as in shells


MEANINGS = {
    Exit.OK: "done",
    Exit.OTHER: "any other error; doctor: something is wrong",
    Exit.USAGE: "usage error: an unknown verb or option, or a malformed value",
    Exit.NOT_FOUND: "no such session, task, bucket or directory",
    Exit.CREDENTIALS: "no credentials, or a permission is missing",
    Exit.TIMED_OUT: "--timeout or the session's own time limit expired first",
    Exit.TASKS_FAILED: "collect, status --watch: a task failed or was cancelled",
    Exit.INTERRUPTED: "interrupted with Ctrl-C",
}


class Failed(click.ClickException):
    """Ends the command with a message on stderr and an exit code."""

    def __init__(self, message: str, code: Exit) -> None:
        super().__init__(printable(message))
        self.exit_code = int(code)  # type: ignore[misc]  # one class, several codes

"""The command line: its verbs, and what its exit codes mean.

Every verb is in one of the modules beside this one, which is imported when the verb is used: asking for
help, or for the completion of a word, loads neither boto3 nor the executor.
"""

from __future__ import annotations

from enum import IntEnum
from importlib import import_module
from typing import Any, NoReturn

import click

from starburst_executor.errors import (
    AccountDenied,
    SessionNotFound,
    StarburstError,
    StoreDenied,
    StoreMissing,
)

__all__ = ["Exit", "Failed", "main"]


class Exit(IntEnum):
    """Exit codes; they never change their meaning."""

    OK = 0
    OTHER = 1
    USAGE = 2  # click's own
    NOT_FOUND = 3
    CREDENTIALS = 4
    TIMED_OUT = 5
    TASKS_FAILED = 6
    INTERRUPTED = 130  # 128 + SIGINT, as shells have it


_MEANING = {
    Exit.OK: "done",
    Exit.OTHER: "any other error; doctor: something is wrong",
    Exit.USAGE: "wrong usage: an unknown verb, option or form of a value",
    Exit.NOT_FOUND: "no such session, task, bucket or directory",
    Exit.CREDENTIALS: "no credentials, or they lack a permission",
    Exit.TIMED_OUT: "--timeout, or the session's own time limit, was over first",
    Exit.TASKS_FAILED: "collect, status --watch: a task failed or was cancelled",
    Exit.INTERRUPTED: "interrupted with Ctrl-C",
}

# Verb -> module, and its line in the help; in the order of the help.
_SECTIONS = {
    "Look": {
        "list": ("inspect", "The sessions in a store."),
        "status": ("inspect", "How far a session is."),
        "tasks": ("inspect", "Its tasks, one a line."),
        "show": ("inspect", "All that is known of one task."),
        "logs": ("inspect", "What its tasks have printed."),
        "errors": ("inspect", "Its failures, grouped by where they happened."),
        "collect": ("results", "What its finished tasks returned or raised."),
        "report": (
            "report",
            "A page to look at: what happened, and what held it back.",
        ),
    },
    "Change": {
        "cancel": ("manage", "Cancel tasks, or all that are unfinished."),
        "retry": ("manage", "Submit failed or chosen tasks again, as new tasks."),
        "extend": ("manage", "Move its time limits on."),
        "scale": ("manage", "Set how many workers it wants."),
        "cleanup": ("manage", "End it; with --force delete it."),
        "prune": ("manage", "Delete sessions that nobody has touched for long."),
    },
    "AWS": {
        "config": ("deploy", "Each setting, and where its value came from."),
        "setup": ("deploy", "Make what workers need in an AWS account."),
        "teardown": ("deploy", "Remove what setup made."),
        "quota": ("planning", "How many workers the account may have at once."),
        "estimate": ("planning", "What a run would take and cost."),
    },
    "This machine": {
        "doctor": ("doctor", "Check that everything works, and say what to mend."),
        "worker": ("doctor", "Work for a session."),
    },
}
_VERBS = {verb: line for section in _SECTIONS.values() for verb, line in section.items()}


class Failed(click.ClickException):
    """Ends the command with a message on stderr and an exit code."""

    def __init__(self, message: str, code: Exit) -> None:
        super().__init__(message)
        self.exit_code = int(code)  # type: ignore[misc]  # one class, several codes


class _Verbs(click.Group):
    """Loads a verb's module when the verb is used, and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _VERBS:
            return None
        module = import_module(f"starburst_executor.cli.{_VERBS[name][0]}")
        command: click.Command = module.VERBS[name]
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, verbs in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(verb, text) for verb, (_, text) in verbs.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(int(code)), text) for code, text in _MEANING.items()])
        super().format_epilog(ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StarburstError as error:
            _fail(error)
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(Exit.INTERRUPTED)


def _fail(error: StarburstError) -> NoReturn:
    code = Exit.OTHER
    # A worker says "terminated" of a session that is gone, because it is not there.
    if any(isinstance(e, SessionNotFound | StoreMissing) for e in (error, error.__cause__)):
        code = Exit.NOT_FOUND
    elif isinstance(error, StoreDenied | AccountDenied):
        code = Exit.CREDENTIALS
    raise Failed(str(error), code) from error


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "A session's id may be shortened as long as no other begins so, in whole or after its last dash. "
        "Every verb of the first section takes --json. Words complete in the shell after, in bash: "
        'eval "$(_STARBURST_EXECUTOR_COMPLETE=bash_source starburst-executor)" (likewise zsh and fish).'
    ),
)
@click.version_option(package_name="starburst-executor")
def main() -> None:
    """Sessions of starburst_executor: look at them, change them, work for them."""

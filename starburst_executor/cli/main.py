"""The command and its verbs.

Each verb lives in a module of this package that is imported only when the verb is used: help and
shell completion load neither boto3 nor the executor.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from starburst_executor.cli.exits import MEANINGS, Exit, Failed
from starburst_executor.errors import (
    AccountDenied,
    SessionNotFound,
    StarburstError,
    StoreDenied,
    StoreMissing,
)
from starburst_executor.formatting import printable

__all__ = ["SECTIONS", "main"]


# Verb -> module, and its line in the help; in the order of the help.
SECTIONS = {
    "Look": {
        "list": ("inspect", "The sessions in a store."),
        "status": ("inspect", "How far a session is."),
        "tasks": ("inspect", "Its tasks, one per line."),
        "show": ("inspect", "Everything known about one task."),
        "logs": ("inspect", "What its tasks printed."),
        "errors": ("inspect", "Its failures, grouped by where they happened."),
        "collect": ("results", "What its finished tasks returned or raised."),
        "report": (
            "report",
            "Write a page about what happened and what held it back.",
        ),
    },
    "Change": {
        "cancel": ("manage", "Cancel tasks; by default all unfinished ones."),
        "retry": ("manage", "Submit failed or chosen tasks again, as new tasks."),
        "extend": ("manage", "Extend its time limits."),
        "scale": ("manage", "Cap its number of workers."),
        "cleanup": ("manage", "End it; with --force, delete it."),
        "prune": ("manage", "Delete sessions that have been idle for long."),
    },
    "AWS": {
        "config": ("deploy", "Every setting and where its value came from."),
        "setup": ("deploy", "Create what workers need in an AWS account."),
        "teardown": ("deploy", "Remove what setup created."),
        "quota": ("planning", "How many workers the account may run at once."),
        "estimate": ("planning", "How long a run would take, and its cost."),
    },
    "This machine": {
        "doctor": ("doctor", "Check that everything works, and say how to fix what does not."),
        "worker": ("doctor", "Run a worker of a session."),
    },
}
_VERBS = {verb: line for section in SECTIONS.values() for verb, line in section.items()}


class _Printable(logging.Formatter):
    """Warnings name objects, and what is in them, that anybody may have written."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


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
        for title, verbs in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(verb, text) for verb, (_, text) in verbs.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(int(code)), text) for code, text in MEANINGS.items()])
        super().format_epilog(ctx, formatter)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            click.echo(f"Error: {_what_failed(error)}", err=True)
            _write_no_more()
            sys.exit(Exit.OTHER)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            if logging.lastResort is not None:
                logging.lastResort.setFormatter(_Printable())
            return super().invoke(ctx)
        except StarburstError as error:
            _fail(error)
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(Exit.INTERRUPTED)


def _write_no_more() -> None:
    """Let what is still buffered go nowhere: Python would try it again at exit, and exit with 120.

    See the note on SIGPIPE in the documentation of Python's `signal`.
    """
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def _what_failed(error: OSError) -> str:
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the output could not be written: {error.strerror}"
    return str(error)


def _fail(error: StarburstError) -> NoReturn:
    code = Exit.OTHER
    # A worker reports a missing session as terminated; the cause tells the difference.
    if any(isinstance(e, SessionNotFound | StoreMissing) for e in (error, error.__cause__)):
        code = Exit.NOT_FOUND
    elif isinstance(error, StoreDenied | AccountDenied):
        code = Exit.CREDENTIALS
    raise Failed(str(error), code) from error


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "A session's id may be shortened as long as it stays unambiguous, from its start or from "
        "after its last dash. Every command in the first section takes --json. For shell "
        "completion in bash, "
        'run eval "$(_STARBURST_EXECUTOR_COMPLETE=bash_source starburst-executor)" '
        "(zsh and fish work likewise)."
    ),
)
@click.version_option(package_name="starburst-executor")
def main() -> None:
    """Inspect and manage sessions of starburst_executor, and run workers for them."""

"""The command and its verbs.

Each verb lives in one of the modules beside this one, which is imported when the verb is used: asking for
help, or completing a word in the shell, loads neither boto3 nor the executor.
"""

from __future__ import annotations

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

__all__ = ["SECTIONS", "main"]


# Verb -> module, and its line in the help; in the order of the help.
SECTIONS = {
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
_VERBS = {verb: line for section in SECTIONS.values() for verb, line in section.items()}


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

"""Verbs for this machine: doctor, worker."""

from __future__ import annotations

import logging
import os
import sys

import click

from starburst_executor.cli.exits import Exit
from starburst_executor.cli.options import json_option, store_option
from starburst_executor.cli.output import document

__all__ = ["VERBS"]


@click.command()
@store_option
@json_option
def doctor(store: str | None, as_json: bool) -> None:
    """Check that everything a session needs is there, and say how to fix what is not.

    Runs one task on one worker of this machine, in a session of its own that it removes again.
    Exits with code 1 if something is wrong.
    """
    from starburst_executor.cli.checks import Check, examine
    from starburst_executor.runtime import SystemRuntime

    checks: list[Check] = []
    runtime = SystemRuntime()
    for check in examine(store, runtime):
        checks.append(check)
        if not as_json:
            _echo(check.name, check.ok, check.found, check.mend)
    if as_json:
        click.echo(document("checks", checks))
    if not all(check.ok for check in checks):
        sys.exit(Exit.OTHER)


def _echo(name: str, ok: bool, found: str, mend: str) -> None:
    mark = click.style("✓", fg="green") if ok else click.style("✗", fg="red", bold=True)
    click.echo(f"{mark} {name}: {found}")
    if mend:
        click.echo(f"  → {mend}")


@click.command()
@click.argument("session_url", metavar="URL")
@click.option("--id", "worker_id", metavar="WORKER_ID", help="Its id; a new one by default.")
def worker(session_url: str, worker_id: str | None) -> None:
    """Run a worker of the session at <store>/sessions/<session id> until it has no reason to stay.

    It logs to stderr, and finally prints why it left. On SIGTERM it hands back its tasks and
    leaves.
    """
    from starburst_executor.worker.process import serve

    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        reason = serve(session_url, worker_id)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="URL") from error
    if not _same_output():
        click.echo(reason)  # otherwise the log, in the same place, already shows it


def _same_output() -> bool:
    """Whether stdout and stderr are one file or terminal."""
    try:
        return os.path.sameopenfile(1, 2)
    except OSError:  # one of them is closed
        return False


VERBS: dict[str, click.Command] = {"doctor": doctor, "worker": worker}

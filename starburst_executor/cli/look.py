"""The verbs that only read: list, status, tasks, show, logs, errors."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import click

from starburst_executor import catalog, history
from starburst_executor.cli import Exit, Failed
from starburst_executor.cli.sessions import (
    at_session,
    at_store,
    json_option,
    session_argument,
    store_option,
    task_argument,
    task_name,
)
from starburst_executor.cli.text import (
    document,
    echo_table,
    local_moment,
    local_time,
    one_line,
    status_text,
)
from starburst_executor.cli.watching import EchoJson, Watch, seconds_option
from starburst_executor.history import Found, TaskHistory, TaskView
from starburst_executor.ledger import Ledger
from starburst_executor.progress import duration, open_display
from starburst_executor.records import State
from starburst_executor.retry import retried
from starburst_executor.session import Session

if TYPE_CHECKING:
    from starburst_executor.progress import Display

__all__ = ["VERBS"]


@click.command("list")
@store_option
@json_option
def list_(store: str | None, as_json: bool) -> None:
    """Print the sessions in a store, oldest first.

    The counts of a session at work are those of one moment or another; `running` includes what a worker
    has claimed.
    """
    with at_store(store) as opened:
        sessions = catalog.summaries(opened)
        if as_json:
            click.echo(document("sessions", sessions))
            return
        if not sessions:
            click.echo(f"There are no sessions in {opened.url}.", err=True)
            return
    echo_table(
        ("session_id", "created_at", "last_activity", "total", "pending", "running",
         "completed", "failed", "state"),
        [
            (s.session_id, local_time(s.created_at), local_time(s.last_activity), str(s.total),
             str(s.pending), str(s.running), str(s.completed), str(s.failed), s.state)
            for s in sessions
        ],
    )  # fmt: skip
    for one in sessions:
        if one.alert:
            click.secho(one.alert, fg="yellow", err=True)


@click.command()
@session_argument
@click.option("--watch", is_flag=True, help="Go on until all tasks are finished.")
@seconds_option
@store_option
@json_option
def status(
    id: str, watch: bool, timeout: float | None, store: str | None, as_json: bool
) -> None:
    """Print how far a session is.

    With --watch it goes on until every task is finished, and then ends with exit code 6 if one failed or
    was cancelled: live on a terminal, else a line every ten seconds, with --json one document a line.
    """
    if timeout is not None and not watch:
        raise click.UsageError("--timeout is for --watch")
    with at_session(store, id) as session:
        if not watch:
            now = catalog.status(session, reckon=Ledger(session).look)
            _echo_status(now, as_json)
            return
        display: Display = (
            EchoJson() if as_json else open_display(sys.stdout, session.runtime)
        )
        last = Watch(session, display, timeout).until_finished()
    if not as_json:
        _echo_status(last, as_json)
    if last.failed or last.cancelled:
        sys.exit(Exit.TASKS_FAILED)


def _echo_status(now: catalog.SessionStatus, as_json: bool) -> None:
    click.echo(document("status", now) if as_json else status_text(str(now)))


@click.command()
@session_argument
@click.option("--failed", "state", flag_value="failed", help="Only those that failed.")
@click.option(
    "--running", "state", flag_value="running", help="Only those that a worker has."
)
@click.option(
    "--pending", "state", flag_value="pending", help="Only those that none has."
)
@store_option
@json_option
def tasks(id: str, state: str | None, store: str | None, as_json: bool) -> None:
    """Print the tasks of a session, one a line.

    `queued` is how long a task waited from being stored until its last attempt began, `ran` how long that
    attempt has run.
    """
    with at_session(store, id) as session:
        session.load()
        found = list(history.views(session, _STATES[state]))
    if as_json:
        click.echo(document("tasks", found))
        return
    echo_table(
        ("index", "task", "state", "worker", "attempt", "queued", "ran", "error"),
        [_task_row(task) for task in found],
    )


_STATES: dict[str | None, Collection[State] | None] = {
    None: None,
    "failed": (State.FAILED,),
    "running": (State.CLAIMED, State.RUNNING),
    "pending": (State.PENDING,),
}


def _task_row(task: TaskView) -> tuple[str, ...]:
    return (
        str(task.index),
        task.task_id,
        task.state,
        task.worker or "-",
        str(task.attempt),
        duration(task.queued),
        duration(task.ran) if task.ran else "-",
        one_line(str(task.error)) if task.error else "",
    )


@click.command()
@session_argument
@task_argument(required=True)
@store_option
@json_option
def show(id: str, task: str, store: str | None, as_json: bool) -> None:
    """Print all that is known of one task: its attempts with their times, its error and its output."""
    with at_session(store, id) as session:
        whole = history.history(session, find_task(session, task))
        again = retried(session).get(whole.task.task_id)
    if as_json:
        content = {"history": whole, "retried_as": again}
        click.echo(document("task", content))
        return
    _echo_history(whole, again)


def find_task(session: Session, text: str) -> Found:
    """The task that `text` names.

    Raises:
        BadParameter: it is no task id.
        Failed: the session has no such task.
    """
    name = task_name(session.load(), text)
    try:
        return history.find_one(session, name)
    except LookupError as error:
        raise Failed(str(error), Exit.NOT_FOUND) from error


def _echo_history(whole: TaskHistory, again: str | None) -> None:
    task = whole.task
    click.echo(
        click.style(f"Task {task.task_id}", bold=True) + f" (index {task.index})"
    )
    lines = [
        f"  State:      {task.state}" + (f", retried as {again}" if again else ""),
        f"  Stored:     {local_moment(whole.stored_at)}",
        f"  Queued:     {duration(task.queued)}",
        f"  Ran:        {duration(task.ran)}",
        f"  Function:   {whole.function[:16]}",
        f"  Arguments:  {whole.argument_bytes} bytes",
    ]
    click.echo("\n".join(lines))
    for one in whole.attempts:
        began = f"began {local_moment(one.started)}" if one.started else "did not begin"
        ended = (
            f", {one.how} {local_moment(one.ended)}" if one.ended else f", {one.how}"
        )
        claimed = f"claimed {local_moment(one.claimed)}"
        click.echo(f"  Attempt {one.number}:  {one.worker} {claimed}, {began}{ended}")
    if task.error is not None:
        _echo_section("Error", task.error.traceback or str(task.error))
        _echo_section("Last of stderr", task.error.stderr)
    _echo_section("stdout", whole.output.stdout)
    _echo_section("stderr", whole.output.stderr)


def _echo_section(title: str, text: str) -> None:
    if text:
        click.echo(click.style(f"--- {title}", bold=True))
        click.echo(text.rstrip("\n"))


@click.command()
@session_argument
@task_argument(required=False)
@click.option("--follow", is_flag=True, help="Go on until all of them are finished.")
@click.option("--worker", metavar="W", help="What this worker's own process printed.")
@click.option("--workers", is_flag=True, help="The same of all workers.")
@store_option
@json_option
def logs(
    id: str,
    task: str | None,
    follow: bool,
    worker: str | None,
    workers: bool,
    store: str | None,
    as_json: bool,
) -> None:
    """Print what tasks have printed: all, or one; or what workers have, which says why one never came to work.

    What a running task has printed is known as of its worker's last heartbeat, some 20 seconds ago. Workers on
    ECS print to CloudWatch Logs, those on this machine to files, of which the end is shown.
    """  # fmt: skip
    from starburst_executor.cli.logs import Follower, whole_logs

    if (task is not None) + (worker is not None) + workers > 1:
        raise click.UsageError("give one of TASK, --worker and --workers")
    with at_session(store, id) as session:
        if worker is not None or workers:
            _print_worker_logs(session, worker, follow, as_json)
            return
        manifest = session.load()
        only = None if task is None else find_task(session, task)
        if follow:
            Follower(session, only, as_json).run(manifest.intervals.look_last)
            return
        found: Iterator[Found] = history.find(session) if only is None else iter([only])
        for line in whole_logs(session, found, as_json, headed=only is None):
            click.echo(line, nl=False)


def _print_worker_logs(
    session: Session, worker: str | None, follow: bool, as_json: bool
) -> None:
    from starburst_executor.cli.worker_logs import WorkerPrinter

    printer = WorkerPrinter(session, worker, as_json)
    if follow:
        printer.follow(session.load().intervals.look_last)
    else:
        printer.run()


@click.command()
@session_argument
@store_option
@json_option
def errors(id: str, store: str | None, as_json: bool) -> None:
    """Print the failures of a session, grouped by traceback: how many, some task ids, one traceback."""
    with at_session(store, id) as session:
        session.load()
        groups = history.group_errors(history.views(session, (State.FAILED,)))
    if as_json:
        click.echo(document("errors", groups))
        return
    if not groups:
        click.echo("No task has failed.", err=True)
    for group in groups:
        ids = ", ".join(group.task_ids) + (", ..." if group.count > 5 else "")
        head = f"{group.count} x {one_line(str(group.error))}"
        click.echo(click.style(head, fg="red", bold=True))
        click.echo(f"  tasks {ids}")
        for part in (group.error.traceback, group.error.stderr):
            click.echo("".join(f"  {line}\n" for line in part.splitlines()), nl=False)


VERBS: dict[str, click.Command] = {
    "list": list_,
    "status": status,
    "tasks": tasks,
    "show": show,
    "logs": logs,
    "errors": errors,
}

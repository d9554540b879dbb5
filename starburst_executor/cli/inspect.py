"""Read-only verbs: list, status, tasks, show, logs, errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from starburst_executor.cli.exits import Exit, Failed
from starburst_executor.cli.follow import EchoJson, Watch, seconds_option
from starburst_executor.cli.options import (
    at_session,
    at_store,
    json_option,
    session_argument,
    store_option,
    task_argument,
    task_name,
)
from starburst_executor.cli.output import (
    counted,
    document,
    echo,
    echo_lines,
    local_moment,
    one_line,
    status_text,
    styled,
    terminal_width,
)
from starburst_executor.client.resubmit import retried, unhealed
from starburst_executor.costs.bill import CostTracker
from starburst_executor.inspection.status import SessionStatus, list_summaries, read_status
from starburst_executor.inspection.tasks import (
    Found,
    TaskHistory,
    TaskView,
    find,
    find_one,
    group_errors,
    history,
    views,
)
from starburst_executor.inspection.terminal import duration, open_display
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import Session
from starburst_executor.tables import Column, fitted

if TYPE_CHECKING:
    from starburst_executor.inspection.terminal import Display

__all__ = ["VERBS"]

F = TypeVar("F", bound=Callable[..., Any])


@click.command("list")
@store_option
@json_option
def list_(store: str | None, as_json: bool) -> None:
    """List the sessions in a store, oldest first.

    `done` is the share of tasks that are finished; `run`, `fail` and `cancel` count running, failed
    and cancelled tasks; `idle` is how long ago anything was written. For a session at work, the
    counts need not describe a single moment.
    """
    with at_store(store) as opened:
        sessions = list_summaries(opened)
        if as_json:
            echo(document("sessions", sessions))
            return
        if not sessions:
            echo(f"There are no sessions in {opened.url}.", err=True)
            return
    echo_lines(sessions.lines(terminal_width()))
    for one in sessions:
        if one.error:
            echo(styled(f"{one.session_id}: {one.error}", fg="red"), err=True)
        if one.alert:
            echo(styled(one.alert, fg="yellow"), err=True)


@click.command()
@session_argument
@click.option("--watch", is_flag=True, help="Continue until all tasks are finished.")
@seconds_option
@store_option
@json_option
def status(id: str, watch: bool, timeout: float | None, store: str | None, as_json: bool) -> None:
    """Show how far a session is.

    With --watch, continue until every task is finished, then exit with code 6 if any failed or was
    cancelled and was not retried. On a terminal the display is live; otherwise it is a line every
    ten seconds, or with --json a document per line.
    """
    if timeout is not None and not watch:
        raise click.UsageError("--timeout requires --watch")
    with at_session(store, id) as session:
        if not watch:
            now = read_status(session, reckon=CostTracker(session).look)
            _echo_status(session, now, as_json)
            return
        display: Display = EchoJson() if as_json else open_display(sys.stdout, session.runtime)
        last = Watch(session, display, timeout).until_finished()
        if not as_json:
            _echo_status(session, last, as_json)
        bad = last.failed + last.cancelled > 0 and unhealed(session, _BAD)
    if bad:
        sys.exit(Exit.TASKS_FAILED)


_BAD = (State.FAILED, State.CANCELLED)


def _echo_status(session: Session, now: SessionStatus, as_json: bool) -> None:
    if as_json:
        echo(document("status", now))
        return
    echo(status_text(str(now)))
    if now.failed or now.cancelled:
        again = len(retried(session).after)
        if again:
            echo(f"  Retried:   {counted(again, 'task')}, also counted as failed or cancelled")


def _only(state: State, which: str) -> Callable[[F], F]:
    """`--pending` and so on."""
    return click.option(f"--{state}", "state", flag_value=str(state), help=f"Only tasks {which}.")


@click.command()
@session_argument
@_only(State.PENDING, "that no worker has")
@_only(State.CLAIMED, "that a worker has claimed and not started")
@_only(State.RUNNING, "that are running")
@_only(State.COMPLETED, "that returned")
@_only(State.FAILED, "that failed")
@_only(State.CANCELLED, "that were cancelled")
@store_option
@json_option
def tasks(id: str, state: str | None, store: str | None, as_json: bool) -> None:
    """List the tasks of a session, one per line.

    `queued` is how long a task waited between being stored and its last attempt; `ran` is how long
    that attempt has run. A terminal too narrow for all columns gets the most important ones.
    """
    with at_session(store, id) as session:
        session.load()
        states = None if state is None else (State(state),)
        found = list(views(session, states))
    if as_json:
        echo(document("tasks", found))
        return
    rows = [_task_row(task) for task in found]
    echo_lines(fitted(_TASKS, rows, terminal_width()))


_TASKS = (
    Column("index", right=True, spare=4),
    Column("task"),
    Column("state"),
    Column("name", least=20),
    Column("attempt", right=True, spare=3),
    Column("queued", right=True, spare=2),
    Column("ran", right=True),
    Column("worker", spare=1),
    Column("error", least=12),
)


def _task_row(task: TaskView) -> tuple[str, ...]:
    return (
        str(task.index),
        task.task_id,
        task.state,
        task.name or "-",
        str(task.attempt),
        duration(task.queued),
        duration(task.ran) if task.ran else "-",
        task.worker or "-",
        one_line(str(task.error)) if task.error else "",
    )


@click.command()
@session_argument
@task_argument(required=True)
@store_option
@json_option
def show(id: str, task: str, store: str | None, as_json: bool) -> None:
    """Show everything known about one task: its attempts and times, its error and its output."""
    with at_session(store, id) as session:
        whole = history(session, find_task(session, task))
        again = retried(session).after.get(whole.task.task_id)
    if as_json:
        content = {"history": whole, "retried_as": again}
        echo(document("task", content))
        return
    _echo_history(whole, again)


def find_task(session: Session, text: str) -> Found:
    """The task that `text` names.

    Raises:
        BadParameter: it is not a task id.
        Failed: the session has no such task.
    """
    name = task_name(session.load(), text)
    try:
        return find_one(session, name)
    except LookupError as error:
        raise Failed(str(error), Exit.NOT_FOUND) from error


def _echo_history(whole: TaskHistory, again: str | None) -> None:
    task = whole.task
    echo(styled(f"Task {task.task_id}", bold=True), f" (index {task.index})")
    lines = [
        *([f"  Label:      {task.label}"] if task.label else []),
        f"  Call:       {task.call or '-'}",
        f"  State:      {task.state}" + (f", retried as {again}" if again else ""),
        f"  Stored:     {local_moment(whole.stored_at)}",
        f"  Queued:     {duration(task.queued)}",
        f"  Ran:        {duration(task.ran)}",
        f"  Function:   {whole.function[:16]}",
        f"  Arguments:  {whole.argument_bytes} bytes",
    ]
    echo("\n".join(lines))
    for one in whole.attempts:
        echo(f"  Attempt {one.number}:  {one.worker} {one.how}")
        for what, when in (
            ("claimed", one.claimed),
            ("began", one.started),
            ("ended", one.ended),
        ):
            if when is not None:
                echo(f"    {what + ':':<9} {local_moment(when)}")
    if task.error is not None:
        _echo_section("Error", task.error.traceback or str(task.error))
        _echo_section("End of stderr", task.error.stderr)
    _echo_section("stdout", whole.output.stdout)
    _echo_section("stderr", whole.output.stderr)


def _echo_section(title: str, text: str) -> None:
    if text:
        echo(styled(f"--- {title}", bold=True))
        echo(text.rstrip("\n"))


@click.command()
@session_argument
@task_argument(required=False)
@click.option("--follow", is_flag=True, help="Continue until all of them are finished.")
@click.option("--worker", metavar="W", help="Output of this worker's own process.")
@click.option("--workers", is_flag=True, help="The same for all workers.")
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
    """Show the output of tasks, all or one; or of workers, which tells why one never started work.

    Output of a running task is as of its worker's last heartbeat, up to about 20 seconds ago.
    Workers on ECS log to CloudWatch Logs, workers on this machine to files, of which the end is
    shown.
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
        found: Iterator[Found] = find(session) if only is None else iter([only])
        for line in whole_logs(session, found, as_json, headed=only is None):
            echo(line, nl=False)


def _print_worker_logs(session: Session, worker: str | None, follow: bool, as_json: bool) -> None:
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
    """Show the failures of a session, grouped by traceback: how many, some tasks, one traceback.

    Tasks that were retried are left out: the outcome of the last try counts.
    """
    with at_session(store, id) as session:
        session.load()
        failed = list(views(session, (State.FAILED,)))
        after = retried(session).after
    standing = [task for task in failed if task.task_id not in after]
    groups = group_errors(standing)
    if as_json:
        echo(document("errors", groups))
        return
    again = len(failed) - len(standing)
    if again:
        echo(f"{counted(again, 'failure')} left out because they were retried.", err=True)
    elif not groups:
        echo("No task has failed.", err=True)
    for group in groups:
        head = f"{group.count} x {one_line(str(group.error))}"
        echo(styled(head, fg="red", bold=True))
        for name in group.names:
            echo(f"  task {name}")
        if group.count > len(group.names):
            echo(f"  and {counted(group.count - len(group.names), 'other')}")
        for part in (group.error.traceback, group.error.stderr):
            echo("".join(f"  {line}\n" for line in part.splitlines()), nl=False)


VERBS: dict[str, click.Command] = {
    "list": list_,
    "status": status,
    "tasks": tasks,
    "show": show,
    "logs": logs,
    "errors": errors,
}

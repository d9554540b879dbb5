"""Verbs that change a session: cancel, retry, extend, scale, cleanup, prune."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress

import click

from starburst_executor.cli.inspect import find_task
from starburst_executor.cli.options import (
    at_session,
    at_store,
    launcher_of,
    session_argument,
    start_workers,
    store_option,
    tasks_argument,
)
from starburst_executor.cli.output import counted, echo
from starburst_executor.client.resubmit import retry as submit_again
from starburst_executor.client.resubmit import unhealed
from starburst_executor.coordination import administration
from starburst_executor.environment.repository import prune as prune_environments
from starburst_executor.errors import SessionNotFound
from starburst_executor.inspection.status import read_status, session_ids
from starburst_executor.inspection.tasks import Found, find, idle_seconds
from starburst_executor.launchers.base import Launcher, open_launcher
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.runtime import Runtime, SystemRuntime
from starburst_executor.storage.base import Store

__all__ = ["VERBS"]

_UNFINISHED = (State.PENDING, State.CLAIMED, State.RUNNING)
_MOST_WORKERS = 10_000  # as for an executor


@click.command()
@session_argument
@tasks_argument
@store_option
def cancel(id: str, task: tuple[str, ...], store: str | None) -> None:
    """Cancel tasks, including running ones; without TASK, all unfinished ones.

    The worker that runs a task notices within a heartbeat and stops it.
    """
    with at_session(store, id) as session:
        chosen = _chosen(session, task, _UNFINISHED)
        cancelled = sum(
            _cancel(session, batch, positions) for batch, positions in _by_batch(chosen).items()
        )
    ended = len(chosen) - cancelled
    echo(
        f"Cancelled {counted(cancelled, 'task')}."
        + (f" {ended} had ended before." if ended else "")
    )


def _chosen(session: Session, names: tuple[str, ...], states: Iterable[State]) -> list[Found]:
    """The named tasks; without names, all that are in one of the states."""
    if names:
        found = {one.task_id: one for one in (find_task(session, n) for n in names)}
        return list(found.values())
    session.load()
    return list(find(session, tuple(states)))


def _by_batch(tasks: Iterable[Found]) -> dict[Batch, list[int]]:
    batches: dict[Batch, list[int]] = {}
    for found in tasks:
        batches.setdefault(found.batch, []).append(found.position)
    return batches


def _cancel(session: Session, batch: Batch, positions: list[int]) -> int:
    record = session.cancel(batch, positions, running=True).record
    return sum(record.tasks[i].state is State.CANCELLED for i in positions)


@click.command()
@session_argument
@tasks_argument
@click.option("--failed", is_flag=True, help="All tasks that failed and have not been retried.")
@click.option("--cancelled", is_flag=True, help="The same for cancelled tasks.")
@click.option("--all", "both", is_flag=True, help="Both.")
@store_option
def retry(
    id: str,
    task: tuple[str, ...],
    failed: bool,
    cancelled: bool,
    both: bool,
    store: str | None,
) -> None:
    """Submit the calls of finished tasks again, as new tasks; print the old and the new id.

    The old tasks stay as they ended, but for `collect`, `errors` and exit codes the outcome of the
    last try counts. Missing workers are started with the session's own launcher.
    """
    states = [State.FAILED] * (failed or both) + [State.CANCELLED] * (cancelled or both)
    if bool(states) == bool(task):
        raise click.UsageError("name one or more tasks, or give --failed, --cancelled or --all")
    with at_session(store, id) as session:
        if task:
            chosen = _chosen(session, task, ())
        else:
            session.load()
            chosen = unhealed(session, states)
        _check_final(chosen)
        made = submit_again(session, chosen)
        for old, new in made.items():
            echo(f"{old} -> {new}")
        for one in chosen:
            if one.task_id not in made:
                echo(
                    f"{one.task_id}: cancelled before it was stored, so there is nothing to retry",
                    err=True,
                )
        if made:
            start_workers(session)
        elif states:
            which = " or ".join(map(str, states))
            echo(f"No task is {which} that was not retried already.", err=True)


def _check_final(tasks: Iterable[Found]) -> None:
    for one in tasks:
        if not one.task.state.final:
            raise click.UsageError(
                f"task {one.task_id} is {one.task.state}: only finished tasks can be retried; "
                "cancel it first"
            )


@click.command()
@session_argument
@click.argument("seconds", type=float)
@store_option
def extend(id: str, seconds: float, store: str | None) -> None:
    """Extend the session's time limits by SECONDS, from now if they have passed; they never shrink.

    Missing workers are started on this machine.
    """
    with at_session(store, id) as session:
        try:
            manifest = administration.extend(session, seconds)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="SECONDS") from error
        status = read_status(session)
        echo(f"Session {session.id} goes on until {status.deadline:%Y-%m-%d %H:%M:%S} UTC.")
        if manifest.state != "terminated":
            start_workers(session)


def _workers(ctx: click.Context, param: click.Parameter, text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_WORKERS:
        raise click.BadParameter(
            f'{text!r} is neither a number from 1 to {_MOST_WORKERS} nor "auto"'
        )
    return int(text)


@click.command()
@session_argument
@click.argument("workers", metavar="N|auto", callback=_workers)
@store_option
def scale(id: str, workers: int | None, store: str | None) -> None:
    """Cap the session at N workers; `auto` goes back to as many as it was created with.

    Workers missing for its unfinished tasks are started with the session's own launcher. Surplus
    workers leave within about a minute: they finish what they run and hand back what they have not
    begun.
    """
    with at_session(store, id) as session:
        try:
            manifest = administration.scale(session, workers)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="N|auto") from error
        most = counted(manifest.workers, "worker")
        echo(f"Session {session.id} will run at most {most}.")
        if manifest.state != "terminated":
            start_workers(session)


@click.command()
@session_argument
@click.option("--force", is_flag=True, help="Delete all its objects.")
@store_option
def cleanup(id: str, force: bool, store: str | None) -> None:
    """End a session: stop its workers and mark it terminated. Its results stay readable.

    With --force, all its objects are deleted once its workers have ended or are lost.
    """
    with at_session(store, id) as session:
        if force:
            administration.delete(session, _launcher(session))
            echo(f"Session {session.id} is deleted.")
        else:
            administration.terminate(session, launcher_of(session.load()))
            echo(f"Session {session.id} is terminated; its results stay readable.")


def _launcher(session: Session) -> Launcher:
    """The session's launcher; for remains of a half-deleted session, this machine's."""
    try:
        return launcher_of(session.load())
    except SessionNotFound:
        return open_launcher(WorkerSpec())


@click.command()
@click.option(
    "--older-than",
    metavar="AGE",
    required=True,
    help="A number with s, m, h, d or w, as in 7d.",
)
@click.option("--dry-run", is_flag=True, help="Only show which.")
@store_option
def prune(older_than: str, dry_run: bool, store: str | None) -> None:
    """Delete sessions in which nothing was written for longer than AGE, finished or not.

    This also deletes what interrupted deletions left behind, and environments that no session uses
    and that none has started with for that long. A session with a live worker is never that old.
    """
    limit = _age(older_than)
    count = 0
    with at_store(store) as opened:
        runtime = SystemRuntime()
        try:
            for session_id in list(session_ids(opened)):
                session = Session(opened, session_id, runtime)
                if idle_seconds(session) > limit:
                    count += 1
                    echo(session_id)
                    if not dry_run:
                        administration.delete(session, _launcher(session))
            environments = _prune_environments(opened, runtime, limit, dry_run=dry_run)
        finally:
            runtime.close()
    done = "would be deleted" if dry_run else "deleted"
    what = f"{counted(count, 'session')} and {counted(environments, 'environment')}"
    echo(f"{what} {done}.", err=True)


def _prune_environments(store: Store, runtime: Runtime, limit: float, *, dry_run: bool) -> int:
    """Delete the environments that no session names; return how many."""
    used: set[str] = set()
    for session_id in session_ids(store):
        with suppress(SessionNotFound):  # half deleted
            used.add(Session(store, session_id, runtime).load().spec.lock or "")
    return len(list(prune_environments(store, used, limit, dry_run=dry_run)))


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def _age(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if match is None:
        raise click.BadParameter(
            f"{text!r} is not an age; give a number with s, m, h, d or w, as in 7d or 12h",
            param_hint="--older-than",
        )
    return float(match[1]) * _UNITS[match[2]]


VERBS: dict[str, click.Command] = {
    "cancel": cancel,
    "retry": retry,
    "extend": extend,
    "scale": scale,
    "cleanup": cleanup,
    "prune": prune,
}

"""The collect verb, the only one that unpickles."""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import click
import cloudpickle  # type: ignore[import-untyped]
import msgspec

from starburst_executor.cli.exits import Exit, Failed
from starburst_executor.cli.follow import Watch, seconds_option
from starburst_executor.cli.options import (
    at_session,
    json_option,
    session_argument,
    start_workers,
    store_option,
)
from starburst_executor.cli.output import counted, document, echo, echo_table, one_line
from starburst_executor.client.codec import PayloadCodec, python_version
from starburst_executor.client.outcomes import Collector, FinalStateName, TaskOutcome
from starburst_executor.client.resubmit import healed, retried
from starburst_executor.inspection import tasks
from starburst_executor.inspection.status import SessionStatus
from starburst_executor.inspection.terminal import duration, open_display
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.manifest import Manifest
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.vanished import lost
from starburst_executor.storage.base import appearing
from starburst_executor.worker.cache import DiskCache

__all__ = ["VERBS"]

_SHOWN = 60  # characters of a value in the table
_REPR_MAX = 1000  # characters of a value that JSON cannot hold
_SCALE_EVERY = 10.0  # seconds between checks for missing workers


@click.command()
@session_argument
@click.option("--wait", is_flag=True, help="Wait until all tasks are finished.")
@seconds_option
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write a pickle (.pkl) of a list of TaskOutcome, or JSON (.json).",
)
@store_option
@json_option
def collect(
    id: str,
    wait: bool,
    timeout: float | None,
    output: Path | None,
    store: str | None,
    as_json: bool,
) -> None:
    """Print one outcome per finished task, in submission order: what it returned or raised.

    With --wait, first wait until all tasks are finished, and start missing workers on this machine,
    as the session's own client would. A value that JSON cannot hold is shown as its `repr`; it
    cannot be written to a .json FILE. A task that was retried has the outcome of its last try.
    Exits with code 6 if a task failed or was cancelled.
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout requires --wait")
    if output is not None:
        _check_suffix(output)
    with at_session(store, id) as session:
        manifest = session.load()
        _check_python(session, manifest, needed=output is not None)
        if wait:
            _wait(session, timeout)
        outcomes = _outcomes(session, manifest)
        if output is not None:
            _write(output, outcomes)
    if as_json:
        echo(document("outcomes", [_as_json(one) for one in outcomes]))
    elif output is None:
        _echo(outcomes)
    if any(not one.ok for one in outcomes):
        sys.exit(Exit.TASKS_FAILED)


def _check_suffix(output: Path) -> None:
    if output.suffix not in (".pkl", ".pickle", ".json"):
        raise click.BadParameter(
            f"{output.name!r} does not tell the format: use the suffix .pkl for a pickle of a "
            "list of TaskOutcome, or .json",
            param_hint="-o",
        )
    if not output.absolute().parent.is_dir():
        raise click.BadParameter(
            f"the directory {str(output.absolute().parent)!r} does not exist",
            param_hint="-o",
        )


def _check_python(session: Session, manifest: Manifest, *, needed: bool) -> None:
    """Warn that values of another Python cannot be read; everything else can."""
    if manifest.python == python_version():
        return
    if needed:
        PayloadCodec(session, manifest.python, ()).check_python()
    echo(
        f"This is Python {python_version()} and the session uses Python {manifest.python}: its "
        "values cannot be read here.",
        err=True,
    )


# --- waiting -----------------------------------------------------------------------


def _wait(session: Session, timeout: float | None) -> None:
    runtime = session.runtime
    display = open_display(sys.stderr, runtime)
    scaled = -_SCALE_EVERY

    def keep_workers(status: SessionStatus) -> None:
        nonlocal scaled
        if runtime.monotonic() - scaled >= _SCALE_EVERY:
            scaled = runtime.monotonic()
            start_workers(session)

    status = Watch(session, display, timeout).until_finished(keep_workers)
    left = status.total - status.finished
    if left:
        echo(
            f"Session {session.id} was terminated with {counted(left, 'task')} unfinished.",
            err=True,
        )


# --- reading -----------------------------------------------------------------------


def _outcomes(session: Session, manifest: Manifest) -> list[TaskOutcome]:
    queue = session.queue()
    listed = [sight.batch for sight in queue.look()]
    gone = lost(queue, listed, manifest.lanes)
    if manifest.python != python_version():
        return _without_values(session)
    collector = Collector(session, PayloadCodec(session, manifest.python, ()))
    outcomes: list[TaskOutcome] = []
    index = 0
    with _importable(session, listed):
        for batch in sorted({*listed, *gone}):
            outcomes += collector.collect(batch, index, gone=batch in gone)
            index += batch.size
    return healed(outcomes, retried(session))


@contextmanager
def _importable(session: Session, batches: Iterable[Batch]) -> Iterator[None]:
    """Make the modules shipped with the tasks importable, for unpickling results."""
    archives: dict[str, str] = {}
    for batch in batches:
        archives |= session.tasks(batch).header.modules
    with tempfile.TemporaryDirectory(prefix="starburst-") as folder:
        added = DiskCache(session, Path(folder)).path(archives)
        sys.path.extend(added)
        try:
            yield
        finally:
            sys.path[:] = [path for path in sys.path if path not in added]


def _without_values(session: Session) -> list[TaskOutcome]:
    outcomes = [
        TaskOutcome(
            index=view.index,
            task_id=view.task_id,
            state=cast(FinalStateName, view.state),
            value=_UNREADABLE,
            type=view.error.type if view.error else "",
            message=view.error.message if view.error else "",
            traceback=view.error.traceback if view.error else "",
            worker=view.worker,
            attempt=view.attempt,
            seconds=view.ran,
        )
        for view in tasks.views(session, [s for s in State if s.final])
    ]
    return healed(outcomes, retried(session))


class _Unreadable:
    """Stands in for a value that this Python cannot unpickle."""

    def __repr__(self) -> str:
        return "<not readable by this Python version>"


_UNREADABLE = _Unreadable()


# --- writing -----------------------------------------------------------------------


def _echo(outcomes: list[TaskOutcome]) -> None:
    if not outcomes:
        echo("No task is finished.", err=True)
        return
    echo_table(
        ("index", "task", "state", "ran", "value or error"),
        [
            (str(one.index), one.task_id, one.state, duration(one.seconds), _value_or_error(one))
            for one in outcomes
        ],
    )


def _value_or_error(outcome: TaskOutcome) -> str:
    if outcome.ok:
        text = one_line(_repr(outcome.value))
        return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
    return one_line(f"{outcome.type}: {outcome.message}" if outcome.type else "")


def _repr(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:  # user code
        return f"<{type(value).__qualname__}: its repr raised {type(error).__qualname__}>"


def _as_json(outcome: TaskOutcome) -> dict[str, Any]:
    held = _json(outcome.value)
    return {
        "index": outcome.index,
        "task_id": outcome.task_id,
        "state": outcome.state,
        "value": held,
        "repr": None if held is not None else _repr(outcome.value)[:_REPR_MAX],
        "type": outcome.type,
        "message": outcome.message,
        "traceback": outcome.traceback,
        "worker": outcome.worker,
        "attempt": outcome.attempt,
        "seconds": outcome.seconds,
        "retried_as": outcome.retried_as,
    }


def _json(value: object) -> msgspec.Raw | None:
    """The value as JSON; None if JSON cannot hold it."""
    try:
        return msgspec.Raw(json.dumps(value, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError):
        return None


def _write(output: Path, outcomes: list[TaskOutcome]) -> None:
    if output.suffix == ".json":
        _check_json(output, outcomes)
        content = document("outcomes", [_as_json(one) for one in outcomes]) + "\n"
        data = content.encode()
    else:
        # With cloudpickle: classes defined in a script are pickled by value.
        data = cloudpickle.dumps(outcomes, pickle.DEFAULT_PROTOCOL)
    with appearing(output) as file:
        file.write(data)
    echo(f"Wrote {counted(len(outcomes), 'outcome')} to {output}.", err=True)


def _check_json(output: Path, outcomes: list[TaskOutcome]) -> None:
    for one in outcomes:
        if _json(one.value) is None:
            raise Failed(
                f"the value of task {one.task_id} is {_repr(one.value)[:_SHOWN]}, of type "
                f"{type(one.value).__qualname__}, which JSON cannot hold; write "
                f"{output.with_suffix('.pkl')} instead",
                Exit.OTHER,
            )


VERBS: dict[str, click.Command] = {"collect": collect}

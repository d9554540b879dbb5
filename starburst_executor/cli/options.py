"""Options and arguments that most verbs share: store, session and tasks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from starburst_executor.cli.exits import Exit, Failed
from starburst_executor.formatting import printable

if TYPE_CHECKING:
    from starburst_executor.launchers.base import Launcher
    from starburst_executor.protocol.manifest import Manifest
    from starburst_executor.protocol.session import Session
    from starburst_executor.storage.base import Store

__all__ = [
    "at_session",
    "at_store",
    "json_option",
    "launcher_of",
    "session_argument",
    "start_workers",
    "store_option",
    "task_argument",
    "task_name",
    "tasks_argument",
]

F = TypeVar("F", bound=Callable[..., Any])

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_MOST_COMPLETIONS = 200  # more would not help anyone


# --- options and arguments -----------------------------------------------------------


def store_option(command: F) -> F:
    """`--store URL`."""
    return click.option(
        "--store",
        metavar="URL",
        help="Where the session is: s3://bucket/prefix or a directory; defaults to "
        "STARBURST_STORE, the configuration file, or a folder in your user data directory.",
    )(command)


def json_option(command: F) -> F:
    """`--json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print JSON, with a schema version."
    )(command)


def session_argument(command: F) -> F:
    """`ID`."""
    return click.argument("id", shell_complete=_complete_session)(command)


def tasks_argument(command: F) -> F:
    """`[TASK]...`."""
    return click.argument("task", nargs=-1, shell_complete=_complete_task)(command)


def task_argument(*, required: bool) -> Callable[[F], F]:
    """`TASK`."""
    return click.argument("task", required=required, shell_complete=_complete_task)


# --- opening -----------------------------------------------------------------------


@contextmanager
def at_store(url: str | None) -> Iterator[Store]:
    """Open the store at that URL, or the default one, for a block."""
    from starburst_executor import config
    from starburst_executor.storage.url import open_store

    found = config.load(arguments={"store": url or None})
    try:
        store = open_store(found.settings.store)
    except ValueError as error:
        hint = "--store" if url else found.sources["store"]
        raise click.BadParameter(str(error), param_hint=hint) from error
    with closing(store):
        yield store


@contextmanager
def at_session(url: str | None, text: str) -> Iterator[Session]:
    """Open the session whose id, or unique part of it, is `text`, for a block.

    Raises:
        SessionNotFound: there is none, or somebody deleted it meanwhile.
    """
    from starburst_executor.errors import DamagedObject, ObjectNotFound, SessionTerminated
    from starburst_executor.protocol.session import Session
    from starburst_executor.runtime import SystemRuntime

    with at_store(url) as store, closing(SystemRuntime()) as runtime:
        session = Session(store, _session_id(store, text), runtime)
        try:
            yield session
        except (DamagedObject, ObjectNotFound, SessionTerminated):
            session.load()  # if it is gone altogether, that is what to say
            raise


def _session_id(store: Store, text: str) -> str:
    """The one id that `text` equals, or is a prefix of, or whose last part it is a prefix of."""
    if not _ID.fullmatch(text):
        raise click.BadParameter(
            f"{text!r} is not a session id; give one like 20250131-094500-k7mw3x or its "
            "beginning, or just k7mw3x or its beginning",
            param_hint="ID",
        )
    from starburst_executor.inspection.status import resolve

    try:
        return resolve(store, text)
    except ValueError as error:  # it lists what is in the store
        raise click.BadParameter(printable(str(error)), param_hint="ID") from error


def task_name(manifest: Manifest, text: str) -> str:
    """The task id that `text` stands for; a bare number will do in a session with one lane.

    Raises:
        BadParameter: it is not a task id.
    """
    from starburst_executor.protocol.keys import parse_task_id

    name = f"0-{text}" if text.isdecimal() and len(manifest.lanes) == 1 else text
    try:
        parse_task_id(name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="TASK") from error
    return name


# --- workers -----------------------------------------------------------------------


def launcher_of(manifest: Manifest) -> Launcher:
    """The launcher of a session's workers."""
    from starburst_executor.launchers.base import open_launcher

    try:
        return open_launcher(manifest.spec, manifest.deployment)
    except ValueError as error:
        raise Failed(str(error), Exit.OTHER) from error


def start_workers(session: Session) -> None:
    """Start the workers that a session's unfinished tasks need, and print how many."""
    from starburst_executor.cli.output import counted, echo
    from starburst_executor.client.codec import python_version
    from starburst_executor.coordination.autoscaler import Autoscaler
    from starburst_executor.inspection.status import read_status

    manifest = session.load()
    status = read_status(session)
    unfinished = status.total - status.finished
    if not unfinished:
        return
    if manifest.python != python_version():
        echo(
            f"No workers were started: the session uses Python {manifest.python} and this is "
            f"{python_version()}. Run with that Python: starburst-executor worker {session.url}"
        )
        return
    launcher = launcher_of(manifest)
    before = launcher.live(session.url) or set()
    Autoscaler(session, launcher, manifest, _reraise).need(unfinished)
    started = (launcher.live(session.url) or set()) - before
    if started:
        echo(f"Started {counted(len(started), 'worker')}.")


def _reraise(error: Exception) -> None:
    raise error


# --- completion --------------------------------------------------------------------


def _complete_session(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from starburst_executor.errors import StarburstError
    from starburst_executor.inspection.status import ids_like, session_ids

    try:
        with at_store(ctx.params.get("store")) as store:
            found = ids_like(store, incomplete) if _ID.fullmatch(incomplete) else []
            if not incomplete:
                found = list(session_ids(store))
    except (StarburstError, click.ClickException):
        return []  # a completion has no place for a message
    return [CompletionItem(one) for one in found[-_MOST_COMPLETIONS:]]


def _complete_task(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from starburst_executor.errors import StarburstError
    from starburst_executor.protocol.keys import task_id

    try:
        with at_session(ctx.params.get("store"), ctx.params["id"]) as session:
            batches = [sight.batch for sight in session.queue().look()]
    except (StarburstError, click.ClickException):
        return []  # a completion has no place for a message
    names = (task_id(b.lane, n) for b in batches for n in range(b.number, b.end))
    found = [name for name in names if name.startswith(incomplete)]
    return [CompletionItem(name) for name in found[:_MOST_COMPLETIONS]]

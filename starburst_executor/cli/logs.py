"""Output of tasks, complete or as it grows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from starburst_executor.cli.output import Styled, document, echo, styled
from starburst_executor.formatting import printable
from starburst_executor.inspection.tasks import Found, Output, find, read_again, read_output
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.manifest import SessionState
from starburst_executor.protocol.records import State
from starburst_executor.protocol.session import Session

__all__ = ["Follower", "added", "whole_logs"]

_OVERLAP = 256  # characters used to find where an output with a truncated beginning continues


def whole_logs(
    session: Session, tasks: Iterable[Found], as_json: bool, *, headed: bool
) -> Iterator[str]:
    """Output of tasks so far, stdout before stderr; as text, tasks without output are left out."""
    if as_json:
        content = [_log(found, read_output(session, found)) for found in tasks]
        yield document("logs", content) + "\n"
        return
    for found in tasks:
        text = "".join(map(_ended, _parts(read_output(session, found))))
        if text:
            text = printable(text)
            yield Styled(f"{_heading(found)}\n{text}" if headed else text)


def _log(found: Found, output: Output) -> dict[str, object]:
    return {
        "task_id": found.task_id,
        "state": found.task.state,
        "attempt": found.task.attempt,
        "stdout": output.stdout,
        "stderr": output.stderr,
    }


def _parts(output: Output) -> tuple[str, str]:
    return output.stdout, output.stderr


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else f"{text}\n"


def _heading(found: Found) -> Styled:
    return styled(f"--- task {found.task_id} ({found.task.state})", bold=True)


def added(before: str, now: str) -> str:
    """What was printed between two reads of an output of which only the tail is kept."""
    if now.startswith(before):
        return now[len(before) :]
    end = before[-_OVERLAP:]
    at = now.find(end)
    return now[at + len(end) :] if at >= 0 else now


class Follower:
    """Prints the output of tasks until they are finished.

    Args:
        session: The session.
        only: The one task to follow; None for all.
        as_json: Print a JSON document per piece of output.
    """

    def __init__(self, session: Session, only: Found | None, as_json: bool) -> None:
        self._session = session
        self._only = only
        self._as_json = as_json
        self._seen: dict[str, tuple[int, Output]] = {}  # task id -> attempt, output
        self._done: set[Batch] = set()  # everything in these is printed
        self._current = "" if only is None else only.task_id
        self._in_line = False  # the last text did not end in a newline

    def run(self, pause: float) -> None:
        """Poll every `pause` seconds until everything is printed or the session was terminated."""
        while self._look():
            if self._session.load().state is SessionState.TERMINATED:
                return
            self._session.runtime.signal().wait(pause)

    def _look(self) -> bool:
        """Print what is new; return whether more can come."""
        looked: set[Batch] = set()
        unfinished: set[Batch] = set()
        for found in self._tasks():
            looked.add(found.batch)
            if not found.task.state.final:
                unfinished.add(found.batch)
            if found.task.state is not State.PENDING:
                self._print_new(found, read_output(self._session, found))
        self._done |= looked - unfinished
        return bool(unfinished)

    def _tasks(self) -> Iterator[Found]:
        if self._only is None:
            return find(self._session, without=self._done)
        return iter([read_again(self._session, self._only)])

    def _print_new(self, found: Found, output: Output) -> None:
        attempt, before = self._seen.get(found.task_id, (0, Output(stdout="", stderr="")))
        if attempt != found.task.attempt:
            before = Output(stdout="", stderr="")
        self._seen[found.task_id] = found.task.attempt, output
        streams = zip(("stdout", "stderr"), _parts(before), _parts(output), strict=True)
        for stream, old, new in streams:
            if text := added(old, new):
                self._print(found, stream, text)

    def _print(self, found: Found, stream: str, text: str) -> None:
        if self._as_json:
            content = {
                "task_id": found.task_id,
                "attempt": found.task.attempt,
                "stream": stream,
                "text": text,
            }
            echo(document("log", content))
            return
        if found.task_id != self._current:
            self._current = found.task_id
            echo("\n" * self._in_line, _heading(found))
        echo(text, nl=False)
        self._in_line = not text.endswith("\n")

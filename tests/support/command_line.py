"""What the tests of the command line share: commands, and sessions for them to look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
from click.testing import CliRunner, Result
from msgspec.structs import replace

from starburst_executor.cli.main import main
from starburst_executor.protocol import transitions
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.manifest import Intervals, Lane, Limits, LiveLog, Manifest
from starburst_executor.protocol.outcome import Failure, Outcome, encode_outcome
from starburst_executor.protocol.records import Piece, Record
from starburst_executor.protocol.session import Session, VersionedRecord
from starburst_executor.protocol.tasks_object import Queued, encode_tasks
from starburst_executor.protocol.transitions import AttemptEnd, WorkerUpdate
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.runtime import SystemRuntime
from starburst_executor.serialization.exceptions import describe
from starburst_executor.serialization.pickling import dumps, pack_call
from starburst_executor.storage.url import open_store

SCHEMAS = Path(__file__).parents[1] / "cli" / "schemas"
QUICK = Intervals(
    lease=4, heartbeat=0.2, poll_first=0.02, poll_last=0.1, look_last=0.05, commit=0.05
)
OTHER_PYTHON = "3.99"
PATIENCE = 60.0  # seconds until a test that waits has failed


def run(*arguments: str, store: str | None = None) -> Result:
    """One command in this process."""
    options = ["--store", store] if store else []
    return CliRunner().invoke(main, [*arguments, *options])


def parsed(text: str, name: str) -> Any:
    """The content of a JSON document, once its schema has been checked."""
    document = json.loads(text)
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    jsonschema.validate(document, schema, format_checker=jsonschema.FormatChecker())
    return document[name]


@dataclass(frozen=True)
class Finished:
    """A session whose tasks have ended: 0 to 9 squared, but 3, 6 and 9 failed."""

    store: str
    id: str

    def run(self, verb: str, *arguments: str) -> Result:
        return run(verb, self.id, *arguments, store=self.store)


class Made:
    """A session put together by hand, without workers: three calls of `pow`, one batch.

    Args:
        store: URL of its store.
        python: Minor version of the Python that is said to have made it.
        left: Seconds until its absolute time limit.
        session_id: Its id.
    """

    def __init__(
        self,
        store: str,
        python: str = OTHER_PYTHON,
        left: float = 3600,
        session_id: str = "20250101-120000-aaaaaa",
    ) -> None:
        self.store = store
        self.batch = Batch(0, 0, 3)
        self.runtime = SystemRuntime()
        now = self.runtime.time()
        manifest = Manifest(
            session_id=session_id,
            python=python,
            package="0",
            created=now,
            deadline=now + left,
            workers=2,
            spec=WorkerSpec(),
            limits=Limits(),
            intervals=QUICK,
            lanes=(Lane(client="x", taken=False, number=3),),
        )
        self.session = Session.create(open_store(store), manifest, self.runtime)
        self.id = session_id
        function = self.session.put_content("functions", dumps(pow, self._keep))
        calls = [Queued(function, pack_call((2, i), {}, self._keep)) for i in range(3)]
        self.session.put_batch(self.batch, encode_tasks(calls, {}))

    def run(self, verb: str, *arguments: str) -> Result:
        return run(verb, self.id, *arguments, store=self.store)

    def change(self, edit: Callable[[Record], Record]) -> Record:
        known = self.session.read(self.batch, VersionedRecord(Record.fresh(3), None))
        record = self.session.change(self.batch, known, edit).record
        self.session.mark(self.batch, record)
        return record

    def begin(self, worker: str = "w-one", count: int = 1) -> None:
        """Have a worker hold so many tasks, and run them."""
        now = self.runtime.time()
        claim = WorkerUpdate(claim=count, begin=count, solo=True)
        self.change(lambda r: transitions.advance(r, worker, now, claim))

    def end(
        self,
        position: int,
        failure: Failure | None = None,
        stdout: str = "",
        worker: str = "w-one",
    ) -> None:
        """Have the worker end a task that it runs."""
        now = self.runtime.time()
        value = None if failure else dumps(2**position, self._keep)
        outcome = encode_outcome(Outcome(value=value, failure=failure))
        finish = AttemptEnd(
            position=position,
            attempt=1,
            ok=failure is None,
            started=now - 2,
            ended=now,
            outcome=Piece(inline=outcome),
            stdout=Piece(inline=stdout.encode()) if stdout else None,
        )
        update = WorkerUpdate(finishes=(finish,))
        self.change(lambda r: transitions.advance(r, worker, now, update))

    def prints(self, position: int, text: str) -> None:
        self.session.put_live_log(self.batch, position, 1, LiveLog(stdout=text))

    def states(self) -> list[str]:
        known = self.session.read(self.batch, VersionedRecord(Record.fresh(3), None))
        return [str(task.state) for task in known.record.tasks]

    def amend(self, **changes: Any) -> None:
        self.session.amend(lambda manifest: replace(manifest, **changes))

    def stored(self) -> list[str]:
        return [e.key for e in self.session.list_all(self.session.prefix)[0]]

    def _keep(self, digest: str, data: memoryview) -> None:
        raise AssertionError("nothing here is large")


def crash(message: str = "") -> Failure:
    return Failure(
        kind="crashed",
        type="TaskCrashed",
        message=message,
        signal=9,
        stderr="last words\n",
    )


def raised(number: int) -> Failure:
    """A failure as `describe` makes it; the line is the same for all numbers."""
    try:
        raise KeyError(number)
    except KeyError as error:
        return describe(error, lambda digest, data: None)


def cli(
    *arguments: str,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
    program: list[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """One command as a process of its own."""
    return subprocess.run(
        [*(program or [sys.executable, "-m", "starburst_executor"]), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        cwd=cwd,
        timeout=60,
        check=False,
    )

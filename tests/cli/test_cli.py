"""The command line, on real sessions: what it prints, what it does, and how it ends."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from msgspec.structs import replace

from starburst_executor import StarburstExecutor
from starburst_executor.cli import _VERBS, Exit, main
from starburst_executor.cli.logs import added
from starburst_executor.client.codec import python_version
from starburst_executor.protocol import transitions
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.manifest import (
    Intervals,
    Lane,
    Limits,
    LiveLog,
    Manifest,
    SessionState,
)
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
from tests.support.servers import S3Server

SCHEMAS = Path(__file__).parent / "schemas"
QUICK = Intervals(
    lease=4, heartbeat=0.2, poll_first=0.02, poll_last=0.1, look_last=0.05, commit=0.05
)
OTHER_PYTHON = "3.99"
PATIENCE = 30.0  # seconds until a test that waits has failed


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


# --- sessions to look at -------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A session whose tasks have ended: 0 to 9 squared, but 3, 6 and 9 failed."""

    store: str
    id: str

    def run(self, verb: str, *arguments: str) -> Result:
        return run(verb, self.id, *arguments, store=self.store)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One finished session for all tests that only read; workers really ran it."""

    def work(i: int) -> int:
        print("hello", i)  # noqa: T201  what `logs` shows
        if i and i % 3 == 0:
            raise ValueError(f"bad {i}")
        return i * i

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARBURST_HOME", str(folder / "home"))
        store = str(folder / "store")
        executor = StarburstExecutor(2, store=store, keep=True, name="squares", intervals=QUICK)
        with executor:
            for i in range(10):
                executor.submit(work, i)
    return Finished(store, executor.session_id)


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


@pytest.fixture
def made(directory_url: str) -> Made:
    return Made(directory_url)


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


# --- help ----------------------------------------------------------------------------


def test_help_names_every_verb_and_every_exit_code() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for word in ("list", "status", "tasks", "show", "collect", "logs", "errors", "cancel",
                 "retry", "extend", "scale", "cleanup", "prune", "doctor", "worker"):  # fmt: skip
        assert f"\n  {word} " in result.output
    for code in Exit:
        assert f"\n  {int(code)} " in result.output


@pytest.mark.parametrize("verb", sorted(_VERBS))
def test_every_verb_has_help_of_its_own(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: main {verb}")
    without = ("config", "estimate", "quota", "teardown", "worker")
    assert verb in without or "--store URL" in result.output


@pytest.mark.parametrize(
    "verb", ["list", "status", "tasks", "show", "logs", "errors", "collect", "doctor"]
)
def test_every_reading_verb_takes_json(verb: str) -> None:
    assert "--json" in run(verb, "--help").output


def test_help_loads_neither_boto3_nor_the_executor_nor_rich() -> None:
    program = (
        "import sys; from starburst_executor.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "heavy = {'boto3', 'botocore', 'rich', 'cloudpickle', 'starburst_executor.executor'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"


def test_reading_a_directory_does_not_load_boto3(finished: Finished) -> None:
    program = (
        "import sys; from starburst_executor.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print('boto3' in sys.modules, file=sys.stderr)"
    )
    command = ["status", finished.id, "--store", finished.store]
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.strip() == "False"


# --- list ----------------------------------------------------------------------------


def test_list_shows_a_line_for_each_session(finished: Finished) -> None:
    heading, line = run("list", store=finished.store).stdout.splitlines()
    assert heading.split() == [
        "session_id", "name", "state", "done", "tasks", "run", "fail", "cancel", "workers", "idle",
    ]  # fmt: skip
    assert line.split()[:-1] == [
        finished.id, "squares", "closed", "100%", "10", "0", "3", "0", "0",
    ]  # fmt: skip


def test_list_as_json_has_the_columns_of_the_table(finished: Finished) -> None:
    (session,) = parsed(run("list", "--json", store=finished.store).stdout, "sessions")
    assert session["session_id"] == finished.id
    assert (session["total"], session["completed"], session["failed"]) == (10, 7, 3)


def test_list_of_an_empty_store_says_so_and_is_no_error(directory_url: str) -> None:
    result = run("list", store=directory_url)
    assert (result.exit_code, result.stdout) == (0, "")
    assert directory_url in result.stderr
    assert parsed(run("list", "--json", store=directory_url).stdout, "sessions") == []


def test_list_of_many_sessions_with_much_unfinished_ends(directory_url: str) -> None:
    for number in range(12):  # more than are looked at side by side
        made = Made(directory_url, session_id=f"20250101-120000-{number:06}")
        header = made.session.tasks(made.batch).header
        more = [Queued(header.functions[0], b"x")]
        made.session.put_batch(Batch(0, 3, 1), encode_tasks(more, {}))
    done = cli("list", "--json", "--store", directory_url)
    assert len(parsed(done.stdout, "sessions")) == 12


def test_the_store_comes_from_the_environment_unless_it_is_named(
    finished: Finished, directory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARBURST_STORE", finished.store)
    assert finished.id in run("list").stdout
    assert finished.id not in run("list", store=directory_url).stdout


# --- status --------------------------------------------------------------------------


def test_status_prints_like_the_status_object(finished: Finished) -> None:
    with StarburstExecutor.attach(finished.id, store=finished.store) as executor:
        expected = str(executor.status())
    assert finished.run("status").stdout == expected + "\n"


def test_status_as_json_has_every_count(finished: Finished) -> None:
    status = parsed(finished.run("status", "--json").stdout, "status")
    assert status["name"] == "squares"
    assert (status["total"], status["completed"], status["failed"]) == (10, 7, 3)


def test_status_of_unfinished_tasks_counts_them_by_state(made: Made) -> None:
    made.begin()
    made.end(0)
    made.begin("w-two")
    status = parsed(made.run("status", "--json").stdout, "status")
    counts = [status[key] for key in ("total", "completed", "running", "pending")]
    assert counts == [3, 1, 1, 1]


def test_watching_prints_a_document_a_line_until_all_is_finished(made: Made) -> None:
    made.begin(count=3)

    def work() -> None:
        for position in range(3):
            made.end(position)

    results: list[Result] = []
    watcher = threading.Thread(
        target=lambda: results.append(made.run("status", "--watch", "--json"))
    )
    watcher.start()
    work()
    watcher.join(PATIENCE)
    (result,) = results
    lines = [parsed(line, "status") for line in result.stdout.splitlines()]
    assert lines[-1]["completed"] == 3
    assert len({json.dumps(line) for line in lines}) == len(lines)
    assert result.exit_code == 0


def test_watching_without_a_terminal_writes_plain_lines(finished: Finished) -> None:
    result = finished.run("status", "--watch")
    assert "\x1b" not in result.stdout
    assert f"{finished.id}: 100%, 10 of 10 done" in result.stdout
    assert result.exit_code == Exit.TASKS_FAILED


def test_watching_a_terminated_session_ends(made: Made) -> None:
    made.amend(state=SessionState.TERMINATED)
    result = made.run("status", "--watch", "--json")
    assert parsed(result.stdout, "status")["pending"] == 3
    assert result.exit_code == 0


def test_a_timeout_is_refused_where_nothing_waits(made: Made) -> None:
    for verb in ("status", "collect"):
        result = made.run(verb, "--timeout", "1")
        assert result.exit_code == Exit.USAGE
        assert "--timeout is for" in result.stderr


# --- tasks, show, errors -----------------------------------------------------------------


def test_tasks_shows_each_task_in_submission_order(finished: Finished) -> None:
    heading, *lines = finished.run("tasks").stdout.splitlines()
    assert heading.split() == [
        "index", "task", "state", "name", "attempt", "queued", "ran", "worker", "error",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines] == [str(i) for i in range(10)]
    assert lines[3].split()[1:4] == ["0-3", "failed", "work(3)"]
    assert lines[3].endswith("ValueError: bad 3")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--failed", ["0-0"]),
        ("--running", ["0-1"]),
        ("--pending", ["0-2"]),
        ("--claimed", []),
    ],
)
def test_tasks_can_be_chosen_by_state(made: Made, option: str, expected: list[str]) -> None:
    made.begin()
    made.end(0, crash())
    made.begin("w-two")
    tasks = parsed(made.run("tasks", option, "--json").stdout, "tasks")
    assert [task["task_id"] for task in tasks] == expected


def test_tasks_as_json_tells_the_times_and_the_error(made: Made) -> None:
    made.begin()
    made.end(0, crash("out of memory"))
    task = parsed(made.run("tasks", "--failed", "--json").stdout, "tasks")[0]
    assert task["worker"] == "w-one"
    assert task["ran"] == pytest.approx(2, abs=0.01)
    assert task["error"]["signal"] == 9
    assert task["error"]["message"] == "out of memory"


def test_tasks_of_finished_batches_are_not_read_when_others_are_asked_for(
    finished: Finished, tmp_path: Path
) -> None:
    store = open_store(finished.store)
    keys = [e.key for e in store.list(f"sessions/{finished.id}/queue/").entries]
    record = next(Path(finished.store, key) for key in keys if key.endswith("record"))
    held = tmp_path / "held"
    record.rename(held)
    try:
        result = finished.run("tasks", "--pending", "--json")
    finally:
        held.rename(record)
    assert parsed(result.stdout, "tasks") == []


def test_show_tells_the_whole_history_of_a_task(made: Made) -> None:
    made.run("cancel", "0-1", "0-2")
    made.begin("w-lost")
    now = made.runtime.time()
    made.change(lambda r: transitions.requeue_lost(r, ["w-lost"], now, 3, lambda i, t: b""))
    made.begin("w-two")
    made.prints(0, "ignored: of the first attempt")
    made.session.put_live_log(made.batch, 0, 2, LiveLog(stdout="half way\n"))
    task = parsed(made.run("show", "0-0", "--json").stdout, "task")
    tries = [(a["number"], a["worker"], a["how"]) for a in task["history"]["attempts"]]
    assert tries == [(1, "w-lost", "lost"), (2, "w-two", "running")]
    assert task["history"]["output"]["stdout"] == "half way\n"
    text = made.run("show", "0-0").stdout
    assert "Attempt 1:  w-lost" in text
    assert "half way" in text


def test_show_names_the_last_attempt_once_when_it_was_lost(made: Made) -> None:
    made.begin()
    lost = encode_outcome(Outcome(failure=Failure(kind="lost", type="WorkerLost")))
    now = made.runtime.time()
    made.change(lambda r: transitions.requeue_lost(r, ["w-one"], now, 1, lambda i, t: lost))
    task = parsed(made.run("show", "0-0", "--json").stdout, "task")["history"]
    assert [attempt["how"] for attempt in task["attempts"]] == ["lost"]
    assert task["task"]["error"]["kind"] == "lost"


def test_show_prints_error_traceback_and_output(finished: Finished) -> None:
    text = finished.run("show", "3").stdout  # one lane, so that a number will do
    assert text.startswith("Task 0-3 (index 3)\n")
    assert "Traceback (most recent call last)" in text
    assert "ValueError: bad 3" in text
    assert "--- stdout\nhello 3\n" in text


def test_errors_are_grouped_by_where_they_happened(finished: Finished) -> None:
    (group,) = parsed(finished.run("errors", "--json").stdout, "errors")
    assert group["count"] == 3
    assert group["task_ids"] == ["0-3", "0-6", "0-9"]
    text = finished.run("errors").stdout
    assert text.startswith("3 x ValueError: bad 3\n  task 0-3 work(3)\n  task 0-6 work(6)\n")


def test_errors_of_different_kinds_stand_apart_the_largest_group_first(
    made: Made,
) -> None:
    made.begin(count=3)
    made.end(0, crash())
    made.end(1, raised(1))
    made.end(2, raised(2))
    groups = parsed(made.run("errors", "--json").stdout, "errors")
    assert [(g["count"], g["error"]["type"]) for g in groups] == [
        (2, "KeyError"),
        (1, "TaskCrashed"),
    ]
    assert "last words" in made.run("errors").stdout


def test_errors_of_a_session_without_failures_says_so(made: Made) -> None:
    result = made.run("errors")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "No task has failed" in result.stderr


def test_a_damaged_outcome_is_shown_as_an_error_of_its_task(made: Made) -> None:
    made.begin()
    now = made.runtime.time()
    gone = Piece(pack="gone", size=10)
    finish = AttemptEnd(0, 1, ok=False, started=now, ended=now, outcome=gone)
    update = WorkerUpdate(finishes=(finish,))
    made.change(lambda r: transitions.advance(r, "w-one", now, update))
    task = parsed(made.run("tasks", "--failed", "--json").stdout, "tasks")[0]
    assert task["error"]["kind"] == "damaged"
    assert "gone" in task["error"]["message"]


# --- logs ----------------------------------------------------------------------------


def test_logs_of_one_task_are_what_it_printed_and_nothing_else(
    finished: Finished,
) -> None:
    assert finished.run("logs", "0-4").stdout == "hello 4\n"


def test_logs_of_all_tasks_stand_under_their_ids(finished: Finished) -> None:
    lines = finished.run("logs").stdout.splitlines()
    assert lines[:2] == ["--- task 0-0 (completed)", "hello 0"]
    assert len(lines) == 20


def test_logs_as_json_tell_streams_apart(finished: Finished) -> None:
    (log,) = parsed(finished.run("logs", "0-4", "--json").stdout, "logs")
    assert (log["stdout"], log["stderr"]) == ("hello 4\n", "")


@pytest.mark.parametrize("as_json", [False, True])
def test_following_prints_what_is_new_until_the_task_ends(made: Made, as_json: bool) -> None:
    made.begin()
    made.prints(0, "one\n")
    command = [sys.executable, "-m", "starburst_executor", "logs", made.id, "0-0"]
    command += ["--follow", "--store", made.store, *(["--json"] if as_json else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        first = follower.stdout.readline()
        made.prints(0, "one\ntwo\n")
        second = follower.stdout.readline()
        made.end(0, stdout="one\ntwo\nthree\n")
        third = follower.stdout.readline()
        assert follower.stdout.read() == ""
        assert follower.wait(PATIENCE) == 0
    if as_json:
        logs = [parsed(line, "log") for line in (first, second, third)]
        assert [log["text"] for log in logs] == ["one\n", "two\n", "three\n"]
    else:
        assert [first, second, third] == ["one\n", "two\n", "three\n"]


def test_following_all_tasks_names_who_speaks(made: Made) -> None:
    made.begin(count=3)
    for position in range(3):
        made.end(position, stdout=f"from {position}")
    assert made.run("logs", "--follow").stdout.splitlines() == [
        "--- task 0-0 (completed)", "from 0",
        "--- task 0-1 (completed)", "from 1",
        "--- task 0-2 (completed)", "from 2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("", "a", "a"),
        ("a\n", "a\nb\n", "b\n"),
        ("a\n", "a\n", ""),
        ("x" * 300 + "end\n", "[cut]" + "x" * 270 + "end\nnew\n", "new\n"),
        ("old", "nothing in common", "nothing in common"),
    ],
)
def test_what_is_new_is_found_in_a_tail_too(before: str, now: str, expected: str) -> None:
    assert added(before, now) == expected


# --- collect -------------------------------------------------------------------------


def test_collect_prints_values_and_errors(finished: Finished) -> None:
    result = finished.run("collect")
    lines = result.stdout.splitlines()
    assert lines[3].split() == ["2", "0-2", "completed", *lines[3].split()[3:5], "4"]
    assert lines[4].endswith("ValueError: bad 3")
    assert result.exit_code == Exit.TASKS_FAILED


def test_collect_as_json_has_the_values(finished: Finished) -> None:
    outcomes = parsed(finished.run("collect", "--json").stdout, "outcomes")
    values = [one["value"] for one in outcomes if one["state"] == "completed"]
    assert values == [0, 1, 4, 16, 25, 49, 64]
    assert "bad 3" in outcomes[3]["traceback"]


def test_collect_gives_what_json_cannot_hold_as_its_repr(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    with StarburstExecutor(1, store=store, keep=True, intervals=QUICK) as executor:
        executor.submit(complex, 1, 2)
    outcome = parsed(run("collect", executor.session_id, "--json", store=store).stdout, "outcomes")[
        0
    ]
    assert (outcome["value"], outcome["repr"]) == (None, "(1+2j)")
    target = tmp_path / "out.json"
    refused = run("collect", executor.session_id, "-o", str(target), store=store)
    assert refused.exit_code == Exit.OTHER
    assert "task 0-0" in refused.stderr
    assert "out.pkl" in refused.stderr
    assert not target.exists()


def test_collect_writes_a_pickle_of_outcomes(finished: Finished, tmp_path: Path) -> None:
    target = tmp_path / "results.pkl"
    result = finished.run("collect", "-o", str(target))
    assert (result.exit_code, result.stdout) == (Exit.TASKS_FAILED, "")
    outcomes = pickle.loads(target.read_bytes())
    assert [one.value for one in outcomes[:3]] == [0, 1, 4]
    assert isinstance(outcomes[3].error, ValueError)


def test_collect_writes_json(finished: Finished, tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    finished.run("collect", "-o", str(target))
    assert len(parsed(target.read_text(), "outcomes")) == 10


@pytest.mark.parametrize("name", ["results.txt", "results", "no/such/folder/r.pkl"])
def test_collect_refuses_a_file_it_cannot_write_before_it_waits(
    made: Made, tmp_path: Path, name: str
) -> None:
    result = made.run("collect", "--wait", "-o", str(tmp_path / name))
    assert result.exit_code == Exit.USAGE
    assert not list(tmp_path.glob("results*"))


def test_collect_finds_classes_of_modules_that_were_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "shapes.py").write_text(
        "class Box:\n"
        "    def __init__(self, side): self.side = side\n"
        "    def __repr__(self): return f'Box({self.side})'\n"
    )
    script = folder / "script.py"
    script.write_text(
        "import sys, shapes\n"
        "from starburst_executor import StarburstExecutor\n"
        "with StarburstExecutor(1, store=sys.argv[1], keep=True) as executor:\n"
        "    executor.submit(shapes.Box, 3)\n"
        "print(executor.session_id)\n"
    )
    store = str(tmp_path / "store")
    made = subprocess.run(
        [sys.executable, str(script), store], capture_output=True, text=True, check=True
    )
    done = cli("collect", made.stdout.strip(), "--store", store, cwd=tmp_path)
    assert "Box(3)" in done.stdout


def test_collect_waits_and_starts_workers_that_lack(directory_url: str) -> None:
    made = Made(directory_url, python=python_version())
    try:
        result = made.run("collect", "--wait", "--timeout", str(PATIENCE), "--json")
        outcomes = parsed(result.stdout[result.stdout.index('{"schema"') :], "outcomes")
        assert [one["value"] for one in outcomes] == [1, 2, 4]
        assert result.exit_code == 0
    finally:
        made.run("cleanup", "--force")
    assert made.stored() == []


# --- another version of Python -------------------------------------------------------


def test_every_reading_verb_works_for_another_version_of_python(made: Made) -> None:
    made.begin(count=2)
    made.end(0, raised(1), stdout="printed\n")
    made.end(1)
    assert "State:     open" in made.run("status").stdout
    assert "KeyError" in made.run("tasks").stdout
    assert "KeyError" in made.run("errors").stdout
    assert "KeyError" in made.run("show", "0-0").stdout
    assert made.run("logs", "0-0").stdout == "printed\n"
    collected = made.run("collect")
    assert "KeyError: 1" in collected.stdout
    assert "<not readable in this version of Python>" in collected.stdout
    assert OTHER_PYTHON in collected.stderr


def test_values_of_another_version_of_python_are_not_written(made: Made, tmp_path: Path) -> None:
    result = made.run("collect", "-o", str(tmp_path / "r.pkl"))
    assert result.exit_code == Exit.OTHER
    assert OTHER_PYTHON in result.stderr
    assert python_version() in result.stderr


def test_tasks_of_another_version_of_python_can_be_retried(made: Made) -> None:
    made.begin()
    made.end(0, raised(1))
    result = made.run("retry", "0-0")
    assert result.exit_code == 0
    assert result.stdout.startswith("0-0 -> 0-3\n")
    assert f"No workers were started: the session is of Python {OTHER_PYTHON}" in result.stdout
    copied = made.session.tasks(Batch(0, 3, 1))
    original = made.session.tasks(made.batch)
    assert made.session.arguments(Batch(0, 3, 1), copied, 0) == made.session.arguments(
        made.batch, original, 0
    )


# --- cancel --------------------------------------------------------------------------


def test_cancel_stops_named_tasks_alone(made: Made) -> None:
    made.begin()
    result = made.run("cancel", "0-0", "0-2")
    assert result.stdout == "Cancelled 2 tasks.\n"
    assert made.states() == ["cancelled", "pending", "cancelled"]


def test_cancel_without_tasks_cancels_all_that_are_unfinished(made: Made) -> None:
    made.begin()
    made.end(0)
    assert made.run("cancel").stdout == "Cancelled 2 tasks.\n"
    assert made.states() == ["completed", "cancelled", "cancelled"]


def test_cancel_says_what_had_ended_before(made: Made) -> None:
    made.begin()
    made.end(0)
    result = made.run("cancel", "0-0")
    assert result.stdout == "Cancelled 0 tasks. 1 had ended before.\n"


# --- retry ---------------------------------------------------------------------------


def test_failed_tasks_are_retried_once_and_run_by_workers(directory_url: str) -> None:
    made = Made(directory_url, python=python_version())
    made.begin(count=3)
    made.end(0, crash())
    made.end(1, crash())
    made.end(2)
    try:
        result = made.run("retry", "--failed")
        assert result.stdout.splitlines()[:2] == ["0-0 -> 0-3", "0-1 -> 0-4"]
        again = made.run("retry", "--failed")
        assert again.stdout == ""
        assert "not retried already" in again.stderr
        made.run("collect", "--wait", "--timeout", str(PATIENCE))
        outcomes = parsed(made.run("collect", "--json").stdout, "outcomes")
        assert [(one["task_id"], one["retried_as"], one["value"]) for one in outcomes] == [
            ("0-0", "0-3", 1), ("0-1", "0-4", 2), ("0-2", "", 4),
        ]  # fmt: skip
        # What failed has been healed: nothing is left to complain of.
        assert made.run("collect").exit_code == Exit.OK
        assert made.run("status", "--watch").exit_code == Exit.OK
        errors = made.run("errors")
        assert (errors.stdout, "2 failures left out" in errors.stderr) == ("", True)
        shown = parsed(made.run("show", "0-0", "--json").stdout, "task")
        assert shown["retried_as"] == "0-3"
    finally:
        made.run("cleanup", "--force")


def test_retried_tasks_go_on_in_a_free_lane_or_a_new_one(made: Made) -> None:
    made.begin(count=2)
    made.end(0, crash())
    made.end(1)
    assert made.run("retry", "0-1").stdout.startswith("0-1 -> 0-3\n")
    taken = Lane(client="somebody", number=4)
    made.amend(lanes=(taken,))
    assert made.run("retry", "0-0").stdout.startswith("0-0 -> 1-0\n")
    manifest = made.session.load()
    assert manifest.lanes[0] == taken
    assert (manifest.lanes[1].taken, manifest.lanes[1].number) == (False, 1)


def test_retrying_opens_a_session_that_was_shut_down(made: Made) -> None:
    made.begin()
    made.end(0, crash())
    made.amend(state=SessionState.CLOSED)
    made.run("retry", "0-0")
    assert made.session.load().state is SessionState.OPEN


def test_many_failures_are_retried_in_few_batches(directory_url: str) -> None:
    made = Made(directory_url)
    batch = Batch(0, 3, 200)
    header = made.session.tasks(made.batch).header
    calls = [Queued(header.functions[0], b"x" * i) for i in range(200)]
    made.session.put_batch(batch, encode_tasks(calls, {}, light=False))
    now = made.runtime.time()
    failed = encode_outcome(Outcome(failure=crash()))
    made.session.change(
        batch,
        VersionedRecord(Record.fresh(200), None),
        lambda r: transitions.fail_all(r, now, failed),
    )
    made.amend(lanes=(Lane(client="x", taken=False, number=203),))
    assert len(made.run("retry", "--failed").stdout.splitlines()) >= 200
    sights = [s for s in made.session.queue().look() if s.batch.number >= 203]
    assert [sight.batch.size for sight in sights] == [25] * 8  # 2 workers, 4 batches each
    copied = made.session.tasks(sights[-1].batch)
    assert made.session.arguments(sights[-1].batch, copied, 24) == b"x" * 199
    assert not copied.header.light


@pytest.mark.parametrize("arguments", [(), ("0-0", "--failed")])
def test_retry_wants_either_tasks_or_failed(made: Made, arguments: tuple[str, ...]) -> None:
    assert made.run("retry", *arguments).exit_code == Exit.USAGE


def test_unfinished_tasks_are_not_retried(made: Made) -> None:
    result = made.run("retry", "0-0")
    assert result.exit_code == Exit.USAGE
    assert "task 0-0 is pending" in result.stderr


def test_a_task_withdrawn_before_it_was_stored_has_nothing_to_retry(
    made: Made,
) -> None:
    batch = Batch(0, 3, 2)
    header = made.session.tasks(made.batch).header
    calls = [Queued(header.functions[0], b"x"), Queued(header.functions[0], None)]
    made.session.put_batch(batch, encode_tasks(calls, {}))
    made.session.withdraw(batch, [1])
    result = made.run("retry", "0-4")
    assert result.exit_code == 0
    assert "nothing to retry" in result.stderr


def test_nothing_of_a_terminated_session_is_retried(made: Made) -> None:
    made.begin()
    made.end(0, crash())
    made.amend(state=SessionState.TERMINATED)
    result = made.run("retry", "--failed")
    assert result.exit_code == Exit.OTHER
    assert "terminated" in result.stderr


# --- extend, scale, cleanup, prune ---------------------------------------------------


def test_extend_moves_the_time_limit_on(made: Made) -> None:
    before = made.session.load().deadline
    result = made.run("extend", "100")
    assert made.session.load().deadline == pytest.approx(before + 100)
    assert result.stdout.startswith(f"Session {made.id} goes on until ")


@pytest.mark.parametrize("seconds", ["0", "nan", "-5", "soon"])
def test_a_session_can_only_be_extended(made: Made, seconds: str) -> None:
    before = made.session.load()
    result = run("extend", "--store", made.store, "--", made.id, seconds)
    assert result.exit_code == Exit.USAGE
    assert made.session.load() == before


def test_scale_sets_how_many_workers_are_wanted(made: Made) -> None:
    assert made.run("scale", "7").exit_code == 0
    assert made.session.load().workers == 7


def test_scale_auto_goes_back_to_what_it_was_made_for(made: Made) -> None:
    made.run("scale", "7")
    made.run("scale", "5")
    assert "at most 2 workers" in made.run("scale", "auto").stdout
    assert made.session.load().workers == 2


@pytest.mark.parametrize("count", ["0", "-1", "100000", "many"])
def test_scale_refuses_counts_beyond_reason(made: Made, count: str) -> None:
    result = run("scale", "--store", made.store, "--", made.id, count)
    assert result.exit_code == Exit.USAGE
    assert made.session.load().workers == 2


def test_scale_starts_the_workers_that_unfinished_tasks_lack(
    directory_url: str,
) -> None:
    made = Made(directory_url, python=python_version())
    try:
        assert "Started 3 workers." in made.run("scale", "8").stdout
    finally:
        made.run("cleanup", "--force")


def test_cleanup_terminates_and_keeps_the_results(made: Made) -> None:
    made.begin()
    made.end(0)
    assert made.run("cleanup").exit_code == 0
    assert made.session.load().state is SessionState.TERMINATED
    assert made.run("collect").exit_code == 0


def test_cleanup_with_force_leaves_no_object(made: Made) -> None:
    assert made.run("cleanup", "--force").exit_code == 0
    assert made.stored() == []


def test_cleanup_with_force_removes_what_a_broken_off_deletion_left(
    made: Made,
) -> None:
    made.session.store.delete([made.session.key("session.json")])
    assert made.run("cleanup", "--force").exit_code == 0
    assert made.stored() == []


def aged(made: Made, seconds: float) -> None:
    """Have all objects of a session written so long ago."""
    for key in made.stored():
        path = Path(made.store, key)
        then = path.stat().st_mtime_ns - int(seconds * 1e9)
        os.utime(path, ns=(then, then))


def test_prune_deletes_what_nobody_has_touched_and_nothing_else(
    directory_url: str,
) -> None:
    old = Made(directory_url, session_id="20250101-120000-aaaaaa")
    debris = Made(directory_url, session_id="20250101-120000-bbbbbb")
    young = Made(directory_url, session_id="20250101-120000-cccccc")
    debris.session.store.delete([debris.session.key("session.json")])
    aged(old, 8 * 86400)
    aged(debris, 8 * 86400)
    aged(young, 6 * 86400)
    dry = run("prune", "--older-than", "7d", "--dry-run", store=directory_url)
    assert dry.stdout.splitlines() == [old.id, debris.id]
    assert old.stored()
    result = run("prune", "--older-than", "7d", store=directory_url)
    assert result.stdout.splitlines() == [old.id, debris.id]
    assert (old.stored(), debris.stored()) == ([], [])
    assert young.stored()


def test_prune_spares_an_old_session_in_which_something_was_written_lately(
    made: Made,
) -> None:
    aged(made, 8 * 86400)
    made.begin()
    assert run("prune", "--older-than", "7d", store=made.store).stdout == ""
    assert made.stored()


def test_prune_spares_a_session_that_is_just_being_made(directory_url: str) -> None:
    store = open_store(directory_url)
    store.put("sessions/20250101-120000-aaaaaa/functions/f", b"x")
    assert run("prune", "--older-than", "1h", store=directory_url).stdout == ""


@pytest.mark.parametrize("age", ["7", "d", "7 days", "-7d", ""])
def test_prune_refuses_what_is_no_age(made: Made, age: str) -> None:
    result = run("prune", f"--older-than={age}", store=made.store)
    assert result.exit_code == Exit.USAGE
    assert "7d" in result.stderr


# --- ids -----------------------------------------------------------------------------


def test_an_id_may_be_shortened_from_either_side(finished: Finished) -> None:
    full = finished.run("status").stdout
    for short in (finished.id[:10], finished.id[-6:], finished.id[-6:-2]):
        assert run("status", short, store=finished.store).stdout == full


def test_an_ambiguous_id_is_refused_and_the_candidates_are_named(
    directory_url: str,
) -> None:
    for last in ("aaaaaa", "aabbbb"):
        Made(directory_url, session_id=f"20250101-120000-{last}")
    result = run("status", "20250101", store=directory_url)
    assert result.exit_code == Exit.USAGE
    assert "20250101-120000-aaaaaa, 20250101-120000-aabbbb" in result.stderr
    assert run("status", "aaa", store=directory_url).exit_code == 0


def test_an_id_that_others_begin_with_is_taken_as_it_is(directory_url: str) -> None:
    Made(directory_url, session_id="run")
    Made(directory_url, session_id="run-2")
    status = parsed(run("status", "run", "--json", store=directory_url).stdout, "status")
    assert status["session_id"] == "run"


def completions(arguments: list[str], incomplete: str) -> list[str]:
    complete = ShellComplete(main, {}, "starburst-executor", "_X")
    return [item.value for item in complete.get_completions(arguments, incomplete)]


def test_words_complete_verbs_sessions_and_tasks(finished: Finished) -> None:
    assert completions([], "sta") == ["status"]
    store = ["--store", finished.store]
    assert completions(["status", *store], "20") == [finished.id]
    assert completions(["status", *store], "") == [finished.id]
    tasks = completions(["show", *store, finished.id], "0-")
    assert tasks == [f"0-{i}" for i in range(10)]


def test_completion_of_an_unknown_store_or_session_says_nothing(
    tmp_path: Path,
) -> None:
    assert completions(["status", "--store", "ftp://x"], "2") == []
    assert completions(["show", "--store", str(tmp_path), "nosuch"], "0") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_get_their_completion_script(shell: str) -> None:
    done = cli(
        environment={"_STARBURST_EXECUTOR_COMPLETE": f"{shell}_source"},
        program=[str(Path(sys.executable).parent / "starburst-executor")],
    )
    assert "_STARBURST_EXECUTOR_COMPLETE" in done.stdout


# --- exit codes, one by one ----------------------------------------------------------


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


def test_exit_0_is_success(finished: Finished) -> None:
    assert cli("status", finished.id, "--store", finished.store).returncode == 0


def test_exit_1_is_any_other_error(made: Made) -> None:
    made.session.store.put(made.session.key("session.json"), b"{")
    done = cli("status", made.id, "--store", made.store)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: session.json cannot be read")


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["status"],
        ["status", "--frobnicate", "x"],
        ["list", "--store", "ftp://example/x"],
        ["status", "../x"],
        ["worker", "nowhere"],
    ],
)
def test_exit_2_is_wrong_usage(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_exit_3_is_an_unknown_session(directory_url: str) -> None:
    for verb in ("status", "tasks", "errors", "logs", "collect", "cancel", "cleanup"):
        result = run(verb, "nosuch", store=directory_url)
        assert result.exit_code == 3
        assert directory_url in result.stderr


def test_exit_3_is_an_unknown_task(finished: Finished) -> None:
    for verb in ("show", "logs", "cancel", "retry"):
        result = finished.run(verb, "0-99")
        assert result.exit_code == 3
        assert "0-99" in result.stderr
    assert finished.run("show", "seven").exit_code == 2


def test_exit_3_is_a_session_of_which_debris_is_left(made: Made) -> None:
    made.session.store.delete([made.session.key("session.json")])
    for verb in ("status", "tasks", "errors", "logs", "collect", "cancel", "cleanup"):
        assert made.run(verb).exit_code == 3


def test_exit_3_is_a_worker_without_its_session(directory_url: str) -> None:
    result = run("worker", f"{directory_url}/sessions/nosuch")
    assert result.exit_code == 3


def test_exit_3_is_a_bucket_that_does_not_exist(
    ministack: S3Server, s3_env: Callable[..., None]
) -> None:
    s3_env(ministack)
    result = run("list", store="s3://no-such-bucket-of-ours/x")
    assert result.exit_code == 3
    assert "no-such-bucket-of-ours" in result.stderr


def test_exit_4_is_want_of_credentials() -> None:
    result = run("list", store="s3://some-bucket-of-ours/x?region=us-east-1")
    assert result.exit_code == 4
    assert "no credentials: Unable to locate credentials. They are" in result.stderr


def test_exit_5_is_a_timeout(made: Made) -> None:
    for command in (["status", "--watch"], ["collect", "--wait"]):
        result = made.run(*command, "--timeout", "0.1")
        assert result.exit_code == 5
        assert "3 of 3 tasks" in result.stderr


def test_exit_5_is_the_end_of_the_sessions_own_time(directory_url: str) -> None:
    made = Made(directory_url, left=-1)
    result = made.run("status", "--watch")
    assert result.exit_code == 5
    assert "starburst-executor extend" in result.stderr


def test_exit_6_is_a_task_that_failed_or_was_cancelled(made: Made) -> None:
    assert made.run("collect").exit_code == 0
    made.run("cancel")
    assert made.run("collect").exit_code == 6
    assert made.run("status", "--watch").exit_code == 6
    assert made.run("status").exit_code == 0


def test_exit_130_is_an_interrupt_and_says_no_more(made: Made) -> None:
    command = [sys.executable, "-m", "starburst_executor", "status", made.id]
    with subprocess.Popen(
        [*command, "--watch", "--json", "--store", made.store],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watcher:
        assert watcher.stdout is not None
        assert watcher.stderr is not None
        watcher.stdout.readline()
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(PATIENCE) == 130
        assert watcher.stderr.read().strip() == ""


# --- doctor, worker ------------------------------------------------------------------


def test_doctor_ticks_everything_on_a_fresh_directory(directory_url: str) -> None:
    result = run("doctor", store=directory_url)
    assert result.exit_code == 0
    names = [line.partition(":")[0] for line in result.stdout.splitlines()]
    assert names == [
        "✓ Python", "✓ package", "✓ store", "✓ launcher", "✓ store answers", "✓ clock",
        "✓ conditional writes", "✓ task",
    ]  # fmt: skip
    assert "from --store" in result.stdout
    assert run("list", store=directory_url).stdout == ""


def test_doctor_says_which_setting_won(
    directory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARBURST_STORE", directory_url)
    monkeypatch.setenv("STARBURST_LAUNCHER", "abacus")
    result = run("doctor")
    assert f"✓ store: {directory_url} (from STARBURST_STORE)" in result.stdout
    assert "✗ launcher: abacus (from STARBURST_LAUNCHER)" in result.stdout
    assert "→ Set STARBURST_LAUNCHER=local" in result.stdout
    assert "✓ task" not in result.stdout
    assert result.exit_code == Exit.OTHER
    other = str(tmp_path / "other")
    assert f"✓ store: {other} (from --store)" in run("doctor", store=other).stdout


def test_doctor_without_credentials_says_how_to_get_some() -> None:
    result = run("doctor", "--json", store="s3://some-bucket-of-ours/x")
    assert result.exit_code == Exit.OTHER
    check = parsed(result.stdout, "checks")[-1]
    assert (check["name"], check["ok"]) == ("credentials", False)
    assert "AWS_PROFILE" in check["mend"]


def test_doctor_of_a_store_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    result = run("doctor", store=str(file))
    assert result.exit_code == Exit.OTHER
    assert "✗ store's URL" in result.stdout
    assert str(file) in result.stdout


def test_doctor_examines_a_bucket(ministack: S3Server, s3_env: Callable[..., None]) -> None:
    s3_env(ministack)
    result = run("doctor", "--json", store=ministack.fresh_url())
    checks = parsed(result.stdout, "checks")
    assert [check["name"] for check in checks if not check["ok"]] == []
    assert [check["name"] for check in checks][4:] == [
        "credentials", "store answers", "clock", "conditional writes", "task",
    ]  # fmt: skip


def test_a_worker_logs_to_stderr_and_prints_why_it_left(directory_url: str) -> None:
    made = Made(directory_url, python=python_version())
    made.amend(limits=Limits(idle_timeout=0.1))
    done = cli("worker", made.session.url, "--id", "w-mine")
    assert done.returncode == 0
    assert made.states() == ["completed"] * 3
    assert "worker w-mine is at session" in done.stderr
    assert len(done.stdout.splitlines()) == 1

"""What the command line shows of sessions and tasks."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from click.testing import Result

from starburst_executor import StarburstExecutor
from starburst_executor.cli.exits import Exit
from starburst_executor.protocol import transitions
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.manifest import LiveLog, SessionState
from starburst_executor.protocol.outcome import Failure, Outcome, encode_outcome
from starburst_executor.protocol.records import Piece
from starburst_executor.protocol.tasks_object import Queued, encode_tasks
from starburst_executor.protocol.transitions import AttemptEnd, WorkerUpdate
from starburst_executor.storage.url import open_store
from tests.support.command_line import PATIENCE, Finished, Made, cli, crash, parsed, raised, run

# --- list --------------------------------------------------------------------------


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


# --- status ------------------------------------------------------------------------


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
        assert "--timeout requires" in result.stderr


# --- tasks, show, errors -----------------------------------------------------------


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

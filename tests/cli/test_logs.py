"""What `logs` prints."""

from __future__ import annotations

import subprocess
import sys

import pytest

from starburst_executor.cli.logs import added
from tests.support.command_line import PATIENCE, Finished, Made, parsed


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

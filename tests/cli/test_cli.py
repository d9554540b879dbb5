"""The command line, on real sessions: what it prints, what it does, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from starburst_executor.cli.exits import Exit
from starburst_executor.cli.main import _VERBS, main
from starburst_executor.client.codec import python_version
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.manifest import Limits
from tests.support.command_line import (
    OTHER_PYTHON,
    PATIENCE,
    Finished,
    Made,
    cli,
    parsed,
    raised,
    run,
)
from tests.support.servers import S3Server

# --- help --------------------------------------------------------------------------


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
        "import sys; from starburst_executor.cli.main import main\n"
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
        "import sys; from starburst_executor.cli.main import main\n"
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


# --- another version of Python -----------------------------------------------------


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
    assert "<not readable by this Python version>" in collected.stdout
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
    assert f"No workers were started: the session uses Python {OTHER_PYTHON}" in result.stdout
    copied = made.session.tasks(Batch(0, 3, 1))
    original = made.session.tasks(made.batch)
    assert made.session.arguments(Batch(0, 3, 1), copied, 0) == made.session.arguments(
        made.batch, original, 0
    )


# --- ids ---------------------------------------------------------------------------


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


# --- exit codes, one by one --------------------------------------------------------


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
    assert "no credentials: Unable to locate credentials. They come" in result.stderr


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


# --- worker ------------------------------------------------------------------------


def test_a_worker_logs_to_stderr_and_prints_why_it_left(directory_url: str) -> None:
    made = Made(directory_url, python=python_version())
    made.amend(limits=Limits(idle_timeout=0.1))
    done = cli("worker", made.session.url, "--id", "w-mine")
    assert done.returncode == 0
    assert made.states() == ["completed"] * 3
    assert "worker w-mine is at session" in done.stderr
    assert len(done.stdout.splitlines()) == 1

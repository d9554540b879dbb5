"""Trying finished tasks again: how the last try ended is what counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from starburst_executor import Intervals, StarburstExecutor
from starburst_executor.cli.exits import Exit
from starburst_executor.cli.main import main
from starburst_executor.client.outcomes import TaskOutcome
from starburst_executor.client.resubmit import Retries, healed

QUICK = Intervals(heartbeat=0.2, poll_first=0.02, poll_last=0.1, look_last=0.05, commit=0.05)


def run(executor: StarburstExecutor, verb: str, *arguments: str) -> Result:
    options = [executor.session_id, *arguments, "--store", executor.store]
    return CliRunner().invoke(main, [verb, *options])


@pytest.fixture
def executor(directory_url: str) -> Iterator[StarburstExecutor]:
    with StarburstExecutor(1, store=directory_url, intervals=QUICK) as made:
        yield made


def flaky(path: str) -> str:
    """Fails until there is such a file."""
    return Path(path).read_text()


def outcome(name: str, state: str, index: int) -> TaskOutcome:
    return TaskOutcome(task_id=name, state=state, index=index)  # type: ignore[arg-type]


def test_what_failed_is_healed_by_a_retry_that_returns(
    executor: StarburstExecutor, tmp_path: Path
) -> None:
    file = tmp_path / "late"
    good, bad = executor.submit(pow, 2, 3), executor.submit(flaky, str(file))
    assert isinstance(bad.exception(), FileNotFoundError)
    assert run(executor, "collect").exit_code == Exit.TASKS_FAILED
    file.write_text("here")
    (again,) = executor.retry()
    assert again.result() == "here"
    assert (good.result(), bad.done(), again.task_id) == (8, True, "1-0")
    outcomes = executor.collect(wait=True)
    assert [(o.task_id, o.index, o.value, o.retried_as) for o in outcomes] == [
        ("0-0", 0, 8, ""), ("0-1", 1, "here", "1-0"),
    ]  # fmt: skip
    for verb in (("collect",), ("status", "--watch"), ("errors",)):
        assert run(executor, *verb).exit_code == Exit.OK
    assert executor.retry() == []


def test_a_retry_that_fails_again_is_what_counts(executor: StarburstExecutor) -> None:
    failed = executor.submit(flaky, "/nowhere/at all")
    failed.exception()
    (first,) = executor.retry(failed)
    assert isinstance(first.exception(), FileNotFoundError)
    assert run(executor, "status", "--watch").exit_code == Exit.TASKS_FAILED
    (second,) = executor.retry()  # the original was retried; its retry was not
    assert isinstance(second.exception(), FileNotFoundError)
    (one,) = executor.collect(wait=True)
    assert (one.task_id, one.retried_as) == (failed.task_id, second.task_id)
    errors = run(executor, "errors")
    assert f"task {second.task_id} flaky('/nowhere/at all')" in errors.stdout
    assert "2 failures left out" in errors.stderr


def test_cancelled_tasks_are_retried_when_that_is_asked_for(
    executor: StarburstExecutor,
) -> None:
    executor.scale(1)
    futures = [executor.submit(pow, 2, i) for i in range(3)]
    executor.flush()
    executor.cancel(futures)
    cancelled = [future for future in futures if future.cancelled()]
    assert executor.retry() == []
    again = executor.retry(cancelled=True)
    assert len(again) == len(cancelled)
    assert [future.result() for future in again] == [2**future.index for future in cancelled]


def test_one_kind_or_both_can_be_retried_from_the_command_line(
    executor: StarburstExecutor,
) -> None:
    executor.submit(flaky, "/nowhere/at all").exception()
    assert run(executor, "retry", "--cancelled").stdout == ""
    assert run(executor, "retry", "--failed", "0-0").exit_code == Exit.USAGE
    assert run(executor, "retry", "--all").stdout.startswith("0-0 -> 1-0\n")


def test_what_was_retried_keeps_its_name(executor: StarburstExecutor) -> None:
    executor.options(label="mine").submit(flaky, "/nowhere/at all").exception()
    (again,) = executor.retry(["0-0"])
    again.exception()
    tasks = json.loads(run(executor, "tasks", "--json").stdout)["tasks"]
    assert [task["label"] for task in tasks] == ["mine", "mine"]
    assert tasks[1]["call"] == "flaky('/nowhere/at all')"


@pytest.mark.parametrize(
    ("task", "kind"), [("0-99", LookupError), ("x", ValueError), (3, TypeError)]
)
def test_what_is_no_task_is_not_retried(
    executor: StarburstExecutor, task: str, kind: type[Exception]
) -> None:
    executor.submit(pow, 2, 3).result()
    with pytest.raises(kind):
        executor.retry([task])


def test_the_last_try_that_has_ended_stands_for_the_task() -> None:
    retries = Retries({"0-0": "2-0", "2-0": "3-0"}, frozenset({"1-0", "2-0", "3-0"}))
    outcomes = [
        outcome("0-0", "failed", 0), outcome("0-1", "completed", 1),
        outcome("1-0", "completed", 2), outcome("2-0", "cancelled", 3),
    ]  # fmt: skip
    first, second = healed(outcomes, retries)  # 3-0 has not ended
    assert (first.task_id, first.index, first.state, first.retried_as) == (
        "0-0", 0, "cancelled", "2-0",
    )  # fmt: skip
    assert second is outcomes[1]

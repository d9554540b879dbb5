"""A real account, end to end: set up, work, lose workers, read logs, tear down. It costs money.

    STARBURST_AWS_TEST=1 STARBURST_IMAGE=... python -m pytest -m aws tests/aws/test_aws_account.py

With the usual AWS settings. STARBURST_IMAGE is the workers' image; without, they install this
environment. What it makes is named after its own stack and removed at the end; the profile that you
use is left as it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from starburst_executor import StarburstExecutor
from starburst_executor.cli.main import main
from tests.support.sessions import live_workers
from tests.support.tasks import until

pytestmark = pytest.mark.aws

# Read here, for no test sees STARBURST_ variables of the user's.
AGREED = os.environ.get("STARBURST_AWS_TEST") == "1"
IMAGE = os.environ.get("STARBURST_IMAGE", "")
STACK = "starburst-executor-test"
START = 300.0  # seconds; Fargate takes 20 to 60 to start a worker


def slow_square(x: int) -> int:
    time.sleep(4)
    return x * x


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_an_account_from_nothing_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if not AGREED:
        pytest.skip("it costs about three cents: set STARBURST_AWS_TEST=1 to agree")
    own = ("--yes", "--profile", STACK, "--stack", STACK)
    image = ("--image", IMAGE) if IMAGE else ()
    try:
        assert "A worker ran the test task" in run("setup", *own, *image)
        monkeypatch.setenv("STARBURST_PROFILE", STACK)
        for check in (workers_are_replaced_and_logs_kept, spot_works, quota_is_read):
            check()
    finally:
        said = run("teardown", *own, "--force", "--delete-data")
    assert f"The stack {STACK} is gone." in said
    assert "Still there" not in said


def workers_are_replaced_and_logs_kept() -> None:
    first = StarburstExecutor(max_workers=2, name="aws test")
    for number in range(3):
        first.submit(slow_square, number)
    executor = StarburstExecutor.attach(first.detach())
    try:
        await_that(lambda: executor.status().running, "a task runs")
        lost = live_workers(executor)
        executor._engine.launcher.stop(executor._engine.session.url, lost, grace=0)
        values = [future.result(timeout=START) for future in executor.futures]
        assert values == [x * x for x in range(3)]
        await_that(lambda: last_words(executor, lost), "what they said is kept")
    finally:
        executor.cleanup(force=True)
    assert not live_workers(executor)


def last_words(executor: StarburstExecutor, workers: set[str]) -> bool:
    said = run("logs", executor.session_id, "--workers")
    return all(f"{worker} leaves" in said for worker in workers)


def spot_works() -> None:
    with StarburstExecutor(max_workers=1, use_spot=True) as executor:
        assert executor.submit(slow_square, 32).result(timeout=START) == 1024


def quota_is_read() -> None:
    assert "L-3032A538" in run("quota")


def await_that(condition: Callable[[], object], what: str) -> None:
    until(condition, what, START)

"""What workers print: found in CloudWatch page by page, or in local files, and followed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from starburst_executor import StarburstExecutor
from starburst_executor.aws.ecs.logs import WorkerLogs, stream_of
from starburst_executor.cli.exits import Exit
from starburst_executor.cli.main import main
from starburst_executor.errors import AccountDenied, AccountError
from tests.emulators.ecs_server import EcsServer, configure, ecs_server
from tests.support.scripted import Scripted
from tests.support.sessions import QUICK, worker_pids

TASK = "0123456789abcdef0123456789abcdef"
WORKER = f"w-{TASK}"
STREAM = f"starburst/worker/{TASK}"


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["logs", *arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


# --- pages ---------------------------------------------------------------------------


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    scripted = Scripted()
    yield scripted
    scripted.assert_used_up()


def script_page(scripted: Scripted, before: str, after: str, *lines: str) -> None:
    """A page asked for with one token, that comes with another."""
    scripted.answer(
        "logs",
        "get_log_events",
        {"events": [{"message": s} for s in lines], "nextForwardToken": after},
        logGroupName="/group",
        logStreamName=STREAM,
        startFromHead=True,
        **({"nextToken": before} if before else {}),
    )


def test_an_empty_page_is_not_the_end_and_the_same_token_twice_is(
    scripted: Scripted,
) -> None:
    logs = WorkerLogs(scripted.clients(), "/group")
    script_page(scripted, "", "f/1", "one\n", "two")
    script_page(scripted, "f/1", "f/2")
    script_page(scripted, "f/2", "f/3", "three")
    script_page(scripted, "f/3", "f/3")
    assert list(logs.more(WORKER)) == ["one", "two", "three"]
    script_page(scripted, "f/3", "f/4", "four")
    script_page(scripted, "f/4", "f/4")
    assert list(logs.more(WORKER)) == ["four"]


def test_a_stream_that_is_not_there_yet_is_empty_and_a_missing_group_is_an_error(
    scripted: Scripted,
) -> None:
    logs = WorkerLogs(scripted.clients(), "/group")
    code = "ResourceNotFoundException"
    text = "The specified log stream does not exist."
    scripted.refuse("logs", "get_log_events", code, text)
    assert list(logs.more(WORKER)) == []
    text = "The specified log group does not exist."
    scripted.refuse("logs", "get_log_events", code, text)
    with pytest.raises(AccountError, match=r"/group does not exist in eu-west-1.*setup"):
        list(logs.more(WORKER))


def test_a_refusal_names_the_permission(scripted: Scripted) -> None:
    logs = WorkerLogs(scripted.clients(), "/group")
    text = "User: u is not authorized to perform: logs:GetLogEvents"
    scripted.refuse("logs", "get_log_events", "AccessDeniedException", text)
    with pytest.raises(AccountDenied, match=r"GetLogEvents.*--print-policy"):
        list(logs.more(WORKER))


@pytest.mark.parametrize("worker", ["w-abcde12345", TASK, f"{WORKER}0"])
def test_only_an_ecs_task_has_a_stream(worker: str) -> None:
    assert stream_of(WORKER) == STREAM
    with pytest.raises(ValueError, match="is not an ECS task"):
        stream_of(worker)


# --- on the emulator -----------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EcsServer]:
    with ecs_server(tmp_path_factory.mktemp("ecs")) as running:
        yield running


@pytest.fixture
def ecs(
    server: EcsServer, monkeypatch: pytest.MonkeyPatch, s3_env: Callable[..., None]
) -> EcsServer:
    server.reset()
    s3_env(server)
    for name, value in configure(server.deploy()).items():
        monkeypatch.setenv(name, value)
    return server


def printed(ecs: EcsServer, group: str, *lines: str) -> None:
    """Have a worker print."""
    client = ecs.aws("logs")
    place = {"logGroupName": group, "logStreamName": STREAM}
    if not client.describe_log_streams(logGroupName=group)["logStreams"]:
        client.create_log_stream(**place)
    events = [{"timestamp": 1, "message": line} for line in lines]
    client.put_log_events(**place, logEvents=events)
    client.close()


def test_a_log_of_many_pages_is_read_whole_although_requests_are_throttled(
    ecs: EcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starburst_executor.aws.account import Clients
    from starburst_executor.config import load_deployment

    deployment = load_deployment()
    assert deployment is not None
    logs = WorkerLogs(Clients(deployment.region), deployment.log_group)
    assert list(logs.more(WORKER)) == []
    lines = [f"line {n}" for n in range(12_000)]  # 10,000 a page
    printed(ecs, deployment.log_group, *lines[:6000])
    printed(ecs, deployment.log_group, *lines[6000:])
    ecs.set(throttle={"GetLogEvents": 2})
    assert list(logs.more(WORKER)) == lines
    printed(ecs, deployment.log_group, "one more")
    assert list(logs.more(WORKER)) == ["one more"]


def cube(x: int) -> int:
    return x**3


@pytest.mark.slow
def test_the_logs_verb_prints_what_workers_on_ecs_printed(ecs: EcsServer) -> None:
    with StarburstExecutor(max_workers=1, intervals=QUICK, keep=True) as executor:
        assert executor.submit(cube, 3).result(timeout=60) == 27
        [worker] = worker_pids(executor)
        said = run(executor.session_id, "--worker", worker).output
        assert f"{worker} is at session" in said
        assert f"--- worker {worker}" in run(executor.session_id, "--workers").output
    followed = run(executor.session_id, "--workers", "--follow", "--json").output
    found = [json.loads(line)["worker_log"] for line in followed.splitlines()]
    assert {one["worker"] for one in found} == {worker}
    assert "SIGTERM" in found[-1]["text"] or "session" in found[-1]["text"]
    output = run(executor.session_id, "--worker", WORKER, code=Exit.NOT_FOUND).output
    assert "left no output" in output
    executor.cleanup(force=True)


# --- on this machine -----------------------------------------------------------------


def test_the_logs_verb_prints_what_workers_of_this_machine_printed(
    directory_url: str, tmp_path: Path
) -> None:
    with StarburstExecutor(1, store=directory_url, launcher="local") as executor:
        assert executor.submit(cube, 2).result(timeout=60) == 8
        [worker] = worker_pids(executor)
        place: Any = (executor.session_id, "--store", directory_url)
        assert "is at session" in run(*place, "--worker", worker).output
        output = run(*place, "--worker", "w-other", code=Exit.NOT_FOUND).output
        assert "worker w-other left no output" in output


def test_tasks_and_workers_are_asked_for_one_at_a_time(directory_url: str) -> None:
    output = run("x", "0-1", "--workers", code=Exit.USAGE).output
    assert "one of TASK, --worker and --workers" in output

"""Set-up in an account that never had an ECS cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from starburst_executor.aws.account import Clients
from starburst_executor.cli.main import main
from tests.emulators.ecs_server import EcsServer, ecs_server
from tests.support.servers import S3Server

TEXT = "Unable to assume the service linked role"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EcsServer]:
    with ecs_server(tmp_path_factory.mktemp("new"), new_to_ecs=True) as server:
        yield server


@pytest.fixture(autouse=True)
def account(
    server: EcsServer,
    s3_env: Callable[[S3Server], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Clients:
    s3_env(server)
    server.reset()
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("stack._LOOK_SECONDS", "stack._ROLE_SECONDS", "teardown._LOOK_SECONDS"):
        monkeypatch.setattr(f"starburst_executor.aws.deployment.{name}", 0.01)
    monkeypatch.setattr("starburst_executor.aws.deployment.setup._ROLE_SECONDS", 0.01)
    return Clients("us-east-1")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    return result.exit_code, result.output


def test_setup_makes_the_role_of_ecs_first_and_tries_again_while_ecs_cannot_use_it(
    server: EcsServer, account: Clients
) -> None:
    server.set(without_role=1)
    code, said = run("setup", "--yes", "--no-task")
    assert code == 0, said
    assert "service-linked role of ECS: created" in said
    assert TEXT in said
    assert "once more in" in said
    roles = account.get("iam").list_roles()["Roles"]
    assert "/aws-service-role/ecs.amazonaws.com/" in {role["Path"] for role in roles}
    code, said = run("teardown", "--yes", "--delete-data")
    assert code == 0, said
    code, said = run("setup", "--yes", "--no-task")
    assert code == 0, said
    assert "service-linked role" not in said
    run("teardown", "--yes", "--delete-data")


def test_a_role_that_ecs_can_never_use_is_an_error_and_leaves_no_bucket(
    server: EcsServer, account: Clients
) -> None:
    before = account.get("s3").list_buckets()["Buckets"]
    server.set(without_role=99)
    code, said = run("setup", "--yes", "--no-task")
    assert code != 0
    assert said.count("once more in") == 3
    assert TEXT in said
    assert account.get("s3").list_buckets()["Buckets"] == before

"""Set-up in an account that never had an ECS cluster, and where a stranger was first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from starburst_executor import StarburstExecutor, config
from starburst_executor.aws.account import Clients
from starburst_executor.cli.main import main
from starburst_executor.errors import StoreDenied
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


MADE = "starburst-executor-000000000000-us-east-1"
STRANGER = "999999999999"


@pytest.fixture
def taken(server: EcsServer, account: Clients) -> Iterator[str]:
    """A bucket of the name that `setup` takes, which belongs to another account."""
    account.get("s3").create_bucket(Bucket=MADE)
    server.set(owners={MADE: STRANGER})
    yield MADE
    server.set(owners={})
    account.get("s3").delete_bucket(Bucket=MADE)


def test_a_strangers_bucket_is_not_taken_for_ones_own(taken: str) -> None:
    for wish in ((), ("--store", f"s3://{taken}/runs")):
        code, said = run("setup", "--yes", "--no-task", *wish)
        assert code != 0
        assert "does not belong to the account 000000000000" in said
        assert "?owner=ACCOUNT_ID" in said


def test_a_bucket_of_another_account_is_used_if_its_owner_is_named(
    server: EcsServer, taken: str
) -> None:
    code, said = run("setup", "--yes", "--no-task", "--store", f"s3://{taken}/x?owner={STRANGER}")
    assert code == 0, said
    assert config.load().settings.store == f"s3://{taken}/x?region=us-east-1&owner={STRANGER}"
    code, said = run("setup", "--yes", "--no-task")  # which remembers
    assert code == 0, said
    server.set(owners={taken: "888888888888"})  # it has become somebody else's
    with pytest.raises(StoreDenied, match=f"not owned by the account {STRANGER}"):
        StarburstExecutor(1, launcher="local")
    server.set(owners={taken: STRANGER})
    assert run("teardown", "--yes")[0] == 0

"""What `doctor` finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from starburst_executor.cli.exits import Exit
from tests.support.command_line import parsed, run
from tests.support.servers import S3Server


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


@pytest.mark.parametrize("verb", ["doctor", "list"])
def test_an_endpoint_without_a_scheme_is_named(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    result = run(verb, store="s3://bucket/prefix")
    assert result.exit_code == Exit.OTHER
    assert isinstance(result.exception, SystemExit)
    assert "AWS_ENDPOINT_URL='localhost:9000' is not an endpoint" in result.output


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

"""Whose credentials are in use, asked of a real server."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from starburst_executor.aws.account import Credentials, find_credentials, identity
from starburst_executor.errors import AccountDenied
from tests.servers import S3Server


def test_credentials_are_found_where_the_aws_settings_lead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert find_credentials() is None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert find_credentials() == Credentials(source="env", key_id="AKIDEXAMPLE")


def test_a_profile_that_does_not_exist_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    with pytest.raises(AccountDenied, match="nosuch"):
        find_credentials()


def test_sts_says_whose_the_credentials_are(
    ministack: S3Server, s3_env: Callable[..., None]
) -> None:
    s3_env(ministack)
    assert identity().startswith("arn:aws:")

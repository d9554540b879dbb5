"""Who is asking: the credentials that AWS settings lead to, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from starburst_executor.aws import make_client
from starburst_executor.errors import AccountDenied, AccountError

__all__ = ["Credentials", "find_credentials", "identity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Credentials as they were found; not the secret.

    Attributes:
        source: Where, in botocore's word for it, such as "env" or "shared-credentials-file".
        key_id: The access key's id.
    """

    source: str
    key_id: str


def find_credentials() -> Credentials | None:
    """The credentials that would be used; None if there are none. May ask the instance's metadata.

    Raises:
        AccountDenied: the AWS settings name some that cannot be had.
    """
    import botocore.session

    try:
        found: Any = botocore.session.get_session().get_credentials()
        if found is None:
            return None
        return Credentials(
            source=found.method, key_id=found.get_frozen_credentials().access_key
        )
    except BotoCoreError as error:
        raise AccountDenied(
            f"the credentials that the AWS settings name cannot be had: {error}"
        ) from error


def identity() -> str:
    """ARN of the user or role that the credentials belong to, as AWS STS says; one request.

    Raises:
        AccountDenied: STS refused them.
        AccountError: it gave no answer.
    """
    try:
        arn: str = make_client("sts").get_caller_identity()["Arn"]
    except ClientError as error:
        raise AccountDenied(f"AWS STS does not know them: {error}") from error
    except BotoCoreError as error:
        raise AccountError(f"AWS STS gave no answer: {error}") from error
    return arn

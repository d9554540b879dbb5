"""Maps each of S3's errors to a `StoreError`, in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    LoginError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
from botocore.parsers import ResponseParserError
from botocore.response import (  # type: ignore[attr-defined]  # its stubs lack them
    URLLib3ProtocolError,
    URLLib3ReadTimeoutError,
)

from starburst_executor.errors import (
    ConfigError,
    Conflict,
    ObjectNotFound,
    StoreDenied,
    StoreError,
    StoreMissing,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import ErrorTypeDef

__all__ = ["NO_ANSWER", "S3Errors", "http_status"]

_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    TokenRetrievalError,
    NoAuthTokenError,
    SSOError,
    LoginError,
    ProfileNotFound,
)
NO_ANSWER = (
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ResponseParserError,
    URLLib3ProtocolError,  # botocore lets pass the body of an error that breaks off
    URLLib3ReadTimeoutError,
)
_BAD_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestExpired",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_PASSING = {"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable"}
_PERMISSIONS = {
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "DeleteObjects": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
}


class S3Errors:
    """Turns botocore's errors into the store's, with advice on each.

    Args:
        bucket: Name of the bucket.
        prefix: Prefix of all keys in the bucket, including its slash.
        endpoint: Returns URL and region of the endpoint.
        uses_kms: Whether writes use a KMS key.
        denied: Called when credentials are missing or refused.
        owner: Id of the account that must own the bucket; None if any may.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str,
        endpoint: Callable[[], tuple[str, str]],
        *,
        uses_kms: bool,
        denied: Callable[[], None] = lambda: None,
        owner: str | None = None,
    ) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._endpoint = endpoint
        self._uses_kms = uses_kms
        self._denied = denied
        self._owner = owner

    @contextlib.contextmanager
    def translating(self, operation: str, key: str, condition: str | None = None) -> Iterator[None]:
        """Raise failures in the block as errors of the store.

        Args:
            operation: S3's name for the operation.
            key: The object's key, without the prefix.
            condition: The header that makes the request conditional, if any.

        Raises:
            StoreError: one of its subclasses.
            ConfigError: no client could be created.
        """
        try:
            yield
        except ConfigError:
            raise  # a ValueError too, but not about a reply
        except ClientError as error:
            raise self._refused(error, operation, key, condition) from error
        except _NO_CREDENTIALS as error:
            self._denied()
            raise StoreDenied(
                f"{operation} of {self.name(key)} had no credentials: {str(error).rstrip('.')}. "
                "They come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, from the profile "
                "(AWS_PROFILE) in ~/.aws/credentials and ~/.aws/config, or from the role of the "
                "container or instance. `aws sts get-caller-identity` shows what is found."
            ) from error
        except (RecursionError, *NO_ANSWER) as error:
            if _is_recursion(error):  # botocore follows redirects recursively
                said = "was redirected, but nowhere that answers"
            else:
                said = f"got no answer: {error}"
            raise StoreUnavailable(
                f"{operation} of {self.name(key)} {said}. {self.place()}"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # What botocore or the store make of a reply that is not S3's.
            raise StoreUnavailable(
                f"{operation} of {self.name(key)} got an invalid reply: {error!r}. "
                f"{self.place()} Is that S3?"
            ) from error
        except BotoCoreError as error:
            raise StoreError(
                f"{operation} of {self.name(key)} could not be sent: {error}"
            ) from error

    def _refused(
        self, error: ClientError, operation: str, key: str, condition: str | None
    ) -> StoreError:
        code, status = error.response["Error"].get("Code") or "", http_status(error)
        text = f"{operation} of {self.name(key)}: {_quote(error)}"
        if code == "NoSuchBucket":
            return self._missing()
        if status == 404:
            return ObjectNotFound(f"{text}. {self.place()}")
        if condition and status in (409, 412):
            return Conflict(f"{text} ({condition})")
        # 409 without a condition: another operation on the object is in progress.
        if status in (409, 429, 500, 502, 503, 504) or code in _PASSING:
            return StoreUnavailable(f"{text}. {self.place()}")
        # The reply to a HEAD has no body that could name the reason.
        if code in _BAD_CREDENTIALS or (operation == "HeadObject" and status == 400):
            place = self.place()
            self._denied()
            return StoreDenied(
                f"{text}. The credentials are wrong or have expired (or this machine's clock is "
                f"off); `aws sts get-caller-identity` shows which are used. {place}"
            )
        if status in (401, 403):
            self._denied()
            hint = self._permission(operation, condition)
            if self._owner:
                hint += (
                    f" Or the bucket is not owned by the account {self._owner} (owner= in the URL)."
                )
            return StoreDenied(f"{text}. {hint}")
        return StoreError(f"{text}. {self.place()}")

    def _permission(self, operation: str, condition: str | None) -> str:
        permission = _PERMISSIONS.get(operation, "s3:PutObject")
        if operation == "PutObject" and condition == "If-Match":
            permission += " or s3:GetObject (both are needed to write with If-Match)"
        if operation == "ListObjectsV2":
            return f"Probably {permission} is missing on the bucket {self._bucket}."
        hint = f"Probably {permission} is missing on s3://{self._bucket}/{self._prefix}*"
        if operation in ("GetObject", "HeadObject"):
            hint += (
                f", or s3:ListBucket on the bucket {self._bucket}: without that one S3 "
                "answers 403, not 404, for an object that does not exist"
            )
        if self._uses_kms:
            hint += ", or kms:GenerateDataKey and kms:Decrypt on the key"
        return f"{hint}."

    def _missing(self) -> StoreMissing:
        return StoreMissing(
            f"the bucket {self._bucket} does not exist. {self.place()} "
            "Check its name and which account is in use, or create it."
        )

    def place(self) -> str:
        """The endpoint in use, for messages."""
        url, region = self._endpoint()
        return f"The endpoint is {url} in region {region}."

    def name(self, key: str) -> str:
        """The object's full name, for messages."""
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def not_deleted(self, failures: Sequence[ErrorTypeDef]) -> StoreError:
        """The error for a DeleteObjects that failed for some keys."""
        first = failures[0]
        code = first.get("Code", "")
        text = (
            f"{len(failures)} objects could not be deleted, the first being "
            f"s3://{self._bucket}/{first.get('Key')}: {code} {first.get('Message', '')}"
        )
        if code == "AccessDenied":
            return StoreDenied(f"{text}. {self._permission('DeleteObjects', None)}")
        return StoreUnavailable(text) if code in _PASSING else StoreError(text)


def _is_recursion(error: Exception) -> bool:
    """Whether the stack was used up, at whatever depth that happened to be noticed."""
    cause = error.kwargs.get("error") if isinstance(error, HTTPClientError) else error
    return isinstance(cause, RecursionError)


def http_status(error: ClientError) -> int:
    """The status of the reply."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def _quote(error: ClientError) -> str:
    details = error.response["Error"]
    code, status = details.get("Code") or "", str(http_status(error))
    head = f"HTTP {status}" if code in ("", status) else f"{code} (HTTP {status})"
    message = str(details.get("Message") or "").rstrip(".")
    return f"{head}, {message}" if message else head

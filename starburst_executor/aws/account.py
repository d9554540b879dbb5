"""What is asked of an AWS account: who is asking, quotas and what of them is used, and prices."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)

from starburst_executor.aws.clients import make_client
from starburst_executor.errors import AccountDenied, AccountError
from starburst_executor.runtime import Runtime

__all__ = [
    "Clients",
    "Credentials",
    "Quota",
    "Vcpus",
    "account_id",
    "asking",
    "date_of",
    "fargate_vcpus",
    "find_credentials",
    "identity",
    "make_client_once",
    "quota",
    "request_quota",
    "used_vcpus",
]

log = logging.getLogger(__name__)

_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
_DENIED = ("AccessDenied", "UnauthorizedOperation", "AuthFailure")
_BAD_CREDENTIALS = ("ExpiredToken", "InvalidClientTokenId", "UnrecognizedClient")


class Clients:
    """boto3 clients for one region, each made when it is first asked for.

    Args:
        region: Their region; default that of the AWS settings.
        make: Makes one.
    """

    def __init__(self, region: str | None = None, make: Callable[..., Any] = make_client) -> None:
        self._region = region
        self._make = make
        self._made: dict[tuple[str, str | None], Any] = {}

    def get(self, service: str, region: str | None = None) -> Any:
        """The client of a service, perhaps in another region than the others.

        Raises:
            AccountError: no region is known.
        """
        key = (service, region or self._region)
        if key not in self._made:
            try:
                self._made[key] = self._make(service, region=key[1])
            except NoRegionError as error:
                raise AccountError(
                    "no AWS region is set; give --region, or set AWS_DEFAULT_REGION"
                ) from error
            except _NO_CREDENTIALS as error:
                raise AccountDenied(f"the AWS settings cannot be used: {error}") from error
        return self._made[key]

    @property
    def region(self) -> str:
        """The region's name."""
        name: str = self.get("sts").meta.region_name
        return name


@contextlib.contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn boto3's errors into this package's.

    Args:
        what: What is being asked, for the message, such as "reading the Fargate quota".

    Raises:
        AccountDenied: credentials or permissions lack.
        AccountError: anything else that AWS, or the way there, has against it.
    """
    try:
        yield
    except ClientError as error:
        code = error.response["Error"].get("Code", "")
        said = f"{what} failed: {error}"
        if code.startswith(_BAD_CREDENTIALS):
            raise AccountDenied(
                f"{said}. The credentials are wrong or have expired; `aws sts get-caller-identity` shows which "
                "are used."
            ) from error
        if code.startswith(_DENIED):
            raise AccountDenied(
                f"{said}. The permission is lacking: `starburst-executor setup --print-policy` shows all that "
                "are needed."
            ) from error
        raise AccountError(said) from error
    except _NO_CREDENTIALS as error:
        raise AccountDenied(
            f"{what} had no credentials: {error} Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or log in with `aws sso login`."
        ) from error
    except BotoCoreError as error:
        raise AccountError(f"{what} failed: {error}") from error


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
        return Credentials(source=found.method, key_id=found.get_frozen_credentials().access_key)
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


def account_id(clients: Clients) -> str:
    """The account that the credentials belong to.

    Raises:
        AccountError: AWS STS does not say.
    """
    with asking("asking whose the credentials are"):
        name: str = clients.get("sts").get_caller_identity()["Account"]
    return name


def make_client_once(service: str, *, region: str | None = None) -> Any:
    """Make a client that tries once: for what can be done without an answer."""
    return make_client(service, region=region, tries=1)


def date_of(runtime: Runtime) -> date:
    """Today, in UTC."""
    return datetime.fromtimestamp(runtime.time(), UTC).date()


# --- quotas --------------------------------------------------------------------------

_SERVICE = "fargate"
_QUOTA_CODES = {False: "L-3032A538", True: "L-36FBB829"}  # by whether it is for Spot
_DESCRIBED_AT_ONCE = 100
_OPEN = ("PENDING", "CASE_OPENED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """A quota of Fargate vCPUs that may run at once in a region.

    Attributes:
        code: Its code, such as "L-3032A538".
        name: AWS's name for it.
        use_spot: Whether it is that of Spot.
        vcpus: The applied value.
        adjustable: Whether an increase may be asked for.
        requested: The value that an open request asks for; None if there is none.
    """

    code: str
    name: str
    use_spot: bool
    vcpus: float
    adjustable: bool
    requested: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Vcpus:
    """Fargate vCPUs of the account in this region.

    Attributes:
        quota: How many may run at once.
        used: How many do.
    """

    quota: float
    used: float


def quota(clients: Clients, *, use_spot: bool) -> Quota:
    """The quota that applies to this account now, and whether more was asked for.

    Raises:
        AccountError: it cannot be read.
    """
    client = clients.get("service-quotas")
    names = {"ServiceCode": _SERVICE, "QuotaCode": _QUOTA_CODES[use_spot]}
    with asking(f"reading the Fargate quota {names['QuotaCode']}"):
        try:
            found = client.get_service_quota(**names)["Quota"]
        except client.exceptions.NoSuchResourceException:
            # Never changed for this account, so AWS's default applies.
            found = client.get_aws_default_service_quota(**names)["Quota"]
        history = client.list_requested_service_quota_change_history_by_quota(**names)
    open_requests = [r for r in history["RequestedQuotas"] if r["Status"] in _OPEN]
    return Quota(
        code=names["QuotaCode"],
        name=found.get("QuotaName", names["QuotaCode"]),
        use_spot=use_spot,
        vcpus=found["Value"],
        adjustable=found.get("Adjustable", False),
        requested=max((r["DesiredValue"] for r in open_requests), default=None),
    )


def request_quota(clients: Clients, vcpus: float, *, use_spot: bool) -> str:
    """Ask AWS to raise the quota; returns the status of the request. AWS may take days to decide.

    Raises:
        AccountError: AWS refuses to look at it: not more than now, or a request is open already.
    """
    client = clients.get("service-quotas")
    code = _QUOTA_CODES[use_spot]
    with asking(f"asking for {vcpus:g} vCPUs (quota {code})"):
        reply = client.request_service_quota_increase(
            ServiceCode=_SERVICE, QuotaCode=code, DesiredValue=vcpus
        )
    status: str = reply["RequestedQuota"]["Status"]
    return status


def used_vcpus(clients: Clients, *, use_spot: bool) -> float:
    """Fargate vCPUs that tasks of this account take now in the region, in all its clusters.

    Raises:
        AccountError: it cannot be found out.
    """
    ecs = clients.get("ecs")
    total = 0.0
    with asking("counting the Fargate tasks that run"):
        for page in ecs.get_paginator("list_clusters").paginate():
            for cluster in page["clusterArns"]:
                total += _cluster_vcpus(ecs, cluster, use_spot=use_spot)
    return total


def _cluster_vcpus(ecs: Any, cluster: str, *, use_spot: bool) -> float:
    total = 0.0
    pages = ecs.get_paginator("list_tasks").paginate(
        cluster=cluster,
        launchType="FARGATE",
        PaginationConfig={"PageSize": _DESCRIBED_AT_ONCE},
    )
    for page in pages:
        if not page["taskArns"]:
            continue
        tasks = ecs.describe_tasks(cluster=cluster, tasks=page["taskArns"])["tasks"]
        for task in tasks:
            if (task.get("capacityProviderName") == "FARGATE_SPOT") is use_spot:
                total += int(task["cpu"]) / 1024
    return total


def fargate_vcpus(clients: Clients, *, use_spot: bool) -> Vcpus | None:
    """The applied quota and what of it is used; None, with a note in the log, where one cannot be had.

    For whoever launches: not knowing must not keep workers from being started.
    """
    try:
        return Vcpus(
            quota=quota(clients, use_spot=use_spot).vcpus,
            used=used_vcpus(clients, use_spot=use_spot),
        )
    except AccountError as error:
        log.info("starting workers without knowing the quota: %s", error)
        return None

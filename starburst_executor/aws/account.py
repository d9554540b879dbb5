"""The AWS account: credentials and identity, quotas and their use."""

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
    "Partition",
    "Quota",
    "Vcpus",
    "account_id",
    "asking",
    "date_of",
    "fargate_vcpus",
    "find_credentials",
    "identity",
    "make_client_once",
    "partition_of",
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
    """boto3 clients for one region, each created on first use.

    Args:
        region: Their region; defaults to that of the AWS settings.
        make: Creates a client.
    """

    def __init__(self, region: str | None = None, make: Callable[..., Any] = make_client) -> None:
        self._region = region
        self._make = make
        self._made: dict[tuple[str, str | None], Any] = {}

    def get(self, service: str, region: str | None = None) -> Any:
        """The client of a service, optionally in another region.

        Raises:
            AccountError: no region is set.
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
                raise AccountDenied(f"the AWS settings are unusable: {error}") from error
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
        what: The operation, for the message, such as "reading the Fargate quota".

    Raises:
        AccountDenied: credentials or permissions are missing.
        AccountError: any other failure of AWS or of the connection.
    """
    try:
        yield
    except ClientError as error:
        code = error.response["Error"].get("Code", "")
        text = f"{what} failed: {error}"
        if code.startswith(_BAD_CREDENTIALS):
            raise AccountDenied(
                f"{text}. The credentials are wrong or have expired; "
                "`aws sts get-caller-identity` shows which are used."
            ) from error
        if code.startswith(_DENIED):
            raise AccountDenied(
                f"{text}. A permission is missing: `starburst-executor setup --print-policy` lists "
                "all that are needed."
            ) from error
        raise AccountError(text) from error
    except _NO_CREDENTIALS as error:
        raise AccountDenied(
            f"{what} had no credentials: {error} Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or log in with `aws sso login`."
        ) from error
    except BotoCoreError as error:
        raise AccountError(f"{what} failed: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """The credentials in use, without the secret.

    Attributes:
        source: Where they were found, in botocore's terms, such as "env" or
            "shared-credentials-file".
        key_id: The access key's id.
    """

    source: str
    key_id: str


def find_credentials() -> Credentials | None:
    """The credentials that would be used; None if there are none. May query instance metadata.

    Raises:
        AccountDenied: the AWS settings name credentials that cannot be loaded.
    """
    import botocore.session

    try:
        found: Any = botocore.session.get_session().get_credentials()
        if found is None:
            return None
        return Credentials(source=found.method, key_id=found.get_frozen_credentials().access_key)
    except BotoCoreError as error:
        raise AccountDenied(
            f"the credentials named by the AWS settings cannot be loaded: {error}"
        ) from error


def identity() -> str:
    """ARN of the user or role that the credentials belong to, from AWS STS; one request.

    Raises:
        AccountDenied: STS refused them.
        AccountError: it did not answer.
    """
    try:
        arn: str = make_client("sts").get_caller_identity()["Arn"]
    except ClientError as error:
        raise AccountDenied(f"AWS STS rejects them: {error}") from error
    except BotoCoreError as error:
        raise AccountError(f"AWS STS did not answer: {error}") from error
    return arn


def account_id(clients: Clients) -> str:
    """The account that the credentials belong to.

    Raises:
        AccountError: AWS STS refused or did not answer.
    """
    with asking("looking up the account of the credentials"):
        name: str = clients.get("sts").get_caller_identity()["Account"]
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A part of AWS with accounts of its own, such as China.

    Attributes:
        name: Its name in ARNs, such as "aws-cn".
        dns_suffix: The end of its host names.
    """

    name: str
    dns_suffix: str


def partition_of(region: str) -> Partition:
    """The partition of a region; asks nobody.

    Raises:
        AccountError: there can be no such region.
    """
    import botocore.session

    session: Any = botocore.session.get_session()
    with asking(f"looking up the partition of {region}"):
        name: str = session.get_partition_for_region(region)
    known = session.get_component("data_loader").load_data("partitions")["partitions"]
    [suffix] = [one["outputs"]["dnsSuffix"] for one in known if one["id"] == name]
    return Partition(name=name, dns_suffix=suffix)


def make_client_once(service: str, *, region: str | None = None) -> Any:
    """Create a client that tries once, for questions whose answer is optional."""
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
    """A region's quota of concurrent Fargate vCPUs.

    Attributes:
        code: Its code, such as "L-3032A538".
        name: AWS's name for it.
        use_spot: Whether it is Spot's.
        vcpus: The applied value.
        adjustable: Whether an increase may be requested.
        requested: The value of an open request; None if there is none.
    """

    code: str
    name: str
    use_spot: bool
    vcpus: float
    adjustable: bool
    requested: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Vcpus:
    """The account's Fargate vCPUs in this region.

    Attributes:
        quota: How many may run at once.
        used: How many are running.
    """

    quota: float
    used: float


def quota(clients: Clients, *, use_spot: bool) -> Quota:
    """The quota that applies to this account now, and any open request for more.

    Raises:
        AccountError: it cannot be read.
    """
    client = clients.get("service-quotas")
    names = {"ServiceCode": _SERVICE, "QuotaCode": _QUOTA_CODES[use_spot]}
    with asking(f"reading the Fargate quota {names['QuotaCode']}"):
        try:
            found = client.get_service_quota(**names)["Quota"]
        except client.exceptions.NoSuchResourceException:
            # Never changed for this account: AWS's default applies.
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
    """Ask AWS to raise the quota; return the status of the request. AWS may take days to decide.

    Raises:
        AccountError: AWS rejects the request: it is not more than now, or another one is open.
    """
    client = clients.get("service-quotas")
    code = _QUOTA_CODES[use_spot]
    with asking(f"requesting {vcpus:g} vCPUs (quota {code})"):
        reply = client.request_service_quota_increase(
            ServiceCode=_SERVICE, QuotaCode=code, DesiredValue=vcpus
        )
    status: str = reply["RequestedQuota"]["Status"]
    return status


def used_vcpus(clients: Clients, *, use_spot: bool) -> float:
    """Fargate vCPUs that this account's tasks use now in the region, across all clusters.

    Raises:
        AccountError: it cannot be determined.
    """
    ecs = clients.get("ecs")
    total = 0.0
    with asking("counting the running Fargate tasks"):
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
    """The applied quota and its use; None, with a log message, if they cannot be determined.

    For launching: an unknown quota must not keep workers from being started.
    """
    try:
        return Vcpus(
            quota=quota(clients, use_spot=use_spot).vcpus,
            used=used_vcpus(clients, use_spot=use_spot),
        )
    except AccountError as error:
        log.info("starting workers without knowing the quota: %s", error)
        return None

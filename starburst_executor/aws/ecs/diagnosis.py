"""Diagnoses why ECS starts no task, or why a task has stopped.

ECS has few error codes, and the same one for a typo and for a full data centre: the meaning is in
the text. So texts are matched, loosely, against one table; unknown ones are retried a few times and
then taken at their word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
)

if TYPE_CHECKING:
    from mypy_boto3_ecs.type_defs import TaskTypeDef

__all__ = [
    "Diagnosis",
    "NotYet",
    "Retryability",
    "Stop",
    "is_passing",
    "judge_error",
    "judge_failure",
    "judge_shortage",
    "judge_start",
]


class NotYet(Exception):
    """The requested change is in progress, and takes AWS some more seconds."""


class Retryability(Enum):
    """Whether the same request can succeed."""

    NEVER = "not until something is fixed"
    DOUBTFUL = "perhaps on the next try; not after several"
    FULL = "when capacity or quota is free"
    LATER = "when AWS answers again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Why no task was started.

    Attributes:
        retryability: Whether to try again.
        text: ECS's message, and what to do about it.
    """

    retryability: Retryability
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Why a task stopped.

    Attributes:
        code: ECS's stop code, such as "SpotInterruption".
        reason: ECS's reasons, including the container's own.
        exit_code: Exit code of the worker's process; None if ECS has none.
        began: Whether the worker's process ever started.
    """

    code: str
    reason: str
    exit_code: int | None
    began: bool

    @classmethod
    def of(cls, task: TaskTypeDef) -> Stop:
        """The stop of a task, as reported by DescribeTasks."""
        containers = task.get("containers", [])
        reasons = [
            task.get("stoppedReason", ""),
            *(c.get("reason", "") for c in containers),
        ]
        codes = [c["exitCode"] for c in containers if c.get("exitCode") is not None]
        return cls(
            code=task.get("stopCode", ""),
            reason="; ".join(dict.fromkeys(text for text in reasons if text)),
            exit_code=codes[0] if codes else None,
            began="startedAt" in task,
        )

    @property
    def expected(self) -> bool:
        """Whether it left by itself, or was stopped by a user."""
        by_user = self.code == "UserInitiated"
        return by_user or (self.code == "EssentialContainerExited" and not self.exit_code)

    def __str__(self) -> str:
        parts = [self.code or "stopped", self.reason]
        if self.exit_code is not None:
            parts.append(f"exit code {_exit(self.exit_code)}")
        text = ": ".join(part for part in parts[:2] if part)
        advice = next((a for p, a in _ENDS if p.search(f"{text} {parts[-1]}")), "")
        return "; ".join(part for part in (text, *parts[2:], advice) if part)


_PASSING_CODES = {
    "ThrottlingException",
    "Throttling",
    "ThrottledException",
    "TooManyRequestsException",
    "RequestLimitExceeded",
    "LimitExceededException",  # of RegisterTaskDefinition: one per second
    "ServerException",
    "InternalFailure",
    "ServiceUnavailable",
    "UpdateInProgressException",  # another client is changing the cluster
    "ResourceInUseException",  # its list of capacity providers was read too early
    "ResourceContention",
}
_NEVER_CODES = {
    "ClusterNotFoundException": "Does this account have the cluster, in this region? "
    "`starburst-executor setup` creates one.",
    "PlatformUnknownException": "",
    "PlatformTaskDefinitionIncompatibilityException": "",
    "UnsupportedFeatureException": "",
    "BlockedException": "AWS has blocked the account; ask AWS Support.",
}
# What was just created, perhaps by another client, is not known everywhere immediately.
_NEW = re.compile(
    r"assume.* role|launch template.*(not exist|not found)|IamInstanceProfile|"
    r"Auto Scaling group.*(not exist|not found|not valid)",
    re.IGNORECASE | re.DOTALL,
)
_DENIED = re.compile(r"AccessDenied|UnauthorizedOperation|not authorized to perform")
_CREDENTIALS = re.compile(
    r"ExpiredToken|InvalidClientTokenId|UnrecognizedClient|InvalidSignature|IncompleteSignature|"
    r"MissingAuth"
)

_QUOTA_ADVICE = (
    "This is the account's quota of concurrent Fargate vCPUs; `starburst-executor quota` shows it "
    "and can request more."
)
_IMAGE_ADVICE = "Check `image`: its name, its tag, and whether it is built for this architecture."
_REGISTRY_ADVICE = (
    "The registry rejects the execution role, or requires a login: check the role's permissions "
    "and the image's name."
)
_NETWORK_ADVICE = (
    "Workers cannot reach the registry or AWS: they need a public address (assign_public_ip), a "
    "NAT gateway or VPC endpoints."
)
_ROLE_ADVICE = (
    "Check that the execution and task roles exist, that ecs-tasks.amazonaws.com may assume them "
    "and that you may pass them (iam:PassRole). It takes some seconds until a new role is known."
)
_SUBNET_ADVICE = (
    "Check the subnets and security groups: they must exist in this region, in one VPC."
)

_TEXTS: tuple[tuple[re.Pattern[str], Retryability, str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), retryability, advice)
    for pattern, retryability, advice in (
        (r"limit on the number of vcpus", Retryability.FULL, _QUOTA_ADVICE),
        (
            r"VcpuLimitExceeded|current vCPU limit|MaxSpotInstanceCountExceeded",
            Retryability.FULL,
            "This is the account's EC2 vCPU quota for that family and market: see Service Quotas.",
        ),
        (
            r"invalid iam ?instance ?profile",
            Retryability.NEVER,
            "Instances have no role: `starburst-executor setup` creates it.",
        ),
        (
            (
                r"capacity is unavailable|RESOURCE:|insufficient ?(instance ?)?capacity|"
                r"no spot capacity|UnfulfillableCapacity"
            ),
            Retryability.FULL,
            "Other subnets (availability zones), another size, or use_spot=False may be available.",
        ),
        (r"too many .*PROVISIONING", Retryability.FULL, ""),
        (r"rate exceeded|throttl", Retryability.LATER, ""),
        (r"toomanyrequests|pull rate limit", Retryability.DOUBTFUL, _REGISTRY_ADVICE),
        (
            r"log ?(group|stream).*(not exist|not found)|ResourceNotFoundException.*log",
            Retryability.NEVER,
            "The log group is missing: `starburst-executor setup` creates it.",
        ),
        (
            r"assume.* role|role .*(invalid|not valid|not exist|not found)",
            Retryability.NEVER,
            _ROLE_ADVICE,
        ),
        (
            (
                r"(subnet|security ?group).*(not exist|not found|invalid|empty)|"
                r"Invalid(Subnet|Group|SecurityGroup)"
            ),
            Retryability.NEVER,
            _SUBNET_ADVICE,
        ),
        (
            r"capacity provider",
            Retryability.NEVER,
            "The cluster needs FARGATE and FARGATE_SPOT; `starburst-executor setup` adds them.",
        ),
        (
            r"CannotPull.*(access denied|no basic auth|unauthorized|forbidden|\b40[13]\b)",
            Retryability.NEVER,
            _IMAGE_ADVICE + " " + _REGISTRY_ADVICE,
        ),
        (
            (
                r"CannotPull.*(not found|manifest unknown|not exist|invalid reference|no match|"
                r"platform)"
            ),
            Retryability.NEVER,
            _IMAGE_ADVICE,
        ),
        (
            r"executable file not found|no such file or directory|exec format error",
            Retryability.NEVER,
            "The image lacks Python, or is built for another architecture: check `image`.",
        ),
        (r"ResourceInitializationError|CannotPull", Retryability.DOUBTFUL, _NETWORK_ADVICE),
    )
)

_ENDS = (
    (
        re.compile(r"OutOfMemory|\b137\b"),
        "probably out of memory: raise memory=, or lower slots=",
    ),
    (
        re.compile("SpotInterruption|TerminationNotice"),
        "its tasks were handed back and run elsewhere",
    ),
)


def is_passing(error: BaseException) -> bool:
    """Whether to retry after this error, some seconds later."""
    if isinstance(error, ClientError):
        code = error.response["Error"].get("Code", "")
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return code in _PASSING_CODES or status >= 500 or _is_new(error)
    return isinstance(error, ConnectionError | HTTPClientError | NotYet)


def judge_error(error: ClientError | BotoCoreError | NotYet) -> Diagnosis:
    """What an error means for starting workers."""
    if not isinstance(error, ClientError):
        retryability = Retryability.LATER if is_passing(error) else Retryability.NEVER
        return Diagnosis(retryability=retryability, text=str(error))
    code = error.response["Error"].get("Code", "")
    message = error.response["Error"].get("Message", "") or code
    text = f"{error.operation_name}: {code}: {message}"
    if _CREDENTIALS.search(code):
        return _diagnosis(Retryability.NEVER, text, "Renew the AWS credentials.")
    if _DENIED.search(f"{code} {message}"):
        advice = (
            "The AWS credentials lack a permission; `starburst-executor setup --print-policy` "
            "lists all."
        )
        return _diagnosis(Retryability.NEVER, text, advice)
    if code in _NEVER_CODES:
        return _diagnosis(Retryability.NEVER, text, _NEVER_CODES[code])
    if code in _PASSING_CODES or error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500:
        return _diagnosis(Retryability.LATER, text, "")
    return _by_text(text, Retryability.NEVER)  # the request itself was rejected


def judge_failure(reason: str, detail: str) -> Diagnosis:
    """What a failure in a RunTask reply means; such replies have HTTP status 200."""
    text = f"RunTask: {reason}" + (f" ({detail})" if detail else "")
    return _by_text(text, Retryability.DOUBTFUL)


def judge_start(stop: Stop) -> Diagnosis:
    """What it means that a task stopped before its process started."""
    if stop.code in ("SpotInterruption", "TerminationNotice"):
        return _diagnosis(Retryability.FULL, str(stop), "")
    return _by_text(str(stop), Retryability.DOUBTFUL)


def judge_shortage(text: str) -> Diagnosis:
    """What it means that a group of instances cannot grow."""
    return _by_text(text, Retryability.FULL)


def _by_text(text: str, otherwise: Retryability) -> Diagnosis:
    for pattern, retryability, advice in _TEXTS:
        if pattern.search(text):
            return _diagnosis(retryability, text, advice)
    return _diagnosis(otherwise, text, "")


def _diagnosis(retryability: Retryability, text: str, advice: str) -> Diagnosis:
    return Diagnosis(retryability=retryability, text=f"{text.rstrip('. ')}. {advice}".rstrip())


def _is_new(error: ClientError) -> bool:
    message = error.response["Error"].get("Message", "")
    return bool(_NEW.search(message)) and not _DENIED.search(
        f"{error.response['Error'].get('Code', '')} {message}"
    )


def _exit(code: int) -> str:
    return f"{code} (killed by signal {code - 128})" if 128 < code < 160 else str(code)

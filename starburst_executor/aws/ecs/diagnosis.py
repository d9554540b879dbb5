"""What ECS says when it starts no task, or when a task has stopped: read, and judged.

ECS has few error codes, and the same one for a typing error and for a full data centre: what it
means is in the text. So the texts are matched, loosely, in one table; a text that nobody knows is tried
again a few times and then taken at its word.
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
    """What was asked for is under way, and takes AWS some more seconds."""


class Retryability(Enum):
    """Whether the same request will ever do."""

    NEVER = "not before something is mended"
    DOUBTFUL = "perhaps at the next try; not after several"
    FULL = "when capacity or quota is free"
    LATER = "when AWS answers again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Why no task was started.

    Attributes:
        retryability: Whether to try again.
        text: What ECS said, and what to do about it.
    """

    retryability: Retryability
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Why a task stopped.

    Attributes:
        code: ECS's stop code, such as "SpotInterruption".
        reason: ECS's words, the container's own included.
        exit_code: Of the worker's process; None if ECS does not know one.
        began: Whether the worker's process was ever started.
    """

    code: str
    reason: str
    exit_code: int | None
    began: bool

    @classmethod
    def of(cls, task: TaskTypeDef) -> Stop:
        """The stop of a task as DescribeTasks tells of it."""
        containers = task.get("containers", [])
        said = [
            task.get("stoppedReason", ""),
            *(c.get("reason", "") for c in containers),
        ]
        codes = [c["exitCode"] for c in containers if c.get("exitCode") is not None]
        return cls(
            code=task.get("stopCode", ""),
            reason="; ".join(dict.fromkeys(text for text in said if text)),
            exit_code=codes[0] if codes else None,
            began="startedAt" in task,
        )

    @property
    def expected(self) -> bool:
        """Whether it left by itself, or was told to."""
        asked = self.code == "UserInitiated"
        return asked or (self.code == "EssentialContainerExited" and not self.exit_code)

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
    "LimitExceededException",  # of RegisterTaskDefinition: one a second
    "ServerException",
    "InternalFailure",
    "ServiceUnavailable",
    "UpdateInProgressException",  # somebody else changes the cluster
    "ResourceInUseException",  # its list of capacity providers was read too early
    "ResourceContention",
}
_NEVER_CODES = {
    "ClusterNotFoundException": "Does this account have the cluster, in this region? `starburst-executor "
    "setup` makes one.",
    "PlatformUnknownException": "",
    "PlatformTaskDefinitionIncompatibilityException": "",
    "UnsupportedFeatureException": "",
    "BlockedException": "AWS has blocked the account; ask AWS Support.",
}
# What was just made, perhaps by another client, is not known everywhere at once.
_NEW = re.compile(
    r"assume.* role|launch template.*(not exist|not found)|IamInstanceProfile|"
    r"Auto Scaling group.*(not exist|not found|not valid)",
    re.IGNORECASE | re.DOTALL,
)
_DENIED = re.compile(r"AccessDenied|UnauthorizedOperation|not authorized to perform")
_CREDENTIALS = re.compile(
    r"ExpiredToken|InvalidClientTokenId|UnrecognizedClient|InvalidSignature|IncompleteSignature|MissingAuth"
)

_QUOTA_ADVICE = "It is the account's quota of Fargate vCPUs at once; `starburst-executor quota` shows it and can ask for more."
_IMAGE_ADVICE = "Check `image`: its name, its tag, and whether it is built for this architecture."
_REGISTRY_ADVICE = "The registry refuses the execution role, or wants a login: check the role's permissions and the image's name."
_NETWORK_ADVICE = (
    "Workers cannot reach the registry or AWS: they need a public address (assign_public_ip), a NAT gateway or "
    "VPC endpoints."
)
_ROLE_ADVICE = (
    "Check that the execution and task roles exist, that ecs-tasks.amazonaws.com may assume them and that you may "
    "pass them (iam:PassRole). A role that was just made takes some seconds to be known."
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
            "It is the account's quota of EC2 vCPUs of that family and market: Service Quotas shows it, under EC2.",
        ),
        (
            r"invalid iam ?instance ?profile",
            Retryability.NEVER,
            "Instances have no role: `starburst-executor setup` makes it.",
        ),
        (
            r"capacity is unavailable|RESOURCE:|insufficient ?(instance ?)?capacity|no spot capacity|UnfulfillableCapacity",
            Retryability.FULL,
            "Other subnets (availability zones), another size, or use_spot=False may be had at once.",
        ),
        (r"too many .*PROVISIONING", Retryability.FULL, ""),
        (r"rate exceeded|throttl", Retryability.LATER, ""),
        (r"toomanyrequests|pull rate limit", Retryability.DOUBTFUL, _REGISTRY_ADVICE),
        (
            r"log ?(group|stream).*(not exist|not found)|ResourceNotFoundException.*log",
            Retryability.NEVER,
            "The log group is missing: `starburst-executor setup` makes it.",
        ),
        (r"assume.* role|role .*(invalid|not valid|not exist|not found)", Retryability.NEVER, _ROLE_ADVICE),
        (
            r"(subnet|security ?group).*(not exist|not found|invalid|empty)|Invalid(Subnet|Group|SecurityGroup)",
            Retryability.NEVER,
            _SUBNET_ADVICE,
        ),
        (
            r"capacity provider",
            Retryability.NEVER,
            "The cluster must have the providers FARGATE and FARGATE_SPOT; `starburst-executor setup` adds them.",
        ),
        (
            r"CannotPull.*(access denied|no basic auth|unauthorized|forbidden|\b40[13]\b)",
            Retryability.NEVER,
            _IMAGE_ADVICE + " " + _REGISTRY_ADVICE,
        ),
        (
            r"CannotPull.*(not found|manifest unknown|not exist|invalid reference|no match|platform)",
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
)  # fmt: skip

_ENDS = (
    (
        re.compile(r"OutOfMemory|\b137\b"),
        "probably out of memory: raise memory=, or lower slots=",
    ),
    (
        re.compile("SpotInterruption|TerminationNotice"),
        "what it held was handed back and runs elsewhere",
    ),
)


def is_passing(error: BaseException) -> bool:
    """Whether asking once more, seconds later, is the right answer to an error of a client."""
    if isinstance(error, ClientError):
        code = error.response["Error"].get("Code", "")
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return code in _PASSING_CODES or status >= 500 or _is_new(error)
    return isinstance(error, ConnectionError | HTTPClientError | NotYet)


def judge_error(error: ClientError | BotoCoreError | NotYet) -> Diagnosis:
    """What an error means for those that wait for workers."""
    if not isinstance(error, ClientError):
        retryability = Retryability.LATER if is_passing(error) else Retryability.NEVER
        return Diagnosis(retryability=retryability, text=str(error))
    code = error.response["Error"].get("Code", "")
    said = error.response["Error"].get("Message", "") or code
    text = f"{error.operation_name}: {code}: {said}"
    if _CREDENTIALS.search(code):
        return _diagnosis(Retryability.NEVER, text, "Renew the AWS credentials.")
    if _DENIED.search(f"{code} {said}"):
        advice = "The AWS credentials lack a permission; `starburst-executor setup --print-policy` lists all."
        return _diagnosis(Retryability.NEVER, text, advice)
    if code in _NEVER_CODES:
        return _diagnosis(Retryability.NEVER, text, _NEVER_CODES[code])
    if code in _PASSING_CODES or error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500:
        return _diagnosis(Retryability.LATER, text, "")
    return _by_text(text, Retryability.NEVER)  # the request itself was refused


def judge_failure(reason: str, detail: str) -> Diagnosis:
    """What a failure in an answer of RunTask means; such answers are HTTP 200."""
    text = f"RunTask: {reason}" + (f" ({detail})" if detail else "")
    return _by_text(text, Retryability.DOUBTFUL)


def judge_start(stop: Stop) -> Diagnosis:
    """What it means that a task stopped before its process was started."""
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
    said = error.response["Error"].get("Message", "")
    return bool(_NEW.search(said)) and not _DENIED.search(
        f"{error.response['Error'].get('Code', '')} {said}"
    )


def _exit(code: int) -> str:
    return f"{code} (killed by signal {code - 128})" if 128 < code < 160 else str(code)

"""What AWS says when it starts no worker, and whether the same request can succeed later.

ECS has few error codes, and the same one for a typo and for a full data centre: the meaning is in
the text. So this is a table of texts, matched loosely against "Code: message". The first entry that
matches counts; codes that say nothing by themselves come last, because a text may follow them that
says more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

__all__ = ["KnownError", "Retryability", "find_known"]


class Retryability(Enum):
    """Whether the same request can succeed."""

    NEVER = "not until something is fixed"
    DOUBTFUL = "perhaps on the next try; not after several"
    FULL = "when capacity or quota is free"
    LATER = "when AWS answers again"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownError:
    """Texts of one meaning.

    Attributes:
        pattern: Matches them.
        retryability: Whether to try again.
        advice: What to do about it.
        soon: Whether the same request may succeed within seconds: AWS was asked too much, or what
            was just created is not known everywhere yet.
    """

    pattern: re.Pattern[str]
    retryability: Retryability
    advice: str
    soon: bool


def find_known(text: str) -> KnownError | None:
    """The first entry that matches; None if nobody has seen such a text yet."""
    return next((known for known in _KNOWN if known.pattern.search(text)), None)


_NEVER, _DOUBTFUL = Retryability.NEVER, Retryability.DOUBTFUL
_FULL, _LATER = Retryability.FULL, Retryability.LATER

_IMAGE = "Check `image`: its name, its tag, and whether it is built for this architecture."
_REGISTRY = (
    "The registry rejects the execution role, or requires a login: check the role's permissions "
    "and the image's name."
)
_NETWORK = (
    "Workers cannot reach the registry or AWS: they need a public address (assign_public_ip), a "
    "NAT gateway or VPC endpoints."
)
_ROLE = (
    "Check that the execution and task roles exist, that ecs-tasks.amazonaws.com may assume them "
    "and that you may pass them (iam:PassRole). It takes some seconds until a new role is known."
)
_ZONES = "Other subnets (availability zones), another size, or use_spot=False may be available."

_TABLE: tuple[tuple[str, Retryability, str, bool], ...] = (
    # Without a permission of the execution role, whatever the task needs it for.
    (
        r"(ResourceInitialization|CannotPull|CannotStart).*(AccessDenied|not (authorized|allowed))",
        _NEVER,
        "The execution role lacks this permission.",
        False,
    ),
    # Registries that limit or fail. Docker's own "API error (500)" says nothing of the registry.
    (
        (
            r"toomanyrequests|pull rate limit|"
            r"CannotPull.*((?<!error \()\b(429|50[0234])\b|Service Unavailable|Bad Gateway)"
        ),
        _LATER,
        (
            "The image's registry limits pulls or fails; the account's own registry (ECR) has no "
            "such limit."
        ),
        False,
    ),
    # Quotas and capacity.
    (
        r"limit on the number of (spot |on-demand )?(tasks|vcpus)",
        _FULL,
        (
            "This is the account's quota of concurrent Fargate vCPUs; `starburst-executor quota` "
            "shows it and can request more."
        ),
        False,
    ),
    (
        r"configuration is above your limit",
        _NEVER,
        "The account's quota is less than one worker: `starburst-executor quota`.",
        False,
    ),
    (
        r"VcpuLimitExceeded|current vCPU limit|max ?spot ?instance ?count ?exceeded",
        _FULL,
        "This is the account's EC2 vCPU quota for that family and market: see Service Quotas.",
        False,
    ),
    (
        (
            r"capacity is unavailable|RESOURCE:\w|(insufficient|sufficient \S+) ?(instance ?)?"
            r"capacity|no (more unused|spot) capacity|UnfulfillableCapacity"
        ),
        _FULL,
        _ZONES,
        False,
    ),
    (r"not supported in your requested Availability Zone", _FULL, _ZONES, False),
    (r"^(SpotInterruption|TerminationNotice)", _FULL, "", False),
    (r"provisioning capacity limit|too many .*PROVISIONING", _LATER, "", False),
    (
        r"InsufficientFreeAddresses|enough free addresses",
        _LATER,
        "The subnets have too few free addresses for so many workers.",
        False,
    ),
    (r"network interface provisioning", _LATER, "", False),
    (r"^RunTask: AGENT\b", _LATER, "An instance has lost its connection to ECS.", False),
    # The account.
    (
        r"account is currently blocked|BlockedException",
        _NEVER,
        "AWS has blocked the account; ask AWS Support.",
        False,
    ),
    (
        r"PendingVerification|is being validated|currently being verified",
        _LATER,
        "AWS is still verifying the account, which takes minutes, or some hours at most.",
        False,
    ),
    (
        r"ExpiredToken|token .*expired|RequestExpired|signature expired|RequestTimeTooSkewed",
        _LATER,
        "Renew the AWS credentials (`aws sso login`), and check this machine's clock.",
        False,
    ),
    (
        r"InvalidClientTokenId|UnrecognizedClient|InvalidSignature|IncompleteSignature|MissingAuth",
        _NEVER,
        "Renew the AWS credentials.",
        False,
    ),
    (
        (
            r"AccessDenied|UnauthorizedOperation|not authorized to perform|"
            r"ServiceLinkedRoleCreationNotPermitted|do not have permission"
        ),
        _NEVER,
        (
            "The AWS credentials lack a permission; `starburst-executor setup --print-policy` "
            "lists all."
        ),
        False,
    ),
    # Asked too much, within a request that fails for it.
    (
        (
            r"rate exceeded|request ?limit ?exceeded|too many concurrent attempts|"
            r"an internal error has occurred"
        ),
        _LATER,
        "",
        True,
    ),
    # What was just created or is being changed, perhaps by another client.
    (
        r"assume the service.linked role",
        _NEVER,
        (
            "ECS lacks its role in this account: `starburst-executor setup` creates it, or "
            "`aws iam create-service-linked-role --aws-service-name ecs.amazonaws.com`."
        ),
        True,
    ),
    (r"assume.* role", _NEVER, _ROLE, True),
    (
        r"invalid iam ?instance ?profile",
        _NEVER,
        "Instances have no role: `starburst-executor setup` creates it.",
        True,
    ),
    (
        (
            r"launch template.*(not exist|not found)|"
            r"Auto Scaling group.*(not exist|not found|not valid)|not in an ACTIVE state"
        ),
        _NEVER,
        "It is missing, or being removed.",
        True,
    ),
    (
        r"cluster was not active",
        _NEVER,
        "`starburst-executor setup` creates a cluster.",
        True,
    ),
    (r"UpdateInProgress|update in progress|ResourceInUse|ResourceContention", _LATER, "", True),
    # What is configured.
    (
        r"ClusterNotFound|cluster not found",
        _NEVER,
        (
            "Does this account have the cluster, in this region? `starburst-executor setup` "
            "creates one."
        ),
        False,
    ),
    (
        r"log ?(group|stream).*(not exist|not found)|ResourceNotFoundException.*log",
        _NEVER,
        "The log group is missing: `starburst-executor setup` creates it.",
        False,
    ),
    (r"role .*(invalid|not valid|not exist|not found)", _NEVER, _ROLE, False),
    (
        (
            r"(subnet|security ?group).*(not exist|not found|invalid|empty)|"
            r"Invalid(Subnet|Group|SecurityGroup)"
        ),
        _NEVER,
        "Check the subnets and security groups: they must exist in this region, in one VPC.",
        False,
    ),
    (
        r"maximum number of capacity providers",
        _NEVER,
        "Take some that are not used off the cluster.",
        False,
    ),
    (
        r"capacity provider",
        _NEVER,
        "The cluster needs FARGATE and FARGATE_SPOT; `starburst-executor setup` adds them.",
        False,
    ),
    (r"accept terms and subscribe|OptInRequired", _NEVER, "", False),
    (
        r"configuration is currently not supported",
        _NEVER,
        "The region may lack this instance type.",
        False,
    ),
    (
        r"client error on launch",
        _NEVER,
        "Often the key of encrypted volumes, which EC2 Auto Scaling must be allowed to use.",
        False,
    ),
    # The image and its container.
    (
        r"CannotPull.*(access denied|no basic auth|unauthorized|forbidden|\b40[13]\b)",
        _NEVER,
        f"{_IMAGE} {_REGISTRY}",
        False,
    ),
    (
        r"CannotPull.*(not found|manifest unknown|not exist|invalid reference|no match|platform)",
        _NEVER,
        _IMAGE,
        False,
    ),
    (r"no space left on device", _NEVER, "The image is larger than the worker's disk.", False),
    (r"OOM-killed", _NEVER, "Raise memory=.", False),
    (
        r"executable file not found|no such file or direct|exec format error",
        _NEVER,
        "The image lacks Python, or is built for another architecture: check `image`.",
        False,
    ),
    (r"ResourceInitializationError|CannotPull", _DOUBTFUL, _NETWORK, False),
    # Codes that say no more than this.
    (
        r"^\w+: (PlatformUnknown|PlatformTaskDefinitionIncompatibility|UnsupportedFeature)",
        _NEVER,
        "",
        False,
    ),
    (
        (
            r"throttl|TooManyRequests|LimitExceededException|ServerException|InternalFailure|"
            r"ServiceUnavailable"
        ),
        _LATER,
        "",
        True,
    ),
)

_KNOWN = tuple(
    KnownError(
        pattern=re.compile(pattern, re.IGNORECASE | re.DOTALL),
        retryability=retryability,
        advice=advice,
        soon=soon,
    )
    for pattern, retryability, advice, soon in _TABLE
)

"""The AWS permissions this package needs, as data: printed for administrators, and tested.

client     who creates, watches and ends sessions: S3, ECS
worker     the workers, and with them the tasks: S3, and starting their own replacements
setup      who runs `setup` and `teardown`: CloudFormation, and what it creates on their behalf
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starburst_executor.aws.account import Partition, partition_of

__all__ = [
    "CALLS",
    "MADE_BY_STACK",
    "Scope",
    "client_policy",
    "setup_policy",
]

# Operation that the package calls -> actions that it requires, by calling module.
CALLS: dict[str, dict[str, tuple[str, ...]]] = {
    "s3": {
        "s3:AbortMultipartUpload": ("s3:AbortMultipartUpload",),
        "s3:CompleteMultipartUpload": ("s3:PutObject",),
        "s3:CreateMultipartUpload": ("s3:PutObject",),
        "s3:DeleteObjects": ("s3:DeleteObject",),
        "s3:GetObject": ("s3:GetObject",),
        "s3:HeadObject": ("s3:GetObject",),
        "s3:ListObjectsV2": ("s3:ListBucket",),
        "s3:PutObject": ("s3:PutObject",),
        "s3:UploadPart": ("s3:PutObject",),
    },
    "ecs": {
        "ecs:DescribeTaskDefinition": ("ecs:DescribeTaskDefinition",),
        "ecs:DescribeTasks": ("ecs:DescribeTasks",),
        "ecs:ListTasks": ("ecs:ListTasks",),
        "ecs:RegisterTaskDefinition": (
            "ecs:RegisterTaskDefinition",
            "ecs:TagResource",
            "iam:PassRole",
        ),
        "ecs:RunTask": ("ecs:RunTask", "ecs:TagResource", "iam:PassRole"),
        "ecs:StopTask": ("ecs:StopTask",),
        "logs:GetLogEvents": ("logs:GetLogEvents",),
    },
    "placement": {
        "autoscaling:DescribeScalingActivities": ("autoscaling:DescribeScalingActivities",),
        "ec2:DescribeInstanceTypes": ("ec2:DescribeInstanceTypes",),
    },
    "capacity": {
        "autoscaling:CreateAutoScalingGroup": (
            "autoscaling:CreateAutoScalingGroup",
            "autoscaling:CreateOrUpdateTags",
            "ec2:RunInstances",  # checked when a group with a launch template is created
            "ec2:CreateTags",
            "iam:CreateServiceLinkedRole",
            "iam:PassRole",
            "ssm:GetParameters",  # the template's image is a public parameter
        ),
        "ec2:CreateLaunchTemplate": ("ec2:CreateLaunchTemplate", "ec2:CreateTags"),
        "ecs:CreateCapacityProvider": (
            "ecs:CreateCapacityProvider",
            "ecs:TagResource",
            # ECS manages the group's scaling on behalf of the provider's creator.
            "autoscaling:CreateOrUpdateTags",
            "autoscaling:DescribeAutoScalingGroups",
            "autoscaling:UpdateAutoScalingGroup",
        ),
        "ecs:DescribeClusters": ("ecs:DescribeClusters",),
        "ecs:PutClusterCapacityProviders": (
            "ecs:PutClusterCapacityProviders",
            "iam:CreateServiceLinkedRole",
        ),
    },
    "removal": {
        "autoscaling:DeleteAutoScalingGroup": ("autoscaling:DeleteAutoScalingGroup",),
        "autoscaling:DescribeAutoScalingGroups": ("autoscaling:DescribeAutoScalingGroups",),
        "ec2:DeleteLaunchTemplate": ("ec2:DeleteLaunchTemplate",),
        "ec2:DescribeLaunchTemplates": ("ec2:DescribeLaunchTemplates",),
        "ecs:DeleteCapacityProvider": ("ecs:DeleteCapacityProvider",),
        "ecs:DeregisterContainerInstance": ("ecs:DeregisterContainerInstance",),
        "ecs:DescribeCapacityProviders": ("ecs:DescribeCapacityProviders",),
        "ecs:DescribeClusters": ("ecs:DescribeClusters",),
        "ecs:ListContainerInstances": ("ecs:ListContainerInstances",),
        "ecs:PutClusterCapacityProviders": ("ecs:PutClusterCapacityProviders",),
    },
    "account": {
        "ecs:DescribeTasks": ("ecs:DescribeTasks",),
        "ecs:ListClusters": ("ecs:ListClusters",),
        "ecs:ListTasks": ("ecs:ListTasks",),
        "service-quotas:GetAWSDefaultServiceQuota": ("servicequotas:GetAWSDefaultServiceQuota",),
        "service-quotas:GetServiceQuota": ("servicequotas:GetServiceQuota",),
        "service-quotas:ListRequestedServiceQuotaChangeHistoryByQuota": (
            "servicequotas:ListRequestedServiceQuotaChangeHistoryByQuota",
        ),
        "service-quotas:RequestServiceQuotaIncrease": (
            "servicequotas:RequestServiceQuotaIncrease",
        ),
        "sts:GetCallerIdentity": (),  # requires none
    },
    "prices": {
        "ec2:DescribeSpotPriceHistory": ("ec2:DescribeSpotPriceHistory",),
        "pricing:GetProducts": ("pricing:GetProducts",),
    },
    "setup": {
        "cloudformation:CreateStack": (
            "cloudformation:CreateStack",
            "cloudformation:TagResource",
        ),
        "cloudformation:DeleteStack": ("cloudformation:DeleteStack",),
        "cloudformation:DescribeStackEvents": ("cloudformation:DescribeStackEvents",),
        "cloudformation:DescribeStackResources": ("cloudformation:DescribeStackResources",),
        "cloudformation:DescribeStacks": ("cloudformation:DescribeStacks",),
        "cloudformation:UpdateStack": (
            "cloudformation:TagResource",
            "cloudformation:UpdateStack",
        ),
        "ec2:DescribeRouteTables": ("ec2:DescribeRouteTables",),
        "ec2:DescribeSubnets": ("ec2:DescribeSubnets",),
        "ec2:DescribeVpcEndpoints": ("ec2:DescribeVpcEndpoints",),
        "ec2:DescribeVpcs": ("ec2:DescribeVpcs",),
        "ecs:DeregisterTaskDefinition": ("ecs:DeregisterTaskDefinition",),
        "ecs:DescribeClusters": ("ecs:DescribeClusters",),
        "ecs:DescribeTaskDefinition": ("ecs:DescribeTaskDefinition",),
        "ecs:DescribeTasks": ("ecs:DescribeTasks",),
        "ecs:ListTaskDefinitions": ("ecs:ListTaskDefinitions",),
        "ecs:ListTasks": ("ecs:ListTasks",),
        "ecs:StopTask": ("ecs:StopTask",),
        "iam:CreateServiceLinkedRole": ("iam:CreateServiceLinkedRole",),
        "s3:DeleteBucket": ("s3:DeleteBucket",),
        "s3:DeleteObjects": ("s3:DeleteObject",),
        "s3:HeadBucket": ("s3:ListBucket",),
        "s3:ListMultipartUploads": ("s3:ListBucketMultipartUploads",),
        "s3:AbortMultipartUpload": ("s3:AbortMultipartUpload",),
        "s3:ListObjectsV2": ("s3:ListBucket",),
    },
}

# Resource type in the template -> actions that CloudFormation performs on behalf of the deployer.
MADE_BY_STACK: dict[str, tuple[str, ...]] = {
    "AWS::S3::Bucket": (
        "s3:CreateBucket",
        "s3:PutBucketOwnershipControls",
        "s3:PutBucketPublicAccessBlock",
        "s3:PutBucketTagging",
        "s3:PutEncryptionConfiguration",
        "s3:PutLifecycleConfiguration",
    ),
    "AWS::S3::BucketPolicy": ("s3:GetBucketPolicy", "s3:PutBucketPolicy"),
    "AWS::ECS::Cluster": (
        "ecs:CreateCluster",
        "ecs:DescribeCapacityProviders",
        "ecs:DeleteCluster",
        "ecs:DescribeClusters",
        "ecs:PutClusterCapacityProviders",
        "ecs:TagResource",
        "ecs:UpdateCluster",
        "iam:CreateServiceLinkedRole",
    ),
    "AWS::Logs::LogGroup": (
        "logs:CreateLogGroup",
        "logs:DeleteLogGroup",
        "logs:DescribeLogGroups",
        "logs:ListTagsForResource",
        "logs:PutRetentionPolicy",
        "logs:TagResource",
    ),
    "AWS::IAM::Role": (
        "iam:AttachRolePolicy",
        "iam:CreateRole",
        "iam:DeleteRole",
        "iam:DetachRolePolicy",
        "iam:GetRole",
        "iam:ListAttachedRolePolicies",
        "iam:ListRolePolicies",
        "iam:TagRole",
        "iam:UpdateAssumeRolePolicy",
        "iam:UpdateRoleDescription",
    ),
    "AWS::IAM::InstanceProfile": (
        "iam:AddRoleToInstanceProfile",
        "iam:CreateInstanceProfile",
        "iam:DeleteInstanceProfile",
        "iam:GetInstanceProfile",
        "iam:PassRole",
        "iam:RemoveRoleFromInstanceProfile",
    ),
    "AWS::IAM::Policy": (
        "iam:DeleteRolePolicy",
        "iam:GetRolePolicy",
        "iam:PutRolePolicy",
    ),
    "AWS::EC2::SecurityGroup": (
        "ec2:AuthorizeSecurityGroupEgress",
        "ec2:CreateSecurityGroup",
        "ec2:CreateTags",
        "ec2:DeleteSecurityGroup",
        "ec2:DescribeInstances",
        "ec2:DescribeSecurityGroups",
        "ec2:RevokeSecurityGroupEgress",
    ),
    "AWS::EC2::VPCEndpoint": (
        "ec2:CreateTags",
        "ec2:CreateVpcEndpoint",
        "ec2:DeleteVpcEndpoints",
        "ec2:DescribeVpcEndpoints",
        "ec2:ModifyVpcEndpoint",
    ),
}


class Scope:
    """The names that a policy is restricted to.

    Args:
        account: Id of the account.
        region: The region.
        bucket: The bucket of the store.
        prefix: Prefix of its keys, ending with a slash unless empty.
        stack: Name of the stack, after which cluster and roles are named.
        partition: The region's partition.
        cluster: Name of a cluster to use instead of the stack's.
        roles: ARNs of roles to use instead of the stack's.
        kms_key: ARN of the key that encrypts the store's objects.
    """

    def __init__(
        self,
        *,
        account: str,
        region: str,
        bucket: str,
        prefix: str,
        stack: str,
        partition: Partition | None = None,
        cluster: str | None = None,
        roles: Sequence[str] = (),
        kms_key: str | None = None,
    ) -> None:
        partition = partition or partition_of("us-east-1")
        aws = f"arn:{partition.name}"
        here = f"{region}:{account}"
        self.bucket = f"{aws}:s3:::{bucket}"
        self.objects = f"{self.bucket}/{prefix}*"
        self.cluster = f"{aws}:ecs:{here}:cluster/{cluster or stack}"
        self.definitions = f"{aws}:ecs:{here}:task-definition/starburst-*"
        self.providers = f"{aws}:ecs:{here}:capacity-provider/starburst-*"
        self.groups = (
            f"{aws}:autoscaling:{here}:autoScalingGroup:*:autoScalingGroupName/starburst-*"
        )
        self.images = f"{aws}:ssm:{region}::parameter/aws/service/ecs/optimized-ami/*"
        self.profiles = f"{aws}:iam::{account}:instance-profile/{stack}-*"
        self.tagged = f"{aws}:ecs:{here}:*"
        self.roles = f"{aws}:iam::{account}:role/{stack}-*"
        self.passed = (self.roles, *roles)
        self.stack = f"{aws}:cloudformation:{here}:stack/{stack}/*"
        # Tags are on the group itself; everything else is asked of what is in it.
        self.log_group = f"{aws}:logs:{here}:log-group:/starburst-executor/{stack}"
        self.logs = f"{self.log_group}:*"
        self.kms_key = kms_key
        # EC2's own name depends on the partition; those of the other services are the same in all.
        self.services = ["ecs-tasks.amazonaws.com", f"ec2.{partition.dns_suffix}"]


def client_policy(scope: Scope) -> dict[str, Any]:
    """Permissions to create and watch sessions, including `quota` and `estimate`."""
    modules = ("s3", "ecs", "placement", "capacity", "account", "prices")
    key = _KEY_ACTIONS if scope.kms_key else set()
    return _document(_actions(*modules) | key, scope)


def setup_policy(scope: Scope) -> dict[str, Any]:
    """Permissions to run `setup` and `teardown`, in addition to a client's."""
    made = {action for actions in MADE_BY_STACK.values() for action in actions}
    modules = ("setup", "placement", "capacity", "removal")
    return _document(_actions(*modules) | made, scope)


def _actions(*modules: str) -> set[str]:
    calls = (CALLS[module] for module in modules)
    return {action for call in calls for actions in call.values() for action in actions}


_KEY_ACTIONS = {"kms:Decrypt", "kms:GenerateDataKey"}  # for S3, to read and write
_LINKED = {
    "StringEquals": {
        "iam:AWSServiceName": [
            "ecs.amazonaws.com",
            "autoscaling.amazonaws.com",
            "spot.amazonaws.com",
        ]
    }
}
_OBJECT_ACTIONS = {
    "s3:AbortMultipartUpload",
    "s3:DeleteObject",
    "s3:GetObject",
    "s3:PutObject",
}
_ANYWHERE = {  # AWS cannot restrict these to resources
    "ecs:CreateCluster",
    "autoscaling:DescribeAutoScalingGroups",
    "autoscaling:DescribeScalingActivities",
    "ecs:DeregisterTaskDefinition",
    "ecs:DescribeTaskDefinition",
    "ecs:ListClusters",
    "ecs:ListTaskDefinitions",
    "logs:DescribeLogGroups",
}


def _document(actions: Iterable[str], scope: Scope) -> dict[str, Any]:
    groups: dict[tuple[tuple[str, ...], str], set[str]] = {}
    for action in actions:
        groups.setdefault(_place(action, scope), set()).add(action)
    statements = [
        _statement(sorted(together), resources, name, scope)
        for (resources, name), together in sorted(groups.items())
    ]
    return {"Version": "2012-10-17", "Statement": statements}


def _place(action: str, scope: Scope) -> tuple[tuple[str, ...], str]:
    """The resources that an action is allowed on, and the name of its condition."""
    service = action.partition(":")[0]
    if action in _ANYWHERE or service in ("ec2", "pricing", "servicequotas"):
        return ("*",), ""
    if action == "iam:PassRole":
        return scope.passed, "passing"
    if action == "iam:CreateServiceLinkedRole":
        return ("*",), "linked"
    if action in ("ecs:DescribeTasks", "ecs:ListTasks"):
        return ("*",), ""  # other clusters' tasks too: they count towards the quota
    if action == "ecs:StopTask":
        return ("*",), "cluster"
    if action == "ecs:TagResource":
        return (scope.tagged,), ""
    if action in ("ecs:RunTask", "ecs:RegisterTaskDefinition"):
        return (scope.definitions,), ""
    if action in ("logs:ListTagsForResource", "logs:TagResource"):
        return (scope.log_group,), ""
    if "CapacityProvider" in action and "Cluster" not in action:
        return (scope.providers,), ""
    if "InstanceProfile" in action:
        return (scope.profiles,), ""
    by_service = {
        "autoscaling": scope.groups,
        "ssm": scope.images,
        "s3": scope.objects if action in _OBJECT_ACTIONS else scope.bucket,
        "ecs": scope.cluster,
        "iam": scope.roles,
        "kms": scope.kms_key or "",
        "logs": scope.logs,
        "cloudformation": scope.stack,
    }
    return (by_service[service],), ""


def _statement(
    actions: list[str], resources: tuple[str, ...], condition: str, scope: Scope
) -> dict[str, Any]:
    statement: dict[str, Any] = {
        "Effect": "Allow",
        "Action": actions,
        "Resource": resources[0] if len(resources) == 1 else list(resources),
    }
    conditions: Mapping[str, Any] = {
        "passing": {"StringEquals": {"iam:PassedToService": scope.services}},
        "linked": _LINKED,
        "cluster": {"ArnEquals": {"ecs:cluster": scope.cluster}},
    }
    if condition:
        statement["Condition"] = conditions[condition]
    return statement

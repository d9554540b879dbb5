"""Every string of the CloudFormation template, against what AWS takes where it goes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import botocore.session
import pytest
import yaml

from starburst_executor.aws.deployment.stack import template
from tests.support.cfn import Loader, rendered
from tests.support.recorder.call_constraints import faults

# Property -> where CloudFormation sends it: service and "Shape.member" of botocore's models.
# A policy is sent as one string.
GOES_TO = {
    "AWS::S3::Bucket": {
        "BucketName": "s3 CreateBucketRequest.Bucket",
        "Tags[].Key": "s3 Tag.Key",
        "Tags[].Value": "s3 Tag.Value",
        "OwnershipControls.Rules[].ObjectOwnership": "s3 OwnershipControlsRule.ObjectOwnership",
        "BucketEncryption.ServerSideEncryptionConfiguration[].ServerSideEncryptionByDefault"
        ".SSEAlgorithm": "s3 ServerSideEncryptionByDefault.SSEAlgorithm",
        "BucketEncryption.ServerSideEncryptionConfiguration[].ServerSideEncryptionByDefault"
        ".KMSMasterKeyID": "s3 ServerSideEncryptionByDefault.KMSMasterKeyID",
        "LifecycleConfiguration.Rules[].Id": "s3 LifecycleRule.ID",
        "LifecycleConfiguration.Rules[].Status": "s3 LifecycleRule.Status",
    },
    "AWS::S3::BucketPolicy": {
        "Bucket": "s3 PutBucketPolicyRequest.Bucket",
        "PolicyDocument": "s3 PutBucketPolicyRequest.Policy",
    },
    "AWS::ECS::Cluster": {
        "ClusterName": "ecs CreateClusterRequest.clusterName",
        "CapacityProviders[]": "ecs CapacityProviderStrategyItem.capacityProvider",
    },
    "AWS::Logs::LogGroup": {
        "LogGroupName": "logs CreateLogGroupRequest.logGroupName",
        "RetentionInDays": "logs PutRetentionPolicyRequest.retentionInDays",
    },
    "AWS::IAM::Role": {
        "Description": "iam CreateRoleRequest.Description",
        "AssumeRolePolicyDocument": "iam CreateRoleRequest.AssumeRolePolicyDocument",
        "ManagedPolicyArns[]": "iam AttachRolePolicyRequest.PolicyArn",
    },
    "AWS::IAM::Policy": {
        "PolicyName": "iam PutRolePolicyRequest.PolicyName",
        "Roles[]": "iam PutRolePolicyRequest.RoleName",
        "PolicyDocument": "iam PutRolePolicyRequest.PolicyDocument",
    },
    "AWS::IAM::InstanceProfile": {"Roles[]": "iam AddRoleToInstanceProfileRequest.RoleName"},
    "AWS::EC2::SecurityGroup": {
        "GroupDescription": "ec2 CreateSecurityGroupRequest.Description",
        "VpcId": "ec2 CreateSecurityGroupRequest.VpcId",
        "SecurityGroupEgress[].IpProtocol": "ec2 IpPermission.IpProtocol",
        "SecurityGroupEgress[].CidrIp": "ec2 IpRange.CidrIp",
        "SecurityGroupEgress[].CidrIpv6": "ec2 Ipv6Range.CidrIpv6",
        "SecurityGroupEgress[].Description": "ec2 IpRange.Description",
    },
    "AWS::EC2::VPCEndpoint": {
        "VpcEndpointType": "ec2 CreateVpcEndpointRequest.VpcEndpointType",
        "ServiceName": "ec2 CreateVpcEndpointRequest.ServiceName",
        "VpcId": "ec2 CreateVpcEndpointRequest.VpcId",
        "RouteTableIds[]": "ec2 DeleteRouteTableRequest.RouteTableId",
    },
}
POLICIES = ("PolicyDocument", "AssumeRolePolicyDocument")
INLINE_POLICIES = 10_240
"""All inline policies of a role, in characters without white space: docs.aws.amazon.com/IAM/latest/
UserGuide/reference_iam-quotas.html, "IAM and AWS STS character limits"."""

DOCUMENT: dict[str, Any] = yaml.load(template(), Loader)
LONGEST_STACK = "s" * 29  # as `setup` allows
ARN = "arn:aws-us-gov:iam::123456789012:role/a-role"
VALUES: dict[str, Any] = {
    "AWS::StackName": LONGEST_STACK,
    "AWS::Partition": "aws-us-gov",
    "AWS::Region": "us-gov-east-1",
    "AWS::URLSuffix": "amazonaws.com",
    "AWS::AccountId": "123456789012",
    "BucketName": f"{LONGEST_STACK}-123456789012-us-gov-east-1",
    "BucketOwner": "123456789012",
    "KeyPrefix": "some/where/",
    "KmsKeyArn": "arn:aws-us-gov:kms:us-gov-east-1:123456789012:key/0123-abc",
    "ClusterName": "c" * 255,
    "ExecutionRoleArn": ARN,
    "VpcId": "vpc-0123456789abcdef0",
    "EndpointRouteTableIds": "rtb-0123456789abcdef0,rtb-0123456789abcdef1",
    "LogRetentionDays": 30,
    "Cluster.Arn": "arn:aws-us-gov:ecs:us-gov-east-1:123456789012:cluster/c",
    **dict.fromkeys(DOCUMENT["Resources"], "a-resource"),
    **{f"{name}.Arn": ARN for name in ("TaskRole", "ExecutionRole")},
}


@functools.cache
def model(service: str) -> Any:
    return botocore.session.get_session().get_service_model(service)


def refused(value: Any, target: str) -> list[str]:
    service, name = target.split()
    shape, member = name.split(".")
    return list(faults(value, model(service).shape_for(shape).members[member], service, name=name))


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The strings and numbers of a resource's properties, by path; a policy is one string."""
    if path in POLICIES:
        yield path, json.dumps(node)
    elif isinstance(node, dict):
        for name, inner in node.items():
            yield from leaves(inner, f"{path}.{name}".lstrip("."))
    elif isinstance(node, list):
        for inner in node:
            yield from leaves(inner, f"{path}[]")
    elif not isinstance(node, bool):
        yield path, node


def properties(resource: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for then in (True, False):
        yield from leaves(rendered(resource["Properties"], VALUES, then=then))


@pytest.mark.parametrize("name", DOCUMENT["Resources"])
def test_aws_takes_every_string_of_a_resource(name: str) -> None:
    resource = DOCUMENT["Resources"][name]
    targets = GOES_TO[resource["Type"]]
    for path, value in properties(resource):
        if isinstance(value, str):
            assert path in targets, f"say in GOES_TO where {resource['Type']} {path} goes"
        if path in targets:
            assert refused(value, targets[path]) == []


def test_descriptions_of_the_template_are_not_too_long() -> None:
    assert refused(DOCUMENT["Description"], "cloudformation ParameterDeclaration.Description") == []
    for kind, target in (
        ("Parameters", "cloudformation ParameterDeclaration.Description"),
        ("Outputs", "cloudformation Output.Description"),
    ):
        for name, about in DOCUMENT[kind].items():
            assert name.isalnum()
            assert refused(about["Description"], target) == []
    assert refused(template(), "cloudformation CreateStackInput.TemplateBody") == []


def test_a_roles_policies_fit_into_a_role() -> None:
    resources = DOCUMENT["Resources"]
    sizes = [
        len(json.dumps(rendered(r["Properties"]["PolicyDocument"], VALUES, then=True)))
        for r in resources.values()
        if r["Type"] == "AWS::IAM::Policy"
    ]
    assert sum(sizes) < INLINE_POLICIES

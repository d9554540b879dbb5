"""What AWS takes: the check of every request and of every string in the template."""

from __future__ import annotations

import functools
import re
from typing import Any

import botocore.session
import pytest

from tests.support.recorder.call_constraints import compiled, documentation, faults, rules


@functools.cache
def model(service: str) -> Any:
    return botocore.session.get_session().get_service_model(service)


def refused(service: str, operation: str, **request: Any) -> list[str]:
    shape = model(service).operation_model(operation).input_shape
    return list(faults(request, shape, service))


MEMBERS = [(service, name) for service, members in rules().items() for name in members]


@pytest.mark.parametrize(("service", "name"), MEMBERS)
def test_a_rule_is_what_botocores_documentation_says(service: str, name: str) -> None:
    shape, member = name.split(".")
    said = documentation(model(service).shape_for(shape).members[member])
    source = rules()[service][name]["source"]
    assert _dense(source) in _dense(said)


def _dense(text: str) -> str:
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize(
    ("service", "operation", "request_", "says"),
    [
        ("ecs", "RunTask", {"startedBy": "a b"}, "startedBy: 'a b' does not match"),
        ("ecs", "RunTask", {"startedBy": "a" * 129}, "has 129, not 0 to 128"),
        ("ecs", "RunTask", {"clientToken": "ä"}, "clientToken"),
        ("ecs", "RunTask", {"tags": [{"key": "k", "value": "a,b"}]}, "tags[].value"),
        ("ecs", "RunTask", {"overrides": {"cpu": "1" * 8192}}, "overrides"),
        ("ecs", "RunTask", {"launchType": "CLOUD"}, "is none of EC2, FARGATE"),
        ("ecs", "ListTasks", {"family": "a" * 999}, ""),  # nothing is said of it there
        ("iam", "CreateRole", {"Description": "a\u2013b"}, "Description"),
        ("iam", "CreateRole", {"RoleName": "a" * 65}, "RoleName"),
        ("logs", "CreateLogGroup", {"logGroupName": "/it's"}, "logGroupName"),
        ("autoscaling", "CreateAutoScalingGroup", {"AutoScalingGroupName": "a:b"}, "Name"),
        ("sns", "CreateTopic", {"Name": "a.b"}, "lacks what is said of it"),
        ("logs", "CreateLogGroup", {"logGroupName": ""}, "has 0, not 1 to 512"),
        ("ec2", "CreateSecurityGroup", {"Description": "nobody's"}, "Description"),
        (
            "ec2",
            "AuthorizeSecurityGroupEgress",
            {"IpPermissions": [{"IpRanges": [{"Description": "the image's registry"}]}]},
            "IpPermissions[].IpRanges[].Description",
        ),
    ],
)
def test_what_aws_refuses_is_found_out(
    service: str, operation: str, request_: dict[str, Any], says: str
) -> None:
    found = refused(service, operation, **request_)
    assert says in "\n".join(found)
    assert bool(found) is bool(says)


def test_patterns_of_java_are_read_as_pythons() -> None:
    assert compiled(r"^([\p{L}\p{Z}\p{N}_.:/=+\-@]*)$").fullmatch("Größe 3/4")
    assert compiled(r"[\u0020-\uD7FF\uE000-\uFFFD\uD800\uDC00-\uDBFF\uDFFF\r\n\t]*").fullmatch("😀")

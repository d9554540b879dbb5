"""CloudFormation stacks: find, create, update and delete them, and wait, reporting their events."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from botocore.exceptions import ClientError

from starburst_executor.aws.account import Clients, asking
from starburst_executor.errors import AccountError
from starburst_executor.runtime import Runtime

__all__ = [
    "Say",
    "Stack",
    "delete_stack",
    "find_stack",
    "put_stack",
    "resource_of",
    "template",
]

_LOOK_SECONDS = 3.0
# ECS makes its service-linked role in an account with its first cluster, and cannot use it for some
# seconds: what fails with this text succeeds later.
_NO_ROLE_YET = re.compile(r"unable to assume the service.linked role", re.IGNORECASE)
_ROLE_TRIES = 4
_ROLE_SECONDS = 15.0
_TAGS = [{"Key": "starburst-executor", "Value": "setup"}]

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A stack as it is.

    Attributes:
        name: Its name.
        status: CloudFormation's status.
        parameters: Its parameters.
        outputs: Its outputs.
    """

    name: str
    status: str
    parameters: Mapping[str, str]
    outputs: Mapping[str, str]

    @property
    def is_debris(self) -> bool:
        """Whether its creation failed, so that it can only be deleted."""
        return self.status in ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED")


def template() -> str:
    """The CloudFormation template, in YAML."""
    return (files(__package__) / "template.yaml").read_text("utf-8")


def find_stack(clients: Clients, name: str) -> Stack | None:
    """The stack of that name; None if there is none.

    Raises:
        AccountError: it cannot be looked up.
    """
    with asking(f"looking for the stack {name}"):
        try:
            reply = clients.get("cloudformation").describe_stacks(StackName=name)
        except ClientError as error:
            if "does not exist" in str(error):
                return None
            raise
    found = reply["Stacks"][0]
    if found["StackStatus"] == "DELETE_COMPLETE":
        return None
    return Stack(
        name=name,
        status=found["StackStatus"],
        parameters={
            p["ParameterKey"]: p.get("ParameterValue", "") for p in found.get("Parameters", ())
        },
        outputs={o["OutputKey"]: o["OutputValue"] for o in found.get("Outputs", ())},
    )


def resource_of(clients: Clients, stack: str, logical: str) -> str | None:
    """The physical id of the stack's resource with that logical id; None if there is none.

    Raises:
        AccountError: it cannot be looked up.
    """
    with asking(f"looking at the stack {stack}"):
        try:
            reply = clients.get("cloudformation").describe_stack_resources(StackName=stack)
        except ClientError as error:
            if "does not exist" in str(error):
                return None
            raise
    for resource in reply["StackResources"]:
        if resource["LogicalResourceId"] == logical:
            name: str | None = resource.get("PhysicalResourceId")
            return name
    return None


def put_stack(
    clients: Clients,
    name: str,
    found: Stack | None,
    parameters: Mapping[str, str],
    runtime: Runtime,
    say: Say,
) -> Stack:
    """Create or update the stack, and wait until it is done.

    A creation that fails because ECS is new to the account is repeated.

    Args:
        clients: Clients for the region.
        name: Name of the stack.
        found: The existing stack; None if there is none.
        parameters: The template's parameters.
        runtime: For waiting.
        say: Called with a line per resource created or changed.

    Raises:
        AccountError: it failed; contains CloudFormation's reasons.
    """
    for _ in range(_ROLE_TRIES - 1):
        stack, failures = _put_once(clients, name, found, parameters, runtime, say)
        if not (stack and stack.is_debris and _NO_ROLE_YET.search(failures)):
            break
        say(f"ECS cannot use its service-linked role yet; once more in {_ROLE_SECONDS:.0f} s")
        runtime.signal().wait(_ROLE_SECONDS)
        found = stack
    else:
        stack, failures = _put_once(clients, name, found, parameters, runtime, say)
    if stack is None or stack.status not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        raise AccountError(
            f"the stack {name} could not be created or updated "
            f"({stack.status if stack else 'it is gone'}):\n{failures}"
        )
    return stack


def _put_once(
    clients: Clients,
    name: str,
    found: Stack | None,
    parameters: Mapping[str, str],
    runtime: Runtime,
    say: Say,
) -> tuple[Stack | None, str]:
    """Create or update the stack once; return how it ended, and CloudFormation's reasons."""
    if found and found.is_debris:
        say(f"removing what an earlier try left ({found.status})")
        delete_stack(clients, name, runtime, say)
    events = _Events(clients, name)
    if found is None or found.is_debris:
        _create(clients, name, parameters)
    else:
        events.skip()
        if not _update(clients, name, parameters):
            say("nothing to change")
    return _await(clients, name, runtime, say, events), events.failures()


def _create(clients: Clients, name: str, parameters: Mapping[str, str]) -> None:
    with asking(f"creating the stack {name}"):
        clients.get("cloudformation").create_stack(**_request(name, parameters))


def _update(clients: Clients, name: str, parameters: Mapping[str, str]) -> bool:
    """Update the stack; False if there is nothing to change."""
    with asking(f"updating the stack {name}"):
        try:
            clients.get("cloudformation").update_stack(**_request(name, parameters))
        except ClientError as error:
            if "No updates are to be performed" in str(error):
                return False
            raise
    return True


def _request(name: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    return {
        "StackName": name,
        "TemplateBody": template(),
        "Parameters": [
            {"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()
        ],
        "Capabilities": ["CAPABILITY_IAM"],
        "Tags": _TAGS,
    }


class _Events:
    """CloudFormation's events of a stack, each once."""

    def __init__(self, clients: Clients, stack: str) -> None:
        self._clients = clients
        self._stack = stack
        self._seen: set[str] = set()
        self._failures: list[str] = []

    def skip(self) -> None:
        """Skip the events so far."""
        self.new()
        self._failures.clear()

    def new(self) -> list[str]:
        """Lines for the steps completed since the last call, in order."""
        client = self._clients.get("cloudformation")
        lines: list[str] = []
        with asking(f"looking at the stack {self._stack}"):
            try:
                reply = client.describe_stack_events(StackName=self._stack)
            except ClientError as error:
                if "does not exist" in str(error):  # deleted
                    return []
                raise
        for event in reversed(reply["StackEvents"]):
            if event["EventId"] in self._seen:
                continue
            self._seen.add(event["EventId"])
            status = event["ResourceStatus"]
            reason = event.get("ResourceStatusReason", "")
            line = f"{event['LogicalResourceId']}: {status.lower().replace('_', ' ')}"
            if status.endswith("_FAILED"):
                self._failures.append(f"{event['LogicalResourceId']}: {reason}")
                line += f" ({reason})"
            if not status.endswith("_IN_PROGRESS"):
                lines.append(line)
        return lines

    def failures(self) -> str:
        """The failures, first one first; it mostly caused the others to be cancelled."""
        return "\n".join(self._failures) or "CloudFormation did not say why"


def _await(
    clients: Clients, name: str, runtime: Runtime, say: Say, events: _Events
) -> Stack | None:
    """Wait until the stack has settled, reporting events; return it, or None if it is gone."""
    pause = runtime.signal()
    while True:
        stack = find_stack(clients, name)
        for line in events.new():
            say(line)
        if stack is None or not stack.status.endswith("_IN_PROGRESS"):
            return stack
        pause.wait(_LOOK_SECONDS)


def delete_stack(clients: Clients, name: str, runtime: Runtime, say: Say) -> None:
    """Delete the stack, and wait until it is gone.

    Raises:
        AccountError: a part of it could not be deleted.
    """
    events = _Events(clients, name)
    events.skip()
    with asking(f"deleting the stack {name}"):
        clients.get("cloudformation").delete_stack(StackName=name)
    stack = _await(clients, name, runtime, say, events)
    if stack is not None:
        raise AccountError(
            f"the stack {name} could not be deleted ({stack.status}):\n{events.failures()}\n"
            "Remove what it names, then run teardown again."
        )

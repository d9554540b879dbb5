"""AWS as a script: real boto3 clients whose answers are written down beforehand."""

from __future__ import annotations

from typing import Any

import boto3
from botocore.stub import Stubber

from starburst_executor.aws.account import Clients


class Scripted:
    """Clients that answer as told, each call checked against boto3's description of the service."""

    def __init__(self) -> None:
        self._stubs: dict[str, Stubber] = {}
        self._made: dict[str, Any] = {}

    def make(self, service: str, *, region: str | None = None) -> Any:
        if service not in self._made:
            self._made[service] = boto3.client(
                service,  # type: ignore[call-overload]
                region_name=region or "eu-west-1",
                aws_access_key_id="a",
                aws_secret_access_key="b",
            )
            self._stubs[service] = Stubber(self._made[service])
            self._stubs[service].activate()
        return self._made[service]

    def answer(self, service: str, operation: str, reply: dict[str, Any], **request: Any) -> None:
        self.make(service)
        self._stubs[service].add_response(operation, reply, request or None)

    def refuse(
        self, service: str, operation: str, code: str, text: str = "", status: int = 400
    ) -> None:
        self.make(service)
        self._stubs[service].add_client_error(operation, code, text, status)

    def clients(self) -> Clients:
        return Clients("eu-west-1", self.make)

    def assert_used_up(self) -> None:
        for stub in self._stubs.values():
            stub.assert_no_pending_responses()

"""An ECS, with the rest of AWS that it needs beside it, whose tasks are local processes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from starburst_executor.config import Deployment
from tests.support.servers import S3Server, _free_ports, _process, _wait_until, _writes

_REGION = "us-east-1"
_ASSUMED_BY_ECS = json.dumps(
    {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"Service": "ecs-tasks.amazonaws.com"},
                "Action": "sts:AssumeRole",
            }
        ],
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EcsServer(S3Server):
    """A running server; it speaks S3 too. `control` is described in `tests/ecs_emulator.py`."""

    metadata_port: int

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        return {
            **S3Server.environment(self, endpoint),
            "AWS_ENDPOINT_URL_SERVICE_QUOTAS": f"http://127.0.0.1:{self.metadata_port}",
        }

    def quotas(self) -> Any:
        """A client of Service Quotas, which is not where the rest is."""
        return self.aws("service-quotas", f"http://127.0.0.1:{self.metadata_port}")

    def aws(self, service: str, endpoint: str | None = None) -> Any:
        """A client of any service of it, which asks once."""
        make: Any = _session().client
        return make(
            service,
            endpoint_url=endpoint or self.endpoint,
            region_name=_REGION,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(retries={"total_max_attempts": 1}),
        )

    def deploy(self) -> Deployment:
        """Make what `setup` would make, empty and of its own for a test."""
        name = f"test-{os.urandom(4).hex()}"
        with contextlib.closing(self.aws("ecs")) as client:
            client.create_cluster(clusterName=name, capacityProviders=["FARGATE", "FARGATE_SPOT"])
        with contextlib.closing(self.aws("logs")) as client:
            client.create_log_group(logGroupName=f"/starburst/{name}")
        with contextlib.closing(self.aws("iam")) as client:
            roles = [
                client.create_role(
                    RoleName=f"{name}-{kind}", AssumeRolePolicyDocument=_ASSUMED_BY_ECS
                )["Role"]["Arn"]
                for kind in ("execution", "task")
            ]
        return Deployment(
            region=_REGION,
            store=f"s3://{self.make_bucket()}/starburst",
            cluster=name,
            subnets=("subnet-1", "subnet-2"),
            security_groups=("sg-1",),
            assign_public_ip=True,
            execution_role_arn=roles[0],
            task_role_arn=roles[1],
            log_group=f"/starburst/{name}",
            image="registry.test/python:3",
            instance_profile_arn=f"arn:aws:iam::000000000000:instance-profile/{name}",
        )

    def set(self, **settings: Any) -> None:
        """Change the emulator's settings."""
        self.control(set=settings)

    def reset(self) -> None:
        """Make the emulator's settings what they are at its start."""
        self.control(reset=True)

    def tasks(self, cluster: str) -> list[dict[str, Any]]:
        """Every task that a cluster ever had, in the order they were started."""
        tasks: list[dict[str, Any]] = self.control()["tasks"]
        return [t for t in tasks if t["clusterArn"].endswith(f"/{cluster}")]

    def live(self, cluster: str) -> list[dict[str, Any]]:
        """The tasks of a cluster that are not stopped."""
        return [t for t in self.tasks(cluster) if t["lastStatus"] != "STOPPED"]

    def kill(self, *task_ids: str) -> None:
        """Kill the processes of tasks, without warning."""
        self.control(kill=task_ids)

    def reclaim(self, *task_ids: str) -> None:
        """Take back the capacity of tasks, as Spot does: SIGTERM, and two minutes."""
        self.control(reclaim=task_ids)

    def control(self, **request: Any) -> dict[str, Any]:
        reply: dict[str, Any] = json.loads(_post(self.endpoint, request))
        return reply


MEASURE = ("COVERAGE_PROCESS_START", "COVERAGE_FILE")


@contextlib.contextmanager
def ecs_server(folder: Path, *, new_to_ecs: bool = False) -> Iterator[EcsServer]:
    """A running server, whose account has had clusters before, unless it is `new_to_ecs`."""
    [port] = _free_ports(1)
    program = Path(__file__).with_name("ecs_emulator.py")
    command = [sys.executable, str(program), str(port), str(folder)]
    environment = {
        "LOG_LEVEL": "WARNING",
        "TMPDIR": str(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # For tasks, to note what they call: the recorder and nothing else of the tests.
        "PYTHONPATH": str(Path(__file__).parents[1] / "support" / "recorder"),
        "BOTOCORE_EXPERIMENTAL__PLUGINS": "calls=call_recorder",
        # Its tasks are measured, and the emulator is not.
        **{f"TASKS_{k}": v for k, v in os.environ.items() if k in MEASURE},
    }
    with _process(command, folder, environment) as running:
        plain = S3Server(
            name="ecs",
            endpoint=f"http://127.0.0.1:{port}",
            access_key="test",
            secret_key="test",
        )
        _wait_until(lambda: _writes(plain), running, folder)
        server = EcsServer(
            name="ecs",
            endpoint=plain.endpoint,
            access_key="test",
            secret_key="test",
            metadata_port=int((folder / "metadata-port").read_text()),
        )
        if not new_to_ecs:
            with contextlib.closing(server.aws("iam")) as client:
                client.create_service_linked_role(AWSServiceName="ecs.amazonaws.com")
        try:
            yield server
        finally:
            server.control(end=True)


@cache
def _session() -> boto3.Session:
    """One for all: it keeps the descriptions of services, which take long to read."""
    return boto3.Session()


def configure(deployment: Deployment) -> Mapping[str, str]:
    """The variables by which the package finds a deployment."""
    return {
        "STARBURST_STORE": deployment.store,
        "STARBURST_LAUNCHER": "ecs",
        "STARBURST_REGION": deployment.region,
        "STARBURST_CLUSTER": deployment.cluster,
        "STARBURST_SUBNETS": ",".join(deployment.subnets),
        "STARBURST_SECURITY_GROUPS": ",".join(deployment.security_groups),
        "STARBURST_EXECUTION_ROLE_ARN": deployment.execution_role_arn,
        "STARBURST_TASK_ROLE_ARN": deployment.task_role_arn,
        "STARBURST_INSTANCE_PROFILE_ARN": deployment.instance_profile_arn,
        "STARBURST_LOG_GROUP": deployment.log_group,
        "STARBURST_IMAGE": deployment.image,
    }


def _post(endpoint: str, request: Mapping[str, Any]) -> bytes:
    headers = {
        "X-Amz-Target": "AmazonEC2ContainerServiceV20141113.Control",
        "Content-Type": "application/x-amz-json-1.1",
        "Authorization": f"AWS4-HMAC-SHA256 Credential=test/20260101/{_REGION}/ecs/aws4_request",
    }
    message = urllib.request.Request(endpoint, json.dumps(request).encode(), headers, method="POST")
    with urllib.request.urlopen(message, timeout=60) as reply:
        data: bytes = reply.read()
        return data

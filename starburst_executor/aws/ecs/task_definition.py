"""The task definition of a session's workers: its content, and finding or registering it."""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, cast

from starburst_executor.aws.ecs.api import CONTAINER, STREAM_PREFIX, EcsApi
from starburst_executor.aws.ecs.container import entry_point, image
from starburst_executor.aws.ecs.placement import Placement
from starburst_executor.config import Deployment
from starburst_executor.protocol.worker_spec import WorkerSpec

if TYPE_CHECKING:
    from mypy_boto3_ecs.type_defs import RegisterTaskDefinitionRequestTypeDef

__all__ = ["STOP_TIMEOUT", "TaskDefinition"]

log = logging.getLogger(__name__)

STOP_TIMEOUT = 120  # seconds from SIGTERM to SIGKILL: Fargate's maximum

_ARCHITECTURE: Final = "X86_64"  # on Fargate, which does not derive it from the image
_PLATFORMS = {"X86_64": "linux-x86_64", "ARM64": "linux-aarch64"}


class TaskDefinition:
    """The task definition for workers of one kind.

    Args:
        api: The cluster.
        spec: What a worker should be.
        deployment: Roles, image and log group.
        placement: Fargate or instances.
        given: A definition to use as it is, as "family:revision"; by default a matching one,
            registered if there is none.
    """

    def __init__(
        self,
        api: EcsApi,
        spec: WorkerSpec,
        deployment: Deployment,
        placement: Placement,
        given: str | None,
    ) -> None:
        self._api = api
        self._spec = spec
        self._deployment = deployment
        self._placement = placement
        self._given = self._arn = given

    @property
    def family(self) -> str:
        """The family of these workers."""
        given = (self._given or "").partition(":")[0]
        return given or self.request["family"]

    @property
    def platform(self) -> str:
        """The workers' platform: Linux on the definition's architecture."""
        request = cast(Any, self.request)
        return _PLATFORMS[request["runtimePlatform"]["cpuArchitecture"]]

    def arn(self) -> str:
        """The definition's ARN, found or else registered, and cached.

        Raises:
            RequestRefused: ECS refuses to find or register it.
        """
        if self._arn is None:
            self._arn = self._api.find_definition(self.request["family"]) or self._register()
        return self._arn

    def forget(self) -> None:
        """Drop the cached ARN: the definition may have been deregistered."""
        self._arn = self._given

    def _register(self) -> str:
        arn = self._api.register_definition(self.request)
        log.info("registered task definition %s", arn)
        return arn

    @cached_property
    def request(self) -> RegisterTaskDefinitionRequestTypeDef:
        """What to register. Its family is a hash of its content, so that equals are shared."""
        size = self._placement.size
        request: RegisterTaskDefinitionRequestTypeDef = {
            "family": "",
            "requiresCompatibilities": ["FARGATE"],
            "networkMode": "awsvpc",
            "cpu": str(size.cpu),
            "memory": str(size.memory),
            "runtimePlatform": {
                "cpuArchitecture": _ARCHITECTURE,
                "operatingSystemFamily": "LINUX",
            },
            "executionRoleArn": self._deployment.execution_role_arn,
            "taskRoleArn": self._deployment.task_role_arn,
            "containerDefinitions": [self._container()],
            "tags": [{"key": "starburst-executor", "value": "worker"}],
        }
        request = cast(Any, self._placement.define(cast(Any, request)))
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode())
        return {**request, "family": f"starburst-{digest.hexdigest()[:16]}"}

    def _container(self) -> Any:
        return {
            "name": CONTAINER,
            "image": image(self._spec, self._deployment),
            "essential": True,
            "entryPoint": entry_point(self._spec),
            "stopTimeout": STOP_TIMEOUT,
            # An init process that forwards SIGTERM even before the worker handles it.
            "linuxParameters": {"initProcessEnabled": True},
            "logConfiguration": {
                "logDriver": "awslogs",
                "options": {
                    "awslogs-group": self._deployment.log_group,
                    "awslogs-region": self._deployment.region,
                    "awslogs-stream-prefix": STREAM_PREFIX,
                    "mode": "non-blocking",  # a stalled log must not stall a worker
                },
            },
        }

"""The task definition of a session's workers: what it says, and finding or registering it."""

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

STOP_TIMEOUT = 120  # seconds from SIGTERM to SIGKILL: the most that Fargate gives

_ARCHITECTURE: Final = "X86_64"  # on Fargate, which does not ask the image
_PLATFORMS = {"X86_64": "linux-x86_64", "ARM64": "linux-aarch64"}


class TaskDefinition:
    """The task definition for workers of one kind.

    Args:
        api: The cluster.
        spec: What a worker shall be.
        deployment: Roles, image and log group.
        placement: Fargate or instances.
        given: One to use as it is, as "family:revision"; default one that says just what is wanted,
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
        """The family that workers of this kind are of."""
        given = (self._given or "").partition(":")[0]
        return given or self.request["family"]

    @property
    def platform(self) -> str:
        """What workers' binaries are built for: Linux on the definition's architecture."""
        request = cast(Any, self.request)
        return _PLATFORMS[request["runtimePlatform"]["cpuArchitecture"]]

    def arn(self) -> str:
        """The definition's ARN: found, or else registered; remembered.

        Raises:
            RequestRefused: ECS does not let it be found or registered.
        """
        if self._arn is None:
            self._arn = self._api.find_definition(self.request["family"]) or self._register()
        return self._arn

    def forget(self) -> None:
        """Find it anew: somebody may have deregistered it."""
        self._arn = self._given

    def _register(self) -> str:
        arn = self._api.register_definition(self.request)
        log.info("registered task definition %s", arn)
        return arn

    @cached_property
    def request(self) -> RegisterTaskDefinitionRequestTypeDef:
        """What to register. Its family is named after all that it says, so that equals are shared."""
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
            # A first process that passes SIGTERM on also before the worker listens for it.
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

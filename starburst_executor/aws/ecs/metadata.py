"""What a worker can ask the machine it was put on: who it is, and of what kind."""

from __future__ import annotations

import json
import os
import urllib.request

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from starburst_executor.errors import StarburstError

__all__ = ["ECS_TASK", "definition_of_task", "worker_id_of_task"]

ECS_TASK = "@ecs-task"
"""Given for a worker's id: take that of the ECS task it runs in, of which one call starts several."""

_ENDPOINT = "ECS_CONTAINER_METADATA_URI_V4"
_TIMEOUT = 2.0  # seconds; the agent is on the same machine
_TRIES = 5  # a second apart: it may come up after the container


def worker_id_of_task() -> str:
    """The id of the worker that is the main process of this ECS task: "w-" and the task's own id.

    Raises:
        StarburstError: this is no ECS task, or its agent does not answer.
    """
    arn = _of_task("TaskARN")["TaskARN"]
    return f"w-{arn.rpartition('/')[2]}"


def definition_of_task() -> str:
    """The task definition of this ECS task, as "family:revision".

    Raises:
        StarburstError: this is no ECS task, or its agent does not answer.
    """
    task = _of_task("Family", "Revision")
    return f"{task['Family']}:{task['Revision']}"


def _of_task(*fields: str) -> dict[str, str]:
    """What the agent tells of this ECS task."""
    endpoint = os.environ.get(_ENDPOINT)
    if not endpoint:
        raise StarburstError(
            f"--id {ECS_TASK} is for workers in an ECS task, and {_ENDPOINT} is not set here; leave --id out"
        )
    retrying = Retrying(
        retry=retry_if_exception_type((OSError, ValueError, KeyError)),
        stop=stop_after_attempt(_TRIES),
        wait=wait_fixed(1),
        reraise=True,
    )
    try:
        return retrying(_ask, endpoint, fields)
    except (OSError, ValueError, KeyError) as error:
        raise StarburstError(
            f"the metadata of this ECS task at {endpoint} cannot be read: {error}"
        ) from error


def _ask(endpoint: str, fields: tuple[str, ...]) -> dict[str, str]:
    # Not through a proxy: the address is the agent's, on this machine alone.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{endpoint}/task", timeout=_TIMEOUT) as reply:
        task = json.load(reply)
    return {field: task[field] for field in fields}

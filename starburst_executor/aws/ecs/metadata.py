"""A worker's identity and task definition, from ECS task metadata."""

from __future__ import annotations

import json
import os
import urllib.request

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from starburst_executor.errors import StarburstError

__all__ = ["ECS_TASK", "definition_of_task", "worker_id_of_task"]

ECS_TASK = "@ecs-task"
"""Worker id that means "use the ECS task's", since one call starts several tasks."""

_ENDPOINT = "ECS_CONTAINER_METADATA_URI_V4"
_TIMEOUT = 2.0  # seconds; the agent is on the same machine
_TRIES = 5  # a second apart: the agent may come up after the container


def worker_id_of_task() -> str:
    """The id of the worker in this ECS task: "w-" and the task's own id.

    Raises:
        StarburstError: this is not an ECS task, or its agent does not answer.
    """
    arn = _of_task("TaskARN")["TaskARN"]
    return f"w-{arn.rpartition('/')[2]}"


def definition_of_task() -> str:
    """The task definition of this ECS task, as "family:revision".

    Raises:
        StarburstError: this is not an ECS task, or its agent does not answer.
    """
    task = _of_task("Family", "Revision")
    return f"{task['Family']}:{task['Revision']}"


def _of_task(*fields: str) -> dict[str, str]:
    """Fields of this ECS task, from the agent."""
    endpoint = os.environ.get(_ENDPOINT)
    if not endpoint:
        raise StarburstError(
            f"--id {ECS_TASK} is for workers in an ECS task, but {_ENDPOINT} is not set here; omit "
            "--id"
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
    # Not through a proxy: the agent's address is local to this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{endpoint}/task", timeout=_TIMEOUT) as reply:
        task = json.load(reply)
    return {field: task[field] for field in fields}

"""Output of workers on ECS, from CloudWatch Logs: all there is of one that never sent a heartbeat.

    stream   starburst/worker/<task id>: created by ECS when the container prints its first line
    page     up to 10,000 events or 1 MB, and possibly empty in the middle of a log. At the
             end, the returned token is the one that was sent; later output follows that token

Lines arrive some seconds after they were printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from botocore.exceptions import ClientError

from starburst_executor.aws.account import Clients, asking
from starburst_executor.aws.ecs.api import CONTAINER, STREAM_PREFIX
from starburst_executor.errors import AccountError

__all__ = ["WorkerLogs", "stream_of"]

_WORKER = re.compile(r"w-([0-9a-f]{32})")


def stream_of(worker_id: str) -> str:
    """The name of a worker's log stream.

    Raises:
        ValueError: the worker is not an ECS task.
    """
    match = _WORKER.fullmatch(worker_id)
    if match is None:
        raise ValueError(
            f"worker {worker_id} is not an ECS task, so CloudWatch has no log of it; "
            "its output is where it was started"
        )
    return f"{STREAM_PREFIX}/{CONTAINER}/{match[1]}"


class WorkerLogs:
    """Reads the logs of workers, each from where the last call stopped.

    Args:
        clients: Clients for the region. They retry throttled requests.
        group: The log group.
    """

    def __init__(self, clients: Clients, group: str) -> None:
        self._clients = clients
        self._group = group
        self._tokens: dict[str, str] = {}

    def more(self, worker_id: str) -> Iterator[str]:
        """Lines that a worker printed since the last call, or all of them at first.

        Raises:
            ValueError: see `stream_of`.
            AccountError: the log group does not exist, or AWS refused or did not answer.
        """
        stream = stream_of(worker_id)
        while (page := self._page(stream)) is not None:
            for event in page["events"]:
                yield event["message"].rstrip("\n")
            after = page["nextForwardToken"]
            if after == self._tokens.get(stream):
                return
            self._tokens[stream] = after

    def _page(self, stream: str) -> Any:
        """The next page; None if the stream does not exist, or not yet."""
        token = self._tokens.get(stream)
        with asking(f"reading the log {stream} in {self._group}"):
            try:
                return self._clients.get("logs").get_log_events(
                    logGroupName=self._group,
                    logStreamName=stream,
                    startFromHead=True,
                    **({"nextToken": token} if token else {}),
                )
            except ClientError as error:
                if error.response["Error"].get("Code") != "ResourceNotFoundException":
                    raise
                if "log group" not in str(error):
                    return None
                raise AccountError(
                    f"the log group {self._group} does not exist in {self._clients.region}: "
                    "`starburst-executor setup` creates it; STARBURST_LOG_GROUP or the "
                    "configuration file names it"
                ) from error

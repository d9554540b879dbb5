"""EC2's two-minute notice that it will reclaim a Spot instance, polled by the workers on it.

ECS drains such an instance, which leaves tasks alone that belong to no service: without polling, a
worker would first notice by losing its machine.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

__all__ = ["SpotNotice"]

log = logging.getLogger(__name__)

_ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # the name used by AWS's own libraries
_DEFAULT_ENDPOINT = "http://169.254.169.254"
_LOOK_SECONDS = 5.0  # as the EC2 guide recommends
_TIMEOUT = 2.0  # seconds; the endpoint is on the same machine
_TOKEN_SECONDS = 21600  # the maximum lifetime of a token


class SpotNotice:
    """Polls for the notice every five seconds, in a thread.

    Args:
        act: Called once, with the notice, when it appears.
    """

    def __init__(self, act: Callable[[str], None]) -> None:
        self._act = act
        self._endpoint = os.environ.get(_ENDPOINT) or _DEFAULT_ENDPOINT
        self._token = ""
        self._silent = False  # the missing answer was logged
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="starburst-spot-notice", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop polling."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            notice = self._look()
            if notice:
                self._act(f"EC2 reclaims its Spot instance ({notice})")
                return
            if self._closed.wait(_LOOK_SECONDS):
                return

    def _look(self) -> str:
        """The notice; "" if there is none, or no answer."""
        try:
            notice = self._ask()
        except Exception as error:  # whatever it is, the next poll may succeed
            if not self._silent:
                log.warning(
                    "the Spot notice at %s cannot be read, so tasks may be lost and retried when "
                    "the instance is reclaimed: %s",
                    self._endpoint,
                    error,
                )
            self._silent = True
            return ""
        self._silent = False
        return notice

    def _ask(self) -> str:
        try:
            body = self._request("GET", "/latest/meta-data/spot/instance-action")
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 401:
                    self._token = ""  # it has expired
                elif error.code != 404:
                    raise
            return ""
        about = json.loads(body)
        return f"{about.get('action', 'terminate')} at {about.get('time', 'any time')}"

    def _request(self, method: str, path: str) -> bytes:
        if not self._token:
            lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
            self._token = self._open("PUT", "/latest/api/token", lifetime).decode()
        return self._open(method, path, {"X-aws-ec2-metadata-token": self._token})

    def _open(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        # Not through a proxy: the address is local to this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(
            self._endpoint.rstrip("/") + path, headers=dict(headers), method=method
        )
        with opener.open(request, timeout=_TIMEOUT) as reply:
            body: bytes = reply.read()
        return body

"""The metadata of an EC2 instance, as far as a Spot notice goes: version 2, with tokens."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator

PATH = "/latest/meta-data/spot/instance-action"


class MetadataServer(http.server.ThreadingHTTPServer):
    """Says what EC2 says: 404 until the instance is taken back. `notices` are given once each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.notices: list[dict[str, str]] = []
        self.tokens: set[str] = set()
        self.looks = 0
        self.looked = threading.Event()  # so that a test can wait for one
        self.failing = False

    def take_back(self) -> None:
        """Give the notice to whoever looks next."""
        self.notices.append({"action": "terminate", "time": "2026-01-02T03:04:05Z"})


class _Handler(http.server.BaseHTTPRequestHandler):
    server: MetadataServer

    def do_PUT(self) -> None:
        lifetime = self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        if self.path != "/latest/api/token" or not 1 <= int(lifetime) <= 21600:
            self._answer(400)
            return
        token = f"token-{len(self.server.tokens)}"
        self.server.tokens.add(token)
        self._answer(200, token.encode())

    def do_GET(self) -> None:
        self.server.looks += 1
        self.server.looked.set()
        if self.server.failing:
            self._answer(500)
        elif self.headers["X-aws-ec2-metadata-token"] not in self.server.tokens:
            self._answer(401)
        elif self.path != PATH or not self.server.notices:
            self._answer(404)
        else:
            self._answer(200, json.dumps(self.server.notices.pop()).encode())

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    with MetadataServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()

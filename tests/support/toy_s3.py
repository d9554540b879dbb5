"""A server that speaks as little of S3 as a test wants, and gets wrong what it wants wrong."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

__all__ = ["DATE", "Toy", "listening", "serving"]

DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


class Toy(http.server.BaseHTTPRequestHandler):
    """A server of one reply; subclasses misbehave in one way each."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[tuple[str, Mapping[str, str]]]]
    objects: ClassVar[dict[str, bytes]]

    def reply(self, status: int, data: bytes = b"", promised: int | None = None) -> None:
        self.send_response(status)
        self.send_header("ETag", '"etag"')
        self.send_header("Last-Modified", DATE)
        self.send_header("Content-Length", str(promised or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def answer(self, body: bytes) -> None:
        self.reply(200)

    def do_PUT(self) -> None:
        self.seen.append((self.command, dict(self.headers)))
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_GET = do_POST = do_HEAD = do_DELETE = do_PUT

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextlib.contextmanager
def serving(kind: type[Toy]) -> Iterator[str]:
    """Run a toy server on this machine; yields its endpoint."""
    kind.seen, kind.objects = [], {}
    with listening(kind) as endpoint:
        yield endpoint


@contextlib.contextmanager
def listening(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a server on this machine whose requests a class handles; yields its endpoint."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""A proxy before an S3 server that gives some requests a faulty reply.

    with fault_proxy(server) as proxy:
        proxy.plan = everything(Fault.UNAVAILABLE)
        s3_env(server, proxy.endpoint)

A plan looks at a request and names the fault, or None. It may be replaced at any time. With one
proxy for clients and one for workers, each side has faults of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import http.server
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import StrEnum
from typing import Any, ClassVar

from tests.support.s3_requests import S3Request
from tests.support.servers import S3Server
from tests.support.toy_s3 import listening

__all__ = [
    "Fault",
    "FaultProxy",
    "FirstOfEach",
    "Plan",
    "Share",
    "everything",
    "fault_proxy",
    "matching",
    "nothing",
]


class Fault(StrEnum):
    """What is wrong with a reply."""

    UNAVAILABLE = "503"
    DENIED = "403 AccessDenied"
    EXPIRED = "400 ExpiredToken"
    SKEWED = "403 RequestTimeTooSkewed"
    PAGE = "a page with status 200"
    CUT = "a reply that breaks off"
    LOST = "no reply, after the effect"
    DATELESS = "a reply without a date"
    WORDLESS = "an error with an empty message"


_REFUSALS = {
    Fault.UNAVAILABLE: (503, "SlowDown", "<Message>Please reduce your request rate.</Message>"),
    Fault.DENIED: (403, "AccessDenied", "<Message>Access Denied</Message>"),
    Fault.EXPIRED: (400, "ExpiredToken", "<Message>The provided token has expired.</Message>"),
    Fault.SKEWED: (403, "RequestTimeTooSkewed", "<Message>The time differs too much.</Message>"),
    Fault.WORDLESS: (503, "ServiceUnavailable", "<Message/>"),
}
_PAGE = b"<!doctype html><html><body><br>Please log in</body></html>"
_OF_ONE_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}

Plan = Callable[[S3Request], Fault | None]
Header = tuple[str, str]


def nothing(request: S3Request) -> Fault | None:
    """No faults."""
    return None


def everything(fault: Fault) -> Plan:
    """The same fault for every request."""
    return lambda request: fault


def matching(fault: Fault, under: str = "", operations: Collection[str] = ()) -> Plan:
    """A fault for what lies under a prefix of the session, perhaps for some operations only."""

    def plan(request: S3Request) -> Fault | None:
        asked = not operations or request.operation in operations
        return fault if asked and request.name.startswith(under) else None

    return plan


class FirstOfEach:
    """Faults for the first requests of each operation on each kind of object, in this order."""

    def __init__(self, *faults: Fault) -> None:
        self._faults = faults
        self._seen: Counter[tuple[str, str]] = Counter()

    def __call__(self, request: S3Request) -> Fault | None:
        what = (request.operation, request.kind)
        self._seen[what] += 1
        early = self._seen[what] <= len(self._faults)
        return self._faults[self._seen[what] - 1] if early else None


class Share:
    """One of some faults for a share of the requests.

    Which, follows from the seed, the request, and how often the same was asked before.
    """

    def __init__(self, share: float, faults: Sequence[Fault], seed: int) -> None:
        self._share = share
        self._faults = faults
        self._seed = seed
        self._asked: Counter[S3Request] = Counter()

    def __call__(self, request: S3Request) -> Fault | None:
        self._asked[request] += 1
        text = f"{self._seed} {request} {self._asked[request]}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
        drawn, which = number / 2**64, number % len(self._faults)
        return self._faults[which] if drawn < self._share else None


class FaultProxy:
    """A running proxy.

    Attributes:
        plan: Which requests get which fault.
        seen: Requests so far, by operation and kind of object.
        faulty: Those that got a fault, by fault, operation and kind.
    """

    def __init__(self, server: S3Server) -> None:
        self._server = server
        self._lock = threading.Lock()
        self.endpoint = ""
        self.plan: Plan = nothing
        self.seen: Counter[tuple[str, str]] = Counter()
        self.faulty: Counter[tuple[Fault, str, str]] = Counter()

    def fault(self, request: S3Request) -> Fault | None:
        """Decide about a request, and count it."""
        what = (request.operation, request.kind)
        with self._lock:
            fault = self.plan(request)
            self.seen[what] += 1
            if fault is not None:
                self.faulty[fault, *what] += 1
        return fault

    def ask(
        self, method: str, target: str, headers: Sequence[Header], body: bytes
    ) -> tuple[int, list[Header], bytes]:
        """The server's own answer."""
        upstream = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=60)
        with contextlib.closing(upstream):
            upstream.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                upstream.putheader(name, value)
            upstream.endheaders(body)
            reply = upstream.getresponse()
            kept = [(k, v) for k, v in reply.getheaders() if k.lower() not in _OF_ONE_HOP]
            data = reply.read()
            length = reply.getheader("Content-Length") if method == "HEAD" else None
            return reply.status, [*kept, ("Content-Length", length or str(len(data)))], data


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: ClassVar[FaultProxy]

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.fault(S3Request.parse(self.command, self.path, body))
        if fault in _REFUSALS:
            self._refuse(*_REFUSALS[fault])
        elif fault is Fault.PAGE:
            self._send(200, [("Content-Type", "text/html")], _PAGE)
        else:
            self._pass_on(body, fault)

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    def _pass_on(self, body: bytes, fault: Fault | None) -> None:
        headers = [(k, v) for k, v in self.headers.items() if k.lower() != "expect"]
        try:
            status, kept, data = self.proxy.ask(self.command, self.path, headers, body)
        except (OSError, http.client.HTTPException):  # as it is without a proxy
            self.close_connection = True
            return
        if fault is Fault.LOST:
            self.close_connection = True
        elif fault is Fault.CUT:
            head = self._head(status, kept)
            # One that breaks off between two headers looks whole to Python.
            self.wfile.write(head + data[: len(data) // 2] if data else head[:5])
            self.close_connection = True
        elif fault is Fault.DATELESS:
            self.wfile.write(self._head(status, [h for h in kept if h[0].lower() != "date"]) + data)
        else:
            self.wfile.write(self._head(status, kept) + data)

    def _refuse(self, status: int, code: str, message: str) -> None:
        text = f'<?xml version="1.0"?><Error><Code>{code}</Code>{message}</Error>'
        self._send(status, [("Content-Type", "application/xml")], text.encode())

    def _send(self, status: int, headers: Sequence[Header], data: bytes) -> None:
        length = ("Content-Length", str(len(data)))
        head = self._head(status, [("Date", self.date_time_string()), *headers, length])
        self.wfile.write(head + (b"" if self.command == "HEAD" else data))

    def _head(self, status: int, headers: Sequence[Header]) -> bytes:
        lines = [f"HTTP/1.1 {status} -", *(f"{name}: {value}" for name, value in headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def fault_proxy(server: S3Server) -> Iterator[FaultProxy]:
    """A proxy before a server, without faults until it has a plan."""
    proxy = FaultProxy(server)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    with listening(handler) as proxy.endpoint:
        yield proxy

"""A TCP proxy that holds every reply back for some time, and counts requests.

    python -m tests.support.latency_proxy LISTEN_PORT TARGET_PORT MILLISECONDS

Bytes towards the server pass at once; bytes from it are each held for MILLISECONDS, in order
and without a limit on their rate. So a request takes that much longer, and one that waits for
`100 Continue` first takes it twice. LISTEN_PORT 0 takes a free port. Prints one line of JSON at
the start (`{"port": ..}`), and one of counts, which begin anew, at each SIGUSR1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections import Counter

from tests.support.s3_requests import operation_of

_HOST = "127.0.0.1"
_CHUNK = 1 << 16


class RequestCounter:
    """Finds the requests in what one client sends, and counts them by what they ask for."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._head = b""
        self._body = 0  # bytes of the present body still to come

    def feed(self, data: bytes) -> None:
        while data:
            if self._body:
                skipped = min(self._body, len(data))
                self._body -= skipped
                data = data[skipped:]
                continue
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self._head[:end], self._head[end + 4 :]
            self._head = b""
            self._request(head.decode("latin-1"))

    def _request(self, head: str) -> None:
        request, *headers = head.split("\r\n")
        method, target, _ = request.split(" ")
        self._counts["requests"] += 1
        self._counts[operation_of(method, target)] += 1
        for header in headers:
            name, _, value = header.partition(":")
            if name.lower() == "content-length":
                self._body = int(value)


class Proxy:
    def __init__(self, target: int, seconds: float) -> None:
        self._target = target
        self._seconds = seconds
        self.counts: Counter[str] = Counter()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts["connections"] += 1
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        with contextlib.suppress(ConnectionError):
            replies, requests = await asyncio.open_connection(_HOST, self._target)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._forward(reader, requests))
                tasks.create_task(self._hold(replies, held))
                tasks.create_task(self._release(held, writer))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        counter = RequestCounter(self.counts)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_CHUNK):
                counter.feed(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _hold(
        self, reader: asyncio.StreamReader, held: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        clock = asyncio.get_running_loop()
        data = b"-"
        while data:
            try:
                data = await reader.read(_CHUNK)
            except ConnectionError:
                data = b""
            await held.put((clock.time() + self._seconds, data))

    async def _release(
        self, held: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        clock = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while True:
                due, data = await held.get()
                await asyncio.sleep(due - clock.time())
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        writer.close()

    def report(self) -> None:
        print(json.dumps(self.counts), flush=True)  # noqa: T201  read by the tests
        self.counts.clear()


async def serve(listen: int, target: int, milliseconds: float) -> None:
    proxy = Proxy(target, milliseconds / 1000)
    server = await asyncio.start_server(proxy.connect, _HOST, listen)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, proxy.report)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)  # noqa: T201
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))

"""S3 servers, and a proxy that makes them as slow as a network, on free ports of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_HOST = "127.0.0.1"
_START_TIMEOUT = 60.0  # seconds
_REGION = "us-east-1"
_SHARED_BUCKET = "shared"
_BIN = Path(sys.executable).parent
_ROOT = Path(__file__).parents[2]

running: set[int] = set()
"""Process ids of what runs: shared by many tests, so not leaked by the one that started it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A running server that speaks S3."""

    name: str
    endpoint: str
    access_key: str
    secret_key: str

    @property
    def port(self) -> int:
        port = urlsplit(self.endpoint).port
        assert port is not None
        return port

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """What to set so that AWS clients use this server, perhaps through a proxy's endpoint."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": _REGION,
        }

    def client(self) -> S3Client:
        import boto3
        from botocore.config import Config

        return boto3.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=_REGION,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(retries={"total_max_attempts": 1}),
        )

    def make_bucket(self) -> str:
        """Make an empty bucket of its own for a test; returns its name."""
        name = f"bucket-{os.urandom(6).hex()}"
        client = self.client()
        client.create_bucket(Bucket=name)
        client.close()
        return name

    def fresh_url(self) -> str:
        """The URL of an empty store; quicker to have than a bucket of its own."""
        return f"s3://{_SHARED_BUCKET}/some/{os.urandom(6).hex()}"


@contextlib.contextmanager
def ministack(folder: Path) -> Iterator[S3Server]:
    [port] = _free_ports(1)
    environment = {
        "GATEWAY_PORT": str(port),
        "BIND_HOST": _HOST,
        "LOG_LEVEL": "WARNING",
        "TMPDIR": str(folder),  # it writes a file with its process id
    }
    server = S3Server(
        name="ministack",
        endpoint=f"http://{_HOST}:{port}",
        access_key="test",
        secret_key="test",
    )
    with _process([str(_BIN / "ministack")], folder, environment) as process:
        _wait_until(lambda: _writes(server), process, folder)
        yield server


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[S3Server]:
    master, volume, filer, s3, grpc = _free_ports(5)
    server = S3Server(
        name="seaweedfs",
        endpoint=f"http://{_HOST}:{s3}",
        access_key="AKTEST",
        secret_key="sktest",
    )
    (folder / "data").mkdir()
    (folder / "s3.json").write_text(json.dumps(_seaweedfs_identities(server)))
    (folder / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
    command = [
        *(str(_BIN / "weed"), "server", "-dir=data", f"-ip={_HOST}"),
        *(f"-ip.bind={_HOST}", f"-master.port={master}", f"-volume.port={volume}"),
        *("-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}"),
        *(f"-s3.port.grpc={grpc}", "-s3.config=s3.json", "-master.telemetry=false"),
        # Others' servers on this machine would want the same ports for these.
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),
        # Each bucket takes a volume of its own.
        *("-volume.max=2000", "-master.volumeSizeLimitMB=1024"),
        "-volume.preStopSeconds=0",
    ]
    with _process(command, folder, {"WEED_S3_SSE_KEY": "any passphrase"}) as process:
        _wait_until(lambda: _writes(server), process, folder)
        yield server


class LatencyProxy:
    """A running proxy; `counts` tells what went through it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._process = process
        self._lines: IO[bytes] = process.stdout
        self.endpoint = f"http://{_HOST}:{self._line()['port']}"

    def counts(self) -> dict[str, int]:
        """Requests by operation since the last call: `requests`, `GET`, `PUT`, `LIST`, ..."""
        self._process.send_signal(signal.SIGUSR1)
        return self._line()

    def _line(self) -> dict[str, int]:
        line: dict[str, int] = json.loads(self._lines.readline())
        return line


@contextlib.contextmanager
def latency_proxy(server: S3Server, milliseconds: float) -> Iterator[LatencyProxy]:
    """A proxy before a server that makes each reply `milliseconds` later."""
    module = f"{__package__}.latency_proxy"
    command = [sys.executable, "-m", module, "0", str(server.port), str(milliseconds)]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, env=unmeasured()) as process:
        try:
            yield LatencyProxy(process)
        finally:
            process.terminate()


def unmeasured() -> dict[str, str]:
    """This environment, for a program in which coverage would cost time and find nothing."""
    return {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}


@contextlib.contextmanager
def _process(
    command: list[str], folder: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**unmeasured(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the tests, which then stop it
        )
    running.add(process.pid)
    try:
        yield process
    finally:
        process.kill()  # there is nothing to keep, and asking takes one of them 10 s
        process.wait()
        running.discard(process.pid)


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    pause = threading.Event()
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            log = (folder / "log").read_text(errors="replace")[-4000:]
            raise RuntimeError(
                f"{process.args!r} did not start (exit code {process.poll()}):\n{log}"
            )
        pause.wait(0.05)


def _writes(server: S3Server) -> bool:
    """Whether the server takes an object: some open their port long before they do."""
    from botocore.exceptions import BotoCoreError, ClientError

    with contextlib.suppress(OSError), socket.create_connection((_HOST, server.port)):
        client = server.client()
        try:
            with contextlib.suppress(ClientError):  # made by an earlier try
                client.create_bucket(Bucket=_SHARED_BUCKET)
            client.put_object(Bucket=_SHARED_BUCKET, Key="ready", Body=b"ready")
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        return True
    return False


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and of which the ports 10,000 higher (seaweedfs takes those too) are."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 30_000)
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
        return True


def _seaweedfs_identities(server: S3Server) -> dict[str, object]:
    keys = {"accessKey": server.access_key, "secretKey": server.secret_key}
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    return {"identities": [{"name": "t", "credentials": [keys], "actions": actions}]}

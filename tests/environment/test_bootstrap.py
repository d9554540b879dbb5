"""The file that a stock Python is given.

It brings a worker's environment here, from a store or by installing it.
"""

from __future__ import annotations

import datetime
import http.server
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from starburst_executor.aws.ecs.container import entry_point
from starburst_executor.environment import bootstrap
from starburst_executor.environment.capture import Prepared
from starburst_executor.environment.lock import Lock
from starburst_executor.environment.repository import ship
from starburst_executor.launchers.base import open_launcher
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.storage.base import Store
from starburst_executor.storage.url import open_store
from tests.support.servers import S3Server
from tests.support.sessions import is_alive, keys
from tests.support.tasks import until

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

PROVIDE = """
import runpy, sys
file, digest, url = sys.argv[1:4]
names = runpy.run_path(file)
try:
    print(names["provide"](digest, names["open_source"](url, digest), url))
except names["Failure"] as failure:
    sys.exit(str(failure))
"""


def lock(**changes: Any) -> Lock:
    """One that takes a single small wheel to install."""
    said: dict[str, Any] = {
        "python": PYTHON,
        "platform": bootstrap.here(),
        "requirements": (),
    }
    return Lock(**{**said, **changes})  # fmt: skip


class World:
    """A store, a cache, and processes that ask for an environment."""

    def __init__(self, url: str, cache: Path) -> None:
        self.url = url
        self.session = f"{url}/sessions/some"
        self.cache = cache
        self.store: Store = open_store(url)

    def ship(self, wanted: Lock) -> str:
        ship(self.store, Prepared(lock=wanted))
        return wanted.digest

    def ship_pack(self, wanted: Lock, text: str = "packed\n") -> str:
        """A lock with its pack, which holds one file of `text`."""
        digest = self.ship(wanted)
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as archive:
            for name, content in (("lib/here.txt", text), (bootstrap.PACK_END, "")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content.encode()))
        self.store.put(f"environments/{digest}/pack", data.getvalue())
        return digest

    def start(self, digest: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-I", "-c", PROVIDE, bootstrap.__file__, digest, self.session],
            env={**os.environ, "STARBURST_CACHE": str(self.cache), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def provide(self, digest: str, **environment: str) -> tuple[int, str, str]:
        with self.start(digest, **environment) as process:
            out, err = process.communicate(timeout=120)
        return process.returncode, out.strip(), err

    def left(self) -> list[str]:
        return [path.name for path in self.cache.glob("environments/*.draft-*")]


@pytest.fixture
def world(directory_url: str, tmp_path: Path) -> Iterator[World]:
    made = World(directory_url, tmp_path / "cache")
    yield made
    made.store.close()


# --- ready, packed, refused -------------------------------------------------------------


def test_a_pack_is_unpacked_once_and_gets_this_machines_interpreter(
    world: World,
) -> None:
    digest = world.ship_pack(lock())
    code, folder, said = world.provide(digest)
    assert code == 0, said
    assert "unpacked the environment" in said
    assert (Path(folder) / "lib" / "here.txt").read_text() == "packed\n"
    assert (Path(folder) / "bin" / "python").resolve().exists()
    assert not (Path(folder) / bootstrap.PACK_END).exists()
    world.store.delete(keys(world.url, "environments/"))
    assert world.provide(digest) == (0, folder, "")  # nothing was asked for


@pytest.mark.parametrize("kind", ["directory", "ministack", "seaweedfs"])
def test_a_store_is_read_without_its_libraries(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, s3_env: Callable[..., None]
) -> None:  # fmt: skip
    if kind == "directory":
        url = (tmp_path / "with space").as_uri()
    else:
        server: S3Server = request.getfixturevalue(kind)
        s3_env(server)
        url = f"{server.fresh_url()}/with space+"
    world = World(url, tmp_path / "cache")
    text = "x" * (40 << 20)  # three parts
    code, folder, said = world.provide(world.ship_pack(lock(), text))
    world.store.close()
    assert code == 0, said
    assert (Path(folder) / "lib" / "here.txt").stat().st_size == len(text)


def test_sixteen_at_once_unpack_once(world: World) -> None:
    digest = world.ship_pack(lock())
    started = [world.start(digest) for _ in range(16)]
    answers = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0] * 16, answers
    assert len({out for out, _ in answers}) == 1
    assert sum("unpacked" in err for _, err in answers) == 1


def test_one_that_is_killed_while_it_unpacks_breaks_nothing(world: World, tmp_path: Path) -> None:
    digest = world.ship_pack(lock())
    programs, ready = tmp_path / "programs", tmp_path / "ready"
    programs.mkdir()
    slow = programs / "tar"
    slow.write_text(f"#!/bin/sh\necho half > $6/half\ntouch {ready}\nexec sleep 600\n")
    slow.chmod(0o755)
    process = world.start(digest, PATH=f"{programs}:{os.environ['PATH']}")
    until(ready.exists, "it unpacks")
    [child] = _children_of(process.pid)
    process.kill()
    os.kill(child, signal.SIGKILL)
    process.communicate()
    assert world.left() != []
    code, folder, said = world.provide(digest)
    assert code == 0, said
    assert world.left() == []
    assert not (Path(folder) / "half").exists()


def test_one_that_is_told_to_end_takes_what_it_started_along(world: World, tmp_path: Path) -> None:
    digest = world.ship_pack(lock())
    programs, ready = tmp_path / "programs", tmp_path / "ready"
    programs.mkdir()
    slow = programs / "tar"
    slow.write_text(f"#!/bin/sh\necho $$ > {ready}.new\nmv {ready}.new {ready}\nexec sleep 600\n")
    slow.chmod(0o755)
    environment = {**os.environ, "STARBURST_CACHE": str(world.cache)}
    environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    command = [sys.executable, "-I", bootstrap.__file__, digest, world.session]
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        until(ready.exists, "it unpacks")
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    child = int(ready.read_text())
    until(lambda: not is_alive(child), "it ended")
    assert world.left() == []


def _children_of(pid: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    pairs = [tuple(map(int, line.split())) for line in listed]
    return [child for child, parent in pairs if parent == pid]


def test_a_pack_that_is_not_whole_is_not_used(world: World) -> None:
    digest = world.ship_pack(lock())
    key = f"environments/{digest}/pack"
    got = world.store.get(key)
    assert got is not None
    for part in (got.data[:1024], got.data[:-10240], b"nonsense"):
        world.store.put(key, part)
        code, _, said = world.provide(
            digest, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS=""
        )
        assert code == 1  # it goes on to install, which it cannot here
        assert "the pack cannot be used" in said
        assert "uv could not be installed by pip" in said
        assert world.left() == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"python": "3.4"}, f"created with Python 3.4 and this is Python {PYTHON}"),
        ({"platform": "plan9-vax"}, f"for plan9-vax and this machine is {bootstrap.here()}"),
    ],
)  # fmt: skip
def test_another_python_or_platform_is_refused_and_both_are_named(
    world: World, changes: dict[str, str], says: str
) -> None:
    code, _, said = world.provide(world.ship_pack(lock(**changes)))
    assert code == 1
    assert says in said


def test_an_environment_that_is_gone_says_so(world: World) -> None:
    code, _, said = world.provide("f" * 64)
    assert code == 1
    assert "may have been pruned" in said


def test_what_cannot_be_installed_is_named_with_its_indexes(world: World) -> None:
    extra = "https://127.0.0.1:9/simple"
    wanted = lock(requirements=("six==0.0.77",), index_url=extra)
    code, _, said = world.provide(world.ship(wanted), PIP_RETRIES="0")
    assert code == 1
    assert extra in said
    assert "exclude=" in said


def test_the_workers_of_a_machine_start_from_its_plain_python() -> None:
    launcher: Any = open_launcher(WorkerSpec(environment="sync", lock="abc"))
    base = str(getattr(sys, "_base_executable", sys.executable))
    assert launcher.command == (base, "-I", bootstrap.__file__, "abc")


def test_a_container_gets_the_file_with_its_task_definition() -> None:
    python, *rest = entry_point(WorkerSpec(launcher="ecs", lock="abc"))
    assert python == "python"
    assert sum(map(len, rest)) < 16_000
    done = subprocess.run([sys.executable, *rest[:-1]], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "usage: bootstrap.py" in done.stderr


# --- reading S3 -------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "a/token+"])
def test_requests_are_signed_as_botocore_signs_them(token: str) -> None:
    url = "https://bucket.s3.eu-west-1.amazonaws.com/a/b%20c%2Bd/lock.json"
    request = AWSRequest("GET", url)
    request.headers["x-amz-content-sha256"] = bootstrap._NOTHING
    S3SigV4Auth(Credentials("AK", "SK", token or None), "s3", "eu-west-1").add_auth(request)
    now = datetime.datetime.strptime(request.headers["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(
        tzinfo=datetime.UTC
    )
    keys = {"id": "AK", "secret": "SK", "token": token}
    ours = bootstrap.sign(url, "eu-west-1", keys, now)
    assert ours["Authorization"] == request.headers["Authorization"]


def test_the_account_that_must_own_the_bucket_is_said_and_signed() -> None:
    url = "https://bucket.s3.eu-west-1.amazonaws.com/lock.json"
    keys = {"id": "AK", "secret": "SK", "token": ""}
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    ours = bootstrap.sign(url, "eu-west-1", keys, now, "123456789012")
    assert ours["x-amz-expected-bucket-owner"] == "123456789012"
    assert "x-amz-expected-bucket-owner" in ours["Authorization"]


class Answers:
    """An HTTP server that gives scripted answers, and notes what it was asked."""

    def __init__(self, answers: Sequence[tuple[int, bytes]]) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        left = list(answers)
        asked = self.asked

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, dict(self.headers)))
                status, body = left.pop(0)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Answers:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr("starburst_executor.environment.bootstrap.time.sleep", taken.append)
    return taken


def test_a_server_that_is_away_for_a_moment_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SK")
    with Answers([(503, b""), (500, b""), (200, b"here")]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with bootstrap.S3("s3://bucket/some").open("lock.json") as file:
            assert file is not None
            assert file.read() == b"here"
    assert pauses == [0.5, 1.0]
    assert {path for path, _ in server.asked} == {"/bucket/some/lock.json"}


def test_the_owner_in_the_stores_url_is_said_with_each_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SK")
    with Answers([(200, b"here")]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with bootstrap.S3("s3://bucket/some?owner=123456789012").open("lock.json"):
            pass
    [(_, headers)] = server.asked
    said = {name.lower(): value for name, value in headers.items()}
    assert said["x-amz-expected-bucket-owner"] == "123456789012"


def test_what_is_forbidden_says_what_the_role_needs(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SK")
    with Answers([(403, b"AccessDenied")]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with (
            pytest.raises(bootstrap.Failure, match="s3:ListBucket"),
            bootstrap.S3("s3://bucket/some").open("lock.json"),
        ):
            pass
    assert pauses == []


def test_credentials_come_from_the_containers_role(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pauses: list[float]
) -> None:
    said = b'{"AccessKeyId": "A", "SecretAccessKey": "S", "Token": "T"}'
    token = tmp_path / "token"
    token.write_text("let me in\n")
    with Answers([(500, b""), (200, said)]) as server:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{server.url}/mine")
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(token))
        assert bootstrap.credentials() == {"id": "A", "secret": "S", "token": "T"}
    assert pauses == [0.5]
    path, headers = server.asked[-1]
    assert (path, headers["Authorization"]) == ("/mine", "let me in")


def test_credentials_come_from_the_file_or_it_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "credentials"
    file.write_text("[mine]\naws_access_key_id = A\naws_secret_access_key = S\n[sso]\nregion = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert bootstrap.credentials() == {"id": "A", "secret": "S", "token": ""}
    monkeypatch.setenv("AWS_PROFILE", "sso")
    with pytest.raises(bootstrap.Failure, match="export-credentials"):
        bootstrap.credentials()

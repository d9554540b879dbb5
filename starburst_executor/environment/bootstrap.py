"""Starts a worker in its session's environment, given only Python with pip.

    python bootstrap.py DIGEST SESSION_URL --id WORKER_ID

      is here    <cache>/environments/<digest>-<python>    run its Python at once
      packed     <store>/environments/<digest>/pack        unpack what another worker installed
      else       <store>/environments/<digest>/lock.json   pip installs uv, uv installs the lock,
                                                           and a background process packs it

The folder appears by one rename, whole or not at all. A pack holds what is the same on every
machine; the interpreter's link and `pyvenv.cfg` are created anew on each. A lock file makes other
workers on this machine wait while one is preparing the folder. A killed process leaves a draft,
which the next one sweeps away.

A stock container image gets only this file, so it uses only the standard library. Older Pythons
than it supports must be able to read it, so that it can tell them so.
"""

from __future__ import annotations

import collections
import configparser
import contextlib
import datetime
import fcntl
import hashlib
import hmac
import http.client
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent import futures
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["cache_home", "here", "main"]

_TRIES = 6  # with pauses of 0.5, 1, 2, 4, 8 s: a store may be away for some 15 s
_PART = 16 << 20  # bytes of a pack that are asked for at once
_STREAMS = 4  # so many at a time
PACK_END = ".pack-end"  # the last member of a pack: without it, something lacks
_TIMEOUT = 60.0  # seconds for a reply, or between two parts of one
_CONTAINER_HOST = "http://169.254.170.2"
_UTC = datetime.timezone.utc  # noqa: UP017  older Pythons have no other
_NOTHING = hashlib.sha256(b"").hexdigest()
_CALLERS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
# Made anew on each machine.
_OWN = re.compile(r"pyvenv\.cfg|lib64|bin/(python[\d.]*|[Aa]ctivate.*)")


class Failure(Exception):
    """Why no worker can be started here, for people."""


def main(argv: Sequence[str]) -> int:  # noqa: RET503  execv does not return
    """Become the worker that `argv` asks for; returns only if that cannot be."""
    signal.signal(signal.SIGTERM, _leave)
    for name in _CALLERS:
        os.environ.pop(name, None)
    try:
        if len(argv) < 2:
            raise Failure("usage: bootstrap.py DIGEST SESSION_URL [--id WORKER_ID]")
        digest, url, rest = argv[0], argv[1], list(argv[2:])
        python = str(provide(digest, open_source(url, digest), url) / "bin" / "python")
    except Failure as failure:
        say(f"no worker can be started: {failure}")
        return 1
    sys.stdout.flush()
    command = [python, "-P", "-m", "starburst_executor", "worker", url, *rest]
    os.execv(python, command)


def _leave(number: int, frame: object) -> None:
    """Exit, with all processes started here: launchers give each worker its own process group."""
    signal.signal(number, signal.SIG_IGN)
    if os.getpgrp() == os.getpid():
        os.killpg(0, number)
    sys.exit(128 + number)


def say(text: str) -> None:
    """Write a line where the worker's log is."""
    sys.stderr.write(f"starburst_executor: {text}\n")
    sys.stderr.flush()


def here() -> str:
    """What binaries must be built for to run here, such as "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine().lower()}"


def cache_home() -> Path:
    """Where environments are kept on this machine: `STARBURST_CACHE`, or the user cache."""
    named = os.environ.get("STARBURST_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    if os.environ.get("ECS_CONTAINER_METADATA_URI_V4"):
        return Path("/tmp/starburst_executor")
    base = os.environ.get("XDG_CACHE_HOME")
    mac = sys.platform == "darwin"
    own = Path.home() / ("Library/Caches" if mac else ".cache")
    return (Path(base) if base else own) / "starburst_executor"


# --- the environment --------------------------------------------------------------------


def provide(digest: str, source: Source, url: str) -> Path:
    """The folder of the environment, ready to run."""
    target = cache_home() / "environments" / _folder_name(digest)
    if not _is_ready(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(target):
            if not _is_ready(target):
                _make(target, digest, source, url)
    return target


def _folder_name(digest: str) -> str:
    """Names the interpreter too: a folder is of no use to another one."""
    python = f"{_base_python()} {sys.version}"
    return f"{digest[:32]}-{hashlib.sha256(python.encode()).hexdigest()[:8]}"


def _base_python() -> str:
    return str(getattr(sys, "_base_executable", "") or sys.executable)


def _is_ready(target: Path) -> bool:
    return (target / "bin" / "python").exists()  # follows the link: it may lead nowhere


@contextlib.contextmanager
def _only_one(target: Path) -> Iterator[None]:
    with (target.parent / (target.name + ".lock")).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network disks: several may do the same work
            say(f"{file.name} cannot be locked ({error})")
        yield


def _make(target: Path, digest: str, source: Source, url: str) -> None:
    for old in target.parent.glob(target.name + ".draft-*"):
        shutil.rmtree(old, ignore_errors=True)
    lock = read_lock(source)
    installed = not _made_of_pack(target, source)
    if installed:
        with _draft(target) as draft:
            install(lock, source, draft)
            _publish(draft, target)
        _pack_aside(target, digest, url)


@contextlib.contextmanager
def _draft(target: Path) -> Iterator[Path]:
    prefix = target.name + ".draft-"
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=str(target.parent)))
    folder.chmod(0o755)
    try:
        _make_venv(folder)
        yield folder
    finally:
        shutil.rmtree(str(folder), ignore_errors=True)


def _publish(draft: Path, target: Path) -> None:
    if target.exists():  # it was of no use any more
        shutil.rmtree(str(target), ignore_errors=True)
    draft.rename(target)


def _make_venv(folder: Path) -> None:
    try:
        import venv
    except ImportError as error:
        raise Failure(
            f"this Python ({_base_python()}) lacks the module venv ({error}); on Debian it is in "
            "the package python3-venv"
        ) from error
    venv.EnvBuilder(symlinks=True, with_pip=False).create(str(folder))
    with (folder / "pyvenv.cfg").open("a") as file:
        file.write("relocatable = true\n")  # uv then writes scripts that can be moved


def read_lock(source: Source) -> dict[str, Any]:
    """What is to be installed.

    Raises:
        Failure: it is gone, or is meant for another Python or platform.
    """
    with source.open("lock.json") as file:
        if file is None:
            raise Failure(
                "the session's environment is gone: there is no {}. It may have been pruned. "
                "Create a new session; this one's results can still be collected".format(
                    source.name("lock.json")
                )
            )
        lock: dict[str, Any] = json.loads(file.read().decode())
    minor = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if lock["python"] != minor:
        raise Failure(
            "the session was created with Python {} and this is Python {} ({}): packages and "
            "pickles of one cannot be used in the other. Use an image, or a machine, with "
            "Python {}".format(lock["python"], minor, sys.executable, lock["python"])
        )
    if lock["platform"] != here():
        raise Failure(
            "the session's environment is for {} and this machine is {}".format(
                lock["platform"], here()
            )
        )
    return lock


# --- unpacking --------------------------------------------------------------------------


def _made_of_pack(target: Path, source: Source) -> bool:
    """Whether the store had a pack, and the environment is made of it now."""
    began = time.monotonic()
    try:
        chunks = source.chunks("pack")
        if chunks is None:
            return False
        with _draft(target) as draft:
            unpack(chunks, draft)
            _publish(draft, target)
    except (Failure, OSError, tarfile.TarError, http.client.HTTPException) as error:
        # A client on this machine may know how to reach the store where this program does not.
        say(f"the pack cannot be used, so all is installed instead: {error!r}")
        return False
    say(f"unpacked the environment in {time.monotonic() - began:.1f} s")
    return True


def unpack(chunks: Iterable[bytes], folder: Path) -> None:
    """Unpack into a folder that has its interpreter already.

    Raises:
        Failure: the pack is not whole.
    """
    if shutil.which("tar"):
        _unpack_by_tar(chunks, folder)
    else:
        with tempfile.TemporaryFile() as file:
            file.writelines(chunks)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                if hasattr(tarfile, "tar_filter"):
                    archive.extraction_filter = tarfile.tar_filter
                archive.extractall(str(folder))
    if not (folder / PACK_END).exists():
        raise Failure("the pack ends too early")
    (folder / PACK_END).unlink()


def _unpack_by_tar(chunks: Iterable[bytes], folder: Path) -> None:
    """Five times as fast as Python's own module."""
    command = ["tar", "-x", "-o", "-f", "-", "-C", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as tar:
        assert tar.stdin is not None
        assert tar.stderr is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # tar says why
                for chunk in chunks:
                    tar.stdin.write(chunk)
                tar.stdin.close()
            said = tar.stderr.read().decode(errors="replace").strip()
        except BaseException:
            tar.kill()
            raise
    if tar.returncode:
        raise Failure(f"tar could not unpack it: {said}")


def members(folder: Path) -> Iterator[Path]:
    """What of an environment is the same on every machine: files and links, in order."""
    for place, folders, names in os.walk(str(folder)):
        folders.sort()
        links = [n for n in folders if os.path.islink(os.path.join(place, n))]  # noqa: PTH114, PTH118
        for name in sorted([*names, *links]):
            path = Path(place) / name
            if not _OWN.fullmatch(str(path.relative_to(folder))):
                yield path


# --- installing -------------------------------------------------------------------------


def install(lock: dict[str, Any], source: Source, folder: Path) -> None:
    """Install a lock into an environment that has its interpreter and nothing else.

    Raises:
        Failure: names what failed, and the indexes that were asked.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="starburst-") as scratch:
        tools, wheels = Path(scratch) / "tools", Path(scratch) / "wheels"
        indexes = _index_options(lock)
        pip = [_base_python(), "-I", "-m", "pip", "install", "--target", str(tools)]
        pip += ["--quiet", "--disable-pip-version-check", "--no-input"]
        _run([*pip, *indexes, "uv<1"], "uv could not be installed by pip", lock)
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text("\n".join([*lock["requirements"], *_wheels(lock, source, wheels)]))
        uv = [str(tools / "bin" / "uv"), "pip", "install", "--no-deps", "--no-config"]
        uv += ["--python", str(folder / "bin" / "python")]
        uv += ["--index-strategy", "unsafe-best-match", *indexes, "-r", str(wanted)]
        _run(uv, "the session's packages could not be installed", lock)
    say(f"installed the environment in {time.monotonic() - began:.1f} s")


def _index_options(lock: dict[str, Any]) -> list[str]:
    options = ["--index-url", lock["index_url"]] if lock["index_url"] else []
    for url in lock["extra_index_urls"]:
        options += ["--extra-index-url", url] if _is_there(url) else []
    for url in lock["find_links"]:
        options += ["--find-links", url] if _is_there(url) else []
    return options


def _is_there(url: str) -> bool:
    """Whether an index may be asked: a folder of the client's is of no use elsewhere."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("", "file") or os.path.exists(  # noqa: PTH110
        urllib.parse.unquote(parts.path)
    ):
        return True
    say(f"the index {url} is not on this machine and is left out")
    return False


def _run(command: Sequence[str], failed: str, lock: dict[str, Any]) -> None:
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    if not os.environ.get("UV_CACHE_DIR") and "ECS_CONTAINER_METADATA_URI_V4" in os.environ:
        environment["UV_CACHE_DIR"] = str(cache_home() / "uv")  # there may be no home
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )  # fmt: skip
    text = done.stdout.decode(errors="replace").strip()
    if done.returncode == 0:
        return
    asked = [
        lock["index_url"] or "the default index",
        *lock["extra_index_urls"],
        *lock["find_links"],
    ]
    raise Failure(
        f"{failed} (exit code {done.returncode}; indexes: {', '.join(asked)}):\n{text}\n"
        "Leave a package out with exclude=, name another version with packages= or requirements=, "
        "or provide an image that has them with image="
    )


def _wheels(lock: dict[str, Any], source: Source, folder: Path) -> Iterator[str]:
    """Bring the client's own packages here; a requirement for each."""
    folder.mkdir()
    for wheel in lock["wheels"]:
        target = folder / wheel["file"]
        with source.open("wheels/" + wheel["file"]) as file:
            if file is None:
                raise Failure("{} is gone".format(source.name("wheels/" + wheel["file"])))
            target.write_bytes(file.read())
        if hashlib.sha256(target.read_bytes()).hexdigest() != wheel["sha256"]:
            raise Failure("{} is damaged".format(source.name("wheels/" + wheel["file"])))
        yield "{} @ {}".format(wheel["name"], target.as_uri())


def _pack_aside(folder: Path, digest: str, url: str) -> None:
    """Let the package in the environment pack it, without waiting."""
    command = [
        str(folder / "bin" / "python"),
        "-P",
        "-m",
        "starburst_executor.environment",
    ]
    try:
        subprocess.Popen([*command, _store_url(url), digest, str(folder)], stdin=subprocess.DEVNULL)
    except OSError as error:
        say(f"the environment could not be packed: {error}")


# --- reading the store ------------------------------------------------------------------


class Source:
    """Where the objects of one environment are: on this machine already, or in the store."""

    def __init__(self, shelf: Path, digest: str, store: Any) -> None:
        self._shelf = shelf
        self._prefix = f"environments/{digest}/"
        self._store = store

    def name(self, key: str) -> str:
        """An object's name, for people."""
        return f"{self._store.url}/{self._prefix}{key}"

    def chunks(self, key: str) -> Iterable[bytes] | None:
        """An object in parts; None if there is none."""
        parts: Iterable[bytes] | None = self._store.chunks(self._prefix + key)
        return parts

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[IO[bytes] | None]:
        """Read an object; None if there is none."""
        local = self._shelf / key
        if local.is_file():
            with local.open("rb") as file:
                yield file
        else:
            with self._store.open(self._prefix + key) as file:
                yield file


def open_source(session_url: str, digest: str) -> Source:
    """Where to read an environment: the client's own copies first, if it was on this machine."""
    url = _store_url(session_url)
    store: Any = S3(url) if url.startswith("s3://") else Folder(url)
    return Source(cache_home() / "shelf" / digest, digest, store)


def _store_url(session_url: str) -> str:
    path, mark, query = session_url, "", ""
    if session_url.startswith("s3://"):
        path, mark, query = session_url.partition("?")
    base, middle, session = path.rstrip("/").rpartition("/sessions/")
    if not middle or not session:
        raise Failure(f"{session_url!r} is not the URL of a session")
    return (base or "/") + mark + query


class Folder:
    """A store in a directory."""

    def __init__(self, url: str) -> None:
        self.url = url
        path = urllib.parse.unquote(url[7:]) if url.startswith("file://") else url
        self._root = Path(path).expanduser()

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[IO[bytes] | None]:
        try:
            file = (self._root / key).open("rb")
        except FileNotFoundError:
            yield None
            return
        with file:
            yield file

    def chunks(self, key: str) -> Iterable[bytes] | None:
        file = self._root / key
        return _read(file) if file.exists() else None


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while True:
            chunk = file.read(1 << 20)
            if not chunk:
                return
            yield chunk


class S3:
    """A store in S3, read with the standard library alone (Signature Version 4)."""

    def __init__(self, url: str) -> None:
        self.url, _, query = url.partition("?")
        self._bucket, _, prefix = self.url[5:].partition("/")
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        said = dict(urllib.parse.parse_qsl(query))
        self._owner = said.get("owner", "")
        env = os.environ
        self._region = (
            said.get("region")
            or env.get("AWS_REGION")
            or env.get("AWS_DEFAULT_REGION")
            or "us-east-1"
        )
        self._endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
        self._keys: dict[str, str] | None = None

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[IO[bytes] | None]:
        reply = self._answer(key)
        if reply is None:
            yield None
            return
        with reply:
            yield reply

    def chunks(self, key: str) -> Iterable[bytes] | None:
        """Several connections at once: one gives less than a worker can unpack."""
        reply = self._answer(key, 0)
        if reply is None:
            return None
        with reply:
            size = int(reply.headers["Content-Range"].rpartition("/")[2])
            first = reply.read()
        return self._rest(key, first, size)

    def _rest(self, key: str, first: bytes, size: int) -> Iterator[bytes]:
        yield first
        with futures.ThreadPoolExecutor(_STREAMS) as pool:
            ahead: collections.deque[futures.Future[bytes]] = collections.deque()
            for start in range(_PART, size, _PART):
                ahead.append(pool.submit(self._part, key, start))
                if len(ahead) > _STREAMS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _part(self, key: str, start: int) -> bytes:
        for left in reversed(range(_TRIES)):
            try:
                with self._answer(key, start) as reply:
                    data: bytes = reply.read()
                    return data
            except (OSError, http.client.HTTPException) as error:
                if not left:
                    raise Failure(f"S3 breaks off {self.url}/{key}: {error}") from error
        raise AssertionError

    def _answer(self, key: str, start: int | None = None) -> Any:
        """A reply to be read; None if there is no such object.

        Raises:
            Failure: S3 refuses, or does not answer.
        """
        try:
            return self._get(key, start)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(2000).decode(errors="replace")
            if error.code == 404 and "NoSuchBucket" not in said:
                return None
            raise Failure(
                f"S3 refuses {self.url}/{key}: {error.code} {said}. The role needs s3:GetObject, "
                "and s3:ListBucket, without which what is missing looks forbidden"
            ) from error
        except OSError as error:
            raise Failure(f"S3 does not answer for {self.url}/{key}: {error}") from error

    def _get(self, key: str, start: int | None) -> Any:
        for attempt in range(_TRIES):
            try:
                return self._get_once(key, start)
            except urllib.error.HTTPError as error:
                region = error.headers.get("x-amz-bucket-region")
                if region and region != self._region:
                    self._region = region  # the bucket is elsewhere: sign for there
                elif (error.code < 500 and error.code != 429) or attempt == _TRIES - 1:
                    raise
                error.close()
            except (OSError, http.client.HTTPException):
                if attempt == _TRIES - 1:
                    raise
            time.sleep(0.5 * 2.0**attempt)  # noqa: TID251  nobody waits on a signal here
        raise AssertionError

    def _get_once(self, key: str, start: int | None) -> Any:
        path = urllib.parse.quote(self._prefix + key, safe="/-_.~")
        if self._endpoint:
            base = "{}/{}".format(self._endpoint.rstrip("/"), self._bucket)
        elif "." in self._bucket:  # no certificate matches more than one label
            base = f"https://{_host(self._region)}/{self._bucket}"
        else:
            base = f"https://{self._bucket}.{_host(self._region)}"
        url = f"{base}/{path}"
        headers = self._signed(url)
        if start is not None:
            headers["Range"] = f"bytes={start}-{start + _PART - 1}"
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=_TIMEOUT)

    def _signed(self, url: str) -> dict[str, str]:
        if self._keys is None:
            self._keys = credentials()
        now = datetime.datetime.now(_UTC)
        return sign(url, self._region, self._keys, now, self._owner)


def _host(region: str) -> str:
    """The host name of S3 in a region."""
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return f"s3.{region}.{suffix}"


def sign(
    url: str, region: str, keys: dict[str, str], now: datetime.datetime, owner: str = ""
) -> dict[str, str]:
    """Headers that sign a GET without a body by AWS Signature Version 4, for S3."""
    parts = urllib.parse.urlsplit(url)
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    headers = {
        "host": parts.netloc,
        "x-amz-content-sha256": _NOTHING,
        "x-amz-date": stamp,
    }
    if keys.get("token"):
        headers["x-amz-security-token"] = keys["token"]
    if owner:  # the account that must own the bucket
        headers["x-amz-expected-bucket-owner"] = owner
    names = ";".join(sorted(headers))
    lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    asked = "\n".join(("GET", parts.path, "", lines, names, _NOTHING))
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256(asked.encode()).hexdigest()
    text = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, digest))
    key = ("AWS4" + keys["secret"]).encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    headers["Authorization"] = (
        "AWS4-HMAC-SHA256 Credential={}/{}, SignedHeaders={}, Signature={}".format(
            keys["id"], scope, names, signature
        )
    )
    return headers


def credentials() -> dict[str, str]:
    """AWS credentials: from the environment, the container's role, or the credentials file.

    Raises:
        Failure: there are none.
    """
    env = os.environ
    if env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY"):
        return {
            "id": env["AWS_ACCESS_KEY_ID"],
            "secret": env["AWS_SECRET_ACCESS_KEY"],
            "token": env.get("AWS_SESSION_TOKEN", ""),
        }
    return _of_container() or _of_file()


def _of_container() -> dict[str, str] | None:
    env = os.environ
    relative = env.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    url = _CONTAINER_HOST + relative if relative else env.get("AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if not url:
        return None
    token = env.get("AWS_CONTAINER_AUTHORIZATION_TOKEN", "")
    if env.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
        token = Path(env["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"]).read_text().strip()
    request = urllib.request.Request(url, headers={"Authorization": token} if token else {})
    for attempt in range(_TRIES):
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:
                said = json.load(reply)
            return {
                "id": said["AccessKeyId"],
                "secret": said["SecretAccessKey"],
                "token": said["Token"],
            }
        except (OSError, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            if attempt == _TRIES - 1:
                raise Failure(
                    f"the credentials of the task role cannot be had from {url}: {error}"
                ) from error
        time.sleep(0.5 * 2.0**attempt)  # noqa: TID251  as above
    raise AssertionError


def _of_file() -> dict[str, str]:
    env = os.environ
    file = Path(env.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    profile = env.get("AWS_PROFILE") or "default"
    parser = configparser.RawConfigParser()
    parser.read(str(file))
    if not parser.has_option(profile, "aws_secret_access_key"):
        raise Failure(
            "there are no AWS credentials in the environment, from a container's role, or for "
            f"profile {profile!r} in {file}. For other kinds (SSO, assumed roles) run "
            "`aws configure export-credentials --format env` and set what it prints"
        )
    values = parser[profile]
    return {
        "id": values["aws_access_key_id"],
        "secret": values["aws_secret_access_key"],
        "token": values.get("aws_session_token", ""),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

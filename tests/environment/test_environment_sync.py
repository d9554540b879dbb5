"""The caller's packages on its workers, for real.

Environments are made, packed, and made again from the pack.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from starburst_executor import StarburstExecutor
from starburst_executor.config import Deployment
from starburst_executor.environment import bootstrap
from starburst_executor.errors import ExecutorBroken
from tests.emulators.ecs_server import EcsServer, configure, ecs_server
from tests.support.callers import Caller, make_caller, make_project
from tests.support.servers import S3Server
from tests.support.sessions import keys
from tests.support.tasks import until

PINNED = ("numpy==2.4.6", "scipy==1.17.1", "pandas==3.1.1")

SCRIPT = """
import json, sys
import private
from starburst_executor import StarburstExecutor

names = sys.argv[2:]
with StarburstExecutor(1, store=sys.argv[1], environment="sync", keep=True) as executor:
    print(json.dumps(executor.submit(private.about, names).result(timeout=240)))
"""

PRIVATE = """
import importlib, importlib.metadata, sys
import acme_lib

def about(names):
    for name in names:
        importlib.import_module(name)
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"versions": versions, "prefix": sys.prefix, "acme": acme_lib.answer()}
"""


@pytest.fixture(scope="module")
def uv_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for all: what is tested is what is installed, not how often it is fetched."""
    folder = tmp_path_factory.mktemp("uv-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UV_CACHE_DIR", str(folder))
        yield folder


def equip(caller: Caller, folder: Path) -> Caller:
    """With an editable package, and a module beside its scripts."""
    text = "def answer():\n    return 42\n"
    caller.install("-e", str(make_project(folder / "acme", "acme-lib", {"__init__.py": text})))
    (caller.scripts / "private.py").write_text(PRIVATE)
    return caller


@pytest.fixture(scope="module")
def caller(uv_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Caller:
    folder = tmp_path_factory.mktemp("caller")
    return equip(make_caller(folder, "six==1.16.0"), folder)


class Machine:
    """A machine of the caller's: its cache of environments, and what its workers printed."""

    def __init__(self, folder: Path, caller: Caller, store: str) -> None:
        self.caller, self.store = caller, store
        self.home, self.cache = folder / "home", folder / "cache"

    def run(self, *names: str) -> dict[str, object]:
        said = self.caller.run(
            SCRIPT, self.store, *names,
            STARBURST_HOME=str(self.home), STARBURST_CACHE=str(self.cache),
        )  # fmt: skip
        found: dict[str, object] = json.loads(said)
        return found

    def printed(self) -> str:
        """What workers have printed since the last call."""
        logs = list(self.home.glob("workers/*/*.log"))
        text = "\n".join(log.read_text() for log in logs)
        for log in logs:
            log.unlink()
        return text

    def await_pack(self) -> None:
        def packed() -> bool:
            return any(k.endswith("/pack") for k in keys(self.store, "environments/"))

        until(packed, "the pack is in the store", 120)


def check_three_starts(machine: Machine, packages: dict[str, str]) -> None:
    names = list(packages)
    first = machine.run(*names)
    assert first["versions"] == packages
    assert first["acme"] == 42
    assert str(first["prefix"]).startswith(str(machine.cache))
    assert "installed the environment" in machine.printed()
    machine.await_pack()
    assert machine.run(*names) == first  # it is here already
    printed = machine.printed()
    assert "installed" not in printed
    assert "unpacked" not in printed
    machine.cache = machine.cache.with_name("another")
    second = machine.run(*names)
    assert second["versions"] == packages
    assert str(second["prefix"]).startswith(str(machine.cache))
    printed = machine.printed()
    assert "unpacked the environment" in printed
    assert "installed" not in printed


@pytest.mark.slow
def test_tasks_see_the_callers_very_packages(
    uv_cache: Path, tmp_path: Path, directory_url: str
) -> None:
    caller = equip(make_caller(tmp_path / "caller", *PINNED), tmp_path)
    packages = dict(line.split("==") for line in PINNED)
    check_three_starts(Machine(tmp_path, caller, directory_url), packages)


def test_the_same_on_s3(
    caller: Caller, ministack: S3Server, s3_env: Callable[..., None], tmp_path: Path
) -> None:
    s3_env(ministack)
    machine = Machine(tmp_path, caller, ministack.fresh_url())
    check_three_starts(machine, {"six": "1.16.0"})


def test_what_no_worker_can_install_ends_the_futures_with_the_reason(
    directory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARBURST_CACHE", str(tmp_path / "cache"))
    executor = StarburstExecutor(
        1, store=directory_url, environment="sync", requirements=["six==1.16.0"]
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ExecutorBroken, match="uv could not be installed by pip"):
        executor.submit(sum, [1, 2]).result(timeout=120)
    executor.cleanup(force=True)


@pytest.mark.skipif(bootstrap.here() != "linux-x86_64", reason="tasks are local")
def test_a_stock_image_on_ecs_becomes_the_callers_environment(
    tmp_path: Path, uv_cache: Path, monkeypatch: pytest.MonkeyPatch, s3_env: Callable[..., None]
) -> None:  # fmt: skip
    monkeypatch.setenv("STARBURST_CACHE", str(tmp_path / "client"))
    with ecs_server(_made(tmp_path / "ecs")) as server:
        s3_env(server)
        deployment = server.deploy()
        for name, value in configure(deployment).items():
            monkeypatch.setenv(name, value)
        server.set(task_endpoints=_of_tasks(tmp_path / "tasks", uv_cache))
        with StarburstExecutor(
            2, cpu=0.25, memory="512MB", environment="sync", requirements=["six==1.16.0"]
        ) as executor:  # fmt: skip
            here = executor.submit(version, "six").result(timeout=240)
            assert here == "1.16.0"
            assert _prefix(executor).startswith(str(tmp_path / "tasks"))
        _check_entry_point(server, deployment)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _of_tasks(cache: Path, uv_cache: Path) -> dict[str, str]:
    """Nothing of the client's but how this machine reaches its package index."""
    import os

    reach = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_"))}
    return {**reach, "STARBURST_CACHE": str(cache), "UV_CACHE_DIR": str(uv_cache)}


def _prefix(executor: StarburstExecutor) -> str:
    import sysconfig

    path: str = executor.submit(sysconfig.get_path, "data").result(timeout=60)
    return path


def _check_entry_point(server: EcsServer, deployment: Deployment) -> None:
    task = server.tasks(deployment.cluster)[0]
    client = server.aws("ecs")
    reply = client.describe_task_definition(taskDefinition=task["taskDefinitionArn"])
    client.close()
    [container] = reply["taskDefinition"]["containerDefinitions"]
    assert container["entryPoint"][:3] == ["python", "-I", "-c"]
    assert len(json.dumps(reply["taskDefinition"], default=str)) < 64_000
    assert container["image"] == deployment.image
    assert sys.executable not in json.dumps(container)

"""Callers: virtual environments with packages of their own, in which a test runs scripts."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starburst_executor.environment import indexes
from starburst_executor.environment.uv import run_uv
from tests.support.servers import unmeasured

ROOT = Path(__file__).parents[2]

_PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """A virtual environment with this package, and a folder for scripts and their modules."""

    venv: Path
    scripts: Path

    def run(self, script: str, *arguments: str, **environment: str) -> str:
        """What a script prints, which must end well."""
        done = self.start(script, *arguments, **environment)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(
        self, script: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        file = self.scripts / "script.py"
        file.write_text(textwrap.dedent(script))
        # One that measures this process's coverage would be imported there, and is not installed.
        return subprocess.run(
            [self.venv / "bin" / "python", file, *arguments],
            env={**unmeasured(), **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def install(self, *what: str) -> None:
        command = ["pip", "install", "--python", str(self.venv / "bin" / "python")]
        done = run_uv([*command, *indexes.find().options(), *what])
        assert done.returncode == 0, done.stdout


def make_caller(folder: Path, *what: str) -> Caller:
    """A caller with this package, editable, and what else is asked for."""
    caller = Caller(venv=folder / "venv", scripts=folder / "scripts")
    caller.scripts.mkdir(parents=True)
    done = run_uv(["venv", "--python", sys.executable, str(caller.venv)])
    assert done.returncode == 0, done.stdout
    caller.install("-e", str(ROOT), *what)
    return caller


def make_project(folder: Path, name: str, modules: Mapping[str, str], version: str = "1.0") -> Path:
    """A project that can be built, with one package."""
    package = folder / name.replace("-", "_")
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(_PYPROJECT.format(name=name, version=version))
    for module, text in modules.items():
        (package / module).write_text(text)
    return folder

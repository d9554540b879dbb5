"""Versions that differ from those installed here: for another platform, or on request."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from starburst_executor.environment import bootstrap
from starburst_executor.environment.indexes import Indexes
from starburst_executor.environment.uv import run_uv
from starburst_executor.errors import PackageError

__all__ = ["check", "resolve"]

# Those of the slim images of Debian and of Amazon Linux 2023 are newer.
_GLIBC = "manylinux_2_28"
_ADVICE = (
    "Leave the package out with exclude=[...], name another version with packages=[...], name all "
    "of them with requirements=, or provide an image that has everything with image="
)


def resolve(
    wanted: Iterable[str],
    held: Iterable[str],
    *,
    python: str,
    platform: str,
    indexes: Indexes,
    build: bool = True,
) -> list[str]:
    """Exact versions of what is wanted and of all that it needs, as they will be on the worker.

    Args:
        wanted: Requirements.
        held: Requirements that hold wherever such a package is needed, whatever others ask for.
        python: Minor version.
        platform: As `bootstrap.here` says it.
        indexes: Where to look.
        build: Whether packages may be taken that have no wheel.

    Raises:
        PackageError: there is no such set; says of which package, in uv's words.
    """
    with tempfile.TemporaryDirectory(prefix="starburst-resolve-") as scratch:
        command = ["pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        command += [
            _written(scratch, "wanted.txt", wanted),
            "--override",
            _written(scratch, "held.txt", held),
        ]
        command += [
            "--python-version",
            python,
            *_platform(platform),
            *indexes.options(),
        ]
        done = run_uv([*command, *([] if build else ["--only-binary", ":all:"])])
    if done.returncode:
        raise PackageError(
            f"the packages for Python {python} on {platform} cannot be found:\n"
            f"{done.stdout.strip()}\n{_ADVICE}"
        )
    lines = (line.strip() for line in done.stdout.splitlines())
    return [line for line in lines if line and not line.startswith(("#", "-", "warning"))]


def check(lines: Sequence[str], *, python: str, platform: str, indexes: Indexes) -> str:
    """Check that each exact version is available; installs nothing, and fetches next to nothing.

    Returns:
        What uv says about packages without a wheel, which each worker has to build; "" if none.

    Raises:
        PackageError: names what is unavailable.
    """
    with tempfile.TemporaryDirectory(prefix="starburst-check-") as scratch:
        command = [
            "pip",
            "install",
            "--dry-run",
            "--no-deps",
            "--quiet",
            "--target",
            str(Path(scratch) / "site"),
        ]
        command += [
            "--python-version",
            python,
            *_platform(platform),
            *indexes.options(),
        ]
        command += ["--requirements", _written(scratch, "lock.txt", lines)]
        done = run_uv([*command, "--only-binary", ":all:"])
        if not done.returncode:
            return ""
        built = run_uv(command)
    if built.returncode:
        raise PackageError(
            f"a package that is installed here cannot be installed for Python {python} on "
            f"{platform}:\n{built.stdout.strip()}\n{_ADVICE}"
        )
    return done.stdout.strip()


def _written(folder: str, name: str, lines: Iterable[str]) -> str:
    file = Path(folder) / name
    file.write_text("".join(f"{line}\n" for line in lines))
    return str(file)


def _platform(platform: str) -> list[str]:
    """Uv's name of a platform; none for this machine's own."""
    if platform == bootstrap.here():
        return []
    system, _, machine = platform.partition("-")
    return [
        "--python-platform",
        f"{machine}-{_GLIBC}" if system == "linux" else platform,
    ]

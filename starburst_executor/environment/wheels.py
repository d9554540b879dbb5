"""Wheels of packages that lie on this machine: built once for each state of their source.

A built wheel is rewritten with its members in order and without dates, so that the same files give
the same wheel, and so the same digest, on any machine and with any build tool.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from starburst_executor.environment.indexes import Indexes
from starburst_executor.environment.installed import Package
from starburst_executor.environment.uv import run_uv, uv
from starburst_executor.errors import PackageError

__all__ = ["build"]

_SKIPPED = {"__pycache__", "node_modules", "build", "dist", "htmlcov"}


def build(package: Package, cache: Path, indexes: Indexes) -> Path:
    """The wheel of a package that was installed from this machine.

    Args:
        package: One with a source.
        cache: Where wheels are kept, by the state of their source.
        indexes: Where its build tools are looked for.

    Raises:
        PackageError: it cannot be built, or its source is gone.
    """
    source = package.source
    assert source is not None
    if not source.exists():
        raise PackageError(
            f"{package.name} {package.version} was installed from {source}, which no longer "
            f"exists, so workers cannot get it. {_advice(package)}"
        )
    kept = cache / _state(source)
    found = sorted(kept.glob("*.whl"))
    if found:
        return found[0]
    with tempfile.TemporaryDirectory(prefix="starburst-wheel-") as scratch:
        made = source if source.suffix == ".whl" else _built(package, Path(scratch), indexes)
        target = Path(scratch) / "canonical" / made.name
        target.parent.mkdir()
        _write_canonical(made, target)
        return _keep(target, kept)


def _advice(package: Package) -> str:
    return (
        f"Install it again, leave it out with exclude=[{package.name!r}], or name another source "
        "with requirements= or packages="
    )


def _built(package: Package, scratch: Path, indexes: Indexes) -> Path:
    assert package.source is not None
    command = [
        "build", "--wheel", "--no-progress", "--out-dir", str(scratch / "built"),
        "--python", sys.executable, *indexes.options(), str(package.source),
    ]  # fmt: skip
    # Dates of an epoch that zip files can hold, for tools that heed this.
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "315532800"}
    done = run_uv(command, environment)
    if done.returncode:
        # The build tools may be known from an earlier time, though no index answers now.
        again = run_uv([*command, "--offline"], environment)
        done = done if again.returncode else again
    wheels = sorted((scratch / "built").glob("*.whl"))
    if done.returncode or not wheels:
        raise PackageError(
            f"{package.name} {package.version} is in {package.source}, and no wheel of it could be "
            f"built:\n{done.stdout.strip()}\n{_advice(package)}"
        )
    return wheels[0]


def _keep(wheel: Path, kept: Path) -> Path:
    """Move a wheel into the cache, where another process may have put it by now."""
    kept.mkdir(parents=True, exist_ok=True)
    part = kept / f".{wheel.name}.{os.getpid()}"
    shutil.copyfile(wheel, part)
    return part.replace(kept / wheel.name)


# --- the state of a source ------------------------------------------------------------


def _state(source: Path) -> str:
    """A digest of a source's state and its build tools; from file times, without reading it."""
    digest = hashlib.sha256(f"{source.resolve()} {sys.version} {uv()}".encode())
    for path in _files(source) if source.is_dir() else [source]:
        about = path.lstat()
        line = f"{path}\0{about.st_size}\0{about.st_mtime_ns}\0{about.st_mode}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not _is_skipped(Path(place) / f))
        yield from (Path(place) / name for name in sorted(names) if not name.endswith(".pyc"))


def _is_skipped(folder: Path) -> bool:
    """What no wheel is built of: hidden folders, results of tools, virtual environments."""
    name = folder.name
    return (
        name.startswith(".")
        or name in _SKIPPED
        or name.endswith(".egg-info")
        or (folder / "pyvenv.cfg").exists()
    )


# --- the same bytes for the same files --------------------------------------------------


def _write_canonical(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w") as new:
        for info in sorted(old.infolist(), key=_order):
            plain = zipfile.ZipInfo(info.filename)  # dated 1980, not compressed
            plain.external_attr = info.external_attr
            new.writestr(plain, _content(old, info))


def _order(info: zipfile.ZipInfo) -> tuple[bool, str]:
    return ".dist-info/" in info.filename, info.filename  # as the format asks for


def _content(wheel: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    data = wheel.read(info)
    if info.filename.endswith(".dist-info/RECORD"):
        return b"".join(sorted(data.splitlines(keepends=True)))
    return data

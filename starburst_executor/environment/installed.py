"""What is installed for this interpreter, and where each package came from."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from starburst_executor.environment.indexes import stripped

__all__ = ["INSTALLERS", "Package", "installed", "normalized"]

log = logging.getLogger(__name__)

# What installs packages; no task imports it. uv is here because this package brings it: 50 MB.
INSTALLERS = {"pip", "uv", "wheel", "distribute", "pkg-resources"}
_BUILD = "setuptools"  # stays if somebody needs it at run time
_NAME = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")
_PROJECT = ("pyproject.toml", "setup.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One installed package.

    Attributes:
        name: Normalized.
        version: As it is installed.
        line: What to ask an index, or a URL, for; None if it must be built here.
        source: Folder or file that it was installed from, if it lies on this machine.
    """

    name: str
    version: str
    line: str | None = None
    source: Path | None = None


def normalized(text: str) -> str:
    """The one name under which a package is known, of a requirement or of a name.

    Raises:
        ValueError: it does not begin with a name.
    """
    match = _NAME.match(text)
    if match is None:
        raise ValueError(
            f"{text!r} is not a requirement; write a package's name, perhaps with a version, such "
            "as 'numpy==2.1.0' or 'my-package @ https://host/my_package-1-py3-none-any.whl'"
        )
    return re.sub(r"[-_.]+", "-", match[1]).lower()


def installed(path: Iterable[str] | None = None) -> list[Package]:
    """Every installed package, by name; without those that install others.

    Args:
        path: Folders to look in; default `sys.path`. As with imports, the first of a name counts.
    """
    found: dict[str, tuple[Package, Distribution]] = {}
    for one in distributions() if path is None else distributions(path=list(path)):
        name = one.metadata["Name"] if one.metadata else None
        if not name:
            log.debug("%s is no distribution: it has no name", one.locate_file(""))
            continue
        package = _package(normalized(name), one)
        found.setdefault(package.name, (package, one))
    left_out = INSTALLERS if _needed(found.values()) else {*INSTALLERS, _BUILD}
    return [found[name][0] for name in sorted(found) if name not in left_out]


def _needed(found: Iterable[tuple[Package, Distribution]]) -> bool:
    """Whether a package that is here needs setuptools when it runs."""
    return any(
        normalized(line) == _BUILD and "extra ==" not in line
        for package, one in found
        if package.name not in INSTALLERS
        for line in one.requires or ()
    )


def _package(name: str, one: Distribution) -> Package:
    said = one.read_text("direct_url.json")
    if said:
        return _direct(name, one, json.loads(said))
    folder = Path(str(one.locate_file("")))
    if not one.read_text("INSTALLER") and any((folder / p).exists() for p in _PROJECT):
        # A checkout on sys.path, or one that was installed by an older setuptools' develop.
        return Package(name=name, version=one.version, source=folder)
    return Package(name=name, version=one.version, line=f"{name}=={one.version}")


def _direct(name: str, one: Distribution, said: dict[str, Any]) -> Package:
    """What PEP 610 tells of a package that came from no index."""
    url = said["url"]
    inner = f"&subdirectory={said['subdirectory']}" if said.get("subdirectory") else ""
    if "vcs_info" in said:
        vcs = said["vcs_info"]
        at = f"{vcs['vcs']}+{stripped(url)}@{vcs['commit_id']}"
        return Package(name=name, version=one.version, line=f"{name} @ {at}{_fragment(inner)}")
    if url.startswith("file:"):
        source = Path(unquote(urlsplit(url).path)) / said.get("subdirectory", "")
        return Package(name=name, version=one.version, source=source)
    return Package(
        name=name,
        version=one.version,
        line=f"{name} @ {stripped(url)}{_fragment(inner)}",
    )


def _fragment(parts: str) -> str:
    return f"#{parts.lstrip('&')}" if parts else ""

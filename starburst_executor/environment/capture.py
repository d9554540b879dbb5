"""From what is installed here to a lock and the wheels that go with it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile

from starburst_executor.environment import bootstrap
from starburst_executor.environment import indexes as package_indexes
from starburst_executor.environment.indexes import Indexes
from starburst_executor.environment.installed import (
    INSTALLERS,
    Package,
    installed,
    normalized,
)
from starburst_executor.environment.lock import Lock, Wheel, digest_of
from starburst_executor.environment.resolve import check, resolve
from starburst_executor.environment.wheels import build
from starburst_executor.errors import PackageError

__all__ = ["Prepared", "Wishes", "prepare"]

log = logging.getLogger(__name__)

_SELF = "starburst-executor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What should be different on the workers.

    Attributes:
        requirements: Installed instead of what is installed here; None for the latter.
        packages: Installed in addition, or instead of a package of the same name.
        exclude: Names of packages to leave out.
    """

    requirements: tuple[str, ...] | None = None
    packages: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for line in (*(self.requirements or ()), *self.packages, *self.exclude):
            normalized(line)
        if _SELF in map(normalized, self.exclude):
            raise ValueError(
                f"exclude={list(self.exclude)!r}: workers run {_SELF}, which cannot be left out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An environment that is ready to be put into a store.

    Attributes:
        lock: What is to be installed.
        files: File of each of its wheels, by name.
    """

    lock: Lock
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Its name in every store."""
        return self.lock.digest


def prepare(
    wishes: Wishes, *, platform: str, packages: Sequence[Package] | None = None
) -> Prepared:
    """Capture what is installed here, as workers should have it.

    Builds wheels of checkouts and local files unless that was done before, and asks the indexes
    whether everything is available unless they confirmed exactly that before.

    Args:
        wishes: What should be different.
        platform: The workers' platform, in the form of `bootstrap.here`.
        packages: What is installed; by default, what is installed here.

    Raises:
        PackageError: something cannot be built or is unavailable; says what, and what to do.
    """
    found = installed() if packages is None else packages
    asked = {normalized(line) for line in (*(wishes.requirements or ()), *wishes.packages)}
    out = {normalized(name) for name in wishes.exclude} | (INSTALLERS - asked)
    own = [p for p in found if p.name == _SELF] or [_missing_self()]
    kept = own if wishes.requirements is not None else found
    replaced = {normalized(line) for line in wishes.packages}
    kept = [p for p in kept if p.name not in out | replaced]
    at = package_indexes.find()
    cache = bootstrap.cache_home()
    files = {p.name: build(p, cache / "wheels", at) for p in kept if p.line is None}
    lines = [p.line for p in kept if p.line is not None]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    target = _Target(python=python, platform=platform, indexes=at)
    if wishes.requirements is not None or wishes.packages or platform != bootstrap.here():
        lines = target.resolved(lines, files, found, wishes)
    lines = sorted(line for line in lines if normalized(line) not in out)
    prepared = _locked(target, lines, files)
    _check_once(prepared, lines, target, cache / "checked")
    _put_on_shelf(prepared, cache / "shelf" / prepared.digest)
    return prepared


def _missing_self() -> Package:
    raise PackageError(
        f"{_SELF} is imported here but not installed, so its workers' dependencies are unknown. "
        "Install it: `pip install -e` of its checkout is enough"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    python: str
    platform: str
    indexes: Indexes

    def resolved(
        self,
        lines: list[str],
        files: Mapping[str, Path],
        found: Sequence[Package],
        wishes: Wishes,
    ) -> list[str]:
        """Lines without the wheels' own, of everything that is needed there."""
        wheels = [f"{name} @ {file.as_uri()}" for name, file in sorted(files.items())]
        wanted = [*lines, *wheels, *(wishes.requirements or ()), *wishes.packages]
        held = [*lines, *wheels]
        if wishes.requirements is not None:
            held += _pickling(found, wishes)
        answer = resolve(
            wanted,
            held,
            python=self.python,
            platform=self.platform,
            indexes=self.indexes,
        )
        return [line for line in answer if normalized(line) not in files]


def _pickling(found: Sequence[Package], wishes: Wishes) -> list[str]:
    """The versions that client and worker must share, unless others are asked for."""
    asked = {normalized(line) for line in (*(wishes.requirements or ()), *wishes.packages)}
    shared = {"cloudpickle", "msgspec"} - asked
    return [p.line for p in found if p.name in shared and p.line is not None]


def _locked(target: _Target, lines: Sequence[str], files: Mapping[str, Path]) -> Prepared:
    wheels = tuple(
        Wheel(name=name, file=file.name, sha256=digest_of(file))
        for name, file in sorted(files.items())
    )
    at = target.indexes.without_secrets()
    lock = Lock(
        python=target.python,
        platform=target.platform,
        requirements=tuple(map(package_indexes.without_login, lines)),
        wheels=wheels,
        index_url=at.default,
        extra_index_urls=at.extra,
        find_links=at.find_links,
    )
    return Prepared(lock=lock, files={file.name: file for file in files.values()})


def _check_once(prepared: Prepared, lines: Sequence[str], target: _Target, verdicts: Path) -> None:
    verdict = verdicts / prepared.digest
    if verdict.exists():
        return
    said = check(
        lines,  # with the logins that this machine has
        python=target.python,
        platform=target.platform,
        indexes=target.indexes,
    )
    if said:
        log.warning(
            "workers have to build a package from source, and need its build tools for that:\n%s",
            said,
        )
    verdicts.mkdir(parents=True, exist_ok=True)
    verdict.touch()


def _put_on_shelf(prepared: Prepared, shelf: Path) -> None:
    """Keep a copy where workers of this machine look first: they need no store to start."""
    if (shelf / "lock.json").exists():
        return
    (shelf / "wheels").mkdir(parents=True, exist_ok=True)
    for name, file in prepared.files.items():
        with file.open("rb") as source:
            _appear(shelf / "wheels" / name, source.read())
    _appear(shelf / "lock.json", prepared.lock.encode())  # last: it is what tells that all is there


def _appear(target: Path, data: bytes) -> None:
    with NamedTemporaryFile(dir=target.parent, prefix=".", delete=False) as part:
        part.write(data)
    Path(part.name).replace(target)

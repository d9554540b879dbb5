"""Exactly what to install on a worker, identified by a digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

__all__ = ["Lock", "Wheel", "digest_of"]


class Wheel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A package that is in no index: a file stored beside the lock.

    Attributes:
        name: Name of the package, normalized.
        file: Name of the file, below `wheels/`.
        sha256: Digest of its content.
    """

    name: str
    file: str
    sha256: str


class Lock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`environments/<digest>/lock.json`.

    Attributes:
        schema: Version of this structure.
        python: Minor version, such as "3.11".
        platform: As returned by `bootstrap.here`, such as "linux-x86_64".
        requirements: `name==version` for packages in an index, else `name @ url`; sorted.
        wheels: Packages built from the caller's own sources, sorted.
        index_url: Package index; None for the worker's default.
        extra_index_urls: Additional indexes.
        find_links: Additional folders or pages of files.
    """

    schema: int = 1
    python: str
    platform: str
    requirements: tuple[str, ...]
    wheels: tuple[Wheel, ...] = ()
    index_url: str | None = None
    extra_index_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """The lock as bytes; equal environments give equal bytes everywhere."""
        return msgspec.json.encode(self)

    @property
    def digest(self) -> str:
        """The environment's name in every store."""
        return hashlib.sha256(self.encode()).hexdigest()


def digest_of(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

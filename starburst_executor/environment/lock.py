"""What is to be installed on a worker, exactly; named by its digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

__all__ = ["Lock", "Wheel", "digest_of"]


class Wheel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A package that no index has: a file beside the lock.

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
        schema: Of this very structure.
        python: Minor version, such as "3.11".
        platform: As `bootstrap.here` says it, such as "linux-x86_64".
        requirements: `name==version` for what an index has, `name @ url` for the rest, sorted.
        wheels: Packages built from the caller's own sources, sorted.
        index_url: Where to look; None for the worker's own default.
        extra_index_urls: Where to look besides.
        find_links: Folders or pages of files to look at besides.
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
        """The same bytes wherever the same is captured."""
        return msgspec.json.encode(self)

    @property
    def digest(self) -> str:
        """Names the environment in every store."""
        return hashlib.sha256(self.encode()).hexdigest()


def digest_of(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

"""Where packages are looked for: what pip and uv are told on this machine."""

from __future__ import annotations

import configparser
import logging
import os
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

__all__ = ["Indexes", "find", "stripped"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexes:
    """Package indexes.

    Attributes:
        default: In place of the public one; None for that.
        extra: Besides.
        find_links: Folders or pages of files, besides.
    """

    default: str | None = None
    extra: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """Command line options of uv."""
        options = ["--index-strategy", "unsafe-best-match"]  # which is pip's
        options += ["--index-url", self.default] if self.default else []
        for url in self.extra:
            options += ["--extra-index-url", url]
        for url in self.find_links:
            options += ["--find-links", url]
        return options

    def without_secrets(self) -> Indexes:
        """The same without passwords, which must not get into a store; says which lack one."""
        return Indexes(
            default=stripped(self.default) if self.default else None,
            extra=tuple(map(stripped, self.extra)),
            find_links=tuple(map(stripped, self.find_links)),
        )


def find() -> Indexes:
    """What environment variables say, then what the files of pip and uv say; all of it together."""
    env = os.environ
    layers = [_of_uv_variables(env), _of_pip_variables(env)]
    layers += [_of_uv_file(file) for file in _uv_files(env)]
    layers += [_of_pip_file(file) for file in _pip_files(env)]
    return Indexes(
        default=next((layer.default for layer in layers if layer.default), None),
        extra=_once(url for layer in layers for url in layer.extra),
        find_links=_once(url for layer in layers for url in layer.find_links),
    )


def _once(urls: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(urls))


# --- variables ----------------------------------------------------------------------


def _of_uv_variables(env: Mapping[str, str]) -> Indexes:
    named = [_url(word) for word in env.get("UV_INDEX", "").split()]
    default = env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL")
    return Indexes(
        default=_url(default) if default else None,
        extra=(*named, *env.get("UV_EXTRA_INDEX_URL", "").split()),
        find_links=tuple(env.get("UV_FIND_LINKS", "").replace(",", " ").split()),
    )


def _url(word: str) -> str:
    """Uv's indexes may have a name: `name=url`."""
    name, equals, url = word.partition("=")
    return url if equals and "/" not in name else word


def _of_pip_variables(env: Mapping[str, str]) -> Indexes:
    return Indexes(
        default=env.get("PIP_INDEX_URL") or None,
        extra=tuple(env.get("PIP_EXTRA_INDEX_URL", "").split()),
        find_links=tuple(env.get("PIP_FIND_LINKS", "").split()),
    )


# --- files --------------------------------------------------------------------------


def _config_home(env: Mapping[str, str]) -> Path:
    return Path(env.get("XDG_CONFIG_HOME") or Path.home() / ".config")


def _pip_files(env: Mapping[str, str]) -> Iterator[Path]:
    """Pip's configuration files, the nearest first."""
    named = env.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return  # pip is told to read none
    if named:
        yield Path(named)
    yield Path(sys.prefix) / "pip.conf"
    yield _config_home(env) / "pip" / "pip.conf"
    if sys.platform == "darwin":
        yield Path.home() / "Library" / "Application Support" / "pip" / "pip.conf"
    yield Path.home() / ".pip" / "pip.conf"
    yield from (Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"))


def _of_pip_file(file: Path) -> Indexes:
    parser = configparser.RawConfigParser()
    try:
        parser.read(file)
    except configparser.Error as error:
        log.warning("%s is not understood, and left out: %s", file, error)
        return Indexes()
    found: dict[str, str] = {}
    for section in ("global", "install"):  # pip lets the command's own section win
        if parser.has_section(section):
            found.update(parser[section])
    return Indexes(
        default=found.get("index-url") or None,
        extra=tuple(found.get("extra-index-url", "").split()),
        find_links=tuple(found.get("find-links", "").split()),
    )


def _uv_files(env: Mapping[str, str]) -> Iterator[Path]:
    if env.get("UV_CONFIG_FILE"):
        yield Path(env["UV_CONFIG_FILE"])
        return
    yield from (_config_home(env) / "uv" / "uv.toml", Path("/etc/uv/uv.toml"))


def _of_uv_file(file: Path) -> Indexes:
    try:
        said = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Indexes()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        log.warning("%s cannot be read, and is left out: %s", file, error)
        return Indexes()
    said = {**said.get("pip", {}), **said}
    listed: list[dict[str, Any]] = said.get("index", [])
    default = next((i["url"] for i in listed if i.get("default")), None)
    extra = [i["url"] for i in listed if not i.get("default")]
    return Indexes(
        default=default or said.get("index-url"),
        extra=(*extra, *said.get("extra-index-url", ())),
        find_links=tuple(said.get("find-links", ())),
    )


# --- secrets ------------------------------------------------------------------------


def stripped(url: str) -> str:
    """A URL without user and password; a warning if it had them."""
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    # The user in git+ssh://git@host is part of the address, and no secret.
    if not at or (parts.scheme.endswith("ssh") and ":" not in login):
        return url
    clean = urlunsplit(parts._replace(netloc=host))
    log.warning(
        "packages come from %s with a login, which workers do not get. If it asks them for one, "
        "start them with UV_INDEX_URL or a netrc file that has it, or provide an image with image=",
        clean,
    )
    return clean


def without_login(requirement: str) -> str:
    """A requirement without user and password in its URL; a warning if it had them."""
    name, at, url = requirement.partition(" @ ")
    return f"{name}{at}{stripped(url)}" if at else requirement

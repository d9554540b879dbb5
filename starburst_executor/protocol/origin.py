"""Where a session was created, so that its tasks find what they would find there.

    client              session.json       launcher, worker          child
      Origin.of_here  ->  origin    ->       starts there, passes ->   `take_on`: its sys.argv,
                                             it to its children        the end of its sys.path

A client may attach from anywhere: workers on this machine start in the session's directory,
not in that of the process that starts them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec

__all__ = ["Origin", "take_on"]

_VARIABLE = "STARBURST_ORIGIN"


class Origin(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """The process that created a session.

    Attributes:
        directory: Its working directory; "" if that no longer existed.
        argv: Its `sys.argv`.
        path: The directories on its `sys.path` in which no package is installed.
    """

    directory: str = ""
    argv: tuple[str, ...] = ()
    path: tuple[str, ...] = ()

    @classmethod
    def of_here(cls, is_local: Callable[[Path], bool]) -> Self:
        """The origin of sessions created by this process.

        Args:
            is_local: Whether nothing in a directory is known to a package installer.
        """
        try:
            directory = str(Path.cwd())
        except FileNotFoundError:
            directory = ""
        entries = [Path(directory, entry) for entry in sys.path if type(entry) is str]
        path = [str(e) for e in entries if e.is_absolute() and _is_dir(e) and is_local(e)]
        return cls(
            directory=directory if _is_text(directory) else "",
            argv=tuple(map(_text, sys.argv)),
            path=tuple(dict.fromkeys(filter(_is_text, path))),
        )

    def leave_to_children(self, folder: Path, *, same_machine: bool) -> None:
        """Let the children that this process starts take it on.

        Args:
            folder: Where to keep it for them; it may be too large for an environment variable.
            same_machine: Whether the client's directories exist here.
        """
        left = self if same_machine else Origin(argv=self.argv)
        file = folder / "origin.json"
        file.write_bytes(msgspec.json.encode(left))
        os.environ[_VARIABLE] = str(file)


_decoder = msgspec.json.Decoder(Origin)


def take_on() -> None:
    """In a child: adopt the arguments of the session's script, and find what it would import."""
    file = os.environ.pop(_VARIABLE, None)
    if file is None:
        return
    origin = _decoder.decode(Path(file).read_bytes())
    sys.argv[:] = origin.argv or [""]
    # At the end: shipped and installed modules come first.
    sys.path += [entry for entry in origin.path if entry not in sys.path]


def _is_dir(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  Path.is_dir raises if access is denied


def _is_text(path: str) -> bool:
    """Whether a path can be stored: one that is not valid Unicode cannot."""
    return _text(path) == path


def _text(value: str) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()

"""uv, as a program."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Mapping, Sequence

from starburst_executor.errors import PackageError

__all__ = ["run_uv", "uv"]

_TIMEOUT = 900.0  # seconds; building a large package takes minutes


@functools.cache
def uv() -> str:
    """Path of the program.

    Raises:
        PackageError: it is not installed, as on workers: another uv installs their environments.
    """
    try:
        from uv import find_uv_bin

        return str(find_uv_bin())
    except (ImportError, FileNotFoundError) as error:
        raise PackageError(
            f'environment="sync" needs uv, which is not here: {error}. Install it with '
            "`pip install uv`; a task that creates its own executor can pass "
            'environment="none"'
        ) from error


def run_uv(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it to its end; stdout and stderr are one text."""
    return subprocess.run(
        [uv(), *arguments],
        env=dict(os.environ if environment is None else environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )

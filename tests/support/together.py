"""The processes that share a run of the suite: what it leaves out, and what has ended in all.

Each appends a line for every test to a file of its own, in the folder where calls of AWS are noted.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from tests.support.recorder import call_recorder

WHY_PARTIAL = pytest.StashKey[str]()
"""Why this is not a run of the whole suite; "" if it is."""

_PATIENCE = 300.0  # seconds in which no test ends


def note_end(*, failed: bool) -> None:
    """Note that a test has ended, and whether any has failed in this process so far."""
    file = _folder() / f"{os.getpid()}.ended"
    with file.open("a") as lines:
        lines.write("failed\n" if failed else "passed\n")


def wait_for(tests: int) -> bool:
    """Wait until so many have ended; returns whether any has failed."""
    pause = threading.Event()
    ended = _ended()
    deadline = time.monotonic() + _PATIENCE
    while len(ended) < tests:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{len(ended)} of {tests} tests have ended, and none for {_PATIENCE:g} s: "
                "did a process that shares this run die?"
            )
        pause.wait(0.1)
        before, ended = ended, _ended()
        if len(ended) > len(before):
            deadline = time.monotonic() + _PATIENCE
    return "failed" in ended


def _ended() -> list[str]:
    files = _folder().glob("*.ended")
    return [line for file in files for line in file.read_text().splitlines()]


def _folder() -> Path:
    return Path(os.environ[call_recorder.FOLDER])

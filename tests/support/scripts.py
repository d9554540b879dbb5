"""Running a script as its reader would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def output_of(script: Path, cwd: Path) -> str:
    command = [sys.executable, str(script)]
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    assert ended.stderr == ""
    return ended.stdout

"""Type checkers see the types of calls and results through `submit` and `map`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import starburst_executor

ROOT = Path(__file__).parent.parent
SAMPLES = Path(__file__).parent / "support" / "typing_samples.py"
MISTAKE = re.compile(r"  # type: ignore\[([a-z-]+)\]")


@pytest.mark.slow
def test_mypy_finds_the_types_and_the_mistakes_of_the_samples(tmp_path: Path) -> None:
    """Without their comments, exactly the mistakes are reported, and each type is as asserted."""
    lines = SAMPLES.read_text().splitlines()
    marked = {n: MISTAKE.findall(line) for n, line in enumerate(lines, 1)}
    expected = {(n, code) for n, codes in marked.items() for code in codes}
    assert len(expected) == 13

    bare = tmp_path / SAMPLES.name
    bare.write_text("\n".join(MISTAKE.sub("", line) for line in lines))
    found = re.findall(r":(\d+): error: .*\[([a-z-]+)\]$", _mypy(bare), re.MULTILINE)
    assert {(int(line), code) for line, code in found} == expected


def _mypy(file: Path) -> str:
    config = ROOT / "pyproject.toml"
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", config, file],
        cwd=ROOT,  # where its cache is
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stderr == ""
    return ended.stdout


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(starburst_executor.__file__).parent / "py.typed").is_file()

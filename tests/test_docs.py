"""What is stated for users holds: the quick start runs, figures and names are the code's."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest

import starburst_executor
from starburst_executor import StarburstExecutor
from starburst_executor.cli.main import main
from starburst_executor.costs.estimate import estimate_run
from starburst_executor.costs.prices import TABLE_DATE, built_in, worker_hour
from starburst_executor.protocol.manifest import Intervals
from starburst_executor.protocol.worker_spec import WorkerSpec
from tests.support.markdown import README, ROOT, blocks, page, rows, sections


def quick_start() -> list[str]:
    return blocks(sections(README, "##")["Quick start"], "bash")


def test_quick_start_has_two_blocks_before_anything_else_is_asked() -> None:
    assert len(quick_start()) == 2
    before = README.partition("## Quick start")[0]
    assert "pip install" not in before
    assert not blocks(before, "(?:bash|sh|console)")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files of this tree that a clone would have, and nothing else."""
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    git = ["git", "-c", f"safe.directory={ROOT}", *listing]
    names = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    target = tmp_path / "clone"
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.mark.slow
def test_the_first_block_runs_in_a_clone_with_an_empty_home(clone: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    base = getattr(sys, "_base_executable", sys.executable)
    path = f"{Path(base).parent}{os.pathsep}{os.environ['PATH']}"
    scrubbed = ("PYTHON", "VIRTUAL_ENV", "XDG_", "COVERAGE_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(scrubbed)}
    ended = subprocess.run(
        ["bash", "-c", quick_start()[0]],
        cwd=clone,
        env=env | {"HOME": str(home), "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    assert ended.stdout.startswith("400 tasks, 8,000 years, ")
    assert "#" * 50 in ended.stdout
    assert not list(home.rglob("session.json"))


def test_ci_runs_the_second_block_of_the_readme_as_it_stands() -> None:
    """It is told to print what it would run, and prints the block."""
    printed = subprocess.run(
        ["bash", ROOT / ".ci" / "run", "--print"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout == quick_start()[1]


# --- what is stated --------------------------------------------------------------


def test_the_cost_formula_is_that_of_the_code() -> None:
    """Its prices, its table of requests, and the example computed from both."""
    text = page("explanation/costs.md")
    prices = built_in("us-east-1")
    [formula] = re.findall(r"cost = ([\d.]+) x \(PUTs \+ LISTs\) \+ ([\d.]+) x GETs", text)
    stated = [float(one) for one in formula]
    assert stated == pytest.approx([prices.write, prices.read])
    assert f"{TABLE_DATE:%Y-%m-%d}" in text
    table = {row[0]: row[1:] for row in rows(text)}
    alone = [int(n) for n in table["a task submitted while nothing else waits"]]
    busy = table["heartbeats and the like of a busy worker, a minute"]
    client = table["a client that waits for long tasks, a minute"]
    found = estimate_run(
        WorkerSpec(launcher="ecs"), prices, tasks=10_000, task_seconds=60, workers=100, startup=0,
    )  # fmt: skip
    minutes = 100
    writes = (
        10_000 * sum(alone[:2])
        + 100 * minutes * sum(int(n) for n in busy[:2])
        + minutes * int(client[1])
    )
    reads = 10_000 * alone[2] + 100 * minutes * int(busy[2]) + minutes * int(client[2])
    assert found.cost.requests == pytest.approx(writes * prices.write + reads * prices.read)
    [said] = re.findall(r"some ([\d,]+) PUTs and LISTs and ([\d,]+) GETs: \$(\d+\.\d+)", text)
    assert (writes // 1000, reads // 1000) == tuple(int(n.split(",")[0]) for n in said[:2])
    assert f"{found.cost.requests:.2f}" == said[2]


def test_limits_in_the_reference_are_those_of_the_code() -> None:
    stated = {row[0].strip("`"): row[1] for row in limits() if ", " not in row[0]}
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(StarburstExecutor).parameters.items()
    }
    fields = {f.name: f.default for f in msgspec.structs.fields(Intervals)}
    words = {"none": "None", "CPUs of this machine": "None"}
    for name, value in stated.items():
        assert words.get(value, value) == str((defaults | fields)[name])


def test_the_check_of_an_account_costs_what_the_price_table_says() -> None:
    text = page("how-to/check-an-account.md")
    prices = built_in("us-east-1", use_spot=False)
    hour = worker_hour(WorkerSpec(launcher="ecs"), prices)
    assert f"6 x 5/60 x ${hour:.5f} = ${6 * 5 / 60 * hour:.4f}" in text
    for price in (prices.vcpu_hour, prices.gb_hour):
        assert f"${price}" in text
    assert f"${1000 * prices.write:.3f}" in text


def test_pairs_of_intervals_in_the_reference_are_those_of_the_code() -> None:
    pairs = [row for row in limits() if ", " in row[0]]
    stated = {
        name.strip("`"): float(value)
        for row in pairs
        for name, value in zip(row[0].split(", "), row[1].split(", "), strict=True)
    }
    fields = {f.name: f.default for f in msgspec.structs.fields(Intervals)}
    assert stated == {name: fields[name] for name in stated}
    alone = {row[0].strip("`") for row in limits() if ", " not in row[0]}
    assert fields.keys() <= stated.keys() | alone


def limits() -> list[list[str]]:
    found = rows(page("reference/limits.md"))
    assert found
    return found


def test_commands_in_the_guide_are_those_of_the_command_line() -> None:
    table = rows(sections(page("how-to/watch.md"))["From a shell"])
    stated = [row[0].split()[1].strip("`") for row in table]
    assert sorted(stated) == sorted(main.list_commands(click.Context(main)))


def test_exceptions_named_in_the_guide_exist() -> None:
    table = rows(sections(page("how-to/handle-failures.md"))["Tell the kinds apart"])
    named = {row[0].strip("`") for row in table}
    assert len(named) == 5
    assert named <= set(starburst_executor.__all__)

"""What `collect` prints and writes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from starburst_executor import StarburstExecutor
from starburst_executor.cli.exits import Exit
from starburst_executor.client.codec import python_version
from tests.support.command_line import PATIENCE, QUICK, Finished, Made, cli, parsed, run


def test_collect_prints_values_and_errors(finished: Finished) -> None:
    result = finished.run("collect")
    lines = result.stdout.splitlines()
    assert lines[3].split() == ["2", "0-2", "completed", *lines[3].split()[3:5], "4"]
    assert lines[4].endswith("ValueError: bad 3")
    assert result.exit_code == Exit.TASKS_FAILED


def test_collect_as_json_has_the_values(finished: Finished) -> None:
    outcomes = parsed(finished.run("collect", "--json").stdout, "outcomes")
    values = [one["value"] for one in outcomes if one["state"] == "completed"]
    assert values == [0, 1, 4, 16, 25, 49, 64]
    assert "bad 3" in outcomes[3]["traceback"]


def test_collect_gives_what_json_cannot_hold_as_its_repr(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    with StarburstExecutor(1, store=store, keep=True, intervals=QUICK) as executor:
        executor.submit(complex, 1, 2)
    outcome = parsed(run("collect", executor.session_id, "--json", store=store).stdout, "outcomes")[
        0
    ]
    assert (outcome["value"], outcome["repr"]) == (None, "(1+2j)")
    target = tmp_path / "out.json"
    refused = run("collect", executor.session_id, "-o", str(target), store=store)
    assert refused.exit_code == Exit.OTHER
    assert "task 0-0" in refused.stderr
    assert "out.pkl" in refused.stderr
    assert not target.exists()


def test_collect_writes_a_pickle_of_outcomes(finished: Finished, tmp_path: Path) -> None:
    target = tmp_path / "results.pkl"
    result = finished.run("collect", "-o", str(target))
    assert (result.exit_code, result.stdout) == (Exit.TASKS_FAILED, "")
    outcomes = pickle.loads(target.read_bytes())
    assert [one.value for one in outcomes[:3]] == [0, 1, 4]
    assert isinstance(outcomes[3].error, ValueError)


def test_collect_writes_json(finished: Finished, tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    finished.run("collect", "-o", str(target))
    assert len(parsed(target.read_text(), "outcomes")) == 10


@pytest.mark.parametrize("name", ["results.txt", "results", "no/such/folder/r.pkl"])
def test_collect_refuses_a_file_it_cannot_write_before_it_waits(
    made: Made, tmp_path: Path, name: str
) -> None:
    result = made.run("collect", "--wait", "-o", str(tmp_path / name))
    assert result.exit_code == Exit.USAGE
    assert not list(tmp_path.glob("results*"))


def test_collect_finds_classes_of_modules_that_were_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "shapes.py").write_text(
        "class Box:\n"
        "    def __init__(self, side): self.side = side\n"
        "    def __repr__(self): return f'Box({self.side})'\n"
    )
    script = folder / "script.py"
    script.write_text(
        "import sys, shapes\n"
        "from starburst_executor import StarburstExecutor\n"
        "with StarburstExecutor(1, store=sys.argv[1], keep=True) as executor:\n"
        "    executor.submit(shapes.Box, 3)\n"
        "print(executor.session_id)\n"
    )
    store = str(tmp_path / "store")
    made = subprocess.run(
        [sys.executable, str(script), store], capture_output=True, text=True, check=True
    )
    done = cli("collect", made.stdout.strip(), "--store", store, cwd=tmp_path)
    assert "Box(3)" in done.stdout


def test_collect_waits_and_starts_workers_that_lack(directory_url: str) -> None:
    made = Made(directory_url, python=python_version())
    try:
        result = made.run("collect", "--wait", "--timeout", str(PATIENCE), "--json")
        outcomes = parsed(result.stdout[result.stdout.index('{"schema"') :], "outcomes")
        assert [one["value"] for one in outcomes] == [1, 2, 4]
        assert result.exit_code == 0
    finally:
        made.run("cleanup", "--force")
    assert made.stored() == []

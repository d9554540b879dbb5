"""Executors inside tasks: allowed, to a depth; never while a task is only being unpickled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from starburst_executor import NestingError, StarburstExecutor
from starburst_executor.nesting import DEPTH_MAX, DEPTH_VARIABLE
from tests.support.sessions import QUICK, keys
from tests.support.tasks import double

SUM_IN_A_TASK = """
def nested(store, depth):
    from starburst_executor import StarburstExecutor

    with StarburstExecutor(1, store=store) as executor:
        if depth > 1:
            return executor.submit(nested, store, depth - 1).result()
        return executor.submit(sum, [1, 2]).result()
"""


def _run_to_its_end(*arguments: str, folder: Path, seconds: float = 60) -> tuple[int, str]:
    """Exit code and output; whatever the script left running is found, killed and reported."""
    mark = f"STARBURST_TEST_MARK={folder}"
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "STARBURST_TEST_MARK": str(folder),
            "STARBURST_STORE": str(folder / "store"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
    finally:
        left = _marked(mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert not left, f"left running: {left}"
    return process.returncode, printed


def _marked(mark: str) -> list[int]:
    """Processes with this in their environment, after a moment for what is just ending."""
    pause = threading.Event()
    for _ in range(50):
        found = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/environ")
            if mark.encode() in _bytes(path)
        ]
        if not found:
            return []
        pause.wait(0.1)
    return found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "arguments", [("-c", "import exp1"), ("-m", "runner")], ids=["import", "runpy"]
)
def test_a_script_that_is_imported_without_a_main_guard_ends_by_itself(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "exp1.py").write_text(
        textwrap.dedent(
            """
            from starburst_executor import StarburstExecutor

            class Model:
                def __init__(self, n):
                    self.n = n

            def work(model):
                return model.n

            with StarburstExecutor(2, name="exp1") as executor:
                print(list(executor.map(work, [Model(1), Model(2)])))
            """
        )
    )
    (tmp_path / "runner.py").write_text(
        "import runpy, sys; sys.path.insert(0, '.'); runpy.run_module('exp1', run_name='exp1')\n"
    )
    code, printed = _run_to_its_end(*arguments, folder=tmp_path)
    # Either the functions travelled by value and all is well, or the reason is plain.
    if code == 0:
        assert printed == "[1, 2]\n"
    else:
        assert "main guard" in printed
    assert len(keys(str(tmp_path / "store"), "sessions/")) <= 40  # of one session


def test_an_executor_made_by_an_import_for_a_task_is_refused_with_the_reason(
    tmp_path: Path,
) -> None:
    (tmp_path / "library.py").write_text(
        textwrap.dedent(
            """
            from starburst_executor import StarburstExecutor

            executor = StarburstExecutor(1)

            def work(n):
                return n
            """
        )
    )
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            """
            import library
            with library.executor as executor:
                print(executor.submit(library.work, 1).exception())
            """
        )
    )
    code, printed = _run_to_its_end("script.py", folder=tmp_path)
    assert code == 0, printed
    assert "importing a module for a task" in printed
    assert 'if __name__ == "__main__":' in printed
    assert keys(str(tmp_path / "store"), "sessions/") == []


def test_executors_inside_tasks_work_to_a_depth(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        SUM_IN_A_TASK + "\nif __name__ == '__main__':\n    print(nested('store', 2))\n"
    )
    code, printed = _run_to_its_end("script.py", folder=tmp_path)
    assert (code, printed) == (0, "3\n")


def test_executors_inside_tasks_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        SUM_IN_A_TASK + "\nif __name__ == '__main__':\n    print(nested('store', 99))\n"
    )
    code, printed = _run_to_its_end("script.py", folder=tmp_path, seconds=120)
    assert code != 0
    assert f"{DEPTH_MAX} sessions" in printed
    assert "NestingError" in printed


def test_a_task_knows_its_depth_by_its_session_whoever_started_the_worker(
    directory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StarburstExecutor(1, store=directory_url, intervals=QUICK) as executor:
        monkeypatch.setenv(DEPTH_VARIABLE, "2")  # as for a client within a task
        assert executor.submit(os.getenv, DEPTH_VARIABLE).result(60) == "1"
        assert executor.submit(double, 1).result(60) == 2


def test_beyond_the_depth_nothing_is_stored(
    directory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEPTH_VARIABLE, str(DEPTH_MAX))
    with pytest.raises(NestingError, match="recurs"):
        StarburstExecutor(1, store=directory_url)
    assert keys(directory_url) == []

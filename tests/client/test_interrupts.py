"""Ctrl-C, once, twice and at a bad moment: workers are stopped, or it is said which are left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from starburst_executor import StarburstExecutor
from starburst_executor.client.interrupts import Uninterrupted
from starburst_executor.launchers.local import LocalLauncher
from tests.support.sessions import keys
from tests.support.tasks import until

HEAD = """
import sys
from pathlib import Path
from starburst_executor import StarburstExecutor

def wait_for_ever(folder):
    import threading
    Path(folder).mkdir()
    threading.Event().wait()

def start(workers=1):
    executor = StarburstExecutor(workers, store=sys.argv[1])
    future = executor.submit(wait_for_ever, sys.argv[2])
    print(executor.session_id, flush=True)
    return executor, future
"""
WAITS = {
    "in the block": "executor, future = start()\nwith executor:\n    future.result()\n",
    "at its end": "executor, future = start()\nwith executor:\n    pass\n",
    "in shutdown": "executor, future = start()\nexecutor.shutdown()\n",
}


class Script:
    """A script whose task runs for ever, in a process of its own."""

    def __init__(self, folder: Path, text: str) -> None:
        self.store = str(folder / "store")
        file = folder / "script.py"
        file.write_text(HEAD + textwrap.dedent(text))
        self.process = subprocess.Popen(
            [sys.executable, str(file), self.store, str(folder / "running")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.session_id = self.process.stdout.readline().strip()
        until((folder / "running").exists, "the task running")

    @property
    def live(self) -> set[str]:
        return LocalLauncher().live(f"{self.store}/sessions/{self.session_id}")

    def interrupt(self, *pauses: float) -> str:
        """What it prints to stderr when it gets SIGINT, and again after each pause."""
        self.process.send_signal(signal.SIGINT)
        for pause in pauses:
            time.sleep(pause)  # the subject: how far apart they are
            self.process.send_signal(signal.SIGINT)
        _, printed = self.process.communicate(timeout=60)
        return printed

    def remove(self) -> None:
        self.process.kill()
        self.process.wait()
        if keys(self.store, "sessions/"):
            executor = StarburstExecutor.attach(self.session_id, store=self.store)
            executor.cleanup(force=True)


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[list[Script]]:
    started: list[Script] = []
    yield started
    for script in started:
        script.remove()


@pytest.mark.parametrize("pauses", [(), (0.002,), (0.02,), (0.005,) * 4], ids=str)
@pytest.mark.parametrize("where", WAITS)
def test_interrupts_however_close_stop_the_workers(
    tmp_path: Path, scripts: list[Script], where: str, pauses: tuple[float, ...]
) -> None:
    script = Script(tmp_path, WAITS[where])
    scripts.append(script)
    printed = script.interrupt(*pauses)
    assert script.process.returncode != 0
    assert "KeyboardInterrupt" in printed
    assert script.session_id in printed  # that it is kept, or left running
    if "left running" not in printed:
        assert script.live == set()


def test_who_has_no_patience_with_the_stop_is_told_how_to_do_it(
    tmp_path: Path, scripts: list[Script]
) -> None:
    text = """
    executor, future = start()
    def stop(*args, **kwargs):
        print("stopping", flush=True)
        __import__("time").sleep(600)
    executor._engine.launcher.stop = stop
    with executor:
        future.result()
    """
    script = Script(tmp_path, text)
    scripts.append(script)
    script.process.send_signal(signal.SIGINT)
    assert script.process.stdout is not None
    assert script.process.stdout.readline() == "stopping\n"
    printed = script.interrupt(*[1.2] * 4)
    assert f"starburst-executor cleanup {script.session_id}" in printed
    assert script.live  # it says so, for it is true


def test_an_interrupt_while_the_interpreter_leaves_a_session_is_not_silent(
    tmp_path: Path, scripts: list[Script]
) -> None:
    text = """
    executor, future = start()
    def slow():
        print("leaving", flush=True)
        __import__("time").sleep(600)
    executor._engine.flush = slow
    """
    script = Script(tmp_path, text)
    scripts.append(script)
    assert script.process.stdout is not None
    assert script.process.stdout.readline() == "leaving\n"
    printed = script.interrupt()
    assert "left running" in printed
    assert f"starburst-executor cleanup {script.session_id}" in printed


def test_what_is_uninterrupted_is_done_once_and_wholly() -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[bool] = []

    def work() -> None:
        begun.set()
        go_on.wait(60)
        done.append(True)

    uninterrupted = Uninterrupted("test-stop", work)

    def interrupt() -> None:
        begun.wait(60)
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGINT)
        go_on.set()

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    uninterrupted.run()
    interrupting.join()
    uninterrupted.run()
    assert done == [True]

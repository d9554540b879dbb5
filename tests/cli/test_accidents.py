"""What befalls a command while it runs: one line says so, never a traceback."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from starburst_executor.cli.exits import Exit
from starburst_executor.cli.main import SECTIONS, main
from starburst_executor.storage.base import Store
from starburst_executor.storage.url import open_store
from tests.support.command_line import Finished, run
from tests.support.sessions import CountingStore

OF_A_SESSION: dict[str, tuple[str, ...]] = {
    "status": (),
    "tasks": (),
    "show": ("0-0",),
    "logs": (),
    "errors": (),
    "collect": (),
    "report": ("--json",),
    "cancel": (),
    "retry": ("--all",),
    "extend": ("60",),
    "scale": ("2",),
    "cleanup": ("--force",),
}
OF_ALL_SESSIONS: dict[str, tuple[str, ...]] = {"list": (), "prune": ("--older-than", "0s")}
LAUNCH = "starburst_executor.launchers.local.LocalLauncher.launch"
OTHERS = {"config", "setup", "teardown", "quota", "estimate", "doctor", "worker"}


def test_every_verb_is_here() -> None:
    verbs = {verb for section in SECTIONS.values() for verb in section}
    assert verbs == OF_A_SESSION.keys() | OF_ALL_SESSIONS.keys() | OTHERS


class Vanishing(CountingStore):
    """A store whose sessions somebody else deletes just before a certain request."""

    def __init__(self, store: Store, request: int) -> None:
        super().__init__(store)
        self.left = request

    def _count(self, method: str, key: str) -> None:
        self.left -= 1
        if self.left == 0:
            shutil.rmtree(Path(self.url) / "sessions", ignore_errors=True)
        super()._count(method, key)


@pytest.fixture
def deleted_before(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Result, bool]]:
    """Runs a command on a session that is deleted before a request; says whether it came to that.

    No workers are started.
    """
    monkeypatch.setattr(LAUNCH, lambda *arguments: [])

    def run_it(request: int, *arguments: str) -> tuple[Result, bool]:
        folder = tmp_path / str(request)
        shutil.copytree(finished.store, folder)
        stores: list[Vanishing] = []

        def open_vanishing(url: str | Path) -> Store:
            stores.append(Vanishing(open_store(url), request))
            return stores[-1]

        monkeypatch.setattr("starburst_executor.storage.url.open_store", open_vanishing)
        monkeypatch.chdir(tmp_path)
        result = run(*arguments, store=str(folder))
        return result, stores[0].left <= 0

    return run_it


@pytest.mark.parametrize("verb", [*OF_A_SESSION, *OF_ALL_SESSIONS])
def test_a_session_that_somebody_deletes_meanwhile_is_one_line(
    verb: str, finished: Finished, deleted_before: Callable[..., tuple[Result, bool]]
) -> None:
    for request in itertools.count(1):
        result, deleted = deleted_before(request, *arguments_for(verb, finished.id))
        if not deleted:
            break
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert result.stderr.count("\n") <= 1
        if result.exit_code not in (Exit.OK, Exit.TASKS_FAILED):
            assert result.exit_code == Exit.NOT_FOUND
            assert finished.id in result.stderr


FULL = Path("/dev/full")
full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
SAID = "Error: the output could not be written: No space left on device\n"


def arguments_for(verb: str, session_id: str) -> tuple[str, ...]:
    if verb in OF_A_SESSION:
        return (verb, session_id, *OF_A_SESSION[verb])
    return (verb, *OF_ALL_SESSIONS.get(verb, ()))


@full
@pytest.mark.parametrize("verb", [*OF_A_SESSION, *OF_ALL_SESSIONS, "config", "doctor", "--help"])
def test_an_output_that_is_full_is_one_line(
    verb: str,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = shutil.copytree(finished.store, tmp_path / "store")
    monkeypatch.setenv("STARBURST_STORE", str(store))
    monkeypatch.setattr(LAUNCH, lambda *arguments: [])
    monkeypatch.chdir(tmp_path)
    output = FULL.open("w")
    monkeypatch.setattr("sys.stdout", output)
    with pytest.raises(SystemExit) as ended:
        main(arguments_for(verb, finished.id))
    with contextlib.suppress(OSError):  # what was not written is written again
        output.close()
    assert ended.value.code == Exit.OTHER
    assert capsys.readouterr().err == SAID


@full
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_process_whose_output_is_full_says_nothing_more_when_it_exits(
    finished: Finished, unbuffered: str
) -> None:
    settings = {"STARBURST_STORE": finished.store, "PYTHONUNBUFFERED": unbuffered}
    with FULL.open("w") as output:
        done = subprocess.run(
            [sys.executable, "-m", "starburst_executor", "status", finished.id],
            env=os.environ | settings,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (Exit.OTHER, SAID)

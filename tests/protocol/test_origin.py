"""Tasks find what is found where the session was made: directory, arguments, files, modules."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from starburst_executor import ExecutorBroken, LaunchFailed, StarburstExecutor
from starburst_executor.protocol import codec
from starburst_executor.protocol.manifest import Manifest
from starburst_executor.protocol.origin import Origin
from starburst_executor.protocol.session import Session
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.url import open_store
from tests.support.sessions import QUICK, run_python


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the session's client."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def session_id(home: Path, directory_url: str) -> str:
    """A session without workers."""
    executor = StarburstExecutor(1, store=directory_url, intervals=QUICK, keep=True)
    return executor.detach()


@pytest.fixture
def elsewhere(
    session_id: str, directory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StarburstExecutor]:
    """A client that has attached from another directory."""
    other = tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    executor = StarburstExecutor.attach(session_id, store=directory_url)
    yield executor
    executor.cleanup(force=True)


def script(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "script.py"
    file.write_text(textwrap.dedent(text))
    return file


def test_workers_start_in_the_directory_of_the_session_whoever_starts_them(
    home: Path, elsewhere: StarburstExecutor
) -> None:
    (home / "data.txt").write_text("found")

    assert elsewhere.submit(os.getcwd).result(60) == str(home)
    assert elsewhere.submit(lambda: Path("data.txt").read_text()).result(60) == "found"


def test_a_directory_that_is_gone_is_named_before_any_task_runs(
    home: Path, elsewhere: StarburstExecutor
) -> None:
    home.rmdir()

    with pytest.raises(ExecutorBroken, match="no such directory") as caught:
        elsewhere.submit(os.getcwd).result(60)
    assert isinstance(caught.value, LaunchFailed)
    assert f"mkdir -p {home}" in str(caught.value)
    elsewhere_too = StarburstExecutor.attach(
        elsewhere.session_id, store=elsewhere._engine.session.store.url
    )
    home.mkdir()
    (future,) = elsewhere_too.futures
    assert future.result(60) == str(home)


def test_tasks_have_the_arguments_of_the_script(tmp_path: Path, directory_url: str) -> None:
    file = script(
        tmp_path / "code",
        """
        import sys
        from starburst_executor import StarburstExecutor
        with StarburstExecutor(1, store=sys.argv[1]) as ex:
            assert ex.submit(lambda: __import__("sys").argv).result(60) == sys.argv
        """,
    )
    many = [f"{i}.csv".zfill(200) for i in range(2000)]  # too much for the environment
    ran = run_python(file, directory_url, *many)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("", "", 0)


def test_files_beside_a_module_and_modules_imported_late_are_found(
    tmp_path: Path, directory_url: str
) -> None:
    code = tmp_path / "code"
    file = script(
        code,
        """
        import os, sys
        import helper
        from starburst_executor import StarburstExecutor
        os.chdir("/")
        with StarburstExecutor(1, store=sys.argv[1]) as ex:
            print(ex.submit(helper.work).result(60))
        """,
    )
    (code / "table.txt").write_text("table")
    (code / "late.py").write_text("VALUE = 'late'\n")
    (code / "helper.py").write_text(
        "from pathlib import Path\n"
        "def work():\n"
        "    import late\n"
        "    return Path(__file__).with_name('table.txt').read_text() + late.VALUE\n"
    )
    ran = run_python(file, directory_url)
    assert (ran.stdout, ran.stderr) == ("tablelate\n", "")


def test_what_was_shipped_comes_before_what_lies_in_the_directories(
    tmp_path: Path, directory_url: str
) -> None:
    file = script(
        tmp_path / "code",
        """
        import sys
        from pathlib import Path
        import helper
        from starburst_executor import StarburstExecutor
        with StarburstExecutor(1, store=sys.argv[1]) as ex:
            future = ex.submit(helper.work)
            Path(helper.__file__).write_text("def work(): return 'edited'")
            print(future.result(60), ex.submit(helper.work).result(60))
        """,
    )
    (tmp_path / "code" / "helper.py").write_text("def work(): return 'shipped'\n")
    ran = run_python(file, directory_url)
    assert (ran.stdout, ran.stderr) == ("shipped shipped\n", "")


def test_a_session_that_does_not_say_where_it_was_made_can_be_used(
    session_id: str, directory_url: str, home: Path
) -> None:
    session = Session(open_store(directory_url), session_id, SystemRuntime())
    manifest = session.load()
    assert manifest.origin is not None
    assert manifest.origin.directory == str(home)
    older = session.amend(lambda m: replace(m, origin=None))
    assert b"origin" not in codec.encode(older)
    assert codec.decode(codec.encode(older), Manifest, "session.json") == older

    executor = StarburstExecutor.attach(session_id, store=directory_url)
    try:
        assert executor.submit(os.getcwd).result(60) == str(home)
    finally:
        executor.cleanup(force=True)


def test_names_that_are_no_unicode_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    odd.mkdir()
    monkeypatch.chdir(odd)
    monkeypatch.setattr(sys, "argv", ["prog", "\udcff"])
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])

    origin = Origin.of_here(lambda _: True)

    assert origin == Origin(argv=("prog", "\\udcff"), path=(str(tmp_path),))


def test_a_process_whose_directory_is_gone_has_none(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]);"
        "from starburst_executor.protocol.origin import Origin;"
        "sys.path[:] = ['', b'/', '/']; sys.argv = ['x'];"
        "print(Origin.of_here(lambda _: True))"
    )
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, gone], stdout=subprocess.PIPE, check=True
    )
    assert done.stdout == b"Origin(directory='', argv=('x',), path=('/',))\n"

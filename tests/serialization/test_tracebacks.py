"""Tracebacks of tasks read as they would on the client: real file, line and source."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.support.sessions import run_python

RUN = """
import sys
from starburst_executor import StarburstExecutor

def remote_traceback(function, *args):
    with StarburstExecutor(1, store=sys.argv[1]) as ex:
        return str(ex.submit(function, *args).exception(60).__cause__)
"""


def written(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(textwrap.dedent, texts)))
    return path


def numbered(path: Path, text: str) -> str:
    """How a traceback begins to show the line of a file that has this text."""
    number = path.read_text().splitlines().index(text) + 1
    return f'File "{path}", line {number}, in '


def printed(script: Path, store: str) -> str:
    ran = run_python(script, store)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_function_of_a_script_shows_file_line_and_source(
    tmp_path: Path, directory_url: str
) -> None:
    script = written(
        tmp_path / "script.py",
        RUN,
        """
        def inner(x):
            return 1 / x  # the line itself

        def outer(x):
            call = lambda y: inner(y)  # noqa
            return call(x)

        print(remote_traceback(outer, 0))
        """,
    )
    text = printed(script, directory_url)

    assert numbered(script, "    return 1 / x  # the line itself") + "inner" in text
    assert numbered(script, "    return call(x)") + "outer" in text
    assert "    return 1 / x  # the line itself\n" in text
    assert "    call = lambda y: inner(y)  # noqa\n" in text
    assert "dynamic-code" not in text
    assert "~~^~~" in text


def test_the_source_is_that_of_what_ran_though_the_script_was_edited(
    tmp_path: Path, directory_url: str
) -> None:
    script = written(
        tmp_path / "script.py",
        RUN,
        """
        from pathlib import Path

        def fails(x):
            return 1 / x  # as it ran

        def edit_and_fail(x):
            text = Path(__file__).read_text()
            Path(__file__).write_text(text.replace("as it " + "ran", "edited"))
            return fails(x)

        edit_and_fail.__globals__["__file__"] = str(Path(__file__))
        print(remote_traceback(edit_and_fail, 0))
        """,
    )
    text = printed(script, directory_url)

    assert "# edited" in script.read_text()
    assert "return 1 / x  # as it ran\n" in text


def test_a_cell_of_a_notebook_shows_its_source(tmp_path: Path, directory_url: str) -> None:
    script = written(
        tmp_path / "kernel.py",
        RUN,
        """
        import linecache
        cell = "def fails(x):\\n    return 1 / x  # of a cell\\n"
        name = "/no/such/folder/ipykernel_1/123.py"
        linecache.cache[name] = (len(cell), None, cell.splitlines(True), name)
        exec(compile(cell, name, "exec"))
        print(remote_traceback(fails, 0))
        """,
    )
    text = printed(script, directory_url)

    assert 'File "/no/such/folder/ipykernel_1/123.py", line 2, in fails' in text
    assert "return 1 / x  # of a cell\n" in text


def test_a_shipped_module_shows_the_path_that_the_user_knows(
    tmp_path: Path, directory_url: str
) -> None:
    code = tmp_path / "code"
    single = written(code / "single.py", "def fails(x):\n    return 1 / x  # single\n")
    member = written(
        code / "package" / "deep" / "member.py",
        "import single\ndef fails(x):\n    return single.fails(x)  # member\n",
    )
    written(code / "package" / "__init__.py")
    written(code / "package" / "deep" / "__init__.py")
    script = written(
        tmp_path / "script.py",
        """
        import shutil, sys
        import package.deep.member
        from starburst_executor import StarburstExecutor
        with StarburstExecutor(1, store=sys.argv[1]) as ex:
            future = ex.submit(package.deep.member.fails, 0)
            if sys.argv[2:] == ["gone"]:
                shutil.rmtree(sys.path[1])
            print(future.exception(60).__cause__)
        """,
    )
    for more in ([], ["gone"]):  # as on another machine
        ran = run_python(script, directory_url, *more, PYTHONPATH=str(code))
        assert ran.returncode == 0, ran.stderr
        assert f'File "{single}", line 2, in fails' in ran.stdout
        assert "    return 1 / x  # single\n" in ran.stdout
        assert f'File "{member}", line 3, in fails' in ran.stdout
        assert "    return single.fails(x)  # member\n" in ran.stdout


@pytest.mark.parametrize("times", [1, 2])
def test_a_reloaded_module_runs_anew_and_shows_its_new_source(
    tmp_path: Path, directory_url: str, times: int
) -> None:
    module = written(tmp_path / "code" / "again.py", "def f():\n    return 0\n")
    script = written(
        tmp_path / "script.py",
        """
        import importlib, sys
        from pathlib import Path
        import again
        from starburst_executor import StarburstExecutor
        with StarburstExecutor(1, store=sys.argv[1]) as ex:
            print(ex.submit(again.f).result(60))
            for i in range(1, int(sys.argv[2]) + 1):
                text = f"def f():\\n    return {i} + 0 * {'1' * i}\\n"
                Path(again.__file__).write_text(text)
                importlib.reload(again)
                print(ex.submit(again.f).result(60))
            Path(again.__file__).write_text("def f():\\n    return 1 // 0  # reloaded\\n")
            importlib.reload(again)
            print(ex.submit(again.f).exception(60).__cause__)
        """,
    )
    ran = run_python(script, directory_url, str(times), PYTHONPATH=str(tmp_path / "code"))
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[: times + 1] == [str(i) for i in range(times + 1)]
    assert f'File "{module}", line 2, in f' in ran.stdout
    assert "return 1 // 0  # reloaded" in ran.stdout

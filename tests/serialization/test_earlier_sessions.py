"""A session that an earlier version of this package made.

What it stored is read, and what was pending runs.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from starburst_executor import SerializationError, StarburstExecutor, TaskFuture, VersionMismatch
from starburst_executor.serialization import remote
from tests.support.sessions import run_python

SUPPORT = Path(__file__).parents[1] / "support"
KINDS = SUPPORT / "script_kinds.py"
EARLIER = SUPPORT / "earlier_session" / "store"
(SESSION,) = (folder.name for folder in (EARLIER / "sessions").iterdir())
MANIFEST = json.loads((EARLIER / "sessions" / SESSION / "session.json").read_bytes())
HERE = "{}.{}".format(*sys.version_info)

same_python = pytest.mark.skipif(
    MANIFEST["python"] != HERE, reason=f"the session was made by Python {MANIFEST['python']}"
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return shutil.copytree(EARLIER, tmp_path / "store")


@pytest.fixture
def futures(store: Path) -> Iterator[list[TaskFuture[object]]]:
    with StarburstExecutor.attach(SESSION, store=store) as executor:
        yield executor.futures


@same_python
def test_stored_results_of_an_earlier_version_are_read(futures: list[TaskFuture[object]]) -> None:
    assert futures[0].result(60) == 49
    assert repr(futures[1].result(60)) == "Point(x=4, y=5)"


@same_python
def test_stored_exception_of_an_earlier_version_comes_back_as_itself(
    futures: list[TaskFuture[object]],
) -> None:
    error = futures[2].exception(60)
    assert type(error).__name__ == "Full"
    assert error is not None
    assert error.args == ("bus 7", "no seat is left")
    assert "in boards" in str(error.__cause__)


@same_python
def test_pending_tasks_of_an_earlier_version_run(futures: list[TaskFuture[object]]) -> None:
    assert [f.result(60) for f in futures[3:5]] == [[0, 1], [4, 9]]  # map(chunksize=2)
    with pytest.raises(SerializationError, match="cannot pickle argument 0, of type generator"):
        futures[5].result(60)  # was refused when it was submitted
    assert repr(futures[6].result(60)) == "Point(x=6, y=7)"


@pytest.mark.skipif(MANIFEST["python"] == HERE, reason="tests the other Python versions")
def test_results_of_a_session_of_another_python_are_refused_and_tasks_too(store: Path) -> None:
    executor = StarburstExecutor.attach(SESSION, store=store)
    for future in executor.futures[:2]:
        with pytest.raises(VersionMismatch, match=HERE):
            future.result(60)
    assert "no seat is left" in str(executor.futures[2].exception(60))
    with pytest.raises(VersionMismatch, match=HERE):
        executor.submit(print)
    executor.cleanup(force=True)


def test_what_is_stored_names_nothing_of_this_package_but_what_keeps_its_name(
    directory_url: str,
) -> None:
    run_python(KINDS, "leave", directory_url, timeout=120)
    stored = b"".join(
        path.read_bytes() for path in Path(directory_url).rglob("*") if path.is_file()
    )
    named = set(re.findall(rb"[\x00-\x7f](starburst_executor(?:\.[a-z_]+)+)", stored))
    assert named - {b"starburst_executor.errors"} == {b"starburst_executor.serialization.remote"}


@pytest.mark.parametrize("name", sorted({*remote.__all__, "_Other"}))
def test_pickled_names_have_the_home_that_they_will_have_for_ever(name: str) -> None:
    named = f"cstarburst_executor.serialization.remote\n{name}\n.".encode()
    assert pickle.loads(named) is getattr(remote, name)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("serialize", "refuse"),
        ("mapping", "call_each"),
        ("code_source", "restore_code"),
        ("namespace", "make_function"),
        ("exception_state", "_Other"),
    ],
)
def test_former_names_of_what_is_pickled_are_known(module: str, name: str) -> None:
    former = f"cstarburst_executor.{module}\n{name}\n.".encode()
    assert pickle.loads(former) is getattr(remote, name)

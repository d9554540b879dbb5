"""What users may import, and what that costs."""

from __future__ import annotations

import inspect
import pickle
from concurrent.futures import BrokenExecutor, Executor, Future
from importlib.metadata import version

import pytest

import starburst_executor
from starburst_executor import errors
from tests.support.sessions import run_python

NEVER_IMPORTED = ("boto3", "botocore", "numpy", "click", "rich", "cloudpickle")

ERRORS = [getattr(errors, name) for name in errors.__all__]


def test_all_is_sorted_and_complete() -> None:
    names = starburst_executor.__all__
    assert names == sorted(names)
    for name in names:
        assert getattr(starburst_executor, name) is not None
        assert name in dir(starburst_executor)
    wanted = {
        "StarburstExecutor", "TaskFuture", "TaskOutcome", "SessionStatus", "SessionSummary",
        "Intervals", "list_sessions", "__version__",
    }  # fmt: skip
    internal = {"Conflict", "ObjectNotFound"}  # of stores; users never see them
    assert set(names) == wanted | (set(errors.__all__) - internal)


def test_what_is_not_public_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Submitter'"):
        starburst_executor.Submitter  # noqa: B018


def test_the_version_is_that_of_the_package() -> None:
    assert starburst_executor.__version__ == version("starburst-executor")


def test_importing_the_package_imports_nothing_large() -> None:
    code = (
        f"import starburst_executor, sys; print([m for m in {NEVER_IMPORTED} if m in sys.modules])"
    )
    assert run_python("-c", code).stdout == "[]\n"


def test_importing_the_executor_does_not_import_the_libraries_of_aws() -> None:
    code = (
        "from starburst_executor import StarburstExecutor; import sys;"
        "print([m for m in ('boto3', 'botocore', 'numpy') if m in sys.modules])"
    )
    assert run_python("-c", code).stdout == "[]\n"


def test_importing_starts_no_thread_and_writes_nothing() -> None:
    code = (
        "import threading, starburst_executor as s; s.StarburstExecutor;"
        "print(threading.active_count())"
    )
    assert run_python("-c", code).stdout == "1\n"


@pytest.mark.parametrize("name", [n for n in starburst_executor.__all__ if n[0] != "_"])
def test_public_things_have_docstrings(name: str) -> None:
    thing = getattr(starburst_executor, name)
    assert inspect.getdoc(thing)
    if not inspect.isclass(thing):
        return
    for attribute, value in vars(thing).items():
        is_code = callable(value) or isinstance(value, (property, classmethod, staticmethod))
        if is_code and not attribute.startswith("_"):
            assert inspect.getdoc(getattr(thing, attribute)), f"{name}.{attribute}"


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_survive_pickling(kind: type[BaseException]) -> None:
    error = kind("what happened")
    error.add_note("where")
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is kind
    assert str(twin) == str(error)
    assert "what happened" in str(twin)
    assert twin.__notes__ == ["where"]


def test_the_tree_of_errors_is_drawn_whole() -> None:
    assert errors.__doc__ is not None
    for kind in ERRORS:
        assert kind.__name__ in errors.__doc__


def test_every_error_that_is_raised_can_be_caught_as_one() -> None:
    for kind in ERRORS:
        if kind is not errors.RemoteTraceback:
            assert issubclass(kind, errors.StarburstError)


def test_errors_are_what_the_standard_library_calls_them() -> None:
    for kind in (errors.WorkerLost, errors.TaskCrashed, errors.InitializerFailed):
        assert issubclass(kind, BrokenExecutor)
    assert issubclass(errors.TaskTimeout, TimeoutError)
    assert issubclass(errors.SerializationError, TypeError)
    assert issubclass(errors.SessionNotFound, LookupError)
    assert issubclass(errors.StoreDenied, PermissionError)
    assert issubclass(starburst_executor.StarburstExecutor, Executor)
    assert issubclass(starburst_executor.TaskFuture, Future)

"""What tasks are called: how names are made, kept with the tasks, and shown."""

from __future__ import annotations

import functools
import pickle
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath
from typing import Any, cast

import numpy as np
import pytest
from click.testing import CliRunner

from starburst_executor import Intervals, StarburstExecutor
from starburst_executor.cli.main import main
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.task_names import (
    NO_NAME,
    Name,
    decode_names,
    encode_names,
    function_name,
    label_of,
    name_of,
)
from starburst_executor.protocol.tasks_object import Queued, encode_tasks
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.url import open_store

QUICK = Intervals(poll_first=0.02, poll_last=0.1, look_last=0.05, commit=0.05)


class Hostile:
    """Whatever is asked of it ends the process."""

    def __repr__(self) -> str:
        raise SystemExit

    __str__ = __repr__

    def __getattr__(self, name: str) -> Any:
        raise SystemExit


class HostileList(list[int]):
    def __iter__(self) -> Any:
        raise SystemExit

    def __len__(self) -> int:
        raise SystemExit

    def __repr__(self) -> str:
        raise SystemExit


class Seed(int):
    def __repr__(self) -> str:
        raise SystemExit


class Colour(Enum):
    RED = 1


@dataclass
class Secret:
    token: str


Point = namedtuple("Point", "x y")


def shown(*args: Any, **kwargs: Any) -> str:
    return name_of("f", args, kwargs).call


# --- making --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.5, "0.5"),
        ("a\nb", r"'a\nb'"),
        ("x" * 1000, "'" + "x" * 40 + "'..."),
        ((1,), "(1,)"),
        ([], "[]"),
        (list(range(10**6)), "[0, 1, 2, 3, ...]"),
        ({"a": [1, {2: 3}]}, "{'a': [1, {...}]}"),
        (frozenset({1}), "frozenset({1})"),
        (set(), "set()"),
        (Point(1, 2), "Point(1, 2)"),
        (Colour.RED, "Colour.RED"),
        (PurePosixPath("/data/a.csv"), "PurePosixPath('/data/a.csv')"),
        (len, "len"),
        (Secret, "Secret"),
        (Secret("hush"), "<Secret>"),
        pytest.param(Hostile(), "<Hostile>", id="hostile"),
        pytest.param(HostileList([1, 2]), "HostileList(1, 2)", id="hostile list"),
        pytest.param(Seed(7), "7", id="seed"),
        pytest.param(1 << 100_000, "<int of 100001 bits>", id="huge"),
        (bytearray(10**6), "<bytearray of 1000000 bytes>"),
        (np.zeros((1000, 3)), "<ndarray 1000x3 float64>"),
        (np.float64(1.5), "1.5"),
        (np.int8(3), "3"),
    ],
)
def test_an_argument_is_shown_in_short_and_runs_no_code_of_the_user(
    value: object, text: str
) -> None:
    assert shown(value) == f"f({text})"


def test_a_table_is_shown_by_its_shape() -> None:
    class DataFrame:
        """Behaves as pandas' in what matters: a column can be had as an attribute."""

        __module__ = "pandas.core.frame"
        shape = (2, 1)
        dtype = "a column of that name"

    assert shown(DataFrame()) == "f(<DataFrame 2x1>)"


def test_a_name_is_never_long() -> None:
    name = name_of("f" * 80, range(1000), {f"k{i}": "v" * 99 for i in range(1000)})
    assert len(name.call) == len(name.arguments) == 80
    assert len(label_of("x" * 1000)) == 80


def test_a_collection_that_another_thread_changes_is_no_error() -> None:
    def changed() -> Iterator[int]:
        yield 1
        raise RuntimeError("dictionary changed size during iteration")

    assert name_of("f", cast(Any, changed()), {}).call == "f(1, ...)"


def test_a_proxy_is_not_asked_what_it_stands_for() -> None:
    class Proxy:
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            raise SystemExit

    names = shown(Proxy()), function_name(Proxy())
    assert names == ("f(<Proxy>)", "Proxy")


def made_by(value: int) -> int:
    return value


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (made_by, "made_by"),
        (lambda: 1, "<lambda>"),
        (str.upper, "str.upper"),
        (functools.lru_cache(made_by), "made_by"),
        (functools.partial(made_by, 3), "partial(made_by)"),
        (Secret, "Secret"),
        pytest.param(Hostile(), "Hostile", id="hostile"),
    ],
)
def test_a_callable_is_called_by_its_qualified_name(
    function: Callable[..., Any], name: str
) -> None:
    assert function_name(function) == name


def test_nothing_in_a_name_commands_a_terminal() -> None:
    name = decode_names(encode_names([Name("f\x1b[2J", "1\n2", "a\tb\x07")]), 1)[0]
    assert name == ("f?[2J", "1 2", "a b?")


# --- storing -------------------------------------------------------------------------

# As they were written before tasks had names.
OLD_TASKS = (
    b'SBX1h\x00\x00\x00{"functions":["ffffffff","gggggggg"],"modules":{"helper":"dddddddd"},'
    b'"calls":[[0,0,3],[0,3,-1],[1,3,5]]}onethree'
)


def test_tasks_from_before_there_were_names_can_still_be_read(
    directory_url: str,
) -> None:
    session = Session(open_store(directory_url), "old", SystemRuntime())
    batch = Batch(0, 0, 3)
    session.put_batch(batch, OLD_TASKS)
    assert session.names(batch) == [NO_NAME] * 3
    assert session.arguments(batch, session.tasks(batch), 2) == b"three"


def test_programs_that_know_no_names_find_everything_where_it_was() -> None:
    """They read the header, and arguments by their place; nothing else."""
    calls = [Queued("f" * 8, b"one"), Queued("f" * 8, None), Queued("g" * 8, b"three")]
    plain = encode_tasks(calls, {"helper": "d" * 8})
    assert plain == OLD_TASKS
    named = [call._replace(name=Name("work", "1")) for call in calls]
    assert encode_tasks(named, {"helper": "d" * 8}).startswith(OLD_TASKS)


@pytest.mark.parametrize("size", [1, 300_000])
def test_names_are_found_behind_arguments_of_any_size(directory_url: str, size: int) -> None:
    session = Session(open_store(directory_url), "s", SystemRuntime())
    batch, names = Batch(0, 0, 2), [Name("f", "1"), Name("f", "2", "second")]
    calls = [Queued("f", b"x" * size, name) for name in names]
    session.put_batch(batch, encode_tasks(calls, {}))
    assert session.names(batch) == names
    nameless = Batch(0, 2, 1)
    session.put_batch(nameless, encode_tasks([Queued("f", b"x" * size)], {}))
    assert session.names(nameless) == [NO_NAME]


def test_names_take_few_bytes() -> None:
    calls = [Queued("f" * 64, b"", name_of("simulate", (i,), {})) for i in range(256)]
    bare = [call._replace(name=NO_NAME) for call in calls]
    extra = len(encode_tasks(calls, {})) - len(encode_tasks(bare, {}))
    assert extra / 256 < 12


def test_damaged_names_do_not_hide_the_tasks(directory_url: str) -> None:
    with StarburstExecutor(1, store=directory_url, keep=True) as executor:
        executor.submit(pow, 2, 3).result()
    store = open_store(directory_url)
    session = Session(store, executor.session_id, SystemRuntime())
    key = session.key(Batch(0, 0, 1).tasks_key)
    got = store.get(key)
    assert got is not None
    store.put(key, got.data[:-5])
    shown = run(directory_url, "tasks", executor.session_id)
    assert "0-0" in shown
    assert "completed" in shown


# --- showing -------------------------------------------------------------------------


def run(store: str, *arguments: str) -> str:
    result = CliRunner().invoke(main, [*arguments, "--store", store])
    assert result.exit_code in (0, 6), result.output
    return result.stdout


def area(width: int, height: int = 1, label: str = "") -> int:
    if width < 0:
        raise ValueError("width must not be negative")
    return width * height


def test_people_see_names_wherever_tasks_are_shown(directory_url: str) -> None:
    with StarburstExecutor(1, store=directory_url, keep=True, intervals=QUICK) as executor:
        executor.submit(area, 3, height=2)
        executor.options(label="the odd one").submit(area, -1)
        list(executor.map(area, [5, 6], chunksize=2))
    session_id = executor.session_id
    tasks = run(directory_url, "tasks", session_id)
    assert "area(3, height=2)" in tasks
    assert "the odd one" in tasks
    assert "map area(((5,), (6,)))" in tasks
    show = run(directory_url, "show", session_id, "0-1")
    assert "Label:      the odd one" in show
    assert "Call:       area(-1)" in show
    assert "task 0-1 the odd one" in run(directory_url, "errors", session_id)


def test_inspection_unpickles_nothing(directory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with StarburstExecutor(1, store=directory_url, keep=True) as executor:
        executor.submit(area, 3).result()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something is unpickled")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    assert "area(3)" in run(directory_url, "tasks", executor.session_id)
    assert "area(3)" in run(directory_url, "show", executor.session_id, "0-0")


def test_options_hand_on_every_keyword_untouched(directory_url: str) -> None:
    with StarburstExecutor(1, store=directory_url, intervals=QUICK) as executor:
        labelled = executor.options(label="a label")
        future = labelled.submit(area, 2, label="the function's own")
        assert (future.result(), future.name) == (2, "a label")
        assert list(labelled.map(area, [1, 2], [3, 4])) == [3, 8]
        assert executor.submit(area, 1, label="x").name == "area(1, label='x')"


@pytest.mark.parametrize("label", [3, None, "", "  "])
def test_a_label_is_a_text(directory_url: str, label: Any) -> None:
    with (
        StarburstExecutor(1, store=directory_url) as executor,
        pytest.raises((TypeError, ValueError), match="label"),
    ):
        executor.options(label=label)


def test_what_cannot_be_pickled_keeps_its_name(directory_url: str) -> None:
    with StarburstExecutor(1, store=directory_url, keep=True, intervals=QUICK) as executor:
        future = executor.submit(area, cast(Any, (i for i in range(3))))
        assert future.name == "area(<generator>)"
    assert "area(<generator>)" in run(directory_url, "tasks", executor.session_id)


def test_an_executor_and_its_futures_say_which_they_are(directory_url: str) -> None:
    executor = StarburstExecutor(1, store=directory_url, name="my run", keep=True, intervals=QUICK)
    whole = f"<StarburstExecutor session {executor.session_id} 'my run' in {executor.store}"
    assert repr(executor) == f"{whole}, open>"
    good, bad = executor.submit(area, 3), executor.submit(area, -1)
    where = f"of session {executor.session_id}"
    assert repr(good).startswith(f"<TaskFuture 0-0 area(3) {where}, ")
    executor.shutdown()
    assert repr(good) == f"<TaskFuture 0-0 area(3) {where}, returned int>"
    assert repr(bad) == f"<TaskFuture 0-1 area(-1) {where}, raised ValueError>"
    assert repr(executor) == f"{whole}, shut down>"
    attached = StarburstExecutor.attach(executor.session_id, store=directory_url)
    assert repr(attached.futures[0]) == f"<TaskFuture 0-0 {where}, finished>"
    attached.detach()
    assert repr(attached).endswith(", detached>")


def test_the_repr_of_a_half_made_executor_is_no_error() -> None:
    assert "StarburstExecutor" in repr(StarburstExecutor.__new__(StarburstExecutor))

"""What a script's functions, classes and globals become in a task, and what comes back of them."""

from __future__ import annotations

import functools
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from starburst_executor.serialization.pickling import dumps
from starburst_executor.storage.url import open_store
from tests.support.sessions import keys, run_python

KINDS = Path(__file__).parents[1] / "support" / "script_kinds.py"


def faults(printed: str) -> dict[str, str]:
    return {kind: wrong for kind, wrong in json.loads(printed).items() if wrong}


def run_code(code: str, *arguments: str, cwd: Path) -> str:
    """Run a program that has no file, as a notebook has none; what it prints."""
    done = subprocess.run(
        [sys.executable, "-", *arguments],
        input=textwrap.dedent(code),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


def run_script(folder: Path, code: str, *arguments: str, name: str = "script") -> str:
    script = folder / f"{name}.py"
    script.write_text(textwrap.dedent(code))
    done = run_python(script, *arguments, timeout=120)
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


# --- every kind of thing ------------------------------------------------------------


def test_processes_of_the_standard_library_pass_every_kind() -> None:
    assert faults(run_python(KINDS, "processes", timeout=120).stdout) == {}


def test_every_kind_works_in_tasks_of_a_script(directory_url: str) -> None:
    done = run_python(KINDS, "starburst", directory_url, timeout=120)

    assert (faults(done.stdout), done.stderr) == ({}, "")


def test_every_kind_comes_back_to_a_second_run_of_the_script(
    directory_url: str,
) -> None:
    session = run_python(KINDS, "leave", directory_url, timeout=120).stdout.strip()
    done = run_python(KINDS, "attach", directory_url, session, timeout=120)

    assert (faults(done.stdout), done.stderr) == ({}, "")


@pytest.mark.parametrize("how", ["-c", "-"])
def test_every_kind_works_in_a_program_without_a_file(how: str, directory_url: str) -> None:
    code = KINDS.read_text()
    arguments = ["-c", code] if how == "-c" else ["-"]
    done = subprocess.run(
        [sys.executable, *arguments, "starburst", directory_url],
        input=code,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    # No program can see the source of what has no file.
    assert faults(done.stdout).keys() == {"getsource"}


# --- one namespace, and whose values are in it ----------------------------------------


def test_a_task_sees_the_globals_of_its_own_submit(directory_url: str, tmp_path: Path) -> None:
    printed = run_code(
        """
        import sys
        from starburst_executor import StarburstExecutor

        class Config:
            factor = 1

        with StarburstExecutor(1, store=sys.argv[1]) as ex:
            scale = 1
            def helper(): return "old"
            def f(): return scale, helper(), Config.factor
            first = [ex.submit(f)]
            scale, Config.factor = 2, 2
            def helper(): return "new"
            second = [ex.submit(f)]
            old = f
            def f(): return "another f", scale, old()
            third = [ex.submit(f), ex.submit(old)]
            first.append(ex.submit(lambda: (scale, Config.factor)))
            print([[future.result() for future in some] for some in (first, second, third)])
        """,
        directory_url,
        cwd=tmp_path,
    )

    first = "[(1, 'old', 1), (2, 2)]"
    second = "[(2, 'new', 2)]"
    third = "[('another f', 2, (2, 'new', 2)), (2, 'new', 2)]"
    assert printed == f"[{first}, {second}, {third}]\n"


def test_a_task_sees_them_after_a_task_that_saw_others(directory_url: str, tmp_path: Path) -> None:
    printed = run_script(
        tmp_path,
        """
        import sys
        from starburst_executor import StarburstExecutor

        def helper(): return scale
        def f(x): return helper() + x

        with StarburstExecutor(1, store=sys.argv[1]) as ex:
            futures = []
            for x in range(4):
                for scale in (10, 20):
                    futures.append(ex.submit(f, x))
            print([future.result() for future in futures])
        """,
        directory_url,
    )

    assert printed == "[10, 20, 11, 21, 12, 22, 13, 23]\n"


def test_what_tasks_put_into_a_global_stays_there(directory_url: str, tmp_path: Path) -> None:
    printed = run_script(
        tmp_path,
        """
        import sys
        from starburst_executor import StarburstExecutor

        count, cache, model = 0, {}, None

        def initialize(**values):
            globals().update(values)

        def add(x):
            global count
            count += 1
            cache[x] = count
            return sorted(cache), model

        def look(): return count, sorted(cache), model

        def load(): initialize(model="loaded")

        with StarburstExecutor(1, store=sys.argv[1], initializer=load) as ex:
            print([ex.submit(add, x).result() for x in "ab"], ex.submit(look).result())
            cache["c"] = 0
            print(ex.submit(look).result(), count)
        """,
        directory_url,
    )

    assert printed.splitlines() == [
        "[(['a'], 'loaded'), (['a', 'b'], 'loaded')] (2, ['a', 'b'], 'loaded')",
        "(2, ['c'], 'loaded') 0",
    ]


def test_objects_that_globals_share_are_shared_in_a_task(
    directory_url: str, tmp_path: Path
) -> None:
    printed = run_script(
        tmp_path,
        """
        import sys
        from starburst_executor import StarburstExecutor

        class Model:
            def __init__(self, layers): self.layers = layers

        layers = [1]
        model = Model(layers)

        def f():
            layers.append(2)
            return model.layers

        with StarburstExecutor(1, store=sys.argv[1]) as ex:
            print(ex.submit(f).result())
        """,
        directory_url,
    )

    assert printed == "[1, 2]\n"


# --- results ------------------------------------------------------------------------

MODELS = """
import sys
from starburst_executor import StarburstExecutor

scale = 1
rows = list(range(100_000))
hooks = []

class Model:
    best = None
    def __init_subclass__(cls): hooks.append(cls.__name__)
    def __init__(self, v): self.v = v
    def value(self): return self.v * scale
    def size(self): return len(rows)

class Special(Model): pass

class MyError(Exception): pass

def fit(v):
    global scale
    scale = 100
    Model.best = v
    if v < 0:
        raise MyError(v)
    return Special(v)
"""


def test_results_leave_the_classes_of_the_client_alone(directory_url: str, tmp_path: Path) -> None:
    printed = run_script(
        tmp_path,
        MODELS
        + """
Model.best = "mine"
with StarburstExecutor(1, store=sys.argv[1]) as ex:
    models = list(ex.map(fit, range(1, 4)))
    print([m.value() for m in models], Model.best, hooks)
    print(all(type(m) is Special for m in models))
""",
        directory_url,
    )

    assert printed.splitlines() == ["[1, 2, 3] mine ['Special']", "True"]


def test_results_of_a_script_are_as_small_as_their_data(directory_url: str, tmp_path: Path) -> None:
    run_script(
        tmp_path,
        MODELS
        + """
with StarburstExecutor(1, store=sys.argv[1], keep=True) as ex:
    for future in [ex.submit(fit, i) for i in range(100)]:
        assert future.result().size() == 100_000
""",
        directory_url,
    )

    store = open_store(directory_url)
    results = [key for key in keys(directory_url) if "/functions/" not in key]
    sizes = {key: len(store.get(key).data) for key in results}  # type: ignore[union-attr]
    functions = [key for key in keys(directory_url) if "/functions/" in key]
    assert len(functions) == 1
    assert sum(size for key, size in sizes.items() if "/logs/" not in key) < 150_000


def test_another_program_gets_results_with_the_code_of_the_script_that_left_them(
    directory_url: str, tmp_path: Path
) -> None:
    session = run_script(
        tmp_path,
        MODELS
        + """
ex = StarburstExecutor(1, store=sys.argv[1])
for call in ((fit, 3), (fit, -1), (type, Special(0))):
    ex.submit(*call)
print(ex.detach())
""",
        directory_url,
    ).strip()
    printed = run_script(
        tmp_path,
        """
        import sys
        from starburst_executor import StarburstExecutor

        scale = 1000

        class MyError(Exception):
            code = property(lambda self: 1)

        with StarburstExecutor.attach(sys.argv[2], store=sys.argv[1]) as ex:
            good, bad, kind = ex.futures
            model = good.result()
            print(type(model).__name__, model.v, model.size(), scale)
            print(type(bad.exception()).__name__, isinstance(bad.exception(), MyError))
            print(kind.result() is type(model), "Special" in globals())
        """,
        directory_url,
        session,
        name="other",
    )

    assert printed.splitlines() == [
        "Special 3 100000 1000",
        "MyError False",
        "True False",
    ]


def test_an_edit_elsewhere_in_the_script_does_not_part_it_from_its_results(
    directory_url: str, tmp_path: Path
) -> None:
    leave = (
        "\nex = StarburstExecutor(1, store=sys.argv[1])\nex.submit(fit, -3)\nprint(ex.detach())\n"
    )
    session = run_script(tmp_path, MODELS + leave, directory_url).strip()
    printed = run_script(
        tmp_path,
        '"""A comment more."""\n\nmore = 1\n'
        + MODELS
        + """
Model.best = 7
with StarburstExecutor.attach(sys.argv[2], store=sys.argv[1]) as ex:
    try:
        ex.futures[0].result()
    except MyError as error:
        print("caught", error)
""",
        directory_url,
        session,
    )

    assert printed == "caught -3\n"


def test_a_class_that_is_defined_anew_is_another_one_and_both_work(
    directory_url: str, tmp_path: Path
) -> None:
    printed = run_code(
        """
        import sys
        from starburst_executor import StarburstExecutor

        def call(x): return x.value()

        with StarburstExecutor(1, store=sys.argv[1]) as ex:
            class Model:
                def value(self): return 1
            first, one = Model, ex.submit(Model).result()
            class Model:
                def value(self): return 2
            other = ex.submit(Model).result()
            print(type(one) is first, type(other) is Model)
            print(ex.submit(call, one).result(), ex.submit(call, other).result())
            Model.extra = 5
            print(ex.submit(lambda: Model.extra).result())
            Model.extra = 6
            print(ex.submit(lambda: Model.extra).result())
        """,
        directory_url,
        cwd=tmp_path,
    )

    assert printed.splitlines() == ["True True", "1 2", "5", "6"]


# --- scripts that are imported ----------------------------------------------------------

EXPERIMENT = """
import sys
from starburst_executor import StarburstExecutor

print("runs as", __name__)
offset = 3

class Point:
    def __init__(self, x): self.x = x

def move(x): return Point(x + offset)

with StarburstExecutor(1, store=sys.argv[-1]) as ex:
    points = list(ex.map(move, [1, 2]))
    print([p.x for p in points], all(type(p) is Point for p in points))
"""


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("import experiment", "experiment"),
        ("import runpy; runpy.run_module('experiment')", "experiment"),
        ("import runpy; runpy.run_path('experiment.py')", "<run_path>"),
    ],
)
def test_functions_of_a_module_that_is_being_imported_travel_by_value(
    how: str, name: str, directory_url: str, tmp_path: Path
) -> None:
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    done = subprocess.run(
        [sys.executable, "-c", how, directory_url],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"runs as {name}", "[4, 5] True"]


# --- bytes ----------------------------------------------------------------------------


def _ignore(digest: str, data: memoryview) -> None:
    pass


def test_the_same_function_has_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = """
        import hashlib
        from starburst_executor.serialization.pickling import dumps

        table = {"a": [1.5, "b"], "c": ("d",)}
        class Point:
            kinds = ("x", "y")
            def norm(self, p="a"): return helper(p)
        def helper(x): return table[x], Point
        def f(x, y="a"): return helper(x), [Point() for _ in y]
        print(hashlib.sha256(dumps(f, None)).hexdigest())
        """
    one, other = (run_script(tmp_path, code) for _ in range(2))

    assert one == other


def test_the_content_of_a_class_does_not_depend_on_the_order_of_sets(
    tmp_path: Path,
) -> None:
    code = """
        from starburst_executor.serialization.content_ids import class_content

        class Point:
            def f(self, p): return p in {"a", "b", "c"}
        print(class_content(Point))
        """
    seen = set()
    for seed in "123":
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(code))
        seen.add(run_python(script, PYTHONHASHSEED=seed).stdout)

    assert len(seen) == 1


def test_a_function_of_an_installed_module_stays_a_reference() -> None:
    cargo = dumps(functools.partial(textwrap.dedent, "x"), _ignore)

    assert b"textwrap" in cargo
    assert len(cargo) < 120


def test_a_pickle_of_nothing_from_a_script_is_what_pickle_writes() -> None:
    value: list[Callable[..., Any]] = [os.path.join, json.dumps]

    assert pickle.dumps(value, 5) in dumps(value, _ignore)

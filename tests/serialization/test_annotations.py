"""Annotations of what travels by value, which Python 3.14 evaluates only when somebody asks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import typing
from typing import Any

from starburst_executor.serialization.pickling import loads

# What 3.14 does by itself is near to what this makes older ones do.
_LATE = "" if sys.version_info >= (3, 14) else "from __future__ import annotations\n"
_BEGIN = """
import dataclasses, functools, sys
from typing import TYPE_CHECKING, NamedTuple
from starburst_executor.serialization.pickling import dumps

if TYPE_CHECKING:
    from somewhere import Absent
"""
_END = """
sys.stdout.buffer.write(dumps(subject, None))
"""


def sent(program: str) -> Any:
    """What comes out of another process that ends by pickling its global variable `subject`."""
    script = _LATE + _BEGIN + textwrap.dedent(program) + _END
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return loads(done.stdout, _no_blobs)


def _no_blobs(digest: str, size: int) -> bytes:
    raise AssertionError("small objects have no blobs")


def test_a_function_may_be_annotated_with_what_only_type_checkers_import() -> None:
    subject = sent("""
        def subject(x: Absent, y: int = 2, *, z=3) -> Absent:
            "What it does."
            return x + y + z
        subject.note = "kept"
        """)
    assert subject(1) == 6
    assert subject.__doc__ == "What it does."
    assert (subject.__name__, subject.note) == ("subject", "kept")
    annotations = subject.__annotations__
    assert annotations == {"x": "Absent", "y": "int", "return": "Absent"}


def test_a_recursive_function_may_be_so_too() -> None:
    subject = sent("""
        def subject(n: Absent) -> Absent:
            return n * subject(n - 1) if n else 1
        """)
    assert subject(5) == 120


def test_a_decorated_closure_may_be_so_too() -> None:
    subject = sent("""
        def twice(function: Absent) -> Absent:
            @functools.wraps(function)
            def wrapper(x: Absent) -> Absent:
                return 2 * function(x)
            return wrapper

        @twice
        def subject(x: Absent) -> Absent:
            return x + 1
        """)
    assert subject(1) == 4
    assert subject.__wrapped__(1) == 2


def test_a_class_and_its_methods_may_be_so_too() -> None:
    subject = sent("""
        class Work:
            todo: Absent
            done: int = 3

            def run(self, x: Absent) -> Absent:
                return self.done * x

        subject = Work()
        """)
    assert subject.run(2) == 6
    assert type(subject).__annotations__ == {"todo": "Absent", "done": "int"}


def test_a_class_keeps_annotations_that_nobody_has_asked_for() -> None:
    subject = sent("""
        class subject:
            x: int
            y: list[str] = []
        """)
    assert typing.get_type_hints(subject) == {"x": int, "y": list[str]}


def test_a_class_is_pickled_the_same_once_its_annotations_were_asked_for() -> None:
    before, after = sent("""
        class Asked:
            x: int

        before = dumps(Asked, None)
        Asked.__annotations__
        subject = before, dumps(Asked, None)
        """)
    assert before == after


def test_a_named_tuple_keeps_its_types() -> None:
    subject = sent("""
        class subject(NamedTuple):
            x: int
            y: str = ""
        """)
    assert typing.get_type_hints(subject) == {"x": int, "y": str}
    assert subject(1) == (1, "")


def test_what_cannot_be_pickled_of_an_annotated_class_is_named() -> None:
    message = sent("""
        class Holds:
            x: int
            lock = __import__("threading").Lock()

        try:
            dumps(Holds, None)
        except TypeError as error:
            subject = str(error)
        """)
    assert message.startswith("cannot pickle argument .lock, of type _thread.lock")


def test_a_data_class_may_name_a_class_that_comes_later() -> None:
    subject = sent("""
        lock = __import__("threading").Lock()  # nobody needs it, and it cannot be pickled

        @dataclasses.dataclass(slots=True)
        class subject:
            x: int
            later: list[Later] | None = None

        class Later:
            pass
        """)
    assert subject(1).x == 1
    assert subject(1) == subject(1, None)

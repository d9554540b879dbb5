"""What cannot be pickled or unpickled is named, with what to do."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import pytest

from starburst_executor.errors import SerializationError
from starburst_executor.serialization.exceptions import describe, rebuild
from starburst_executor.serialization.pickling import dumps, loads, pack_call
from tests.support.travel import Blobs, Unbuildable, raised

# --- errors of pickling ------------------------------------------------------------


class Holder:
    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("lock", "name")

    def __init__(self) -> None:
        self.name = "x"
        self.lock = threading.Lock()


class Choosy:
    """Leaves its lock out, but not what else it holds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stream = threading.Event()

    def __getstate__(self) -> object:
        return {"stream": self.stream}


class Words(dict[str, object]):
    lock: object


class Grumpy:
    def __reduce__(self) -> NoReturn:
        raise LookupError("not today")


class Nonsense:
    def __reduce__(self) -> Any:
        return 42


def words_with_lock() -> Words:
    words = Words(a=1)
    words.lock = threading.Lock()
    return words


def cyclic() -> Holder:
    parent = Holder()
    parent.child = Holder(parent=parent)  # type: ignore[attr-defined]
    parent.lock = threading.Lock()  # type: ignore[attr-defined]
    return parent


def numbers() -> Iterator[int]:
    yield 1


def function_with(lock: object) -> Callable[[], object]:
    return lambda: lock


def function_defaulting_to_a_lock() -> Callable[..., object]:
    def work(x: int = 1, *, lock: object = threading.Lock()) -> object:
        return lock

    return work


@pytest.mark.parametrize(
    ("make", "where", "kind"),
    [
        (threading.Lock, "argument 1", "_thread.lock"),
        (numbers, "argument 1", "generator"),
        (lambda: {"cfg": Holder(lock=threading.Lock())}, "argument 1 ['cfg'].lock", ""),
        (lambda: [0, (1, threading.Lock())], "argument 1 [1][1]", "_thread.lock"),
        (lambda: {Grumpy(): 1}, "argument 1 key <", "Grumpy"),
        (lambda: {Grumpy()}, "argument 1 element <", "Grumpy"),
        (Slotted, "argument 1 .lock", "_thread.lock"),
        (Choosy, "argument 1 .stream._cond._lock", "_thread.lock"),
        (words_with_lock, "argument 1 .lock", "_thread.lock"),
        (cyclic, "argument 1 .lock", "_thread.lock"),
        (
            lambda: function_with(threading.Lock()),
            "argument 1 closure variable 'lock'",
            "_thread.lock",
        ),
        (
            function_defaulting_to_a_lock,
            "argument 1 default of 'lock'",
            "_thread.lock",
        ),
        (
            lambda: functools.partial(print, threading.Lock()),
            "argument 1 ",
            "_thread.lock",
        ),
        (
            lambda: Holder(x=threading.Lock()).__init__,  # type: ignore[misc]
            "argument 1 .__self__.x",
            "_thread.lock",
        ),
        (lambda: [Grumpy()], "argument 1 [0]", "Grumpy"),
        (lambda: [Nonsense()], "argument 1 [0]", "Nonsense"),
        (
            lambda: type("Local", (), {"lock": threading.Lock()}),
            "argument 1 .lock",
            "_thread.lock",
        ),
        (
            lambda: np.array([1, threading.Lock()], dtype=object),
            "argument 1 ",
            "_thread.lock",
        ),
    ],
)
def test_the_part_that_cannot_be_pickled_is_named(
    make: Callable[[], object], where: str, kind: str, blobs: Blobs
) -> None:
    with pytest.raises(SerializationError) as caught:
        pack_call(("fine", make()), {"also": "fine"}, blobs.keep)

    message = str(caught.value)
    assert message.startswith(f"cannot pickle {where}")
    assert kind in message
    assert isinstance(caught.value.__cause__, Exception)
    assert "\n" not in message


def test_a_keyword_argument_is_named(blobs: Blobs) -> None:
    with pytest.raises(SerializationError, match="cannot pickle argument 'n', of type"):
        pack_call((), {"m": 1, "n": threading.Lock()}, blobs.keep)


def test_a_result_is_called_what_the_caller_calls_it(blobs: Blobs) -> None:
    with pytest.raises(SerializationError, match=r"cannot pickle result \[0\], of type"):
        dumps([threading.Lock()], blobs.keep, what="result")


def test_a_global_that_a_function_of_main_uses_is_named() -> None:
    script = textwrap.dedent("""
        import threading
        from starburst_executor.serialization.pickling import dumps
        lock = threading.Lock()
        def work():
            return [lock for _ in range(3)]
        try:
            dumps(work, None, what="function work")
        except TypeError as error:
            print(error)
        """)
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True
    )

    assert done.stdout.startswith(
        "cannot pickle function work global variable 'lock', of type _thread.lock"
    )


def test_a_nest_that_is_too_deep_is_a_serialization_error(blobs: Blobs) -> None:
    nest: list[Any] = []
    for _ in range(100_000):
        nest = [nest]

    with pytest.raises(SerializationError, match=r"argument 1, .*nested too deeply"):
        pack_call((1, nest), {}, blobs.keep)


def test_the_search_for_the_culprit_is_bounded(
    monkeypatch: pytest.MonkeyPatch, blobs: Blobs
) -> None:
    tries = []
    real = cloudpickle.Pickler.dump

    def counting(self: Any, obj: object) -> None:
        tries.append(1)
        real(self, obj)

    monkeypatch.setattr(cloudpickle.Pickler, "dump", counting)
    crowd = [Holder(i=i) for i in range(20_000)]

    with pytest.raises(SerializationError, match="argument 0, of type list"):
        pack_call(([*crowd, threading.Lock()],), {}, blobs.keep)
    assert len(tries) < 6000


@pytest.mark.parametrize("signal_like", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_pickling_passes_through(
    signal_like: type[BaseException], blobs: Blobs
) -> None:
    class Interrupted:
        def __reduce__(self) -> NoReturn:
            raise signal_like

    with pytest.raises(signal_like):
        dumps(Interrupted(), blobs.keep)


# --- errors of unpickling ----------------------------------------------------------


def test_a_missing_module_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blobs: Blobs
) -> None:
    (tmp_path / "here_only.py").write_text("def work(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import here_only  # type: ignore[import-not-found]

    cargo = dumps(here_only.work, blobs.keep)
    assert loads(cargo, blobs.fetch) is here_only.work
    monkeypatch.delitem(sys.modules, "here_only")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])

    with pytest.raises(SerializationError) as caught:
        loads(cargo, blobs.fetch, "function")
    assert "cannot unpickle the function" in str(caught.value)
    assert "modules=['here_only']" in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_function_that_is_gone_hints_at_versions(
    monkeypatch: pytest.MonkeyPatch, blobs: Blobs
) -> None:
    cargo = dumps(numbers, blobs.keep)
    monkeypatch.delattr(sys.modules[__name__], "numbers")

    with pytest.raises(SerializationError, match="differ from the version"):
        loads(cargo, blobs.fetch)


def test_a_constructor_that_raises_is_a_serialization_error(blobs: Blobs) -> None:
    cargo = dumps(Unbuildable(), blobs.keep)

    with pytest.raises(SerializationError, match="RuntimeError: boom") as caught:
        loads(cargo, blobs.fetch)
    assert isinstance(caught.value.__cause__, RuntimeError)


class Ends:
    """Raises, when it is unpickled, what no `except Exception` catches."""

    def __init__(self, end: type[BaseException]) -> None:
        self.end = end

    def __reduce__(self) -> Any:
        return _raise, (self.end,)


def _raise(end: type[BaseException]) -> NoReturn:
    raise end


@pytest.mark.parametrize("end", [SystemExit, GeneratorExit, KeyboardInterrupt])
def test_an_end_while_unpickling_is_a_serialization_error(
    end: type[BaseException], blobs: Blobs
) -> None:
    cargo = dumps(Ends(end), blobs.keep)

    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(loads, cargo, blobs.fetch).exception()
    assert isinstance(error, SerializationError)
    assert end.__name__ in str(error)
    assert type(error.__cause__) is end


def test_ctrl_c_while_unpickling_on_the_main_thread_interrupts(blobs: Blobs) -> None:
    cargo = dumps(Ends(KeyboardInterrupt), blobs.keep)
    with pytest.raises(KeyboardInterrupt):
        loads(cargo, blobs.fetch)

    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    failure = describe(raised(ValueError(np.zeros(20_000))), blobs.keep)
    with pytest.raises(KeyboardInterrupt):
        rebuild(failure, interrupted, "task t")

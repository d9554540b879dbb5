"""A script with one of each kind of thing that its functions and classes may be.

    python script_kinds.py processes            runs the tasks in a ProcessPoolExecutor
    python script_kinds.py starburst STORE      runs them in a StarburstExecutor
    python script_kinds.py leave STORE          submits them, prints the session, and goes
    python script_kinds.py attach STORE ID      picks them up again

Prints one JSON object: what is wrong with each kind, or null. Tests run it.
"""

# ruff: noqa: T201, UP042
# mypy: disable-error-code="call-arg, comparison-overlap"

import abc
import contextvars
import dataclasses
import enum
import functools
import inspect
import json
import multiprocessing
import pickle
import sys
import threading
import typing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

STATE = None
SCALE = 2
ROWS = list(range(100_000))
VARIABLE = contextvars.ContextVar("VARIABLE", default=7)
LOCAL = threading.local()
LOCAL.x = 5
UserId = typing.NewType("UserId", int)
T = typing.TypeVar("T")


class Model:
    best = 0

    def __init__(self, v: int) -> None:
        self.v = v

    def value(self) -> int:
        return self.v * SCALE

    def rows(self) -> int:
        return len(ROWS)


class Slotted:
    __slots__ = ("__hidden", "shown")

    def __init__(self, x: int) -> None:
        self.shown = self.__hidden = x

    def both(self) -> tuple[int, int]:
        return self.shown, self.__hidden


@dataclasses.dataclass(slots=True)
class Data:
    x: int
    y: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: int


class Color(enum.Enum):
    RED = 1
    CRIMSON = 1  # noqa: PIE796  an alias
    BLUE = "b"


class Planet(enum.Enum):
    EARTH = (5.9, 6.3)
    MARS = (0.6, 3.3)

    def __new__(cls, mass: float, radius: float) -> "Planet":
        made = object.__new__(cls)
        made._value_ = int(mass * 10)
        made.mass, made.radius = mass, radius  # type: ignore[attr-defined]
        return made


class Level(enum.IntEnum):
    LOW = 1
    HIGH = enum.auto()


class Word(str, enum.Enum):
    HI = "hi"


class Permission(enum.Flag):
    READ = 1
    WRITE = 2
    BOTH = 3


class Registered:
    registry: typing.ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, key: str) -> None:
        if key in Registered.registry:
            raise RuntimeError(f"{key} again")
        Registered.registry[key] = cls


class Entry(Registered, key="entry"):
    pass


class Meta(type):
    seen: typing.ClassVar[list[str]] = []

    def __new__(cls, name: str, bases: Any, attributes: Any) -> "Meta":
        if name in Meta.seen:
            raise RuntimeError(f"{name} again")
        Meta.seen.append(name)
        return super().__new__(cls, name, bases, attributes)


class Made(metaclass=Meta):
    pass


class Abstract(abc.ABC):
    @abc.abstractmethod
    def go(self) -> str: ...


class Concrete(Abstract):
    def go(self) -> str:
        return type(super().__self__).__name__  # type: ignore[misc]


class Outer:
    class Inner:
        pass


class Sentinel:
    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> str:
        return self.name


MISSING = Sentinel("MISSING")


class Lazy:
    def __init__(self) -> None:
        self.runs = 0

    @functools.cached_property
    def big(self) -> int:
        self.runs += 1
        return 42


class Pair(typing.NamedTuple):
    a: int
    b: "Model"


class Options(typing.TypedDict):
    depth: int


class Box(typing.Generic[T]):
    def __init__(self, x: T) -> None:
        self.x = x


class MyError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@functools.lru_cache(maxsize=None)  # noqa: UP033  with its arguments
def fibonacci(n: int) -> int:
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


@functools.cache
def square(n: int) -> int:
    return n * n


@functools.singledispatch
def show(x: object) -> str:
    return "any"


@show.register
def _(x: int) -> str:
    return "int"


@show.register
def _(x: Model) -> str:
    return "model"


def helper(x: int) -> int:
    return x * SCALE


def initialize(x: str) -> None:
    global STATE
    STATE = x


def annotated(a: "Model", b: "typing.List[Color]") -> "Data":  # noqa: UP006
    raise NotImplementedError


def same(x: Any) -> Any:
    return x


# --- tasks ------------------------------------------------------------------------


def state() -> Any:
    return STATE


def pickled() -> list[str]:
    things = (
        Model(1), Slotted(1), Data(1), Frozen(1), Color.RED, Planet.MARS, Permission.BOTH, Entry(),
        Made(), MISSING, Pair(1, Model(1)), Outer.Inner(), Concrete(), Box(1), MyError(1), Lazy(),
    )  # fmt: skip
    return [type(pickle.loads(pickle.dumps(thing))).__name__ for thing in things]


def pickled_by_name() -> bool:
    things = (helper, fibonacci, square, show, Model, UserId, MISSING)
    return all(pickle.loads(pickle.dumps(t)) is t for t in things)


def slots(x: Slotted) -> Any:
    return x, x.both(), hasattr(x, "__dict__")


def data(x: Data) -> Any:
    return x, Data(3), hasattr(x, "__dict__"), Frozen(4)


def members() -> Any:
    return Color.CRIMSON, Planet.EARTH, Level.HIGH, Word.HI, Permission.READ | Permission.WRITE


def inside_members() -> Any:
    return (
        Color("b").name, list(Color) == [Color.RED, Color.BLUE], Planet(59) is Planet.EARTH,
        Planet.MARS.radius, Level(1) < Level.HIGH, Word.HI == "hi", Permission.BOTH.name,  # type: ignore[attr-defined]
    )  # fmt: skip


def registry() -> Any:
    return Registered.registry, Entry(), Registered.registry["entry"] is Entry


def metaclass() -> Any:
    return Made(), Meta.seen


def abstract() -> Any:
    return Concrete().go(), isinstance(Concrete(), Abstract), Concrete()


def caches() -> Any:
    return fibonacci(50), fibonacci.cache_info().currsize, square(3)


def dispatched() -> Any:
    return show(1), show(Model(1)), show("")


def lazy(x: Lazy) -> Any:
    return x.big, x.big, x.runs, x


def is_missing(x: object) -> Any:
    return x is MISSING, MISSING


def variables() -> Any:
    return VARIABLE.get(), LOCAL.x


def hints() -> bool:
    wanted = {"a": Model, "b": list[Color], "return": Data}
    found = typing.get_type_hints(annotated)
    found["b"] = list[typing.get_args(found["b"])[0]]  # type: ignore[misc]
    return found == wanted and typing.get_type_hints(Pair)["b"] is Model


def source() -> Any:
    return inspect.getsource(helper), inspect.getsource(Model).count("def ")


def nested(method: str) -> Any:
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        models = [model.v for model in pool.map(Model, [1, 2])]
        return list(pool.map(helper, [1, 2])), models


def nested_pool() -> list[int]:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(helper, [1, 2])


def put_helped(answers: Any) -> None:
    answers.put(helper(2))


def nested_process() -> int:
    context = multiprocessing.get_context("forkserver")
    answers = context.SimpleQueue()
    process = context.Process(target=put_helped, args=(answers,))
    process.start()
    answer: int = answers.get()
    process.join()
    return answer


def fails() -> None:
    raise MyError(3)


def main_module() -> bool:
    main = sys.modules["__main__"]
    return main.helper is helper and main.Model is Model and __name__ == "__main__"


def improve() -> Any:
    Model.best += 1
    return Model(1), Model.best


def small() -> Any:
    models = [Model(i) for i in range(100)]
    return models, models[0].rows()


def things() -> Any:
    return (
        Options,
        Model,
        helper,
        square,
        UserId,
        Outer.Inner(),
        Box(3),
        Pair(1, Model(1)),
    )


# --- what must come back ----------------------------------------------------------

Check = Callable[[Any], Any]
KINDS: dict[str, tuple[Any, Callable[[], Any] | None, Check]] = {
    "initializer": (state, None, lambda r: r == "w"),
    "pickle": (pickled, None, lambda r: "Slotted" in r and "Inner" in r),
    "pickle by name": (pickled_by_name, None, lambda r: r),
    "slots": (
        slots, lambda: Slotted(1),
        lambda r: type(r[0]) is Slotted and r[0].both() == (1, 1) and r[1:] == ((1, 1), False),
    ),
    "slots dataclass": (
        data, lambda: Data(1, [2]), lambda r: r == (Data(1, [2]), Data(3), False, Frozen(4)),
    ),
    "enum": (
        members, None,
        lambda r: all(
            a is b
            for a, b in zip(
                r, (Color.RED, Planet.EARTH, Level.HIGH, Word.HI, Permission.BOTH), strict=True
            )
        ),
    ),
    "enum inside": (
        inside_members, None, lambda r: r == ("BLUE", True, True, 3.3, True, True, "BOTH"),
    ),
    "subclass registry": (
        registry, None, lambda r: r[0] == {"entry": Entry} and type(r[1]) is Entry and r[2],
    ),
    "metaclass": (metaclass, None, lambda r: type(r[0]) is Made and r[1] == ["Made"]),
    "abstract": (abstract, None, lambda r: r[:2] == ("Concrete", True) and type(r[2]) is Concrete),
    "caches": (caches, None, lambda r: r == (12586269025, 51, 9)),
    "lru_cache": (fibonacci, lambda: 30, lambda r: r == 832040),
    "cache": (square, lambda: 4, lambda r: r == 16),
    "singledispatch": (show, lambda: 4, lambda r: r == "int"),
    "singledispatch inside": (dispatched, None, lambda r: r == ("int", "model", "any")),
    "cached_property": (
        lazy, Lazy, lambda r: r[:3] == (42, 42, 1) and type(r[3]) is Lazy and r[3].big == 42,
    ),
    "NewType": (same, lambda: UserId, lambda r: r is UserId),
    "reduce to a name": (is_missing, lambda: MISSING, lambda r: r == (True, MISSING)),
    "ContextVar and local": (variables, None, lambda r: r == (7, 5)),
    "get_type_hints": (hints, None, lambda r: r),
    "getsource": (source, None, lambda r: "return x * SCALE" in r[0] and r[1] == 3),
    "nested fork": (nested, lambda: "fork", lambda r: r == ([2, 4], [1, 2])),
    "nested spawn": (nested, lambda: "spawn", lambda r: r == ([2, 4], [1, 2])),
    "nested Pool": (nested_pool, None, lambda r: r == [2, 4]),
    "nested Process": (nested_process, None, lambda r: r == 4),
    "main": (main_module, None, lambda r: r),
    "class with state": (
        improve, None, lambda r: Model.best == 0 and type(r[0]) is Model and r[1] == 1,
    ),
    "small results": (small, None, lambda r: r[0][7].value() == 14 and r[1] == 100_000),
    "things": (
        things, None,
        lambda r: (
            r[:5] == (Options, Model, helper, square, UserId)
            and [type(x) for x in r[5:]] == [Outer.Inner, Box, Pair]
        ),
    ),
}  # fmt: skip


def verdict(future: "Future[Any]", check: Check) -> str | None:
    try:
        value = future.result()
        return None if check(value) else f"got {value!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def verdict_on_error(future: "Future[Any]") -> str | None:
    try:
        future.result()
    except MyError as error:
        return None if error.code == 3 else f"code {error.code}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def submitted(executor: Any) -> "list[Future[Any]]":
    calls = [(task, make) for task, make, _ in KINDS.values()]
    return [
        *(executor.submit(task, *([make()] if make else [])) for task, make in calls),
        executor.submit(fails),
    ]


def report(futures: "list[Future[Any]]") -> None:
    checks = [check for _, _, check in KINDS.values()]
    verdicts = dict(zip(KINDS, map(verdict, futures, checks), strict=True))
    print(json.dumps({**verdicts, "exception": verdict_on_error(futures[-1])}))


def main(mode: str, store: str = "", session: str = "") -> None:
    if mode == "processes":
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(1, context, initialize, ("w",)) as pool:
            report(submitted(pool))
        return
    from starburst_executor import StarburstExecutor

    if mode == "attach":
        with StarburstExecutor.attach(session, store=store) as executor:
            report(list(executor.futures))
        return
    executor = StarburstExecutor(1, store=store, initializer=initialize, initargs=("w",))
    if mode == "leave":
        submitted(executor)
        print(executor.detach())
        return
    with executor:
        report(submitted(executor))


if __name__ == "__main__":
    main(*sys.argv[1:])

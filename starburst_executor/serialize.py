"""Objects to bytes and back; exceptions to records and back.

A *cargo* is one pickled object: a small msgpack frame of the pickle and the names of
its *blobs*. Large buffers (the data of a NumPy array) do not travel in the pickle:
each is a blob, named by the SHA-256 of its content, and whoever holds the cargo
stores it once per content. A pickle that is large itself becomes a blob too, so that
a cargo is always small enough for a record.

A *failure* is what remains of a task that ended without a value, and an *outcome*
is either of the two. Reading an outcome or asking a cargo for its blobs unpickles
nothing; only `loads`, `unpack_call` and `rebuild` run code of the user.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import reprlib
import signal
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Protocol, TypeAlias

import msgspec

from starburst_executor.errors import (
    DamagedObject,
    InitializerFailed,
    RemoteError,
    RemoteTraceback,
    SerializationError,
    StarburstError,
    TaskCrashed,
    TaskTimeout,
    WorkerLost,
)
from starburst_executor.exception_state import (
    Part,
    clean,
    is_interrupt,
    message_of,
    one_line,
    put_together,
    take_apart,
    type_name,
)
from starburst_executor.scripts import Pickler

__all__ = [
    "BUFFER_MIN",
    "Failure",
    "Fetch",
    "Keep",
    "Outcome",
    "decode_outcome",
    "describe",
    "digest_of",
    "dumps",
    "encode_outcome",
    "loads",
    "pack_call",
    "rebuild",
    "references",
    "refuse",
    "unpack_call",
]

BUFFER_MIN = 64 * 1024  # bytes; below this a request of its own costs more than the copy
STREAM_MAX = 1024 * 1024  # bytes of pickle that may stay in the cargo
TRACEBACK_MAX = 64 * 1024  # characters
MESSAGE_MAX = 8 * 1024  # characters; the message is shown in listings

Data: TypeAlias = bytes | bytearray | memoryview


class Keep(Protocol):
    """Stores one blob; called once per content and cargo."""

    def __call__(self, digest: str, data: memoryview, /) -> None:
        """Store `data` under `digest`; the view is valid only until this returns."""


Fetch: TypeAlias = Callable[[str, int], Any]
"""`fetch(digest, size)`: a blob as a buffer of its own that may be written to (bytearray, private mmap)."""

# The pattern keeps a damaged or forged name from becoming a path.
_Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Blob: TypeAlias = tuple[_Digest, Annotated[int, msgspec.Meta(ge=0)]]
_Frame: TypeAlias = tuple[bytes | _Blob, tuple[_Blob, ...]]

_encoder = msgspec.msgpack.Encoder()
_frames: msgspec.msgpack.Decoder[_Frame] = msgspec.msgpack.Decoder(_Frame)
_exception_parts = msgspec.msgpack.Decoder(list[Part])


def digest_of(data: Data) -> str:
    """The SHA-256 of `data` in hexadecimal, which is the name of a blob."""
    return hashlib.sha256(data).hexdigest()


# --- to bytes ---------------------------------------------------------------------


def dumps(obj: object, keep: Keep, what: str = "argument") -> bytes:
    """Pickle an object; its large buffers go to `keep`, without being copied.

    Nothing is kept before the whole object has been pickled.

    Args:
        obj: What to pickle. Functions and classes of `__main__`, lambdas and whatever
            else cannot be imported travel by value.
        keep: Stores the blobs. What it raises passes through.
        what: What to call the object in an error message.

    Raises:
        SerializationError: it cannot be pickled; the message says which part of it.
    """
    return _dump(obj, keep, _lifted, lambda: [(what, obj)])


def pack_call(args: Sequence[Any], kwargs: Mapping[str, Any], keep: Keep) -> bytes:
    """Pickle the arguments of a call as one cargo; errors name the argument.

    Raises:
        SerializationError: an argument cannot be pickled.
    """
    call = (tuple(args), dict(kwargs))
    return _dump(call, keep, _lifted_call, lambda: _named(*call))


def refuse(error: SerializationError) -> NoReturn:
    """Stand in, on the worker, for a call that could not be pickled."""
    raise error


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    positional = [(f"argument {i}", value) for i, value in enumerate(args)]
    return positional + [(f"argument {k!r}", value) for k, value in kwargs.items()]


def _dump(
    obj: Any,
    keep: Keep,
    lift: Callable[[Any], Any],
    parts: Callable[[], list[tuple[str, Any]]],
) -> bytes:
    try:
        if _is_plain(obj):  # a tenth of cloudpickle's time, with the same result
            stream: Data = pickle.dumps(obj, protocol=5)
            buffers: Sequence[memoryview] = ()
        else:
            stream, buffers = _pickle(lift(obj))
    except Exception as error:
        raise _refusal(error, parts()) from error
    return _frame(stream, buffers, keep)


_SCALARS = frozenset({type(None), bool, int, float, complex})
_CONTAINERS = frozenset({tuple, list, dict})


def _is_plain(obj: Any, depth: int = 5) -> bool:
    """Whether plain pickle is sure to do: small exact builtins, few and shallow."""
    kind = type(obj)
    if kind in _SCALARS:
        return True
    if kind is str or kind is bytes:
        return len(obj) < BUFFER_MIN
    if kind not in _CONTAINERS or depth == 0 or len(obj) > 64:
        return False
    for item in (*obj, *obj.values()) if kind is dict else obj:
        if not _is_plain(item, depth - 1):
            return False
    return True


class _Bytes:
    """Large `bytes` on their way out of band: pickle itself would copy them inline."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[type[bytes], tuple[pickle.PickleBuffer]]:
        return bytes, (pickle.PickleBuffer(self.data),)


def _lifted(obj: Any) -> Any:
    return _Bytes(obj) if type(obj) is bytes and len(obj) >= BUFFER_MIN else obj


def _lifted_call(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = call
    return tuple(map(_lifted, args)), {k: _lifted(v) for k, v in kwargs.items()}


def _pickle(obj: object) -> tuple[memoryview, list[memoryview]]:
    buffers: list[memoryview] = []

    def goes_inline(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < BUFFER_MIN:
            return True
        buffers.append(raw)
        return False

    stream = io.BytesIO()
    Pickler(stream, goes_inline).dump(obj)
    return stream.getbuffer(), buffers


def _frame(stream: Data, buffers: Sequence[memoryview], keep: Keep) -> bytes:
    if not buffers and len(stream) <= STREAM_MAX:
        return _encoder.encode((stream, ()))
    blobs = [(digest_of(raw), raw) for raw in buffers]
    head: Data | tuple[str, int] = stream
    if len(stream) > STREAM_MAX:
        head = (digest_of(stream), len(stream))
        blobs.append((head[0], memoryview(stream)))
    for digest, data in dict(blobs).items():
        keep(digest, data)
    names = [(digest, data.nbytes) for digest, data in blobs[: len(buffers)]]
    return _encoder.encode((head, names))


# --- and back ---------------------------------------------------------------------


def loads(cargo: Data, fetch: Fetch, what: str = "object") -> Any:
    """Unpickle a cargo. Arrays use the fetched buffers as their memory.

    Args:
        cargo: What `dumps` returned.
        fetch: Gives a blob. What it raises passes through.
        what: What to call the object in an error message.

    Raises:
        SerializationError: its code is missing here or raised; the message has a hint.
        DamagedObject: the bytes are no cargo, or a blob has another size.
    """
    stream, names = _parse(cargo)
    head = stream if isinstance(stream, bytes) else _fetched(stream, fetch)
    return _unpickle(head, [_fetched(name, fetch) for name in names], what)


def unpack_call(cargo: Data, fetch: Fetch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments that `pack_call` packed; raises as `loads` does."""
    args, kwargs = loads(cargo, fetch, "arguments")
    return args, kwargs


def references(cargo: Data) -> list[tuple[str, int]]:
    """Digest and size of each blob that a cargo needs; nothing is unpickled.

    Raises:
        DamagedObject: the bytes are no cargo.
    """
    stream, names = _parse(cargo)
    heads = [] if isinstance(stream, bytes) else [stream]
    return list(dict.fromkeys([*heads, *names]))


def _parse(cargo: Data) -> _Frame:
    try:
        return _frames.decode(cargo)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedObject(
            f"{len(cargo)} bytes that should be a pickled object are truncated or "
            f"something else ({error})"
        ) from error


def _fetched(name: tuple[str, int], fetch: Fetch) -> Any:
    digest, size = name
    data = fetch(digest, size)
    if len(data) != size:
        raise DamagedObject(f"blob {digest} has {len(data)} bytes instead of {size}")
    return data


def _unpickle(stream: Any, buffers: Iterable[Any], what: str) -> Any:
    try:
        return pickle.loads(stream, buffers=buffers)
    except pickle.UnpicklingError as error:
        raise DamagedObject(f"the pickle of the {what} is damaged: {error}") from error
    except BaseException as error:  # of a module that calls sys.exit, say
        if is_interrupt(error):
            raise
        raise SerializationError(
            f"cannot unpickle the {what}: {one_line(error)}. {_hint(error)}"
        ) from error


def _hint(error: BaseException) -> str:
    if isinstance(error, StarburstError):
        return ""  # it says itself what to do
    if isinstance(error, ModuleNotFoundError):
        top = (error.name or "").partition(".")[0]
        return (
            f"The module {error.name!r} is not installed here: if it is code of yours, "
            f"pass modules=[{top!r}]; if it is a package, install it for the workers too"
        )
    if isinstance(error, (AttributeError, ImportError)):
        return (
            "The code here seems to be of another version than where the object was "
            "pickled; modules=[...] makes code of yours travel with the session"
        )
    if isinstance(error, MemoryError):
        return "There is too little memory here; memory= asks for larger workers"
    return "Its class raised while rebuilding it: try pickle.loads(pickle.dumps(...)) on it"


# --- which part it was ------------------------------------------------------------


def _refusal(error: Exception, parts: list[tuple[str, Any]]) -> SerializationError:
    """The error that names the part of the object which cannot be pickled."""
    # One level of a nest that is too deep is as good as any other: stop at the first.
    too_deep = isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError)
    where, offender = _Search().run(parts, 0 if too_deep else 16)
    advice = (
        "It is nested too deeply: flatten it"
        if too_deep
        else "Create it inside the function, or leave it out by the __getstate__ of its owner"
    )
    return SerializationError(
        f"cannot pickle {where}, of type {type_name(type(offender))} ({one_line(error)}). {advice}"
    )


class _Exhausted(Exception):
    """The search has pickled as much as it may."""


class _Search:
    """Finds the object to blame: one that fails although nothing below it does.

    It is bounded by what it may pickle, since each level pickles again what lies below.
    """

    def __init__(self) -> None:
        self._bytes_left = 256 * 1024 * 1024
        self._tries_left = 5000
        self._failing: dict[int, object] = {}  # holds them, or an id might be reused
        self._best: tuple[str, object] | None = None

    def run(self, parts: list[tuple[str, Any]], depth: int) -> tuple[str, object]:
        """Path and object to blame; without one, what the parts are together."""
        names = " or ".join(name for name, _ in parts[:3]) or "the arguments"
        whole: Any = parts[0][1] if len(parts) == 1 else parts
        try:
            for name, obj in parts:
                if self._fails(obj):
                    return self._below(name, " ", obj, depth) or (name, obj)
        except (_Exhausted, RecursionError):
            pass  # what was found so far is still true
        return self._best or (names, whole)

    def write(self, data: Data) -> int:
        """Be a file for the pickler that keeps nothing."""
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise _Exhausted
        return len(data)

    def _fails(self, obj: object) -> bool:
        self._tries_left -= 1
        if self._tries_left < 0:
            raise _Exhausted
        try:
            Pickler(self, lambda _: None).dump(obj)
        except _Exhausted:
            raise
        except BaseException as error:  # what it is was said by the first attempt
            if is_interrupt(error):
                raise
            return True
        return False

    def _below(self, path: str, joint: str, obj: object, depth: int) -> tuple[str, object] | None:
        self._failing[id(obj)] = obj
        self._best = (path, obj)
        guilty = True
        for step, part in _parts(obj) if depth else ():
            if id(part) in self._failing:
                guilty = False  # a cycle: the one above fails, perhaps for another part
            elif not _is_plain(part) and self._fails(part):
                guilty = False
                step = joint + step.lstrip() if joint else step
                if found := self._below(path + step, "", part, depth - 1):
                    return found
        return (path, obj) if guilty else None


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    """What an object is pickled with, and how one would write the way there."""
    kind = type(obj)
    if isinstance(obj, dict):
        yield from ((f"[{_short(key)}]", value) for key, value in obj.items())
        yield from ((f" key {_short(key)}", key) for key in obj)
    elif isinstance(obj, (list, tuple)):
        yield from ((f"[{i}]", item) for i, item in enumerate(obj))
    elif isinstance(obj, (set, frozenset)):
        yield from ((f" element {_short(item)}", item) for item in obj)
    elif isinstance(obj, types.FunctionType):
        yield from _function_parts(obj)
    elif isinstance(obj, (types.MethodType, staticmethod, classmethod)):
        yield ".__func__", obj.__func__
        yield ".__self__", getattr(obj, "__self__", None)
    elif isinstance(obj, type):
        yield from _class_parts(obj)
    if kind not in (dict, list, tuple, set, frozenset, types.FunctionType):
        yield from _reduced_parts(obj)


def _class_parts(cls: type) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(cls).items()):
        if name != "__annotate_func__":  # is not pickled
            yield f".{name}", value


def _function_parts(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        try:
            yield f" closure variable {name!r}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in sorted(_global_names(function.__code__)):
        if name in function.__globals__:
            yield f" global variable {name!r}", function.__globals__[name]
    for value in function.__defaults__ or ():
        yield f" default {_short(value)}", value
    for name, value in (function.__kwdefaults__ or {}).items():
        yield f" default of {name!r}", value
    for name, value in vars(function).items():
        yield f".{name}", value


def _global_names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*map(_global_names, inner))


def _reduced_parts(obj: Any) -> Iterator[tuple[str, Any]]:
    """Attributes and constructor arguments, after `__getstate__` had its say."""
    try:
        reduced = obj.__reduce_ex__(5)
    except BaseException as error:  # then it is to blame itself
        if is_interrupt(error):
            raise
        return
    if not isinstance(reduced, tuple) or len(reduced) < 2:
        return
    state = reduced[2] if len(reduced) > 2 else None
    # With __slots__ the state is a pair: the __dict__, or None, and the slots.
    for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
        if isinstance(part, dict):
            yield from ((f".{name}", value) for name, value in part.items())
        else:
            yield " state", part
    for value in reduced[1]:
        yield f" part {_short(value)}", value


def _short(obj: object) -> str:
    try:
        return reprlib.repr(obj)
    except BaseException as error:  # a __repr__ of the user's
        if is_interrupt(error):
            raise
        return f"<{type(obj).__qualname__}>"


# --- what a task ended with -------------------------------------------------------

FailureKind: TypeAlias = Literal[
    "raised",
    "crashed",
    "timeout",
    "lost",
    "initializer",
    "unserializable",
    "damaged",
]


class Failure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a task has no value; all that is needed to raise it where it is waited for."""

    kind: FailureKind
    type: str = ""  # qualified name of the exception's class
    message: str = ""
    traceback: str = ""
    cargo: bytes | None = None  # the exception; None if it cannot travel
    exit_code: int | None = None
    signal: int | None = None
    stderr: str = ""  # the last lines that the task's process wrote


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a task ended with: the cargo of its value, or a failure."""

    value: bytes | None = None
    failure: Failure | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.failure is None):
            raise ValueError("an outcome is either a value or a failure")


_outcomes = msgspec.msgpack.Decoder(Outcome)


def encode_outcome(outcome: Outcome) -> bytes:
    """An outcome as bytes."""
    return _encoder.encode(outcome)


def decode_outcome(data: Data) -> Outcome:
    """The outcome that `encode_outcome` encoded; nothing is unpickled.

    Raises:
        DamagedObject: the bytes are something else.
    """
    try:
        return _outcomes.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedObject(
            f"{len(data)} bytes that should be the outcome of a task are truncated or "
            f"something else ({error})"
        ) from error


# --- exceptions to failures -------------------------------------------------------


def describe(exc: BaseException, keep: Keep, kind: FailureKind = "raised") -> Failure:
    """What has to be known about an exception to raise it somewhere else.

    It travels with its causes, contexts and notes, each taken apart by itself, so that
    what cannot be pickled of one is all that stays behind.
    """
    return Failure(
        kind=kind,
        type=clean(type_name(type(exc))),
        message=_clip(clean(message_of(exc)), MESSAGE_MAX),
        traceback=_clip(clean(_traceback(exc)), TRACEBACK_MAX),
        cargo=_exception_cargo(exc, keep) if kind == "raised" else None,
    )


def _exception_cargo(exc: BaseException, keep: Keep) -> bytes:
    blobs: dict[str, memoryview] = {}

    def pack(value: object) -> tuple[bytes, Any]:
        stream, buffers = _pickle(_lifted(value))
        twin = pickle.loads(stream, buffers=buffers)
        return _frame(stream, buffers, blobs.__setitem__), twin

    parts = take_apart(exc, pack)
    cargo = _frame(_encoder.encode(parts), (), blobs.__setitem__)
    for digest, data in blobs.items():
        # Not while it is taken apart: a disk that is full is no fault of an attribute.
        keep(digest, data)
    return cargo


_OWN_FILES = {
    str(Path(__file__).with_name(name))
    for name in ("serialize.py", "exception_state.py", "child.py")
}


def _traceback(exc: BaseException) -> str:
    try:
        report = traceback.TracebackException.from_exception(exc)
        _drop_own_frames(report)
        return "".join(report.format())
    except Exception as error:  # e.g. a note or a source line that cannot be shown
        return f"{one_line(exc)}\n(its traceback cannot be shown: {one_line(error)})\n"


def _drop_own_frames(report: traceback.TracebackException) -> None:
    todo: list[traceback.TracebackException | None] = [report]
    while todo:
        part = todo.pop()
        if part is None:
            continue
        while part.stack and part.stack[0].filename in _OWN_FILES:
            del part.stack[0]
        todo += [part.__cause__, part.__context__, *(part.exceptions or ())]


def _clip(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = (limit - 60) // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n... {left_out} characters left out ...\n{text[-half:]}"


# --- failures to exceptions -------------------------------------------------------


def rebuild(failure: Failure, fetch: Fetch, context: str) -> BaseException:
    """The exception to raise for a failure. Never raises.

    An exception of the task comes back as itself. Its `__cause__` is the
    `RemoteTraceback`, whose own `__cause__` is the one it had.

    Args:
        failure: Why the task has no value.
        fetch: Gives the blobs of the exception, as for `loads`.
        context: Names task, attempt and worker, for the message or a note.
    """
    if failure.kind == "raised":
        return _raised(failure, fetch, context)
    if failure.kind == "unserializable":
        return _shown(SerializationError(_unserializable(failure)), failure, context)
    if failure.kind == "damaged":
        return _shown(DamagedObject(failure.message), failure, context)
    if failure.kind == "initializer":
        return _shown(InitializerFailed(_initializer(failure, context)), failure)
    kinds = {"crashed": TaskCrashed, "timeout": TaskTimeout, "lost": WorkerLost}
    happened = {"crashed": _crash, "timeout": _timeout, "lost": _loss}
    text = f"{context}: {happened[failure.kind](failure)}{_stderr(failure)}"
    return kinds[failure.kind](text)


def _raised(failure: Failure, fetch: Fetch, context: str) -> BaseException:
    reason = "it cannot be pickled and unpickled"
    if failure.cargo is not None:
        try:
            return _shown(_restored(failure.cargo, fetch), failure, context)
        except Exception as error:  # the store, or the cargo is damaged
            reason = one_line(error)
    error_text = f"{failure.type}: {failure.message}"
    stand_in = _shown(RemoteError(error_text), failure, context)
    stand_in.add_note(f"The exception could not be brought back as itself: {reason}")
    return stand_in


def _restored(cargo: bytes, fetch: Fetch) -> BaseException:
    stream, _ = _parse(cargo)
    data = stream if isinstance(stream, bytes) else _fetched(stream, fetch)
    parts = _exception_parts.decode(data)
    return put_together(parts, lambda cargo: loads(cargo, fetch, "exception"))


def _shown(exc: BaseException, failure: Failure, note: str = "") -> BaseException:
    """Give an exception its remote traceback and a note about where it comes from."""
    if failure.traceback:
        remote = RemoteTraceback(failure.traceback)
        remote.__cause__ = exc.__cause__
        _set(exc, "__cause__", remote)
    if note:
        _set(exc, "__notes__", [*(getattr(exc, "__notes__", None) or ()), note])
    return exc


def _set(exc: BaseException, name: str, value: object) -> None:
    object.__setattr__(exc, name, value)  # past a class that is frozen


_LIKELY = {
    signal.SIGKILL: "Most likely it ran out of memory: ask for more by memory=, or use less",
    signal.SIGSEGV: "Most likely a bug in a compiled extension that it uses",
    signal.SIGBUS: "Most likely a bug in a compiled extension, or a full disk under a mapped file",
    signal.SIGABRT: "Most likely a compiled extension called abort()",
    signal.SIGILL: "Most likely a compiled extension built for another processor",
    signal.SIGFPE: "Most likely a division by zero in a compiled extension",
    signal.SIGTERM: "Something asked it to end",
}


def _crash(failure: Failure) -> str:
    likely = "Most likely os._exit, or exit() in a compiled extension"
    if failure.signal is not None:
        likely = _LIKELY.get(failure.signal, "")  # type: ignore[call-overload]
    detail = f" ({failure.message})" if failure.message else ""
    end = f"the process that ran the task {_ending(failure)}{detail}"
    # What is known for sure needs no guess beside it.
    return f"{end}. {likely}." if likely and not detail else f"{end}."


def _ending(failure: Failure) -> str:
    if failure.signal is not None:
        return f"was killed by {_signal_name(failure.signal)}"
    if failure.exit_code is not None:
        return f"exited with code {failure.exit_code}"
    return "died"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _timeout(failure: Failure) -> str:
    return failure.message or "the task ran over task_timeout and was stopped"


def _loss(failure: Failure) -> str:
    return failure.message or "its worker died or vanished while the task was running"


def _unserializable(failure: Failure) -> str:
    own = failure.type == type_name(SerializationError)
    return failure.message if own else f"{failure.type}: {failure.message}"


def _initializer(failure: Failure, context: str) -> str:
    text = f"{failure.type}: {failure.message}" if failure.type else failure.message
    if failure.signal is not None or failure.exit_code is not None:
        text = f"its process {_ending(failure)}"
    return f"{context}: the initializer failed, so no task can run there: {text}{_stderr(failure)}"


def _stderr(failure: Failure) -> str:
    tail = failure.stderr.rstrip()
    return f"\nThe last it wrote to stderr:\n{tail}" if tail else ""

"""Converts exceptions to failures and back."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from pathlib import Path
from typing import Any

import msgspec

import starburst_executor
from starburst_executor.errors import (
    DamagedObject,
    InitializerFailed,
    RemoteError,
    RemoteTraceback,
    SerializationError,
    TaskCrashed,
    TaskTimeout,
    WorkerLost,
)
from starburst_executor.protocol.outcome import Failure, FailureKind
from starburst_executor.protocol.payload import ENCODER, Fetch, Keep, fetched, frame, parse
from starburst_executor.serialization.diagnosis import MESSAGE_MAX
from starburst_executor.serialization.exception_state import (
    Part,
    clean,
    message_of,
    one_line,
    put_together,
    take_apart,
    type_name,
)
from starburst_executor.serialization.pickling import lifted, loads, pickle_out_of_band

__all__ = ["describe", "rebuild"]


TRACEBACK_MAX = 64 * 1024  # characters

_exception_parts = msgspec.msgpack.Decoder(list[Part])


def describe(exc: BaseException, keep: Keep, kind: FailureKind = "raised") -> Failure:
    """Everything needed to raise an exception somewhere else.

    Its causes, contexts and notes are included, each taken apart separately, so that only the parts
    that cannot be pickled are left out.
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
        stream, buffers = pickle_out_of_band(lifted(value))
        twin = pickle.loads(stream, buffers=buffers)
        return frame(stream, buffers, blobs.__setitem__), twin

    parts = take_apart(exc, pack)
    cargo = frame(ENCODER.encode(parts), (), blobs.__setitem__)
    for digest, data in blobs.items():
        # Not while taking it apart: a full disk would be blamed on an attribute.
        keep(digest, data)
    return cargo


# Frames of this package's own code, which precede the user's.
_OWN_FOLDER = f"{Path(starburst_executor.__file__).parent}{os.sep}"


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
        while part.stack and part.stack[0].filename.startswith(_OWN_FOLDER):
            del part.stack[0]
        todo += [part.__cause__, part.__context__, *(part.exceptions or ())]


def _clip(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = (limit - 60) // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n... {left_out} characters left out ...\n{text[-half:]}"


def rebuild(failure: Failure, fetch: Fetch, context: str) -> BaseException:
    """The exception to raise for a failure. Never raises.

    The task's own exception is restored. Its `__cause__` is the `RemoteTraceback`, whose
    `__cause__` is the original one.

    Args:
        failure: Why the task has no value.
        fetch: Returns the exception's blobs, as for `loads`.
        context: Task, attempt and worker, for the message or a note.
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
    stand_in.add_note(f"The exception could not be restored: {reason}")
    return stand_in


def _restored(cargo: bytes, fetch: Fetch) -> BaseException:
    stream, _ = parse(cargo)
    data = stream if isinstance(stream, bytes) else fetched(stream, fetch)
    if data[:1] == pickle.PROTO:
        return _restored_whole(cargo, fetch)
    parts = _exception_parts.decode(data)
    return put_together(parts, lambda cargo: loads(cargo, fetch, "exception"))


def _restored_whole(cargo: bytes, fetch: Fetch) -> BaseException:
    """An exception from a session older than the format that takes exceptions apart."""
    exc, links = loads(cargo, fetch, "exception")
    for e, cause, context, hides, notes in links:
        _set(e, "__cause__", cause)
        _set(e, "__context__", context)
        _set(e, "__suppress_context__", hides)
        if notes is not None:
            _set(e, "__notes__", notes)
    if not isinstance(exc, BaseException):
        raise TypeError(f"{type_name(type(exc))} is not an exception")
    return exc


def _shown(exc: BaseException, failure: Failure, note: str = "") -> BaseException:
    """Add the remote traceback to an exception, and a note about its origin."""
    if failure.traceback:
        remote = RemoteTraceback(failure.traceback)
        remote.__cause__ = exc.__cause__
        _set(exc, "__cause__", remote)
    if note:
        _set(exc, "__notes__", [*(getattr(exc, "__notes__", None) or ()), note])
    return exc


def _set(exc: BaseException, name: str, value: object) -> None:
    object.__setattr__(exc, name, value)  # works for frozen classes too


_LIKELY = {
    signal.SIGKILL: "Most likely it ran out of memory: request more with memory=, or use less",
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
    # No guess where the cause is known.
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
    return failure.message or "the task exceeded task_timeout and was stopped"


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
    return f"\nLast lines on stderr:\n{tail}" if tail else ""

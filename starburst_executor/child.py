"""The process that runs tasks: one job in, one reply out, warm in between.

    worker process                                     | child process, one per slot
                                                       |
    slots.ProcessSlots ---- Order ---> unread orders --|--> Child.serve
            ^             (the socket is the queue)    |      unpickle, call, pickle
            +-------------- Reply ---------------------|-----------+
            |                                          |
            +-- stdout and stderr: files <-------------|-- fd 1 and 2

* The worker starts `python -m starburst_executor.child`, sends orders, a few of them
  ahead, and can take back those that were not read yet: one message is one order, and
  the kernel decides who read it.
* The child says `Ready` once it can read, `Initialized` once the initializer has run,
  and then answers each order with one `Reply`. Only here is user data unpickled.
* Messages that are too large for the socket lie in a file, which the message names.
* When the worker dies, however, the child dies too.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import importlib
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from starburst_executor.nesting import importing_for_task
from starburst_executor.serialize import (
    Failure,
    Outcome,
    describe,
    dumps,
    encode_outcome,
    loads,
    unpack_call,
)

__all__ = [
    "MESSAGE_MAX",
    "Blob",
    "FromChild",
    "Initialized",
    "Kind",
    "Order",
    "Ready",
    "Reply",
    "Spooled",
    "ToChild",
    "frame",
    "tail",
    "to_child",
    "unspool",
]

MESSAGE_MAX = 64 * 1024  # bytes; a socket's buffer holds several of these
OUTPUT_MAX = 1024 * 1024  # bytes of stdout, and of stderr, kept of one task
FUNCTIONS_MAX = 64  # callables kept warm

Kind: TypeAlias = Literal[
    "returned", "raised", "crashed", "timeout", "initializer", "unserializable"
]
Blob: TypeAlias = tuple[str, str, int]  # digest, spool file, bytes


class Order(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Run this."""

    number: int
    function: str  # file with the callable's cargo
    function_digest: str
    call: bytes  # cargo of (args, kwargs)
    blobs: str  # directory of the blobs that the cargos name
    path: tuple[str, ...]  # directories for sys.path


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The child has started and reads orders."""


class Initialized(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The initializer has returned; the run time of the first order counts from here."""


class Reply(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What became of an order."""

    number: int
    seconds: float  # run time, with unpickling and pickling
    kind: Kind
    outcome: bytes  # of `encode_outcome`
    blobs: tuple[Blob, ...]
    stdout: bytes
    stderr: bytes


class Spooled(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The message with this number is in a file; whoever reads it deletes it."""

    number: int
    file: str


ToChild: TypeAlias = Order | Spooled
FromChild: TypeAlias = Ready | Initialized | Reply | Spooled

_encoder = msgspec.msgpack.Encoder()
_orders = msgspec.msgpack.Decoder(Order)
to_child: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)


# --- messages and files, for both ends --------------------------------------------


def frame(message: Order | Reply, file: Path) -> bytes:
    """Encode a message; one too large for the socket goes to `file`, which the result names."""
    data = _encoder.encode(message)
    if len(data) <= MESSAGE_MAX:
        return data
    file.write_bytes(data)
    return _encoder.encode(Spooled(message.number, str(file)))


def unspool(message: Spooled) -> bytes:
    """The bytes of a message that lies in a file; the file is deleted."""
    file = Path(message.file)
    data = file.read_bytes()
    file.unlink()
    return data


def tail(file: int, limit: int = OUTPUT_MAX) -> bytes:
    """The last `limit` bytes of an open file, after a line that says how much was cut."""
    size = os.fstat(file).st_size
    cut = max(0, size - limit)
    data = os.pread(file, size - cut, cut)
    return (
        b"[starburst: the first %d bytes were cut]\n%b" % (cut, data) if cut else data
    )


# --- what a job leaves behind -----------------------------------------------------


class _Output:
    """What is written to fd 1 and 2, by Python, C code and subprocesses alike.

    Both are files opened for appending, so truncating one starts it anew for everybody
    who has it open.
    """

    def __init__(self) -> None:
        # Copies, so that a task that closes or redirects fd 1 does no harm here.
        self._files = (os.dup(1), os.dup(2))
        for stream in (sys.stdout, sys.stderr):
            # By line: whoever looks at a running task sees what it has printed, and a
            # crash loses none of it. Nothing printed may fail for want of an encoding.
            stream.reconfigure(  # type: ignore[union-attr]  # TextIO hides it
                encoding="utf-8", errors="backslashreplace", line_buffering=True
            )

    def take(self) -> tuple[bytes, bytes]:
        """What was written to stdout and to stderr since the last call."""
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            with suppress(Exception):  # it may be anything of the task's, or closed
                stream.flush()  # type: ignore[union-attr]
        stdout, stderr = map(_emptied, self._files)
        return stdout, stderr


def _emptied(file: int) -> bytes:
    if not os.fstat(file).st_size:
        return b""
    data = tail(file)
    os.ftruncate(file, 0)
    return data


class _Spool:
    """Large buffers of one job's outcome, as files for the worker to upload."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._number = number
        self._kept: dict[str, Blob] = {}

    def __call__(self, digest: str, data: memoryview) -> None:
        if digest not in self._kept:
            file = self._folder / f"{self._number}.{digest}"
            self._kept[digest] = (digest, str(file), data.nbytes)
            file.write_bytes(data)

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return tuple(self._kept.values())

    def discard(self) -> None:
        """Forget what was kept of a result that could not be pickled or written as a whole."""
        for _, file, _ in self._kept.values():
            Path(file).unlink(missing_ok=True)
        self._kept.clear()


# --- running ----------------------------------------------------------------------


class Child:
    """Answers orders, one after the other, in the main thread of this process.

    Args:
        channel: The socket; closed by the worker when the child may go.
        spool: Directory for files that travel beside the messages.
        initializer: File with the cargo of (initializer, initargs), run before the
            first order.
    """

    def __init__(
        self, channel: socket.socket, spool: Path, initializer: Path | None
    ) -> None:
        self._channel = channel
        self._spool = spool
        self._initializer = initializer
        self._functions: OrderedDict[str, Callable[..., object]] = OrderedDict()
        self._path: set[str] = set()
        self._blobs = ""
        self._output = _Output()

    def serve(self) -> None:
        """Answer orders until the worker hangs up, says so, or the initializer fails."""
        self._send(_encoder.encode(Ready()))
        going = True
        while going and (data := self._channel.recv(MESSAGE_MAX)):
            message = to_child.decode(data)
            if isinstance(message, Spooled):
                message = _orders.decode(unspool(message))
            going = self._answer(message)

    def _answer(self, order: Order) -> bool:
        process = os.getpid()
        spool = _Spool(self._spool, order.number)
        self._blobs = order.blobs
        self._extend_path(order.path)
        began = time.monotonic()
        failure = self._initialize(spool)
        if failure is None:
            began = time.monotonic()
            kind, outcome = self._run(order, spool)
        else:
            kind, outcome = "initializer", Outcome(failure=failure)
        if os.getpid() != process:
            os._exit(0)  # the task forked and both came back: the reply is not ours
        seconds = time.monotonic() - began
        encoded = encode_outcome(outcome)
        stdout, stderr = self._output.take()
        reply = Reply(order.number, seconds, kind, encoded, spool.blobs, stdout, stderr)
        self._send(frame(reply, self._spool / f"{order.number}.reply"))
        return failure is None

    def _extend_path(self, path: Sequence[str]) -> None:
        new = [directory for directory in path if directory not in self._path]
        if new:
            # In front, as the caller had them: before what is installed.
            sys.path[:0] = new
            self._path.update(new)
            importlib.invalidate_caches()

    def _initialize(self, spool: _Spool) -> Failure | None:
        if self._initializer is None:
            return None
        try:
            cargo = self._initializer.read_bytes()
            with importing_for_task():
                initializer, arguments = loads(cargo, self._fetch, "initializer")
            initializer(*arguments)
        except BaseException as error:
            return _failure(error, "initializer", spool)
        self._initializer = None
        self._send(_encoder.encode(Initialized()))
        return None

    def _run(self, order: Order, spool: _Spool) -> tuple[Kind, Outcome]:
        """The steps of a job; no reference to a user's object outlives it."""
        kind: Literal["raised", "unserializable"] = "unserializable"
        try:
            with importing_for_task():
                function = self._function(order)
                args, kwargs = unpack_call(order.call, self._fetch)
            kind = "raised"
            value = function(*args, **kwargs)
            del args, kwargs
            kind = "unserializable"
            return "returned", Outcome(value=dumps(value, spool, what="result"))
        except BaseException as error:  # SystemExit too, as in concurrent.futures
            return kind, Outcome(failure=_failure(error, kind, spool))

    def _function(self, order: Order) -> Callable[..., object]:
        function = self._functions.get(order.function_digest)
        if function is None:
            cargo = Path(order.function).read_bytes()
            function = self._functions[order.function_digest] = loads(
                cargo, self._fetch, "function"
            )
            if len(self._functions) > FUNCTIONS_MAX:
                self._functions.popitem(last=False)
        else:
            self._functions.move_to_end(order.function_digest)
        return function

    def _fetch(self, digest: str, size: int) -> mmap.mmap | bytearray:
        """A blob as memory of its own that may be written to and costs nothing until it is."""
        with Path(self._blobs, digest).open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return bytearray()  # cannot be mapped; a wrong size is seen in `loads`
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def _send(self, data: bytes) -> None:
        while True:
            try:
                self._channel.send(data)
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # macOS's way to say that it is full
                    raise
            select.select([], [self._channel], [], 0.01)


def _failure(
    error: BaseException,
    kind: Literal["raised", "unserializable", "initializer"],
    spool: _Spool,
) -> Failure:
    spool.discard()
    return describe(error, spool, kind)


# --- the process ------------------------------------------------------------------


def main() -> None:
    """Run a child: its channel, the worker's process id and two paths are arguments."""
    descriptor, life, worker, spool, initializer = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the worker
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable()  # so that stderr tells where a segmentation fault was
    _die_with(int(worker))
    _die_before(int(worker))
    channel = socket.socket(fileno=int(descriptor))
    _keep_to_this_process(channel, int(life))
    _look_like_nothing()
    Child(channel, Path(spool), Path(initializer) if initializer else None).serve()


def _die_with(worker: int) -> None:
    """Have this process killed when the worker ends, whatever it is doing then."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != worker:
            os._exit(0)  # it ended before the call, so no signal will come
    else:
        threading.Thread(target=_watch, args=(worker,), daemon=True).start()


def _die_before(worker: int) -> None:
    """Let the kernel choose this process rather than the worker when memory runs out."""
    with suppress(OSError):  # not Linux, or nearer to the top of its list already
        theirs = int(Path(f"/proc/{worker}/oom_score_adj").read_text())
        Path("/proc/self/oom_score_adj").write_text(str(min(1000, theirs + 500)))


def _watch(worker: int) -> None:
    never = threading.Event()
    while os.getppid() == worker:
        never.wait(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def _keep_to_this_process(channel: socket.socket, life: int) -> None:
    """Keep the channel from subprocesses and forks of tasks.

    `life` is a pipe that nobody writes to: that its last holder is gone tells the
    worker that this process ended.
    """
    channel.set_inheritable(False)
    os.set_inheritable(life, False)

    def close() -> None:
        channel.close()
        os.close(life)

    os.register_at_fork(after_in_child=close)


def _look_like_nothing() -> None:
    """Give user code an empty `__main__` and no arguments, as in a fresh interpreter.

    Otherwise `multiprocessing` in a task would import this module as its main one, and
    a name that was pickled by reference to the caller's `__main__` might be found here.
    """
    sys.argv[:] = [""]
    sys.modules["__main__"] = types.ModuleType("__main__")


if __name__ == "__main__":
    main()

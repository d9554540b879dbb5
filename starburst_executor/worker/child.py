"""The process that runs tasks: one job in, one reply out, warm in between.

    worker process                                     | child process, one per slot
                                                       |
    pool.ProcessPool ---- JobRequest --> unread jobs --|--> Child.serve
            ^             (the socket is the queue)    |      unpickle, call, pickle
            +-------------- Reply ---------------------|-----------+
            |                                          |
            +-- stdout and stderr: files <-------------|-- fd 1 and 2

* The worker starts this module with `python -m`, sends requests, a few of them ahead, and can take
  back unread ones: one message is one request, and the kernel decides which side reads it.
* The child says `Ready` once it can read, `Initialized` once the initializer has run, and then
  answers each request with one `Reply`. Only here does a worker unpickle user data.
* A message too large for the socket goes into a file, which a smaller message names.
* If the worker dies, however it dies, the child dies too.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from starburst_executor.environment import shipped_modules
from starburst_executor.nesting import importing_for_task
from starburst_executor.protocol import origin
from starburst_executor.protocol.outcome import Failure, Outcome, encode_outcome
from starburst_executor.serialization.exceptions import describe
from starburst_executor.serialization.mp_main import new_main
from starburst_executor.serialization.namespace import Capture, Home
from starburst_executor.serialization.pickling import dumps, loads, unpack_call
from starburst_executor.serialization.remote import show_sources
from starburst_executor.storage.base import STARVED
from starburst_executor.worker.ipc import (
    ENCODER,
    MESSAGE_MAX,
    ORDERS,
    TO_CHILD,
    Blob,
    Initialized,
    JobRequest,
    Kind,
    Ready,
    Reply,
    Spooled,
    Unable,
    delete_files,
    frame,
    unspool,
)
from starburst_executor.worker.output import Output, log_error
from starburst_executor.worker.process_state import ProcessState

__all__ = ["Child", "main"]


FUNCTIONS_MAX = 64  # callables kept warm


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
            with _own_file(file):
                file.write_bytes(data)

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return tuple(self._kept.values())

    def discard(self) -> None:
        """Forget what was kept of a result that could not be pickled or written as a whole."""
        delete_files(Path(file) for _, file, _ in self._kept.values())
        self._kept.clear()


class _OwnFault(Exception):
    """What failed is this process or the machine, not the task."""

    begun = True  # the task's own code was run, and may have to do with it
    disk = False


class _NothingToRun(_OwnFault):
    """What the worker has put here cannot be opened, for this process has too little left."""

    begun = False


class _DiskFault(_OwnFault):
    """The disk that the worker keeps its files on is full or gone."""

    disk = True


@contextmanager
def _own_file(path: Path, otherwise: type[_OwnFault] = _OwnFault) -> Iterator[None]:
    """Tell errors with a file of the worker's from those of the task.

    Args:
        path: The file.
        otherwise: What to raise if this process is short of descriptors or memory.
    """
    try:
        yield
    except OSError as error:
        kind = otherwise if error.errno in STARVED else _DiskFault
        raise kind(f"{path} cannot be read or written: {error.strerror or error}") from error


class Child:
    """Answers orders, one after the other, in the main thread of this process.

    Args:
        channel: The socket; closed by the worker when the child may go.
        spool: Directory for files that travel beside the messages.
        initializer: File with the cargo of (initializer, initargs), run before the
            first order.
        memory_max: Bytes of memory that this process may have between two orders.
    """

    def __init__(
        self,
        channel: socket.socket,
        spool: Path,
        initializer: Path | None,
        memory_max: float,
    ) -> None:
        self._channel = channel
        self._spool = spool
        self._initializer = initializer
        self._home = Home()
        self._functions: OrderedDict[str, tuple[Callable[..., object], Capture]]
        self._functions = OrderedDict()
        self._path: set[str] = set()
        self._blobs = ""
        self._output = Output()
        self._state = ProcessState(memory_max)

    def serve(self) -> None:
        """Serve requests until the worker hangs up or says stop, or this process is unfit."""
        self._send(ENCODER.encode(Ready()))
        going = True
        while going and (data := self._channel.recv(MESSAGE_MAX)):
            message = TO_CHILD.decode(data)
            if isinstance(message, Spooled):
                message = ORDERS.decode(unspool(message))
            going = self._answer(message)

    def _answer(self, order: JobRequest) -> bool:
        """Carry out an order and say what became of it; False if it was the last one."""
        process = os.getpid()
        spool = _Spool(self._spool, order.number)
        try:
            reply = self._carry_out(order, spool, process)
            with _own_file(self._spool):
                data = frame(reply, self._spool)
        except BaseException as error:  # all that a task raises is in the reply
            if os.getpid() != process:
                os._exit(0)
            spool.discard()
            if not isinstance(error, _OwnFault):
                error = _OwnFault(repr(error))
            unable = Unable(order.number, str(error), error.begun, error.disk)
            self._send(ENCODER.encode(unable))
            return False
        self._send(data)
        return not reply.unfit and reply.kind != "initializer"

    def _carry_out(self, order: JobRequest, spool: _Spool, process: int) -> Reply:
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
        self._output.flush()
        unfit = self._state.restore(seconds)
        encoded = encode_outcome(outcome)
        stdout, stderr = self._output.take()
        blobs = spool.blobs
        return Reply(order.number, seconds, kind, encoded, blobs, stdout, stderr, unfit)

    def _extend_path(self, path: Sequence[str]) -> None:
        new = [directory for directory in path if directory not in self._path]
        if new:
            shipped_modules.add_to_path(new)
            self._path.update(new)
            self._state.accept_imports()

    def _initialize(self, spool: _Spool) -> Failure | None:
        if self._initializer is None:
            return None
        try:
            cargo = _read(self._initializer)
            with importing_for_task(), self._home.receive(self._initializer.name):
                initializer, arguments = loads(cargo, self._fetch, "initializer")
            initializer(*arguments)
        except _OwnFault:
            raise
        except BaseException as error:
            return self._failure(error, "initializer", spool)
        self._initializer = None
        self._state.accept()
        self._send(ENCODER.encode(Initialized()))
        return None

    def _run(self, order: JobRequest, spool: _Spool) -> tuple[Kind, Outcome]:
        """The steps of a job; no reference to a user's object outlives it."""
        kind: Literal["raised", "unserializable"] = "unserializable"
        modules = len(sys.modules)
        try:
            with importing_for_task():
                function = self._function(order)
                with self._home.receive():
                    args, kwargs = unpack_call(order.call, self._fetch)
            if len(sys.modules) != modules:
                self._state.accept_imports()
            kind = "raised"
            value = function(*args, **kwargs)
            del args, kwargs
            kind = "unserializable"
            with self._home.reply():
                return "returned", Outcome(value=dumps(value, spool, what="result"))
        except _OwnFault:
            raise
        except BaseException as error:  # SystemExit too, as in concurrent.futures
            if (full := log_error(error)) is not None:
                raise _DiskFault(f"what it prints cannot be written: {full}") from error
            if kind == "unserializable" and _is_starved(error):
                raise _OwnFault(str(error)) from error
            return kind, Outcome(failure=self._failure(error, kind, spool))

    def _function(self, order: JobRequest) -> Callable[..., object]:
        digest = order.function_digest
        if digest in self._functions:
            self._functions.move_to_end(digest)
            known, values = self._functions[digest]
            self._home.enter(values)
            return known
        cargo = _read(Path(order.function))
        with self._home.receive(digest) as values:
            function: Callable[..., object] = loads(cargo, self._fetch, "function")
        self._functions[digest] = function, values
        if len(self._functions) > FUNCTIONS_MAX:
            self._functions.popitem(last=False)
        return function

    def _failure(
        self,
        error: BaseException,
        kind: Literal["raised", "unserializable", "initializer"],
        spool: _Spool,
    ) -> Failure:
        spool.discard()
        with self._home.reply():
            return describe(error, spool, kind)

    def _fetch(self, digest: str, size: int) -> mmap.mmap | bytearray:
        """A blob as memory of its own that may be written to and costs nothing until it is."""
        path = Path(self._blobs, digest)
        with _own_file(path, _NothingToRun), path.open("rb") as file:
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
                    raise SystemExit(
                        "starburst: the task has closed or replaced the descriptor by which"
                        f" its process answers (os.close, os.closerange, os.dup2): {error}"
                    ) from error
            select.select([], [self._channel], [], 0.01)


def _read(file: Path) -> bytes:
    with _own_file(file, _NothingToRun):
        return file.read_bytes()


def _is_starved(error: BaseException | None) -> bool:
    """Whether something failed for want of what this process has used up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in STARVED:
            return True
        error = error.__cause__ or error.__context__
    return False


def main() -> None:
    """Run a child: its channel, the worker's process id and two paths are among the arguments."""
    descriptor, life, worker, spool, initializer, memory_max = sys.argv[1:]
    # Ctrl-C does not come here, for this process has a session of its own.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable()  # so that stderr tells where a segmentation fault was
    _die_with(int(worker))
    _die_before(int(worker))
    channel = socket.socket(fileno=int(descriptor))
    _keep_to_this_process(channel, int(life))
    _look_like_nothing(Path(spool))
    origin.take_on()
    show_sources()
    first = Path(initializer) if initializer else None
    Child(channel, Path(spool), first, float(memory_max)).serve()


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


def _look_like_nothing(spool: Path) -> None:
    """Give user code an empty `__main__` and no arguments, as in a fresh interpreter.

    What arrives of the script is put there.
    """
    sys.argv[:] = [""]
    sys.modules["__main__"] = new_main(spool)


if __name__ == "__main__":
    main()

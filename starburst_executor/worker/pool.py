"""The worker's side of its child processes: jobs in, results out, never blocking.

    worker's loop                 | thread "starburst-slots"             | children
                                  |                                      |
    start ----> queue of jobs ----|--> feed ---- socket of each child ---|--> run
    withdraw <--------------------|--- take back what was not read       |
    take <----- results <---------|--- collect <-------------------------|--- reply
    signal <----------------------|--- bury: blame, replace <------------|--- death

* The worker's loop hands over jobs and fetches their results.
* The thread sends each child one job, and a few ahead while jobs are tiny; it takes back what it
  sent ahead when the job in front turns out to be long, enforces time limits, and replaces
  children that died.
* A child (`child.py`) runs one job at a time, in a process group of its own.

There is never any doubt who owns a job. A message in a child's socket is read either by the child
or, to take it back, by this process, which keeps the receiving end open too; the kernel decides
which. So a child that died had begun at most one job without answering it: that one is to blame,
and all others go to another child.
"""

from __future__ import annotations

import logging
import math
import os
import selectors
import shutil
import sys
import threading
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from starburst_executor.protocol.outcome import Failure, Outcome, encode_outcome
from starburst_executor.runtime import Runtime, Signal
from starburst_executor.worker.child_handle import (
    REPLIES,
    ChildHandle,
    Job,
    QueuedJob,
    Ruling,
    death_kind,
    seconds_left,
)
from starburst_executor.worker.ipc import (
    FromChild,
    Initialized,
    JobRequest,
    Kind,
    Reply,
    Spooled,
    Unable,
    frame,
    unspool,
)
from starburst_executor.worker.output import OUTPUT_MAX

__all__ = ["ChildPool", "JobResult", "ProcessPool", "SlotsBroken"]

log = logging.getLogger(__name__)

SLOW = 0.1  # seconds; a job that runs longer keeps none waiting behind it

STDERR_TAIL = 4096  # bytes of stderr shown in the message of a crash

STARTS_MAX = 5  # children in a row that die before they can read: then it is the machine

PAUSE = 0.05  # seconds before the second try to start a child, then twice that, ...

LEAVE = 1.0  # seconds that idle children have for their own clean-up

# Children that begin a job and cannot carry it out: then it is the job. Children in a row
# that cannot even begin: then it is the machine.
UNABLE_MAX = 3

# Seconds between looks at how much running jobs have printed: when it was much, and else.
LOOK_SOON, LOOK_LATER = 0.05, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What became of a job.

    The files of `blobs` belong to whoever took this: to be uploaded, then deleted.
    """

    key: Hashable
    began: float  # UTC seconds by this machine's clock
    ended: float
    outcome: bytes  # of `encode_outcome`
    ok: bool  # it returned a value
    kind: Kind
    blobs: tuple[tuple[str, Path, int], ...]  # digest, file, bytes
    stdout: bytes  # the last 1 MiB of it
    stderr: bytes


class SlotsBroken(RuntimeError):
    """No jobs can be run here any more, whatever they are."""


class ChildPool(Protocol):
    """Runs jobs, `size` at a time, first in first out. No call blocks on a job."""

    size: int
    signal: Signal
    """Set whenever `take` has something new."""

    def start(self, job: Job) -> None:
        """Queue a job; the next free slot begins it."""

    def withdraw(self, keys: Iterable[Hashable]) -> set[Hashable]:
        """Take back those of the jobs that have not begun.

        Returns:
            The keys of the jobs that will now never run; each other one is running,
            has ended or was never here.
        """

    def begun(self) -> dict[Hashable, float]:
        """The jobs that run now, and since when (UTC seconds)."""

    def kill(self, key: Hashable) -> None:
        """Stop a job, running or not; `take` will not tell of it."""

    def take(self) -> list[JobResult]:
        """The jobs that ended since the last call.

        Raises:
            SlotsBroken: no jobs can be run here any more; those that were begun may be run elsewhere.
        """

    def live_output(self, key: Hashable) -> tuple[bytes, bytes]:
        """The last that a running job has written to stdout and to stderr so far."""

    def close(self) -> None:
        """Stop everything within a few seconds and delete what is left of it."""


_from_child: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)


class ProcessPool:
    """Slots that are child processes of this one. Implements `Slots`.

    A child that died is replaced by a fresh one. Functions and imports stay warm in a
    child; so does whatever else a task leaves in it, its threads and background
    processes included, until the child ends.

    Args:
        size: How many jobs run at once.
        folder: A directory for this object alone; made here, removed by `close`.
        initializer: File with the cargo of (initializer, initargs), which each child
            runs before its first job. It may take as long as it likes.
        runtime: The clock.
        signal: Set whenever `take` has something.
        jobs_max: How many jobs a child runs before it is replaced.
        memory_max: Bytes of memory that a child may keep between jobs before it is replaced.
    """

    def __init__(
        self,
        size: int,
        *,
        folder: Path,
        initializer: Path | None = None,
        runtime: Runtime,
        signal: Signal,
        jobs_max: int | None = None,
        memory_max: float = math.inf,
    ) -> None:
        self.size = size
        self._jobs_max = math.inf if jobs_max is None else jobs_max
        self._memory_max = memory_max
        self.signal = signal
        self._folder = folder.absolute()  # tasks may change the directory
        self._initializer = initializer
        self._runtime = runtime
        self._lock = threading.Lock()  # over all that follows
        self._queue: deque[QueuedJob] = deque()
        self._children: list[ChildHandle] = []
        self._done: list[JobResult] = []
        self._arrived = 0  # jobs, in all
        self._spawned = 0  # children, in all
        self._mean: float | None = None  # recent run time, seconds
        self._due = math.inf  # when to look for jobs that are slow or over their limit
        self._stillborn = 0  # children in a row that died before they were ready
        self._unable = 0  # children in a row that could not even begin a job
        self._fatal: SlotsBroken | None = None
        self._look_at_output = math.inf
        self._spawn_at = -math.inf  # not before
        self._woken = False
        self._closing = False
        self._broken: Exception | None = None
        folder.mkdir(parents=True)
        self._bell, self._rope = os.pipe()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ, self._hear)
        # One thread for all, which lives as long as they do: Linux kills a child when
        # the thread that started it ends.
        self._thread = threading.Thread(target=self._pump, name="starburst-slots", daemon=True)
        self._thread.start()

    # The worker's loop

    def start(self, job: Job) -> None:
        """Queue a job; the next free child begins it."""
        with self._lock:
            if self._closing:
                raise SlotsBroken(f"{job.label}: the slots are closed") from self._broken
            if not self._queue:  # else the thread knows, or has no child to spare
                self._wake()
            self._arrived += 1
            self._queue.append(QueuedJob(self._arrived, job))

    def withdraw(self, keys: Iterable[Hashable]) -> set[Hashable]:
        """Take back those of the jobs that no child has begun."""
        with self._lock:
            return self._withdraw(set(keys))

    def _withdraw(self, wanted: set[Hashable]) -> set[Hashable]:
        for child in self._children:
            if any(entry.job.key in wanted for entry in child.sent):
                self._recall(child)
        withdrawn = {e.job.key for e in self._queue if e.job.key in wanted}
        self._queue = deque(e for e in self._queue if e.job.key not in wanted)
        self._wake()  # to send again what was not meant
        return withdrawn

    def begun(self) -> dict[Hashable, float]:
        """The jobs that children are running, and since when."""
        with self._lock:
            heads = [child.sent[0] for child in self._children if child.sent]
            return {head.job.key: head.began for head in heads if not head.unwanted}

    def kill(self, key: Hashable) -> None:
        """Stop a job, with the child that runs it and the processes it started."""
        with self._lock:
            self._withdraw({key})
            for child in self._children:
                self._collect(child)
                # What it was sent besides is taken back, so it kills no other job.
                if child.sent and child.sent[0].job.key == key:
                    child.sent[0].unwanted = True
                    self._condemn(child, "killed")
            for ended in self._done:
                if ended.key == key:
                    _unlink(ended)
            self._done = [ended for ended in self._done if ended.key != key]

    def take(self) -> list[JobResult]:
        """The jobs that ended since the last call."""
        with self._lock:
            done, self._done = self._done, []
            if self._broken is not None and not done:
                raise SlotsBroken(
                    f"no tasks can be run here any more: {self._broken}"
                ) from self._broken
            return done

    def live_output(self, key: Hashable) -> tuple[bytes, bytes]:
        """The last 1 MiB that a running job has written to stdout and to stderr so far."""
        with self._lock:
            for child in self._children:
                if child.sent and child.sent[0].job.key == key:
                    return child.output()
        return b"", b""

    def close(self) -> None:
        """Kill running jobs, let idle children go, delete every file; twice is fine."""
        with self._lock:
            self._wake()
            self._closing = True
        self._thread.join()

    def _wake(self) -> None:
        if not self._woken and not self._closing:
            self._woken = True
            os.write(self._rope, b"!")

    # The thread

    def _pump(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except Exception as error:
            log.exception("the children are stopped, because of an error around them")
            with self._lock:
                self._broken = error
        finally:
            try:
                self._end()
            finally:
                self.signal.set()

    def _turn(self) -> None:
        self._spawn_missing()
        with self._lock:
            self._feed()
            patience = self._patience()
        events = self._selector.select(patience)
        with self._lock:
            for key, _ in events:
                key.data()
            if self._runtime.monotonic() >= self._due:
                self._check_times()
            self._shorten_output()
            dying = [child for child in self._children if child.verdict]
        for child in dying:
            self._bury(child)
        if self._fatal is not None:
            raise self._fatal
        if self._done:
            self.signal.set()

    def _patience(self) -> float | None:
        until = min(self._due, self._look_at_output)
        if self._lacking():
            until = min(until, self._spawn_at)
        return None if until == math.inf else max(0.0, until - self._runtime.monotonic())

    def _hear(self) -> None:
        os.read(self._bell, 16)
        self._woken = False

    # Children come

    def _spawn_missing(self) -> None:
        """Start what is missing, without the lock: it takes milliseconds for each."""
        while self._lacking() and not self._closing:
            if self._runtime.monotonic() < self._spawn_at:
                return
            try:
                child = self._spawn()
            except OSError as error:  # out of processes, memory or descriptors
                self._count_stillborn(str(error))
                return
            with self._lock:
                self._children.append(child)
            heed, kinds = self._selector.register, selectors.EVENT_READ
            heed(child.channel, kinds, partial(self._collect, child))
            heed(child.life, kinds, partial(self._condemn, child, "gone"))

    def _lacking(self) -> bool:
        return sum(not child.leaving for child in self._children) < self.size

    def _spawn(self) -> ChildHandle:
        self._spawned += 1
        stem = self._folder / f"child-{self._spawned}"
        outputs = (stem.with_suffix(".stdout"), stem.with_suffix(".stderr"))
        initializer = str(self._initializer or "")
        arguments = [str(self._folder), initializer, str(self._memory_max)]
        child = ChildHandle(outputs, arguments, self._jobs_max)
        child.initialized = self._initializer is None
        return child

    def _count_stillborn(self, reason: str) -> None:
        self._stillborn += 1
        if self._stillborn == STARTS_MAX:
            raise SlotsBroken(
                f"{STARTS_MAX} child processes in a row could not start; is"
                f" {sys.executable} complete, and is there memory left?\n{reason}"
            )
        pause = PAUSE * 2 ** (self._stillborn - 1)
        self._spawn_at = self._runtime.monotonic() + pause

    # Jobs go out

    def _feed(self) -> None:
        """Send queued jobs to the least loaded children, in the order of their arrival."""
        window = _window(self._mean)
        free = [c for c in self._children if len(c.sent) < c.window(window)]
        for load in range(window):
            for child in list(free):
                if not self._queue:
                    return
                if len(child.sent) <= load and not self._offer(child, window):
                    free.remove(child)

    def _offer(self, child: ChildHandle, window: int) -> bool:
        """Send a child the next job; False if it cannot take it, or nothing after it."""
        entry = self._queue[0]
        if not _adds_to(child.path, entry.job.path):
            if not child.sent:
                self._replace(child)
            return False
        if not child.send(frame(_order(entry), self._folder)):
            (self._folder / f"{entry.number}.order").unlink(missing_ok=True)
            return False
        self._queue.popleft()
        child.path = entry.job.path
        child.sent.append(entry)
        if len(child.sent) == 1:
            self._begin(entry)
        if self._look_at_output == math.inf:
            self._look_at_output = self._runtime.monotonic() + LOOK_SOON
        return len(child.sent) < child.window(window)

    def _replace(self, child: ChildHandle) -> None:
        """End a child that was shown other modules than the next job needs."""
        used = [c for c in self._children if not c.verdict and (c.path or c.sent)]
        fresh = self.size - len(used)  # now or soon
        if fresh < len(self._queue):
            self._condemn(child, "replaced")

    def _begin(self, entry: QueuedJob) -> None:
        entry.began = self._runtime.time()
        entry.since = self._runtime.monotonic()
        self._due = min(self._due, entry.since + min(SLOW, entry.job.timeout or SLOW))

    def _recall(self, child: ChildHandle) -> None:
        """Put back into the queue what a child was sent and has not read."""
        recalled = child.recall()
        for entry in recalled:
            (self._folder / f"{entry.number}.order").unlink(missing_ok=True)
        self._put_back(recalled)

    def _put_back(self, entries: list[QueuedJob]) -> None:
        if entries:
            everything = [*entries, *self._queue]
            self._queue = deque(sorted(everything, key=lambda entry: entry.number))

    # Replies come in

    def _collect(self, child: ChildHandle) -> None:
        try:
            for data in child.receive():
                message = _from_child.decode(data)
                if isinstance(message, Spooled):
                    message = REPLIES.decode(unspool(message))
                self._hear_from(child, message)
        except (msgspec.DecodeError, OSError, LookupError) as error:
            # The job wrote into our socket or deleted our files: no telling what else.
            log.warning("a child is replaced, for it sent nonsense: %r", error)
            self._condemn(child, "crashed")

    def _hear_from(self, child: ChildHandle, message: FromChild) -> None:
        if isinstance(message, Reply):
            self._finish(child, message)
        elif isinstance(message, Unable):
            self._take_back(child, message)
        elif isinstance(message, Initialized):
            child.initialized = True
            self._begin(child.sent[0])
        else:
            child.ready = True
            self._stillborn = 0

    def _finish(self, child: ChildHandle, reply: Reply) -> None:
        if child.sent[0].number != reply.number:
            raise LookupError(f"a reply to order {reply.number}")
        entry = child.sent.popleft()
        self._unable = 0
        child.slow = False
        mean = reply.seconds if self._mean is None else self._mean
        self._mean = mean + 0.2 * (reply.seconds - mean)
        if child.sent:
            self._begin(child.sent[0])
        ended = _ended(entry.job, reply, self._runtime.time())
        if entry.unwanted:
            _unlink(ended)
        else:
            self._done.append(ended)
        child.jobs_left -= 1
        if reply.unfit:
            log.info("a child is replaced after %s: %s", entry.job.label, reply.unfit)
        if reply.unfit or child.jobs_left <= 0:
            self._retire(child)

    def _retire(self, child: ChildHandle) -> None:
        """Let a child end by itself, in its own time but not for ever; another takes its place."""
        if child.leaving:
            return
        self._recall(child)
        child.leave()
        child.leave_by = self._runtime.monotonic() + LEAVE
        self._due = min(self._due, child.leave_by)

    def _take_back(self, child: ChildHandle, message: Unable) -> None:
        """Have another child try what one could not carry out for reasons of its own."""
        if child.sent[0].number != message.number:
            raise LookupError(f"no reply to order {message.number}")
        entry = child.sent.popleft()
        log.warning("a child is replaced at %s: %s", entry.job.label, message.reason)
        self._condemn(child, "replaced")
        entry.refusals += message.begun
        self._unable += not message.begun
        why = (
            f"{UNABLE_MAX} processes, one after the other, could not carry it out: {message.reason}"
        )
        if self._unable >= UNABLE_MAX:
            self._fatal = SlotsBroken(f"{entry.job.label}: {why}")
        elif entry.refusals >= UNABLE_MAX and not entry.unwanted:
            self._report(child, entry, Failure(kind="crashed", message=why))
        elif not entry.unwanted:
            self._put_back([entry])

    # Time passes

    def _check_times(self) -> None:
        """Take back what waits behind a slow job, and stop what is over its limit."""
        now = self._runtime.monotonic()
        self._due = math.inf
        for child in self._children:
            if child.leaving and not child.verdict:
                self._check_leaving(child, now)
            if not child.sent or child.verdict:
                continue
            slow_at = child.sent[0].since + SLOW
            if not child.slow and now >= slow_at:
                child.slow = True
                self._recall(child)
            limit = seconds_left(child)
            if now >= limit:
                self._stop_late(child)
            self._due = min([self._due, *(t for t in (slow_at, limit) if t > now)])

    def _check_leaving(self, child: ChildHandle, now: float) -> None:
        if now >= child.leave_by:
            self._condemn(child, "replaced")
        else:
            self._due = min(self._due, child.leave_by)

    def _shorten_output(self) -> None:
        """Keep what running jobs print from filling the disk."""
        now = self._runtime.monotonic()
        if now < self._look_at_output:
            return
        busy = [child for child in self._children if child.sent]
        try:
            most = max((child.shorten_output() for child in busy), default=0)
        except OSError as error:
            log.warning("what tasks print cannot be cut to its end: %s", error)
            most = 0
        pause = LOOK_SOON if most >= OUTPUT_MAX else LOOK_LATER
        self._look_at_output = now + pause if busy else math.inf

    def _stop_late(self, child: ChildHandle) -> None:
        late = child.sent[0]
        self._recall(child)
        self._collect(child)
        # What it was sent besides is taken back, so it cannot have gone on to that.
        if child.sent and child.sent[0] is late:
            self._condemn(child, "timeout")

    # Children go

    def _condemn(self, child: ChildHandle, verdict: Ruling) -> None:
        if child.verdict is None:
            child.verdict = verdict
            if verdict != "gone":
                child.kill()  # else it is seen first how it ended
            self._wake()

    def _bury(self, child: ChildHandle) -> None:
        """Settle the jobs of a child that is dead or was killed, and forget it."""
        fate = child.fate() if child.verdict == "gone" else ""
        child.kill()
        code = child.reap()
        with self._lock:
            self._collect(child)
            self._recall(child)
            if child.sent:
                self._blame(child, child.sent.popleft(), code, fate)
            self._selector.unregister(child.channel)
            self._selector.unregister(child.life)
            self._children.remove(child)
            stderr = child.output()[1]
            child.close()
        if not child.ready and child.verdict in ("gone", "crashed"):
            self._count_stillborn(f"code {code}: {_last_lines(stderr)}")

    def _blame(self, child: ChildHandle, entry: QueuedJob, code: int, fate: str) -> None:
        """Report the job that a child was running when it died."""
        if entry.unwanted:
            self._remove_files(entry)
            return
        seconds = self._runtime.monotonic() - entry.since
        kind = death_kind(child)
        log.info("%s: %s after %.3g s, code %d", entry.job.label, kind, seconds, code)
        stderr = child.output()[1]
        failure = _failure(kind, entry.job, seconds, code, stderr, fate)
        self._report(child, entry, failure)

    def _report(self, child: ChildHandle, entry: QueuedJob, failure: Failure) -> None:
        """Let a job end with a failure that its child did not tell of."""
        self._remove_files(entry)
        stdout, stderr = child.output()
        now = self._runtime.time()
        kind = failure.kind
        assert kind in ("crashed", "timeout", "initializer")
        ended = JobResult(
            key=entry.job.key,
            began=now - (self._runtime.monotonic() - entry.since),
            ended=now,
            outcome=encode_outcome(Outcome(failure=failure)),
            ok=False,
            kind=kind,
            blobs=(),
            stdout=stdout,
            stderr=stderr,
        )
        self._done.append(ended)

    def _remove_files(self, entry: QueuedJob) -> None:
        for file in self._folder.glob(f"{entry.number}.*"):
            file.unlink(missing_ok=True)

    def _end(self) -> None:
        with self._lock:
            self._closing = True
            for child in self._children:
                if child.ready and not child.sent:
                    child.leave()
                else:
                    child.kill()
        self._wait_for_ends()
        for child in self._children:
            child.kill()  # those that did not leave, and what others left running
            child.reap()
        with self._lock:
            for child in self._children:
                child.close()
            self._children.clear()
            self._selector.close()
            os.close(self._bell)
            os.close(self._rope)
        # A process that a task has hidden from us may still write there.
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_for_ends(self) -> None:
        until = self._runtime.monotonic() + LEAVE
        with selectors.DefaultSelector() as lives:
            for child in self._children:
                lives.register(child.life, selectors.EVENT_READ)
            while lives.get_map():
                patience = until - self._runtime.monotonic()
                if patience <= 0:
                    return
                for key, _ in lives.select(patience):
                    lives.unregister(key.fileobj)


def _window(mean: float | None) -> int:
    """How many jobs to give to one child at once, by the recent mean run time.

    About 40 ms of work, so that a child never waits for its next tiny job; and fewer
    messages than a socket holds (10 on Linux, unless the machine is set up otherwise).
    """
    if mean is None or mean > 0.2:
        return 1
    return 9 if mean < 0.005 else 2


def _adds_to(shown: tuple[str, ...], path: tuple[str, ...]) -> bool:
    """Whether a child that was shown some directories may run a job with this path."""
    return path == shown or set(path).issuperset(shown)


def _order(entry: QueuedJob) -> JobRequest:
    job = entry.job
    return JobRequest(
        entry.number,
        str(job.function),
        job.function_digest,
        job.call,
        str(job.blobs),
        job.path,
    )


def _ended(job: Job, reply: Reply, now: float) -> JobResult:
    return JobResult(
        key=job.key,
        began=now - reply.seconds,
        ended=now,
        outcome=reply.outcome,
        ok=reply.kind == "returned",
        kind=reply.kind,
        blobs=tuple((digest, Path(file), size) for digest, file, size in reply.blobs),
        stdout=reply.stdout,
        stderr=reply.stderr,
    )


def _unlink(ended: JobResult) -> None:
    for _, file, _ in ended.blobs:
        file.unlink(missing_ok=True)


def _failure(
    kind: Literal["timeout", "initializer", "crashed"],
    job: Job,
    seconds: float,
    code: int,
    stderr: bytes,
    fate: str,
) -> Failure:
    text = _last_lines(stderr)
    if fate:
        return Failure(kind=kind, message=fate, stderr=text)
    if kind == "timeout":
        message = (
            f"it ran for {seconds:.3g} s, over its limit of {job.timeout:g} s,"
            " and was killed with the processes that it had started"
        )
        return Failure(kind=kind, message=message, stderr=text)
    return Failure(
        kind=kind,
        exit_code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        stderr=text,
    )


def _last_lines(stderr: bytes) -> str:
    return stderr[-STDERR_TAIL:].decode(errors="replace")

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
import threading
from collections.abc import Hashable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from starburst_executor.errors import LocalDiskError
from starburst_executor.protocol.outcome import Failure
from starburst_executor.runtime import Runtime, Signal
from starburst_executor.storage.base import local_disk
from starburst_executor.worker.child_handle import (
    REPLIES,
    ChildHandle,
    Job,
    QueuedJob,
    death_kind,
    seconds_left,
)
from starburst_executor.worker.children import LEAVE, READY, Children, SlotsBroken
from starburst_executor.worker.ipc import (
    FromChild,
    Initialized,
    Reply,
    Spooled,
    Unable,
    delete_files,
    unspool,
)
from starburst_executor.worker.job_result import (
    JobResult,
    death_failure,
    last_lines,
    result_of_failure,
    result_of_reply,
)
from starburst_executor.worker.output import OUTPUT_MAX
from starburst_executor.worker.scheduling import LOOK_LATER, LOOK_SOON, SLOW, JobScheduler

__all__ = ["ChildPool", "JobResult", "ProcessPool", "SlotsBroken"]

log = logging.getLogger(__name__)

# Children that begin a job and cannot carry it out: then it is the job. Children in a row
# that cannot even begin: then it is the machine.
UNABLE_MAX = 3


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
            SlotsBroken: no more jobs can run here; those already started may run elsewhere.
        """

    def live_output(self, key: Hashable) -> tuple[bytes, bytes]:
        """The last that a running job has written to stdout and to stderr so far."""

    def close(self) -> None:
        """Stop everything within a few seconds and delete what is left of it."""


_from_child: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)


class ProcessPool:
    """A `ChildPool` of processes.

    A child that died is replaced by a fresh one. Functions and imports stay warm in a child,
    and so does whatever else a task leaves in it, such as threads and background processes,
    until the child ends.

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
        self.signal = signal
        self._folder = folder.absolute()  # tasks may change the directory
        self._runtime = runtime
        self._lock = threading.Lock()  # over all that follows
        self._children = Children(
            size,
            self._folder,
            initializer,
            runtime,
            math.inf if jobs_max is None else jobs_max,
            memory_max,
            self._wake,
        )
        self._scheduler = JobScheduler(
            size, self._folder, runtime, partial(self._children.condemn, verdict="replaced")
        )
        self._done: list[JobResult] = []
        self._unable = 0  # children in a row that could not even begin a job
        self._fatal: SlotsBroken | LocalDiskError | None = None
        self._woken = False
        self._closing = False
        self._broken: Exception | None = None
        with local_disk(folder):
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
            if self._scheduler.empty:  # else the thread knows, or has no child to spare
                self._wake()
            self._scheduler.add(job)

    def withdraw(self, keys: Iterable[Hashable]) -> set[Hashable]:
        """Take back those of the jobs that no child has begun."""
        with self._lock:
            return self._withdraw(set(keys))

    def _withdraw(self, wanted: set[Hashable]) -> set[Hashable]:
        withdrawn = self._scheduler.withdraw(wanted, self._children)
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
                    self._children.condemn(child, "killed")
            for ended in self._done:
                if ended.key == key:
                    ended.delete_blobs()
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
            child = self._children.running(key)
            return child.output() if child else (b"", b"")

    def close(self) -> None:
        """Kill running jobs, let idle children go, delete every file; may be called twice."""
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
                self._step()
        except Exception as error:
            known = isinstance(error, SlotsBroken | LocalDiskError)
            log.error("the children are stopped: %s", error, exc_info=not known)
            with self._lock:
                self._broken = error
        finally:
            try:
                self._end()
            finally:
                self.signal.set()

    def _step(self) -> None:
        self._spawn_missing()
        with self._lock:
            self._scheduler.feed(self._children)
            patience = self._patience()
        events = self._selector.select(patience)
        with self._lock:
            for key, _ in events:
                key.data()
            if self._runtime.monotonic() >= self._scheduler.due:
                self._check_times()
            self._shorten_output()
            dying = self._children.dying
        for child in dying:
            self._bury(child)
        if self._fatal is not None:
            raise self._fatal
        if self._done:
            self.signal.set()

    def _patience(self) -> float | None:
        until = min(self._scheduler.due, self._scheduler.look_at_output)
        if self._children.lacking:
            until = min(until, self._children.spawn_at)
        return None if until == math.inf else max(0.0, until - self._runtime.monotonic())

    def _hear(self) -> None:
        os.read(self._bell, 16)
        self._woken = False

    def _spawn_missing(self) -> None:
        """Start what is missing, without the lock: it takes milliseconds for each."""
        while self._children.lacking and not self._closing:
            child = self._children.spawn()
            if child is None:
                return
            with self._lock:
                self._children.add(child)
                self._scheduler.look_by(child.ready_by)
            register, kinds = self._selector.register, selectors.EVENT_READ
            register(child.channel, kinds, partial(self._collect, child))
            register(child.life, kinds, partial(self._children.condemn, child, "gone"))

    # Replies come in

    def _collect(self, child: ChildHandle) -> None:
        try:
            for data in child.receive():
                message = _from_child.decode(data)
                if isinstance(message, Spooled):
                    message = REPLIES.decode(unspool(message))
                self._hear_from(child, message)
        except (msgspec.DecodeError, OSError, LookupError) as error:
            if isinstance(error, LocalDiskError) and not self._folder.exists():
                self._fatal = error
                return
            # The job wrote into our socket or deleted our files: no telling what else.
            log.warning("a child is replaced, for it sent nonsense: %r", error)
            self._children.condemn(child, "crashed")

    def _hear_from(self, child: ChildHandle, message: FromChild) -> None:
        if isinstance(message, Reply):
            self._finish(child, message)
        elif isinstance(message, Unable):
            self._take_back(child, message)
        elif isinstance(message, Initialized):
            child.initialized = True
            self._scheduler.begin(child.sent[0])
        else:
            self._children.note_ready(child)

    def _finish(self, child: ChildHandle, reply: Reply) -> None:
        if child.sent[0].number != reply.number:
            raise LookupError(f"a reply to order {reply.number}")
        entry = child.sent.popleft()
        self._unable = 0
        child.slow = False
        self._scheduler.learn(reply.seconds)
        if child.sent:
            self._scheduler.begin(child.sent[0])
        ended = result_of_reply(entry.job, reply, self._runtime.time())
        if entry.unwanted:
            ended.delete_blobs()
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
        self._scheduler.recall(child)
        child.leave()
        child.leave_by = self._runtime.monotonic() + LEAVE
        self._scheduler.look_by(child.leave_by)

    def _take_back(self, child: ChildHandle, message: Unable) -> None:
        """Have another child try what one could not carry out for reasons of its own."""
        if child.sent[0].number != message.number:
            raise LookupError(f"no reply to order {message.number}")
        entry = child.sent.popleft()
        if message.disk:  # no other child has a better one
            self._fatal = LocalDiskError(message.reason)
            return
        log.warning("a child is replaced at %s: %s", entry.job.label, message.reason)
        self._children.condemn(child, "replaced")
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
            self._scheduler.put_back([entry])

    # Time passes

    def _check_times(self) -> None:
        """Take back what waits behind a slow job, and stop what is over its limit."""
        now = self._runtime.monotonic()
        self._scheduler.due = math.inf
        for child in self._children:
            if child.leaving and not child.verdict:
                self._check_leaving(child, now)
            if not child.ready and not child.verdict:
                self._check_ready(child, now)
            if not child.sent or child.verdict:
                continue
            slow_at = child.sent[0].since + SLOW
            if not child.slow and now >= slow_at:
                child.slow = True
                self._scheduler.recall(child)
            limit = seconds_left(child)
            if now >= limit:
                self._stop_late(child)
            for due in (slow_at, limit):
                if due > now:
                    self._scheduler.look_by(due)

    def _check_leaving(self, child: ChildHandle, now: float) -> None:
        if now >= child.leave_by:
            self._children.condemn(child, "replaced")
        else:
            self._scheduler.look_by(child.leave_by)

    def _check_ready(self, child: ChildHandle, now: float) -> None:
        if now >= child.ready_by:
            self._children.condemn(child, "unready")
        else:
            self._scheduler.look_by(child.ready_by)

    def _shorten_output(self) -> None:
        """Keep what running jobs print from filling the disk."""
        now = self._runtime.monotonic()
        if now < self._scheduler.look_at_output:
            return
        most = self._children.shorten_output()
        pause = LOOK_SOON if most >= OUTPUT_MAX else LOOK_LATER
        busy = any(child.sent for child in self._children)
        self._scheduler.look_at_output = now + pause if busy else math.inf

    def _stop_late(self, child: ChildHandle) -> None:
        late = child.sent[0]
        self._scheduler.recall(child)
        self._collect(child)
        # What it was sent besides is taken back, so it cannot have gone on to that.
        if child.sent and child.sent[0] is late:
            self._children.condemn(child, "timeout")

    # Children go

    def _bury(self, child: ChildHandle) -> None:
        """Settle the jobs of a child that is dead or was killed, and forget it."""
        fate = child.fate() if child.verdict == "gone" else ""
        child.kill()
        code = child.reap()
        with self._lock:
            self._collect(child)
            self._scheduler.recall(child)
            if child.sent:
                self._blame(child, child.sent.popleft(), code, fate)
            self._selector.unregister(child.channel)
            self._selector.unregister(child.life)
            self._children.remove(child)
            stderr = child.output()[1]
            child.close()
        if not child.ready and child.verdict in ("gone", "crashed", "unready"):
            late = f"not ready after {READY:g} s, " if child.verdict == "unready" else ""
            self._children.count_stillborn(f"{late}code {code}: {last_lines(stderr)}")

    def _blame(self, child: ChildHandle, entry: QueuedJob, code: int, fate: str) -> None:
        """Report the job that a child was running when it died."""
        if entry.unwanted:
            self._remove_files(entry)
            return
        seconds = self._runtime.monotonic() - entry.since
        kind = death_kind(child)
        log.info("%s: %s after %.3g s, code %d", entry.job.label, kind, seconds, code)
        stderr = child.output()[1]
        failure = death_failure(kind, entry.job, seconds, code, stderr, fate)
        self._report(child, entry, failure)

    def _report(self, child: ChildHandle, entry: QueuedJob, failure: Failure) -> None:
        """Let a job end with a failure that its child did not tell of."""
        self._remove_files(entry)
        seconds = self._runtime.monotonic() - entry.since
        now = self._runtime.time()
        self._done.append(result_of_failure(entry.job, failure, seconds, now, child.output()))

    def _remove_files(self, entry: QueuedJob) -> None:
        delete_files(self._folder.glob(f"{entry.number}.*"))

    def _end(self) -> None:
        with self._lock:
            self._closing = True
            self._children.dismiss()
        self._children.reap()
        with self._lock:
            self._children.clear()
            self._selector.close()
            os.close(self._bell)
            os.close(self._rope)
        # A process that a task has hidden from us may still write there.
        shutil.rmtree(self._folder, ignore_errors=True)

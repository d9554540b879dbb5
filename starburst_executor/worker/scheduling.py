"""Which job goes to which child process, and when to look at those that run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Hashable
from contextlib import suppress
from pathlib import Path

from starburst_executor.runtime import Runtime
from starburst_executor.worker.child_handle import ChildHandle, Job, QueuedJob
from starburst_executor.worker.ipc import JobRequest, frame, spool_file

__all__ = ["LOOK_LATER", "LOOK_SOON", "SLOW", "JobScheduler", "job_request"]

SLOW = 0.1  # seconds; a job that runs longer keeps none waiting behind it

# Seconds between looks at how much running jobs have printed: after it was much, and otherwise.
LOOK_SOON, LOOK_LATER = 0.05, 0.5


class JobScheduler:
    """A queue of jobs, first in first out. Not thread-safe: the pool's lock is held around it.

    Args:
        size: How many children there are to be.
        folder: Where messages that are too large for a socket go.
        runtime: The clock.
        replace: Ends a child that cannot run the next job; another takes its place.

    Attributes:
        due: When to look for jobs that are slow or over their limit, on the monotonic clock.
        look_at_output: When to look at how much running jobs have printed.
    """

    def __init__(
        self,
        size: int,
        folder: Path,
        runtime: Runtime,
        replace: Callable[[ChildHandle], None],
    ) -> None:
        self._size = size
        self._folder = folder
        self._runtime = runtime
        self._replace = replace
        self._queue: deque[QueuedJob] = deque()
        self._arrived = 0  # jobs, in all
        self._mean: float | None = None  # recent run time, seconds
        self.due = math.inf
        self.look_at_output = math.inf

    @property
    def empty(self) -> bool:
        """Whether no job waits for a child."""
        return not self._queue

    def add(self, job: Job) -> None:
        """Queue a job."""
        self._arrived += 1
        self._queue.append(QueuedJob(self._arrived, job))

    def withdraw(
        self, wanted: Collection[Hashable], children: Collection[ChildHandle]
    ) -> set[Hashable]:
        """Take jobs out of the queue and back from the children, unless they have begun."""
        for child in children:
            if any(entry.job.key in wanted for entry in child.sent):
                self.recall(child)
        withdrawn = {e.job.key for e in self._queue if e.job.key in wanted}
        self._queue = deque(e for e in self._queue if e.job.key not in wanted)
        return withdrawn

    def feed(self, children: Collection[ChildHandle]) -> None:
        """Send queued jobs to the least loaded children, in the order of their arrival."""
        window = _window(self._mean)
        free = [c for c in children if len(c.sent) < c.window(window)]
        for load in range(window):
            for child in list(free):
                if not self._queue:
                    return
                if len(child.sent) <= load and not self._offer(child, window, children):
                    free.remove(child)

    def _offer(self, child: ChildHandle, window: int, children: Collection[ChildHandle]) -> bool:
        """Send a child the next job; False if it cannot take it, or nothing after it."""
        entry = self._queue[0]
        if not _adds_to(child.path, entry.job.path):
            if not child.sent:
                self._replace_if_needed(child, children)
            return False
        if not child.send(frame(job_request(entry), self._folder)):
            self._remove_request(entry)
            return False
        self._queue.popleft()
        child.path = entry.job.path
        child.sent.append(entry)
        if len(child.sent) == 1:
            self.begin(entry)
        if self.look_at_output == math.inf:
            self.look_at_output = self._runtime.monotonic() + LOOK_SOON
        return len(child.sent) < child.window(window)

    def _replace_if_needed(self, child: ChildHandle, children: Collection[ChildHandle]) -> None:
        """End a child that was shown other modules than the next job needs."""
        used = [c for c in children if not c.verdict and (c.path or c.sent)]
        fresh = self._size - len(used)  # now or soon
        if fresh < len(self._queue):
            self._replace(child)

    def begin(self, entry: QueuedJob) -> None:
        """Note that a job begins now."""
        entry.began = self._runtime.time()
        entry.since = self._runtime.monotonic()
        self.look_by(entry.since + min(SLOW, entry.job.timeout or SLOW))

    def look_by(self, when: float) -> None:
        """Have the running jobs looked at by then."""
        self.due = min(self.due, when)

    def learn(self, seconds: float) -> None:
        """Learn that a job ran for so long."""
        mean = seconds if self._mean is None else self._mean
        self._mean = mean + 0.2 * (seconds - mean)

    def recall(self, child: ChildHandle) -> None:
        """Put back into the queue what a child was sent and has not read."""
        recalled = child.recall()
        for entry in recalled:
            self._remove_request(entry)
        self.put_back(recalled)

    def _remove_request(self, entry: QueuedJob) -> None:
        with suppress(OSError):  # the folder is removed at the end
            spool_file(self._folder, entry.number, JobRequest).unlink(missing_ok=True)

    def put_back(self, entries: list[QueuedJob]) -> None:
        """Queue jobs again, each in its old place."""
        if entries:
            everything = [*entries, *self._queue]
            self._queue = deque(sorted(everything, key=lambda entry: entry.number))


def job_request(entry: QueuedJob) -> JobRequest:
    """The message that has a child run a job."""
    job = entry.job
    return JobRequest(
        entry.number,
        str(job.function),
        job.function_digest,
        job.call,
        str(job.blobs),
        job.path,
    )


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

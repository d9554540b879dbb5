"""One client's machinery: its parts, how they are wired together, and their threads.

    the caller's thread   Submission       pickles and queues calls
    starburst-submit      Submitter.run    stores batches, then has their futures watched
    starburst-watch       Watcher.run      settles futures; once a second, requests workers
    starburst-staff       Autoscaler.run   starts the missing workers

Nothing here references the `StarburstExecutor`. The threads keep an engine alive while they run,
but the executor in front of it can be garbage-collected, which is how a dropped one is noticed
(see `ending`). Futures outlive both, so they hold only a weak reference to their engine.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from starburst_executor.client.creation import OpenSession
from starburst_executor.client.future import TaskFuture
from starburst_executor.client.lifecycle import Lifecycle
from starburst_executor.client.registry import FutureRegistry
from starburst_executor.client.resubmit import named, retry, unhealed
from starburst_executor.client.results import ResultReader
from starburst_executor.client.submitter import Submitter
from starburst_executor.client.watcher import Watcher
from starburst_executor.coordination import administration
from starburst_executor.coordination.autoscaler import Autoscaler
from starburst_executor.costs.alert import CostAlert
from starburst_executor.errors import ExecutorBroken, ObjectNotFound, SessionTerminated
from starburst_executor.inspection.terminal import Ticker
from starburst_executor.protocol import lanes
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.manifest import Manifest, SessionState
from starburst_executor.protocol.records import State
from starburst_executor.runtime import SystemRuntime

__all__ = ["Engine"]

log = logging.getLogger(__name__)


class Engine:
    """Submits to, watches and staffs one session.

    Args:
        opened: The session.
        lifecycle: Says whether the client is open; is told when something breaks.
    """

    def __init__(self, opened: OpenSession, lifecycle: Lifecycle) -> None:
        self.session = session = opened.session
        self.manifest = manifest = opened.manifest
        self.launcher = opened.launcher
        self.codec = opened.codec
        self.lifecycle = lifecycle
        self._pid = os.getpid()
        self._alert = CostAlert(session)
        self.results = ResultReader(session, self.codec.open_outcome)
        self.autoscaler = Autoscaler(
            session, self.launcher, manifest, self.fail, lambda: self.watcher.hurry()
        )
        queue = session.queue()
        queue.learn(manifest.lanes)
        self.watcher = Watcher(
            session,
            manifest,
            queue,
            self.results,
            self._look_after,
            lambda: self.autoscaler.ended,
            self.fail,
        )
        self.registry = FutureRegistry(session, self.results, self.watcher, _weakly(self))
        self.submitter = Submitter(
            session,
            lambda: self.autoscaler.manifest.workers * manifest.spec.slots,
            lambda: self.watcher.unfinished,
            self.registry.stored,
            self.fail,
        )
        self.threads: list[threading.Thread] = []
        self._ticker: Ticker | None = None

    # --- threads ------------------------------------------------------------------------

    def start(self, *, progress: bool) -> None:
        """Start the threads and the minimum number of workers."""
        loops = {
            "submit": self.submitter.run,
            "watch": self.watcher.run,
            "staff": self.autoscaler.run,
        }
        self.threads = [
            threading.Thread(
                target=self._run, args=(name, loop), name=f"starburst-{name}", daemon=True
            )
            for name, loop in loops.items()
        ]
        for thread in self.threads:
            thread.start()
        if self.manifest.min_workers:
            self.autoscaler.ask_need(0)
        if progress:
            self._ticker = Ticker(self.session, sys.stderr)

    def _run(self, name: str, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:  # user code runs here too, in callbacks
            log.error("session %s: the %s thread failed", self.session.id, name, exc_info=error)
            broken = ExecutorBroken(
                f"the {name} thread of session {self.session.id} failed ({error!r}). What is "
                f"stored is safe: StarburstExecutor.attach({self.session.id!r}) picks it up."
            )
            broken.__cause__ = error
            self.fail(broken)

    def _look_after(self, unfinished: int) -> None:
        """Request enough workers, and track their cost; on the watcher's thread."""
        seen = self.watcher.manifest
        if seen.deadline > self.autoscaler.manifest.deadline:  # another client's `extend`
            self.manifest = self.autoscaler.manifest = seen
        self.autoscaler.ask_need(unfinished)
        self._alert.look(self.manifest)

    def fail(self, error: Exception) -> None:
        """Fail every future and refuse new ones after a fatal error. Called on any thread."""
        log.error("session %s: %s", self.session.id, error)
        self.lifecycle.fail(error)
        self.watcher.abandon(error)
        self.submitter.abandon(error)
        self.autoscaler.close()

    def abandon(self, error: Exception) -> None:
        """End every future with an error."""
        self.watcher.abandon(error)
        self.submitter.abandon(error)

    def wait_until_idle(self) -> None:
        """Wait until everything submitted is stored and every future has ended."""
        self.submitter.wait_until_idle()
        self.watcher.wait_until_idle()

    def stop(self) -> None:
        """Store what is queued, then wait for all threads but the caller's to end."""
        self.autoscaler.close()
        self.submitter.close()
        self.watcher.close()
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join()
        if self._ticker is not None:
            self._ticker.close()

    def start_no_threads(self) -> None:
        """Make do with the existing threads: the interpreter is exiting and starts no more."""
        self._own_runtime.start_no_threads()

    def close(self) -> None:
        """Release the store; idempotent."""
        self._own_runtime.close()
        self.session.store.close()

    @property
    def _own_runtime(self) -> SystemRuntime:
        runtime = self.session.runtime
        assert isinstance(runtime, SystemRuntime)
        return runtime

    # --- whether it may be used ---------------------------------------------------------

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a forked process, whose locks may be held forever."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Refuse to work in a forked process; call before taking any lock.

        Raises:
            RuntimeError: this process is a fork.
        """
        if self.forked:
            raise RuntimeError(
                "this executor was created before this process was forked and cannot be used here; "
                f"use StarburstExecutor.attach({self.session.id!r})"
            )

    def check_open(self) -> None:
        """Raise unless the session can be submitted to, by this client and this Python."""
        self.lifecycle.check_open()
        if self.manifest.state is SessionState.TERMINATED:
            raise SessionTerminated(
                f"session {self.session.id} was terminated; its results stay readable, but new "
                "tasks need a new session"
            )
        self.codec.check_python()

    def check_admission(self) -> None:
        """Like `check_open`, but also refuses once the interpreter is exiting."""
        self.lifecycle.check_admission()
        self.check_open()

    def own(self, future: object) -> TaskFuture[Any]:
        """The future itself, if it is one of this session's.

        Raises:
            TypeError, ValueError: it is not a future of this session.
        """
        if not isinstance(future, TaskFuture):
            raise TypeError(f"{future!r} is not a future of this session; `futures` has them all")
        if future.session_id != self.session.id:
            raise ValueError(
                f"task {future.task_id} is of session {future.session_id}, not of {self.session.id}"
            )
        return future

    # --- changing the session -----------------------------------------------------------

    def flush(self) -> None:
        """Implements `StarburstExecutor.flush`."""
        self.check_process()
        self.submitter.flush()

    def cancel(
        self, futures: TaskFuture[Any] | Iterable[TaskFuture[Any]], *, running: bool
    ) -> bool:
        """Implements `StarburstExecutor.cancel`."""
        self.check_process()
        given = [futures] if isinstance(futures, TaskFuture) else futures
        chosen = [self.own(future) for future in given]
        left = [f for f in chosen if not f.done() and not self.submitter.withdraw(f)]
        if left:
            self.submitter.flush()
        batches: dict[Batch, list[int]] = {}
        for future in left:
            assert future.batch is not None
            batches.setdefault(future.batch, []).append(future.number - future.batch.number)
        self._cancel_stored(batches, running=running)
        return all(future.cancelled() for future in chosen)

    def cancel_unwanted(self, futures: Iterable[Future[Any]]) -> None:
        """Implements `StarburstExecutor.cancel_all`."""
        own = [f for f in futures if isinstance(f, TaskFuture) and not f.done()]
        if own and self.lifecycle.refusal is None:
            self.cancel(own, running=False)

    def cancel_pending(self) -> None:
        """Cancel every task that no worker has started."""
        self.submitter.withdraw_all()
        self.submitter.wait_until_idle()
        self._cancel_stored(self.watcher.stored_pending(), running=False)

    def _cancel_stored(self, batches: dict[Batch, list[int]], *, running: bool) -> None:
        for batch, positions in batches.items():
            try:
                known = self.session.cancel(batch, positions, running=running)
            except ObjectNotFound:  # somebody removed its tasks: the watcher fails their futures
                self.watcher.hurry()
            else:
                self.watcher.learn(batch, known)

    def retry(
        self, tasks: TaskFuture[Any] | Iterable[TaskFuture[Any] | str] | None, *, cancelled: bool
    ) -> list[TaskFuture[Any]]:
        """Implements `StarburstExecutor.retry`."""
        self.check_process()
        self.check_admission()
        self.flush()
        if tasks is None:
            states = [State.FAILED, *([State.CANCELLED] if cancelled else [])]
            chosen = unhealed(self.session, states)
        else:
            given = [tasks] if isinstance(tasks, TaskFuture) else tasks
            names = [t if isinstance(t, str) else self.own(t).task_id for t in given]
            chosen = named(self.session, names)
        futures = self.registry.of(retry(self.session, chosen).values())
        self.autoscaler.ask_need(self.watcher.unfinished)
        return futures

    def extend(self, seconds: float) -> None:
        """Implements `StarburstExecutor.extend`."""
        self.check_process()
        self.manifest = administration.extend(self.session, seconds)
        self.autoscaler.manifest = self.watcher.manifest = self.manifest
        self.watcher.hurry()

    def scale(self, workers: int | None) -> Manifest:
        """Implements `StarburstExecutor.scale`; None for "auto"."""
        self.check_process()
        self.manifest = self.autoscaler.manifest = administration.scale(self.session, workers)
        self.autoscaler.ask_need(self.watcher.unfinished)
        return self.manifest

    def take_in_others(self) -> None:
        """Pick up the tasks already in the session, and warn if it has cost too much."""
        self.registry.take_in_others()
        self._alert.look(self.manifest)

    # --- leaving it ---------------------------------------------------------------------

    def others(self) -> list[str]:
        """Clients that hold a lane."""
        taken = self.session.load().lanes
        own = self.submitter.lane
        return [lane.client for i, lane in enumerate(taken) if lane.taken and i != own]

    def give_back_lane(self, state: SessionState) -> None:
        """Set the session's state, and give the lane back."""
        # A lane with a batch in doubt is kept: the batch may still appear in it.
        submitter = self.submitter
        lane = submitter.lane if submitter.certain and submitter.lane >= 0 else None
        lanes.give_back(self.session, lane, submitter.number, state, self.watcher.queue.finished)

    def stop_workers(self) -> None:
        """Stop the session's workers; their tasks return to pending."""
        self.launcher.stop(self.session.url, grace=2.0)


def _weakly(engine: Engine) -> Callable[[TaskFuture[Any]], bool]:
    """The implementation of a future's `cancel`: does nothing once the engine is gone."""
    known = weakref.ref(engine)

    def cancel(future: TaskFuture[Any]) -> bool:
        found = known()
        if found is None or found.lifecycle.refusal is not None:
            return False
        return found.cancel(future, running=False)

    return cancel

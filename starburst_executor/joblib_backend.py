"""The joblib backend "starburst": runs whatever uses joblib, such as scikit-learn, on a session.

joblib looks up backends in its own registry, so this module registers one when it is imported:


    import joblib
    import starburst_executor.joblib_backend

    with joblib.parallel_config(backend="starburst", n_jobs=8, store="s3://bucket/prefix"):
        GridSearchCV(estimator, grid).fit(X, y)

`n_jobs` is how many calls run at once; -1 means `max_workers` if given, or all CPUs of this
machine. As with every backend, a single job runs in this process, without any worker. All other
keywords are those of `StarburstExecutor`.

All calls of a `parallel_config` block share one session. The first call creates it. It is removed,
in the background, when the block is left and no generator of results is in use any more.

    joblib.Parallel                          this module                      workers
      cuts calls into batches  -- submit -->   StarburstExecutor.submit  -->    run a batch, time it
      hands out results        <- callback --  the future has ended      <--
"""

from __future__ import annotations

import inspect
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

from joblib import cpu_count, register_parallel_backend  # type: ignore[import-untyped]  # noqa: TID253
from joblib.parallel import (  # type: ignore[import-untyped]  # noqa: TID253
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
)

from starburst_executor import config
from starburst_executor.errors import StarburstError
from starburst_executor.executor import StarburstExecutor

__all__ = ["StarburstBackend"]

log = logging.getLogger(__name__)

_JOBLIBS_OWN = frozenset(
    {
        "context",
        "max_nbytes",
        "mmap_mode",
        "prefer",
        "require",
        "temp_folder",
        "verbose",
    }
)  # keywords that joblib passes to every backend; here large arrays are stored once anyway

Timed = tuple[float, list[Any]]
"""Seconds that a batch ran, and the results of its calls."""


class StarburstBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """What joblib creates for `backend="starburst"`.

    Batches grow until one runs for `MIN_IDEAL_BATCH_DURATION` seconds. The worker measures that:
    the round trip, or the start of the first worker, says nothing about the calls.

    Args:
        nesting_level: Set by joblib.
        inner_max_num_threads: Set by joblib: threads that BLAS, OpenMP and the like may use in each
            process that runs calls. Defaults to this machine's CPUs divided among the jobs;
            elsewhere, to no limit.
        **options: Keyword arguments of `StarburstExecutor`.

    Raises:
        TypeError: `StarburstExecutor` has no such argument.
    """

    MIN_IDEAL_BATCH_DURATION = 0.5
    MAX_IDEAL_BATCH_DURATION = 5

    supports_retrieve_callback = True  # and with it timeouts and generators
    supports_inner_max_num_threads = True
    default_n_jobs = -1

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        _check_names(options)
        self._options = options
        self._executor: StarburstExecutor | None = None
        self._workers = 0
        self._calls = 0
        self._lock = threading.Lock()
        self._waiting: dict[Future[Timed], Any] = {}  # -> the `Parallel` that waits for it

    # --- before and after a call of `Parallel` ---------------------------------------

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many jobs run at once: `n_jobs`, or if negative, counted down from all."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        count = self.default_n_jobs if n_jobs is None else n_jobs
        if count > 0:
            return count
        return max(self._all_jobs() + 1 + count, 1)

    def configure(self, n_jobs: int = 1, *, parallel: Any, **options: Any) -> int:
        """Ensure a session with workers for `n_jobs`, and return the number of jobs.

        Args:
            n_jobs: As given to `Parallel`.
            parallel: The caller.
            **options: Keyword arguments given to `Parallel`, including the executor's.

        Raises:
            ValueError, TypeError, StoreError: as by `StarburstExecutor`.
        """
        own = {k: v for k, v in options.items() if k not in _JOBLIBS_OWN}
        with self._lock:
            self._take_options(own)
            jobs: int = self.effective_n_jobs(n_jobs)
            if jobs == 1:
                raise FallbackToBackend(SequentialBackend(self.nesting_level))
            self._have_workers(jobs)
        # A proxy: `parallel` holds this backend, and the session ends once both are gone.
        self.parallel = weakref.proxy(parallel)
        return jobs

    def start_call(self) -> None:
        """Begin a call of `Parallel`."""
        self._calls += 1

    def terminate(self) -> None:
        """Forget what was learned about the calls; the session stays for the next `Parallel`."""
        self.reset_batch_stats()

    def _all_jobs(self) -> int:
        slots = self._options.get("slots", 1)
        workers = self._options.get("max_workers")
        count: int = cpu_count() if workers is None else workers * slots
        return count

    def _take_options(self, own: Mapping[str, Any]) -> None:
        _check_names(own)
        if self._executor is None:
            self._options.update(own)
            return
        late = [k for k in own if self._options.get(k) != own[k]]
        if late:
            raise ValueError(
                f"{', '.join(late)} given to Parallel, but this block already has session "
                f"{self._executor.session_id}; give it to parallel_config"
            )

    def _have_workers(self, jobs: int) -> None:
        workers = math.ceil(jobs / self._options.get("slots", 1))
        if self._executor is None:
            self._executor = self._open(workers, jobs)
        elif workers != self._workers:
            self._executor.scale(workers)
        self._workers = workers

    def _open(self, workers: int, jobs: int) -> StarburstExecutor:
        options = {"name": "joblib", **self._options, "max_workers": workers}
        limits = self._thread_limits(jobs)
        if limits:
            options["initializer"] = _limiting(
                limits, options.get("initializer"), options.pop("initargs", ())
            )
        executor = StarburstExecutor(**options)
        _end_with(self, executor)
        return executor

    def _thread_limits(self, jobs: int) -> dict[str, str]:
        launcher = self._options.get("launcher") or config.load().settings.launcher
        if self.inner_max_num_threads is None and launcher != "local":
            return {}
        limits: dict[str, str] = self._prepare_worker_env(jobs)
        return limits

    # --- during a call --------------------------------------------------------------

    def submit(self, func: Callable[[], list[Any]], callback: Any = None) -> Future[Timed] | None:
        """Submit a batch; `callback` gets its future when it ends, successfully or not."""
        return self._followed(self._submit(func), callback)

    def _followed(self, future: Future[Timed], callback: Any) -> Future[Timed] | None:
        self._waiting[future] = getattr(callback, "parallel", None)
        future.add_done_callback(self._forget)
        if callback is not None:
            future.add_done_callback(callback)
        # joblib drops a job when it ends, and a refused one has ended already. Keeping it would
        # keep its exception, its traceback, and through that this backend, in a cycle.
        return None if future.done() else future

    def _submit(self, func: Callable[[], list[Any]]) -> Future[Timed]:
        assert self._executor is not None
        # A new function per call: workers expect a function's tasks to take as long as the last
        # ones did, and would claim too many long tasks that follow short ones.
        run = partial(_run_timed, self._calls)
        try:
            return self._executor.submit(run, func)
        except Exception as error:  # the user's iterable and pickles run here too
            # Most batches are submitted by callbacks, where nobody would see it and all would hang.
            failed: Future[Timed] = Future()
            failed.set_exception(error)
            return failed

    def _forget(self, future: Future[Timed]) -> None:
        self._waiting.pop(future, None)

    def retrieve_result_callback(self, out: Future[Timed]) -> list[Any]:
        """The results of a batch, or its exception."""
        seconds, results = out.result()
        super().batch_completed(len(results), seconds)
        return results

    def batch_completed(self, batch_size: int, duration: float) -> None:
        """Do nothing: `duration` includes the round trip and the wait for a worker."""

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Cancel what the aborting `Parallel` has submitted, running or not.

        A worker notices within a heartbeat; what it was running no longer counts.
        """
        futures = [
            future
            for future, parallel in list(self._waiting.items())
            # Another one may be using this session: a generator that is read meanwhile.
            if getattr(parallel, "_aborting", True)
        ]
        if self._executor is None or not futures:
            return
        try:
            self._executor.cancel(futures)  # type: ignore[arg-type]
        except (StarburstError, RuntimeError) as error:
            # The error that made it abort is on its way to the user, and says more.
            log.warning("%d batches could not be cancelled: %s", len(futures), error)


def _end_with(backend: StarburstBackend, executor: StarburstExecutor) -> None:
    """Shut the executor down when the backend is gone.

    joblib does not tell us when a block is left, but it drops its backend then. That may happen in
    any thread and, by garbage collection, under any lock: all we can safely do is wake a thread.
    """
    gone: SimpleQueue[None] = SimpleQueue()

    def end() -> None:
        gone.get()
        executor.shutdown()

    # At exit executors end themselves if need be; nobody must wait for this thread.
    threading.Thread(target=end, name="starburst-joblib", daemon=True).start()
    weakref.finalize(backend, gone.put, None).atexit = False


def _run_timed(_call: int, batch: Callable[[], list[Any]]) -> Timed:
    """What a task runs; the call number makes each call's function distinct."""
    began = time.perf_counter()
    results = batch()
    return time.perf_counter() - began, results


def _limiting(
    environment: Mapping[str, str],
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
) -> Callable[[], None]:
    """An initializer that limits threads, then runs the user's."""

    def initialize() -> None:
        # Nested, so it travels by value. An imported function would import joblib, which
        # imports NumPy, whose BLAS reads its limits only once.
        import os

        os.environ.update(environment)
        if initializer is not None:
            initializer(*initargs)

    return initialize


def _check_names(options: Mapping[str, Any]) -> None:
    known = inspect.signature(StarburstExecutor).parameters
    wrong = [name for name in options if name not in known]
    if wrong:
        raise TypeError(
            f"StarburstExecutor has no argument {', '.join(map(repr, wrong))}; "
            f"it has {', '.join(known)}"
        )


register_parallel_backend("starburst", StarburstBackend)

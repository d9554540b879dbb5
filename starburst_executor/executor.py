"""`StarburstExecutor`: a `concurrent.futures.Executor` whose futures are records in a store.

This is the face of a client and nothing else: each method says what it promises and hands on to the
part that does it.

    submit, map                   Submission           pickles calls, on the caller's thread
                                  Submitter (thread)   stores what has gathered, in batches
    future.result                 Watcher (thread)     one LIST a look; settles futures
                                  Autoscaler (thread)  starts workers as tasks need them
    futures, status, collect      SessionReader        tells what is stored
    cancel, retry, extend, scale  Engine               owns those parts, changes the session
    detach, shutdown, cleanup     Ending, Lifecycle    end all of it, once

Large buffers are stored by `submit` itself, so that the task does not see what the caller changes
afterwards. Nothing here knows what a worker does with a batch: `protocol` is all that the two sides
share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal, ParamSpec, Self, TypeVar, overload

from starburst_executor import config
from starburst_executor.client import creation, mapping
from starburst_executor.client import options as arguments
from starburst_executor.client.ending import Ending, register_at_exit
from starburst_executor.client.engine import Engine
from starburst_executor.client.environment_options import choose_environment
from starburst_executor.client.future import TaskFuture
from starburst_executor.client.lifecycle import Lifecycle
from starburst_executor.client.outcomes import TaskOutcome
from starburst_executor.client.reading import SessionReader
from starburst_executor.client.submission import Submission
from starburst_executor.client.submit_options import SubmitOptions
from starburst_executor.errors import ExecutorBroken, SessionDetached, SessionTerminated
from starburst_executor.inspection import status
from starburst_executor.nesting import check_nesting
from starburst_executor.protocol.manifest import Intervals
from starburst_executor.storage.url import open_store

__all__ = ["StarburstExecutor", "default_store", "list_sessions"]

T = TypeVar("T")
P = ParamSpec("P")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")


def default_store() -> str:
    """The default store: `STARBURST_STORE`, else the configured one, else a user folder."""
    return config.load().settings.store


def list_sessions(store: str | Path | None = None) -> status.SessionList:
    """The sessions in a store, oldest first.

    Args:
        store: URL or directory; by default, `default_store()`.

    Returns:
        For each session: session_id, name, created_at, last_activity, total, pending, claimed,
        running, completed, failed, cancelled, workers, state. The list prints as a table.
    """
    opened = open_store(store or default_store())
    try:
        return status.list_summaries(opened)
    finally:
        opened.close()


class StarburstExecutor(Executor):
    """An executor whose work survives this process, this machine and its workers.

    Args:
        max_workers: Most worker processes at once; by default, the number of CPUs of this machine.
        min_workers: Start this many workers right away and keep them, even when there is nothing to
            do, until the session times out.
        store: `s3://bucket/prefix` or a directory; by default, `default_store()`.
        launcher: "local" (this machine) or "ecs"; by default, what `STARBURST_LAUNCHER` or the
            configuration file says, else "local".
        cpu: vCPUs of each worker, on ECS.
        memory: Memory of each worker on ECS, such as "2GB".
        launch_type: "FARGATE" or "EC2", on ECS; "FARGATE" by default. This option and the next
            three are refused for workers on this machine.
        instance_type: EC2 instance type, such as "c8a.xlarge".
        use_spot: Use Spot capacity.
        spot_fallback: Use on-demand capacity when there is not enough Spot capacity.
        region: AWS region of the bucket and the workers; by default, that of your AWS settings.
        environment: Where the workers' packages come from. "none": workers have what they need (the
            default on this machine, where they run in your own environment). "sync": they get what
            is installed here (the default on ECS). "image": the container image has it (the default
            if an image is given or configured).
        image: Container image of the workers, on ECS; by default, the configured one, else a stock
            image of this version of Python.
        requirements: With "sync", what to install instead of what is installed here: a list of
            requirements, or the path of a requirements file.
        packages: With "sync", requirements to install as well, or in place of the versions
            installed here.
        exclude: With "sync", names of packages to leave out.
        initializer: Called once in each process that runs tasks, before its first task.
        initargs: Arguments of `initializer`.
        slots: How many tasks a worker runs at once, each in a process of its own.
        task_timeout: Seconds a task may run; no limit by default.
        max_tasks_per_child: How many tasks a process runs before a fresh one replaces it; no limit
            by default.
        max_attempts: How often a task is tried if its worker is lost while running it.
        idle_timeout: A worker with nothing to do leaves after this many seconds.
        session_timeout: Workers leave when nothing has been unfinished for this many seconds.
        absolute_timeout: Workers leave this many seconds after the session began, whatever is left
            to do. Nothing is lost, and `extend` lets it go on. A week by default: workers with
            nothing to do leave long before, so what this bounds is a task that hangs, at some $8 a
            week for a worker with 1 vCPU and 2 GB.
        name: A name to show in lists of sessions.
        progress: Show progress on stderr.
        modules: Modules or packages to ship to the workers, besides those imported from outside
            site-packages: names, module objects or paths.
        keep: Keep the session's objects after `shutdown`.
        max_hourly_cost: Dollars. More workers than this pays for, by the hour, are refused here, by
            `attach` and by `scale`, and are never started by anyone. By default, the limit in your
            settings, if any.
        cost_alert: Dollars. Once the session has cost this much, it is logged once, and shown in
            the session's status from then on.
        intervals: How often clients and workers look at the store; for tests and unusual stores.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is left behind.
        NestingError: this is a task inside too many others, or a worker importing a module for a
            task.
        StoreDenied, StoreMissing, StoreNotConditional: the store cannot be used.
        PackageError: a package of this machine cannot be brought to the workers; the message names
            it.

    Attributes:
        session_id: Id of the session. With the store, it is all that `attach` needs.
    """

    session_id: str

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        min_workers: int = 0,
        store: str | Path | None = None,
        launcher: Literal["local", "ecs"] | None = None,
        cpu: float = 1,
        memory: str = "2GB",
        launch_type: Literal["FARGATE", "EC2"] | None = None,
        instance_type: str | None = None,
        use_spot: bool = False,
        spot_fallback: bool = False,
        region: str | None = None,
        environment: Literal["none", "sync", "image"] | None = None,
        image: str | None = None,
        requirements: str | Path | Iterable[str] | None = None,
        packages: Iterable[str] = (),
        exclude: Iterable[str] = (),
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        slots: int = 1,
        task_timeout: float | None = None,
        max_tasks_per_child: int | None = None,
        max_attempts: int = 3,
        idle_timeout: float = 300,
        session_timeout: float = 3600,
        absolute_timeout: float = 604800,
        name: str | None = None,
        progress: bool = False,
        modules: Iterable[str | Path | ModuleType] = (),
        keep: bool = False,
        max_hourly_cost: float | None = None,
        cost_alert: float | None = None,
        intervals: Intervals | None = None,
    ) -> None:
        depth = check_nesting()
        # fmt: off
        worker = arguments.worker_spec(
            launcher=launcher, cpu=cpu, memory=memory, launch_type=launch_type, use_spot=use_spot,
            instance_type=instance_type, spot_fallback=spot_fallback, region=region, slots=slots)
        limits = arguments.limits(
            task_timeout=task_timeout, max_attempts=max_attempts,
            max_tasks_per_child=max_tasks_per_child, idle_timeout=idle_timeout,
            session_timeout=session_timeout, absolute_timeout=absolute_timeout)
        spec, wishes = choose_environment(
            worker, environment, image, requirements, packages, exclude)
        hourly, alert = arguments.cost_limits(max_hourly_cost, cost_alert)
        options = arguments.Options(
            depth=depth, spec=spec, wishes=wishes, limits=limits,
            store=arguments.with_region(store or default_store(), region),
            max_workers=arguments.worker_count(max_workers), min_workers=min_workers,
            initializer=initializer, initargs=initargs, name=name, modules=modules,
            max_hourly_cost=hourly, cost_alert=alert, intervals=intervals)
        # fmt: on
        register_at_exit()
        self._begin(creation.create(options), keep=keep, progress=progress)
        self._submission.begin(0, 0)

    @classmethod
    def attach(
        cls,
        session_id: str,
        *,
        store: str | Path | None = None,
        launcher: Literal["local", "ecs"] | None = None,
        max_workers: int | None = None,
        progress: bool = False,
        modules: Iterable[str | Path | ModuleType] = (),
        max_hourly_cost: float | None = None,
        cost_alert: float | None = None,
    ) -> Self:
        """Pick up a session: its futures, finished or not, and the right to submit more.

        Starts workers if work is pending and none are alive, unless the session's absolute time
        limit has passed. Works whether or not the session was detached, and alongside other
        clients.

        Args:
            session_id: What `detach` returned, or a list of sessions shows. May be shortened to its
                beginning, or to the beginning of its last part, as long as it fits only one
                session.
            store: Where the session is; by default, `default_store()`.
            launcher: What starts workers; by default, what the session says.
            max_workers: Most workers at once from now on; by default, what the session says.
            progress: Show progress on stderr.
            modules: As for the constructor.
            max_hourly_cost: As for the constructor, from now on; by default, what the session says,
                else your settings.
            cost_alert: As for the constructor, from now on; by default, what the session says.

        Raises:
            SessionNotFound: there is no such session in that store.
            ValueError, TypeError: an argument is wrong, or the short id fits several sessions.
            NewerSchema: the session was made by a newer version of this package.
        """
        register_at_exit()
        opened = creation.attach(
            session_id,
            store or default_store(),
            launcher=launcher,
            max_workers=max_workers,
            modules=modules,
            max_hourly_cost=max_hourly_cost,
            cost_alert=cost_alert,
        )
        self = cls.__new__(cls)
        self._begin(opened, keep=True, progress=progress)
        self._engine.take_in_others()
        return self

    def _begin(self, opened: creation.OpenSession, *, keep: bool, progress: bool) -> None:
        self.session_id = opened.session.id
        self._max_workers = opened.manifest.workers  # dask and joblib read it
        self._engine = Engine(opened, Lifecycle())
        self._submission = Submission(self._engine)
        self._reader = SessionReader(self._engine)
        self._engine.start(progress=progress)
        self._ending = Ending(self._engine, keep=keep)

    # --- submitting -----------------------------------------------------------------

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[T]:
        """Queue a call and return its future at once; see `concurrent.futures.Executor.submit`.

        The callable and its arguments are pickled right away, so later changes to them are not
        seen. Large buffers (of arrays, say) are stored before this returns, once for each content.
        If something cannot be pickled, the future ends with a `SerializationError` that names it.

        Raises:
            RuntimeError, SessionDetached, BrokenExecutor: nothing can be submitted any more.
            StoreError: a large buffer could not be stored.
        """
        return self._submission.submit(fn, args, kwargs, "")

    def submit_call(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        label: str = "",
    ) -> TaskFuture[T]:
        """What `submit` does, with a label; for `options`."""
        return self._submission.submit(fn, args, kwargs, label)

    def options(self, *, label: str) -> SubmitOptions:
        """`submit` and `map` of this executor with options for the tasks.

        `executor.options(label="warm-up").submit(fn, x)` passes `fn` and its arguments on
        untouched.

        Args:
            label: What to call the tasks in lists, errors and reports, instead of by function and
                arguments; cut off after 80 characters.

        Raises:
            TypeError, ValueError: `label` is not a string, or is empty.
        """
        return SubmitOptions(self, self._engine.session.runtime, arguments.label(label))

    # Narrower than the base class, which lets any callable have any arguments.
    @overload  # type: ignore[override]
    def map(
        self,
        fn: Callable[[A], T],
        first: Iterable[A],
        /,
        *,
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]: ...

    @overload
    def map(
        self,
        fn: Callable[[A, B], T],
        first: Iterable[A],
        second: Iterable[B],
        /,
        *,
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]: ...

    @overload
    def map(
        self,
        fn: Callable[[A, B, C], T],
        first: Iterable[A],
        second: Iterable[B],
        third: Iterable[C],
        /,
        *,
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]: ...

    @overload
    def map(
        self,
        fn: Callable[[A, B, C, D], T],
        first: Iterable[A],
        second: Iterable[B],
        third: Iterable[C],
        fourth: Iterable[D],
        /,
        *,
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]: ...

    @overload
    def map(
        self,
        fn: Callable[[A, B, C, D, E], T],
        first: Iterable[A],
        second: Iterable[B],
        third: Iterable[C],
        fourth: Iterable[D],
        fifth: Iterable[E],
        /,
        *,
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]: ...

    @overload
    def map(
        self,
        fn: Callable[..., T],
        first: Iterable[Any],
        second: Iterable[Any],
        third: Iterable[Any],
        fourth: Iterable[Any],
        fifth: Iterable[Any],
        sixth: Iterable[Any],
        /,
        *more: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]: ...

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Like `map(fn, *iterables)`, with the calls made by workers; results are in order.

        The callable is pickled once. Tasks are stored in batches whatever `chunksize` is, so it
        matters only for very short calls, as each task then makes that many of them.

        Args:
            fn: What to call.
            *iterables: Its arguments; read at once, or, with `buffersize`, as results are taken.
            timeout: Seconds from now until all results must be there.
            chunksize: Calls made by each task, 1 or more.
            buffersize: How many tasks to submit ahead of the results taken; all by default.

        Raises:
            TimeoutError: from the iterator, when a result is not there in time.
            SerializationError: the callable cannot be pickled. An argument that cannot be pickled
                fails only its own call.
        """
        return mapping.map_on(
            self,
            self._engine.session.runtime,
            fn,
            iterables,
            timeout=timeout,
            chunksize=chunksize,
            buffersize=buffersize,
        )

    def submit_all(
        self,
        fn: Callable[..., Any],
        calls: list[tuple[Any, ...]],
        function: str,
        label: str = "",
    ) -> list[TaskFuture[Any]]:
        """Submit many calls of one callable; the size of batches follows from their number.

        Args:
            fn: The callable.
            calls: Arguments of each call.
            function: What to call the callable where people see it.
            label: What to call the tasks instead.
        """
        return self._submission.submit_all(fn, calls, function, label)

    def flush(self) -> None:
        """Return when everything submitted so far is stored.

        Raises:
            StoreError: it could not be stored.
        """
        self._engine.flush()

    # --- looking --------------------------------------------------------------------

    @property
    def futures(self) -> list[TaskFuture[Any]]:
        """The futures of all tasks of the session, in submission order.

        Those of finished tasks are done at once, and fetch their result when asked for it. Once
        this executor has been shut down or detached, only futures that are still referenced
        somewhere.
        """
        return self._reader.futures()

    @property
    def store(self) -> str:
        """URL of the store that the session is in."""
        return self._engine.session.store.url

    def status(self) -> status.SessionStatus:
        """How far the session is, over all clients; what is queued here is stored first."""
        return self._reader.status()

    def report(self, path: str | Path) -> None:
        """Write an HTML page about what workers and tasks did when, and what held them up.

        The page needs no network. What is queued here is stored first.

        Raises:
            ModuleNotFoundError: the extra `starburst-executor[report]` is not installed.
            SessionNotFound: the session was removed, as `shutdown` does unless told to keep it.
            OSError: the file cannot be written.
        """
        self._reader.report(path)

    def collect(self, wait: bool = False, timeout: float | None = None) -> list[TaskOutcome]:
        """One outcome per finished task, in submission order; failures are included, not raised.

        Each outcome is downloaded once, however often this is called. A task that was retried has
        the outcome of its last try that has ended; the tries themselves are not listed.

        Args:
            wait: Wait until all tasks are finished.
            timeout: Wait no longer than this many seconds, then return what there is.

        Raises:
            SessionNotFound: the session was removed, as `shutdown` does unless told to keep it.
        """
        return self._reader.collect(wait_for_all=wait, timeout=timeout)

    def logs(self, task: TaskFuture[Any] | str | None = None) -> str:
        """What tasks have printed, stdout and stderr.

        Args:
            task: A future or a task id; by default, all tasks, each under a line with its id.

        Raises:
            ValueError, LookupError: there is no such task.
        """
        return self._reader.logs(task)

    def __repr__(self) -> str:
        if "_engine" not in vars(self):  # the constructor has raised
            return object.__repr__(self)
        name = self._engine.manifest.name
        called = f" {name!r}" if name else ""
        return (
            f"<{type(self).__name__} session {self.session_id}{called} in {self.store}, "
            f"{self._how()}>"
        )

    def _how(self) -> str:
        match self._engine.lifecycle.refusal:
            case None:
                return self._engine.watcher.past_limit or "open"
            case SessionDetached():
                return "detached"
            case SessionTerminated():
                return "terminated"
            case ExecutorBroken():
                return "broken"
        return "shut down"

    def _repr_html_(self) -> str:
        from starburst_executor.inspection.notebook import executor_html

        return executor_html(self)

    # --- changing it ----------------------------------------------------------------

    def cancel(
        self, futures: TaskFuture[Any] | Iterable[TaskFuture[Any]], running: bool = True
    ) -> bool:
        """Cancel tasks, with one write for each batch; returns whether all of them are cancelled.

        Args:
            futures: One future, or many.
            running: Also stop tasks that a worker has begun; it notices within a heartbeat.

        Raises:
            TypeError, ValueError: one is not a future of this session; then none is cancelled.
        """
        return self._engine.cancel(futures, running=running)

    def cancel_all(self, futures: Iterable[Future[Any]]) -> None:
        """Cancel those that no worker has begun; for `map`."""
        self._engine.cancel_unwanted(futures)

    def retry(
        self,
        tasks: TaskFuture[Any] | Iterable[TaskFuture[Any] | str] | None = None,
        *,
        cancelled: bool = False,
    ) -> list[TaskFuture[Any]]:
        """Submit the calls of finished tasks again, as new tasks; returns the new tasks' futures.

        The old tasks and their futures stay as they ended. `collect` gives the outcome of the last
        try.

        Args:
            tasks: A future, or futures or task ids; by default, all that failed and were not
                retried yet.
            cancelled: By default, retry cancelled tasks too.

        Raises:
            TypeError, ValueError: one is not a future of this session, or has not finished.
            LookupError: the session has no such task.
            RuntimeError, SessionDetached, BrokenExecutor: nothing can be submitted any more.
        """
        return self._engine.retry(tasks, cancelled=cancelled)

    def extend(self, seconds: float) -> None:
        """Move the session's time limits back by `seconds`; they are never shortened.

        Raises:
            TypeError, ValueError: `seconds` is not a positive number.
        """
        self._engine.extend(seconds)

    def scale(self, workers: int | Literal["auto"]) -> None:
        """Allow this many workers at once from now on, whether more or fewer than before.

        New ones are started as far as there are tasks waiting. Surplus ones leave within about a
        minute (`Intervals.session_check`): they finish what they are running and hand back what has
        not begun. Two stay while anything is unfinished, so that each can take over from the other.

        Args:
            workers: How many. "auto": as many as tasks need, between `min_workers` and
                `max_workers`, as before the first `scale`.

        Raises:
            TypeError, ValueError: not such a number, or more than `max_hourly_cost` allows.
        """
        self._engine.check_process()
        self._max_workers = self._engine.scale(arguments.scaled_workers(workers)).workers

    # --- leaving --------------------------------------------------------------------

    def detach(self) -> str:
        """Let go of the session: workers carry on, and `attach` picks it up by the id returned.

        Everything queued is stored before this returns. Unfinished futures of this executor end
        with `SessionDetached`, so that nobody waits for them forever. If this raises, call it
        again: until everything is stored, the executor can be used as before.

        Raises:
            StoreError: not everything could be stored, or workers could not be counted.
        """
        return self._ending.detach()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more tasks; once all have ended, stop the workers and remove the session.

        The objects are kept if `keep` was given, if the session was attached to, or if another
        client is using it. May be called again. Does nothing after `detach`.

        Args:
            wait: Return only when all of that is done.
            cancel_futures: Cancel tasks that no worker has begun.
        """
        self._ending.shutdown(wait=wait, cancel_futures=cancel_futures)

    def cleanup(self, force: bool = False) -> None:
        """End the session now: stop its workers and mark it terminated. Results stay readable.

        Args:
            force: Delete all its objects instead, once its workers have ended.

        Raises:
            SessionNotFound: it is already gone; not with `force`.
        """
        self._ending.cleanup(force=force)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ending.leave_block(exc)

    def __del__(self) -> None:
        if "_ending" in vars(self):  # else the constructor has raised
            self._ending.note_dropped()

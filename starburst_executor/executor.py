"""`StarburstExecutor`: a `concurrent.futures.Executor` whose futures are records in a store.

    submit, map           Submitter (thread)           the store            Watcher (thread)
      pickle the call       pack what gathered           queue/...            one LIST a look
      queue it, return      write batches          --->              --->     settle futures
      a future                                                                ask for workers: Staff (thread)

The caller's thread pickles and queues, nothing else; large buffers are stored by `submit` itself,
so that what the caller changes afterwards is not seen by the task. Nothing here knows what a worker
does with a batch: `session` is all that the two sides share.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, TracebackType
from typing import (
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Self,
    TypeVar,
    cast,
    overload,
)

from msgspec.structs import replace

from starburst_executor import arguments, catalog, config, lanes, mapping
from starburst_executor.choice import (
    choose_environment,
    on_launcher,
    prepare_environment,
)
from starburst_executor.collect import Collector, TaskOutcome
from starburst_executor.dropped import Dropped, Link
from starburst_executor.environment import ship
from starburst_executor.errors import (
    ExecutorBroken,
    SerializationError,
    SessionDetached,
    SessionNotFound,
    SessionTerminated,
    StarburstError,
)
from starburst_executor.future import TaskFuture
from starburst_executor.interrupts import Uninterrupted
from starburst_executor.launch import Launcher, open_launcher
from starburst_executor.ledger import Alarm, Ledger, check_workers
from starburst_executor.nesting import check_nesting
from starburst_executor.packing import Packer, python_version
from starburst_executor.pricing import rate_for
from starburst_executor.progress import Ticker
from starburst_executor.records import (
    Batch,
    Intervals,
    Lane,
    Limits,
    Manifest,
    SessionState,
)
from starburst_executor.roster import Roster
from starburst_executor.runtime import SystemRuntime
from starburst_executor.serialize import refuse
from starburst_executor.session import Session
from starburst_executor.spec import WorkerSpec
from starburst_executor.staff import Staff
from starburst_executor.store import Store, open_store, probe_conditional
from starburst_executor.submit import Item, Submitter
from starburst_executor.watch import Outcomes, Watcher

__all__ = ["StarburstExecutor", "default_store", "list_sessions"]

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")

_open_executors: weakref.WeakSet[StarburstExecutor] = weakref.WeakSet()
_probed: set[str] = set()  # URLs of stores that were seen to honour conditions


def default_store() -> str:
    """Where sessions are kept when nothing is said: `STARBURST_STORE`, the file, a folder of this user's."""
    return config.load().settings.store


def list_sessions(store: str | Path | None = None) -> catalog.SessionList:
    """The sessions in a store, oldest first.

    Args:
        store: URL or directory; default `default_store()`.

    Returns:
        For each: session_id, created_at, last_activity, total, pending, running (with claimed),
        completed, failed, state.
    """
    opened = open_store(store or default_store())
    try:
        return catalog.summaries(opened)
    finally:
        opened.close()


class StarburstExecutor(Executor):
    """An executor whose work survives this process, this machine and its workers.

    Args:
        max_workers: Most worker processes at once; default the number of this machine's CPUs.
        min_workers: So many workers are started at once and stay though nothing waits, until the session
            times out.
        store: `s3://bucket/prefix` or a directory; default `default_store()`.
        launcher: "local" (this machine) or "ecs"; default `STARBURST_LAUNCHER`, the configuration file,
            "local".
        cpu: vCPUs of a worker on ECS.
        memory: Memory of a worker on ECS, such as "2GB".
        launch_type: "FARGATE" or "EC2", on ECS; default "FARGATE". This option and the next three are refused for
            workers on this machine.
        instance_type: With EC2, such as "c8a.xlarge".
        use_spot: Take Spot capacity.
        spot_fallback: Take on-demand capacity for what Spot has no room for.
        region: AWS region of bucket and workers; default that of the AWS settings.
        environment: "none": workers have what they need (default on this machine: they run in the caller's own
            environment). "sync": they get what is installed here (default on ECS). "image": the container
            image has it (default if an image is given or configured).
        image: Container image of workers on ECS; default the configured one, else a stock one of this Python.
        requirements: With "sync", what to install instead of what is installed here: a list of requirements,
            or the path of a requirements file.
        packages: With "sync", requirements to add, or to put in place of what is installed here.
        exclude: With "sync", names of packages to leave out.
        initializer: Called once in each process that runs tasks, before its first.
        initargs: Its arguments.
        slots: Tasks that a worker runs at once, each in a process of its own.
        task_timeout: Seconds that a task may run; default no limit.
        max_attempts: A task whose worker is lost while running it is tried so often.
        idle_timeout: A worker with nothing to do leaves after so many seconds.
        session_timeout: Workers leave when nothing was unfinished for so many seconds.
        absolute_timeout: Workers leave so many seconds after the session began, whatever is left;
            nothing is lost, and `extend` goes on from there. Default a week: workers with nothing to do leave long
            before, so that what it bounds is a task that hangs, at some $8 a week for a worker of 1 vCPU and 2 GB.
        name: For lists of sessions.
        progress: Show how far it is.
        modules: Modules or packages to ship to the workers, besides those that were imported from
            outside site-packages: names, module objects or paths.
        keep: Keep the session's objects after `shutdown`.
        max_hourly_cost: Dollars. More workers than cost so much an hour are refused, here, by `attach` and by
            `scale`, and are never started, by whomever; default that of the settings, which is no limit.
        cost_alert: Dollars. When the session has cost so much, that is said once in the log, and from then
            on in its status.
        intervals: How often clients and workers look; for tests and unusual stores.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is left behind.
        NestingError: this is a task inside too many others, or a worker that imports a module for one.
        StoreDenied, StoreMissing, StoreNotConditional: the store cannot be used.
        PackageError: a package of this machine cannot be brought to the workers; named.

    Attributes:
        session_id: Id of the session; with the store it is all that `attach` needs.
    """

    session_id: str

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        min_workers: int = 0,
        store: str | Path | None = None,
        launcher: str | None = None,
        cpu: float = 1,
        memory: str = "2GB",
        launch_type: str | None = None,
        instance_type: str | None = None,
        use_spot: bool = False,
        spot_fallback: bool = False,
        region: str | None = None,
        environment: str | None = None,
        image: str | None = None,
        requirements: str | Path | Iterable[str] | None = None,
        packages: Iterable[str] = (),
        exclude: Iterable[str] = (),
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        slots: int = 1,
        task_timeout: float | None = None,
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
        spec = WorkerSpec(
            launcher=arguments.launcher_name(launcher),
            cpu=cpu,
            memory=memory,
            launch_type=cast(Any, "FARGATE" if launch_type is None else launch_type),
            instance_type=instance_type,
            use_spot=use_spot,
            spot_fallback=spot_fallback,
            region=region,
            slots=slots,
        )
        arguments.check_of_ecs(spec, launch_type)
        limits = Limits(
            task_timeout=None
            if task_timeout is None
            else arguments.seconds("task_timeout", task_timeout),
            max_attempts=arguments.whole_number("max_attempts", max_attempts),
            idle_timeout=arguments.seconds("idle_timeout", idle_timeout),
            session_timeout=arguments.seconds("session_timeout", session_timeout),
            absolute_timeout=arguments.seconds("absolute_timeout", absolute_timeout),
        )
        workers = arguments.worker_count(max_workers)
        arguments.check_min_workers(min_workers, workers)
        arguments.check_initializer(initializer, initargs)
        arguments.check_name(name)
        arguments.check_intervals(intervals)
        spec, wishes = choose_environment(
            spec, environment, image, requirements, packages, exclude
        )
        place = arguments.with_region(store or default_store(), region)
        arguments.check_store_reachable(spec.launcher, place)
        hourly, alert = arguments.cost_limits(max_hourly_cost, cost_alert)
        _register_at_exit()
        deployment = arguments.deployment(spec)
        launches = open_launcher(spec, deployment)
        opened = open_store(place)
        with _closed_on_error(opened):
            runtime = SystemRuntime()
            session = Session(opened, arguments.new_session_id(runtime), runtime)
            packer = Packer(session, python_version(), modules)
            manifest = Manifest(
                session_id=session.id,
                depth=depth,
                name=name,
                owner=arguments.owner(),
                python=python_version(),
                package=version("starburst-executor"),
                created=0,
                deadline=0,
                workers=workers,
                min_workers=min_workers,
                spec=spec,
                deployment=deployment,
                limits=limits,
                intervals=intervals or arguments.default_intervals(opened, spec),
                lanes=(Lane(client=runtime.new_id(8)),),
                rate=rate_for(spec, opened.url, runtime),
                max_hourly_cost=hourly,
                cost_alert=alert,
            )
            check_workers(manifest)
            spec, prepared = prepare_environment(spec, wishes, launches.platform)
            _probe(opened, runtime)
            if prepared is not None:
                launches = open_launcher(spec, deployment)
                ship(opened, prepared)
                manifest = replace(manifest, spec=spec)
            manifest = _store_manifest(session, manifest, packer, initializer, initargs)
        self._setup(session, manifest, launches, packer, keep=keep, progress=progress)
        self._take_lane(0, 0)

    @classmethod
    def attach(
        cls,
        session_id: str,
        *,
        store: str | Path | None = None,
        launcher: str | None = None,
        max_workers: int | None = None,
        progress: bool = False,
        modules: Iterable[str | Path | ModuleType] = (),
        max_hourly_cost: float | None = None,
        cost_alert: float | None = None,
    ) -> Self:
        """Pick a session up again: its futures, finished or not, and the right to submit more.

        Workers are started if work is pending and none live, unless the session's absolute time
        limit has passed. Works whether or not the session was detached, and beside other clients.

        Args:
            session_id: What `detach` returned, or a list of sessions shows.
            store: Where the session is; default `default_store()`.
            launcher: What starts workers; default the session's own.
            max_workers: Most workers at once from now on; default as the session has it.
            progress: Show how far it is.
            modules: As for the constructor.
            max_hourly_cost: The same, from now on; default the session's own, else that of the settings.
            cost_alert: The same, from now on; default the session's own.

        Raises:
            SessionNotFound: no such session in that store.
            ValueError, TypeError: an argument is wrong.
            NewerSchema: a newer version of this package made it.
        """
        arguments.check_session_id(session_id)
        count = None if max_workers is None else arguments.worker_count(max_workers)
        hourly, alert = arguments.cost_limits(max_hourly_cost, cost_alert)
        _register_at_exit()
        opened = open_store(store or default_store())
        with _closed_on_error(opened):
            session = Session(opened, session_id, SystemRuntime())
            manifest = session.load()
            spec = manifest.spec
            if launcher is not None:
                spec = on_launcher(spec, arguments.launcher_name(launcher))
            arguments.check_store_reachable(spec.launcher, opened.url)
            launches = open_launcher(spec, manifest.deployment)
            packer = Packer(session, manifest.python, modules)
            limited = functools.partial(
                _limited,
                workers=count,
                asked=max_hourly_cost,
                hourly=hourly,
                alert=alert,
            )
            if limited(manifest) != manifest:
                manifest = session.amend(limited)
        self = cls.__new__(cls)
        self._setup(session, manifest, launches, packer, keep=True, progress=progress)
        self._roster.take_in_others()
        self._alarm.look(manifest)
        return self

    def _setup(
        self,
        session: Session,
        manifest: Manifest,
        launcher: Launcher,
        packer: Packer,
        *,
        keep: bool,
        progress: bool,
    ) -> None:
        self.session_id = session.id
        self._session = session
        self._manifest = manifest
        self._launcher = launcher
        self._packer = packer
        self._keep = keep
        self._max_workers = manifest.workers  # dask and joblib read it
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._detaching = threading.RLock()
        self._end: Exception | None = None  # why nothing can be submitted any more
        self._ending: threading.Thread | None = None
        self._taken_down = False  # by `detach`, `shutdown`, `cleanup` or an interrupt
        self._removed = False  # the session's objects, by `shutdown`
        self._at_exit = False
        self._link = Link(self)
        self._stopping = Uninterrupted(
            "starburst-stop", self._calls(StarburstExecutor._stop_workers)
        )
        self._lane: int | None = None
        self._numbers: Iterator[int] = iter(())
        self._outcomes = Outcomes(session, packer.open_outcome)
        self._collector = Collector(session, packer)
        self._ledger = Ledger(session, client=True)
        self._alarm = Alarm(session)
        broken = self._calls(StarburstExecutor._break)
        self._staff = staff = Staff(
            session, launcher, manifest, broken, lambda: watcher.hurry()
        )
        queue = session.queue()
        queue.learn(manifest.lanes)
        self._watcher = watcher = Watcher(
            session,
            manifest,
            queue,
            self._outcomes,
            self._calls(StarburstExecutor._look_after),
            lambda: staff.ended,
            broken,
        )
        cancel = self._link.call(StarburstExecutor._cancel_one)
        self._roster = Roster(
            session, self._outcomes, watcher, lambda future: bool(cancel(future))
        )
        self._submitter = Submitter(
            session,
            lambda: staff.manifest.workers * manifest.spec.slots,
            lambda: watcher.unfinished,
            self._roster.stored,
            broken,
        )
        self._start_threads()
        if manifest.min_workers:
            self._staff.ask_need(0)
        self._ticker = Ticker(session, sys.stderr) if progress else None
        _open_executors.add(self)
        _dropped.watch()
        self._made = True

    def _calls(
        self, method: Callable[Concatenate[StarburstExecutor, P], None]
    ) -> Callable[P, None]:
        """What threads may keep of this object without keeping it from being collected."""
        return self._link.call(method)

    def _start_threads(self) -> None:
        loops = (
            ("submit", self._submitter.run),
            ("watch", self._watcher.run),
            ("staff", self._staff.run),
        )
        failed = self._calls(StarburstExecutor._break_after)
        self._threads = [
            threading.Thread(
                target=_run_loop,
                args=(*one, failed),
                name=f"starburst-{one[0]}",
                daemon=True,
            )
            for one in loops
        ]
        for thread in self._threads:
            thread.start()

    def _look_after(self, unfinished: int) -> None:
        """Keep workers there, and see what they cost; on the watcher's thread."""
        seen = self._watcher.manifest
        if seen.deadline > self._staff.manifest.deadline:  # another client's `extend`
            self._manifest = self._staff.manifest = seen
        self._staff.ask_need(unfinished)
        self._alarm.look(self._manifest)

    def _break_after(self, name: str, error: BaseException) -> None:
        """A thread has failed: nobody shall wait for it for ever."""
        log.error(
            "session %s: the %s thread failed", self.session_id, name, exc_info=error
        )
        broken = ExecutorBroken(
            f"the {name} thread of session {self.session_id} failed ({error!r}). What is stored is "
            f"safe: StarburstExecutor.attach({self.session_id!r}) goes on."
        )
        broken.__cause__ = error
        self._break(broken)

    # --- submitting -----------------------------------------------------------------

    def submit(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> TaskFuture[T]:
        """Queue a call and return its future at once; see `concurrent.futures.Executor.submit`.

        The callable and its arguments are pickled now, so that later changes are not seen. Large
        buffers (of arrays, say) are stored before this returns, once for each content. If something
        cannot be pickled, the future ends with a `SerializationError` that names it.

        Raises:
            RuntimeError, SessionDetached, BrokenExecutor: nothing can be submitted any more.
            StoreError: a large buffer could not be stored.
        """
        self._check_process()
        with self._lock:
            self._check_usable()
            try:
                digest = self._pickle_function(fn)
            except SerializationError as error:
                return self._refuse(error)
            return self._submit(digest, args, kwargs)

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
        """Like `map(fn, *iterables)`, with the calls made by workers; results in order.

        The callable is pickled once. Tasks are stored in batches whatever `chunksize` is, so that it
        matters only for very short tasks, where each task then makes that many calls.

        Args:
            fn: What to call.
            *iterables: Its arguments; read at once, or as results are taken with `buffersize`.
            timeout: Seconds from now for all results.
            chunksize: Calls made by one task, 1 or more.
            buffersize: Most tasks submitted ahead of the results taken; default all.

        Raises:
            TimeoutError: from the iterator, when a result is not there in time.
            SerializationError: the callable cannot be pickled. An argument that cannot be fails its
                own call.
        """
        return mapping.map_on(
            self,
            self._session.runtime,
            fn,
            iterables,
            timeout=timeout,
            chunksize=chunksize,
            buffersize=buffersize,
        )

    def _pickle_function(self, fn: Callable[..., Any]) -> str:
        digest, cargo = self._packer.function(fn)
        self._submitter.add_function(digest, cargo)
        return digest

    def _submit(
        self,
        digest: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        announced: bool = False,
    ) -> TaskFuture[Any]:
        try:
            call, light = self._packer.call(args, kwargs)
        except SerializationError as error:
            return self._refuse(error, announced=announced)
        modules = self._packer.modules()
        if self._lane is None:
            self._take_free_lane()
        assert self._lane is not None
        future = self._roster.new(self._lane, next(self._numbers))
        item = Item(future, digest, call, light, modules)
        self._submitter.add(item, announced=announced)
        return future

    def _refuse(
        self, error: SerializationError, *, announced: bool = False
    ) -> TaskFuture[Any]:
        """A task that fails with this error, here at once and for whoever attaches later."""
        digest = self._pickle_function(refuse)
        future = self._submit(digest, (error,), {}, announced=announced)
        future.settle((False, error))
        return future

    def submit_all(
        self, fn: Callable[..., Any], calls: list[tuple[Any, ...]]
    ) -> list[TaskFuture[Any]]:
        """Submit many calls of one callable; the size of batches follows their number."""
        self._check_process()
        with self._lock:
            self._check_usable()
            digest = self._pickle_function(fn)
            self._submitter.announce(len(calls))
            futures: list[TaskFuture[Any]] = []
            try:
                for args in calls:
                    futures.append(self._submit(digest, args, {}, announced=True))  # noqa: PERF401
            finally:
                self._submitter.announce(len(futures) - len(calls))
            return futures

    def _take_free_lane(self) -> None:
        self._manifest, lane = lanes.take(self._session)
        self._take_lane(lane, self._manifest.lanes[lane].number)

    def _take_lane(self, lane: int, number: int) -> None:
        self._lane = lane
        self._numbers = itertools.count(number)
        self._submitter.begin(lane, number)

    def _check_process(self) -> None:
        """Refuse in a forked process, before any lock: its copies of locks may be held for ever."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this executor was made by the process that forked this one and cannot be used here; "
                f"StarburstExecutor.attach({self.session_id!r}) makes one that can"
            )

    def _check_usable(self) -> None:
        if self._at_exit:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        self._check_open()

    def _check_open(self) -> None:
        if self._end is not None:
            # Without the traceback of the last time it was raised.
            raise self._end.with_traceback(None)
        if self._manifest.state is SessionState.TERMINATED:
            raise self._terminated()
        self._packer.check_python()

    def _terminated(self) -> SessionTerminated:
        return SessionTerminated(
            f"session {self.session_id} was terminated; its results stay readable, and more can only "
            "be submitted to a new session"
        )

    # --- what there is --------------------------------------------------------------

    @property
    def futures(self) -> list[TaskFuture[Any]]:
        """The futures of all tasks of the session, in submission order.

        Finished ones are done at once and bring their result when asked for it. Once this executor
        was shut down or detached, only those that somebody still holds.
        """
        self._check_process()
        if self._end is not None:
            return self._roster.living()
        self.flush()
        return self._roster.all()

    def flush(self) -> None:
        """Return when everything submitted so far is stored.

        Raises:
            StoreError: it could not be.
        """
        self._check_process()
        self._submitter.flush()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """What is queued here is stored first; of a session that was left, nothing stays open after."""
        if self._end is None:
            self.flush()
        self._check_process()
        try:
            yield
        finally:
            if self._taken_down:
                self._close()

    def status(self) -> catalog.SessionStatus:
        """How far the session is, all clients' tasks together; what is queued here is stored first."""
        with self._reading():
            # What this client asked for is added to its lane when it leaves.
            own = self._ledger if self._end is None else Ledger(self._session)
            return catalog.status(self._session, reckon=own.look)

    @property
    def store(self) -> str:
        """URL of the store that the session is in."""
        return self._session.store.url

    def report(self, path: str | Path) -> None:
        """Write one HTML page about the session: what its workers and tasks did when, and what held it back.

        The page needs no network. What is queued here is stored first.

        Raises:
            ModuleNotFoundError: the extra `starburst-executor[report]` is not installed.
            SessionNotFound: the session was removed, as `shutdown` does unless told to keep it.
            OSError: the file cannot be written.
        """
        from starburst_executor import page

        with self._reading():
            page.write(self._session, path)

    def _repr_html_(self) -> str:
        from starburst_executor.views import executor_html

        return executor_html(self)

    def collect(
        self, wait: bool = False, timeout: float | None = None
    ) -> list[TaskOutcome]:
        """One outcome for each finished task, in submission order; failures included, not raised.

        Each outcome is downloaded once, however often this is called.

        Args:
            wait: Wait until all tasks are finished.
            timeout: But for no more than so many seconds; then what there is.

        Raises:
            SessionNotFound: the session was removed, as `shutdown` does unless told to keep it.
        """
        if wait:
            _wait_for(self.futures, timeout)
        with self._reading():
            self._session.load()
            self._roster.take_in_others()
            outcomes: list[TaskOutcome] = []
            for batch in self._roster.batches():
                first = self._roster.first_index(batch)
                outcomes += self._collector.collect(batch, first)
            return outcomes

    def logs(self, task: TaskFuture[Any] | str | None = None) -> str:
        """What tasks have printed, stdout and stderr.

        Args:
            task: A future or a task id; default all tasks, each under a line with its id.

        Raises:
            ValueError, LookupError: no such task.
        """
        with self._reading():
            if task is None:
                return catalog.all_logs(self._session)
            name = self._own(task).task_id if isinstance(task, TaskFuture) else task
            return catalog.task_log(self._session, name)

    def _own(self, future: object) -> TaskFuture[Any]:
        """The future again, if it is of this session."""
        if not isinstance(future, TaskFuture):
            raise TypeError(
                f"{future!r} is no future of this session; `futures` has them all"
            )
        if future.session_id != self.session_id:
            raise ValueError(
                f"task {future.task_id} is of session {future.session_id}, not of {self.session_id}"
            )
        return future

    # --- changing it ----------------------------------------------------------------

    def cancel(
        self, futures: TaskFuture[Any] | Iterable[TaskFuture[Any]], running: bool = True
    ) -> bool:
        """Cancel tasks, with one write for each batch; returns whether all of them are cancelled.

        Args:
            futures: One future, or many.
            running: Stop those too that a worker has begun; it notices within a heartbeat.

        Raises:
            TypeError, ValueError: one is no future of this session; then none is cancelled.
        """
        self._check_process()
        given = [futures] if isinstance(futures, TaskFuture) else futures
        chosen = [self._own(future) for future in given]
        left = [f for f in chosen if not f.done() and not self._submitter.withdraw(f)]
        if left:
            self._submitter.flush()
        batches: dict[Batch, list[int]] = {}
        for future in left:
            assert future.batch is not None
            batches.setdefault(future.batch, []).append(
                future.number - future.batch.number
            )
        for batch, positions in batches.items():
            self._watcher.learn(
                batch, self._session.cancel(batch, positions, running=running)
            )
        return all(future.cancelled() for future in chosen)

    def cancel_all(self, futures: Iterable[Future[Any]]) -> None:
        """Cancel those that no worker has begun."""
        own = [f for f in futures if isinstance(f, TaskFuture) and not f.done()]
        if own and self._end is None:
            self.cancel(own, running=False)

    def _cancel_one(self, future: TaskFuture[Any]) -> bool:
        if self._end is not None:
            return False
        return self.cancel(future, running=False)

    def extend(self, seconds: float) -> None:
        """Move the session's time limits `seconds` on; they are never shortened.

        Raises:
            TypeError, ValueError: `seconds` is not a positive number.
        """
        self._check_process()
        self._manifest = catalog.extend(self._session, seconds)
        self._staff.manifest = self._watcher.manifest = self._manifest
        self._watcher.hurry()

    def scale(self, workers: int | Literal["auto"]) -> None:
        """Have at most so many workers at once from now on, whether more or fewer than before.

        What lacks is started as far as tasks wait. Those too many leave within about a minute
        (`Intervals.session_check`): they end what they run, and hand back what has not begun. Two stay
        while anything is unfinished, so that each can take over from the other.

        Args:
            workers: How many; "auto": again between `min_workers` and `max_workers`, as tasks wait.

        Raises:
            TypeError, ValueError: no such number, or more than `max_hourly_cost` allows.
        """
        self._check_process()
        count = arguments.scaled_workers(workers)
        self._manifest = catalog.scale(self._session, count)
        self._max_workers = self._manifest.workers
        self._staff.manifest = self._manifest
        self._staff.ask_need(self._watcher.unfinished)

    # --- leaving --------------------------------------------------------------------

    def detach(self) -> str:
        """Let go of the session: workers carry on, and `attach` with the id returned picks it up again.

        Everything queued is stored before this returns. Unfinished futures of this object end with
        `SessionDetached`, so that nobody waits on them for ever.
        """
        self._check_process()
        with self._detaching:
            if not isinstance(self._end, SessionDetached):
                self._detach()
        return self.session_id

    def _detach(self) -> None:
        # The lock is not held while threads are waited for: their callbacks may submit.
        with self._lock:
            self._check_open()
            detached = self._end = SessionDetached(
                f"session {self.session_id} was detached; "
                f"StarburstExecutor.attach({self.session_id!r}) picks it up again"
            )
        self.flush()
        self._staff.need(self._watcher.unfinished)
        self._claim_end()
        self._stop_threads()
        self._give_back_lane(SessionState.OPEN)
        self._watcher.abandon(detached)
        self._close()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more tasks; when all have ended, stop the workers and remove the session's objects.

        The objects stay if `keep` was given, if the session was attached to, or if another client is
        at it. May be called again; does nothing after `detach`.

        Args:
            wait: Return only when all that is done.
            cancel_futures: Cancel what no worker has begun.
        """
        if os.getpid() != self._pid:
            return  # a forked child's copy must not end its parent's session
        self._begin_end(cancel_futures=cancel_futures, clean=True)
        if wait:
            try:
                self._await_end()
            except BaseException as interrupt:  # Ctrl-C
                self._stop_at_once()
                self._say_how_to_come_back(interrupt)
                raise

    def cleanup(self, force: bool = False) -> None:
        """End the session: stop its workers and mark it terminated. Results stay readable.

        Args:
            force: Delete every object of it instead, once its workers have ended.

        Raises:
            SessionNotFound: it is gone already; not with `force`.
        """
        self._check_process()
        error = SessionTerminated(f"session {self.session_id} was cleaned up")
        with self._lock:
            self._end = self._end or error
        if not self._claim_end():
            self._await_end()
        self._watcher.abandon(error)
        self._submitter.abandon(error)
        self._stop_threads()
        try:
            if force:
                catalog.delete(self._session, self._launcher)
            else:
                catalog.terminate(self._session, self._launcher)
        finally:
            self._close()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if os.getpid() != self._pid or isinstance(self._end, SessionDetached):
            return
        try:
            if exc is None or isinstance(exc, Exception):
                self._begin_end(cancel_futures=False, clean=exc is None)
                self._await_end()
            else:
                self._stop_at_once()
        except BaseException as interrupt:  # Ctrl-C while tasks were waited for
            self._stop_at_once()
            self._say_how_to_come_back(interrupt)
            raise
        if exc is not None:
            self._say_how_to_come_back(exc)

    def _say_how_to_come_back(self, exc: BaseException) -> None:
        if isinstance(self._end, SessionTerminated) or self._removed:
            return
        text = (
            f"session {self.session_id} is kept in {self._session.store.url}: "
            f"StarburstExecutor.attach({self.session_id!r}, store={self._session.store.url!r}) picks it "
            f"up, `starburst-executor cleanup --force {self.session_id}` removes it"
        )
        exc.add_note(text)
        if not isinstance(exc, Exception):
            log.warning("%s", text)  # nobody is shown the notes of a SystemExit

    def _begin_end(self, *, cancel_futures: bool, clean: bool) -> None:
        with self._lock:
            if self._ending is not None or isinstance(self._end, SessionDetached):
                return
            broken = self._end
            self._end = self._end or RuntimeError(
                "cannot schedule new futures after shutdown"
            )
            ending = threading.Thread(
                target=self._end_when_done,
                args=(cancel_futures, clean and broken is None),
                name="starburst-end",
            )
            try:
                ending.start()
            except RuntimeError as error:
                self._end = broken
                if "interpreter shutdown" not in str(
                    error
                ):  # but "can't start new thread"
                    raise
                return  # Python 3.12 starts none at exit; `_leave_at_exit` ends this one too, or has
            self._ending = ending

    def _await_end(self) -> None:
        """Return when the thread that ends the session has; at once in a callback, for which it waits."""
        if self._ending is not None and threading.current_thread() not in self._threads:
            self._ending.join()

    def _claim_end(self) -> bool:
        """Whether the caller is the first to take this executor down."""
        with self._lock:
            first, self._taken_down = not self._taken_down, True
            return first

    def _end_when_done(self, cancel_futures: bool, clean: bool) -> None:
        """Wait as the standard says, then take everything down; on a thread of its own, but at exit."""
        try:
            if cancel_futures:
                self._cancel_pending()
            self._submitter.wait_until_idle()
            self._watcher.wait_until_idle()
            if self._claim_end():
                self._take_down(clean=clean)
        except SessionNotFound:
            log.info("session %s was removed by another client", self.session_id)
        except (StarburstError, OSError) as error:
            log.error("session %s could not be ended: %s", self.session_id, error)

    def _take_down(self, *, clean: bool) -> None:
        try:
            self._stop_threads()
            others = self._others()
            if clean and not self._keep and not others:
                catalog.delete(self._session, self._launcher)
                self._removed = True
                return
            if clean and not self._keep:
                log.warning(
                    "session %s is kept: another client is attached to it (%s); "
                    "`starburst-executor cleanup --force %s` removes it",
                    self.session_id, ", ".join(others), self.session_id,
                )  # fmt: skip
            self._give_back_lane(SessionState.OPEN if others else SessionState.CLOSED)
            # Another client may have submitted what this one does not know of.
            if not others or all(s.done for s in self._watcher.queue.look()):
                self._launcher.stop(self._session.url, grace=2.0)
        finally:
            self._close()

    def _cancel_pending(self) -> None:
        self._submitter.withdraw_all()
        self._submitter.wait_until_idle()
        for batch, positions in self._watcher.stored_pending().items():
            self._watcher.learn(
                batch, self._session.cancel(batch, positions, running=False)
            )

    def _others(self) -> list[str]:
        """Clients that have taken a lane and not given it back."""
        taken = self._session.load().lanes
        return [
            lane.client
            for i, lane in enumerate(taken)
            if lane.taken and i != self._lane
        ]

    def _stop_at_once(self) -> None:
        """Stop workers without waiting for their tasks, which go back to pending; safe to interrupt."""
        try:
            self._stopping.run()
        except BaseException:
            log.warning(
                "session %s: interrupted before its workers were known to have stopped; "
                "`starburst-executor cleanup %s` stops those that are left",
                self.session_id, self.session_id,
            )  # fmt: skip
            raise

    def _stop_workers(self) -> None:
        """What an interrupt sets off, on a thread that none reaches."""
        with self._lock:
            self._end = self._end or RuntimeError("this executor was interrupted")
        if not self._claim_end():
            self._await_end()
            return
        error = SessionDetached(f"session {self.session_id} was left by an interrupt")
        self._submitter.abandon(error)
        self._watcher.abandon(error)
        self._stop_threads()
        try:
            self._launcher.stop(self._session.url, grace=2.0)
            self._give_back_lane(SessionState.CLOSED)
        except (StarburstError, OSError) as failure:
            log.error("session %s: %s", self.session_id, failure)
        self._close()

    def _stop_threads(self) -> None:
        self._staff.close()
        self._submitter.close()
        self._watcher.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        if self._ticker is not None:
            self._ticker.close()

    def _give_back_lane(self, state: SessionState) -> None:
        # A lane with a batch in doubt is not given back: the batch may still appear in it.
        lane = self._lane if self._submitter.certain else None
        finished = self._watcher.queue.finished
        lanes.give_back(self._session, lane, self._submitter.number, state, finished)

    def _break(self, error: Exception) -> None:
        """Nothing can go on: end every future, refuse new ones. Called from this object's threads."""
        log.error("session %s: %s", self.session_id, error)
        self._end = self._end or error
        self._watcher.abandon(error)
        self._submitter.abandon(error)
        self._staff.close()

    def _close(self) -> None:
        _open_executors.discard(self)
        self._link.release()
        self._own_runtime.close()
        self._session.store.close()

    @property
    def _own_runtime(self) -> SystemRuntime:
        runtime = self._session.runtime
        assert isinstance(runtime, SystemRuntime)
        return runtime

    def _leave_at_exit(self) -> None:
        """The interpreter ends: leave nothing behind if all is done, else leave it running."""
        if os.getpid() != self._pid:
            return
        if self._stopping.begun:
            self._stop_at_once()
            return
        with self._lock:  # another thread may just be starting the one that ends it
            ending = self._ending
            self._at_exit = self._end is None
        if ending is not None:
            ending.join()
            return
        self._own_runtime.start_no_threads()
        if self._end is not None:
            if isinstance(self._end, ExecutorBroken):
                self._end_when_done(False, clean=False)  # nobody can use its workers
            return
        if self._watcher.unfinished or not self._submitter.idle:
            self._start_last_workers()
            session_id = self.detach()
            log.warning(
                "session %s is left running with unfinished tasks; "
                "StarburstExecutor.attach(%r, store=%r) picks it up",
                session_id, session_id, self._session.store.url,
            )  # fmt: skip
        else:
            self._staff.close()
            self._end = RuntimeError("the interpreter has ended")
            self._end_when_done(False, clean=True)

    def __del__(self) -> None:
        # It may not have been made; and see `dropped` on what may be done here.
        if not self.__dict__.get("_made") or os.getpid() != self._pid:
            return
        if not self._taken_down and self._ending is None and not self._at_exit:
            self._link.hold(self)
            _dropped.put(self)

    def _outlive(self) -> None:
        """Go on without anybody who holds this object, and end as by `shutdown` once all is done."""
        _open_executors.add(self)
        unfinished = sum(not future.done() for future in self._roster.living())
        if unfinished:
            log.warning(
                "session %s goes on: its executor was dropped without `shutdown` or `detach` (unfinished tasks: "
                "%d). When they have ended, its workers and the session do",
                self.session_id, unfinished,
            )  # fmt: skip
        threading.Thread(
            target=self._end_when_idle, name="starburst-outlive", daemon=True
        ).start()

    def _end_when_idle(self) -> None:
        self._submitter.wait_until_idle()
        self._watcher.wait_until_idle()
        if not self._at_exit:
            self._begin_end(cancel_futures=False, clean=True)

    def _say_left_running(self) -> None:
        log.warning(
            "session %s: interrupted while the interpreter left it, and so perhaps left running; "
            "StarburstExecutor.attach(%r, store=%r) picks it up, `starburst-executor cleanup %s` stops its workers",
            self.session_id, self.session_id, self._session.store.url, self.session_id,
        )  # fmt: skip

    def _start_last_workers(self) -> None:
        """What was submitted last may have no worker yet; but Python 3.12 starts no process at exit."""
        try:
            self.flush()
            self._staff.need(self._watcher.unfinished)
        except RuntimeError as error:
            log.warning("no worker could be started, attach will: %s", error)
        self._staff.close()


_dropped: Dropped[StarburstExecutor] = Dropped(StarburstExecutor._outlive)  # noqa: SLF001  the same module


def _leave_all_at_exit() -> None:
    interrupt: BaseException | None = None
    for executor in {*_open_executors, *_dropped.take_out()}:
        try:
            executor._leave_at_exit()  # noqa: SLF001  the same module
        except BaseException as error:  # the others are left all the same
            executor._say_left_running()  # noqa: SLF001
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _run_loop(
    name: str,
    loop: Callable[[], None],
    failed: Callable[[str, BaseException], None],
) -> None:
    """Run a thread's loop."""
    try:
        loop()
    except BaseException as error:  # user code runs here too, in callbacks
        failed(name, error)


@functools.cache
def _register_at_exit() -> None:
    """Have executors left before the threads that they need are refused.

    `atexit` would be too late: by then no thread can be started, and storing needs some. The standard
    library's own executors use this hook for the same reason.
    """
    register: Callable[[Callable[[], None]], None] = threading._register_atexit  # type: ignore[attr-defined]  # noqa: SLF001
    register(_leave_all_at_exit)


def _probe(store: Store, runtime: SystemRuntime) -> None:
    if store.url not in _probed:
        probe_conditional(store, "probe/", runtime.new_id)
        _probed.add(store.url)


@contextlib.contextmanager
def _closed_on_error(store: Store) -> Iterator[None]:
    try:
        yield
    except BaseException:
        store.close()
        raise


def _limited(
    manifest: Manifest,
    *,
    workers: int | None,
    asked: float | None,
    hourly: float | None,
    alert: float | None,
) -> Manifest:
    """The manifest with what `attach` was asked for; the session's own limit goes before the settings'."""
    limit = hourly if asked is not None else manifest.max_hourly_cost or hourly
    limited = replace(
        manifest,
        workers=manifest.workers if workers is None else workers,
        unscaled=manifest.unscaled if workers is None else 0,
        max_hourly_cost=limit,
        cost_alert=manifest.cost_alert if alert is None else alert,
    )
    check_workers(limited)
    return limited


def _store_manifest(
    session: Session,
    manifest: Manifest,
    packer: Packer,
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
) -> Manifest:
    """Store what the manifest names, then the manifest."""
    if initializer is not None:
        _, cargo = packer.function((initializer, initargs), "initializer")
        digest = session.put_content("functions", cargo)
        manifest = replace(manifest, initializer=digest, modules=dict(packer.modules()))
    now = session.store.list(session.prefix, limit=1).now
    deadline = now + manifest.limits.absolute_timeout
    manifest = replace(manifest, created=now, deadline=deadline)
    Session.create(session.store, manifest, session.runtime)
    return manifest


def _wait_for(futures: list[TaskFuture[Any]], timeout: float | None) -> None:
    wait(futures, timeout)

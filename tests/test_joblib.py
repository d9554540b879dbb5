"""The joblib backend behaves as joblib documents, and scikit-learn runs on it unchanged.

scikit-learn is imported by its tests alone: workers import this module too, for the functions in
it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped]
import numpy as np
import pytest
from joblib import Parallel, delayed

from starburst_executor import (
    RemoteTraceback,
    SerializationError,
    StarburstExecutor,
    TaskCrashed,
)
from starburst_executor.joblib_backend import StarburstBackend
from tests.support.servers import S3Server
from tests.support.sessions import QUICK, is_alive, keys, run_python
from tests.support.tasks import Gate, until

Block = Callable[..., Any]


@pytest.fixture
def block(directory_url: str) -> Iterator[Block]:
    """Makes `parallel_config` blocks; their sessions must be gone after the test."""

    def make(n_jobs: int = 2, **options: Any) -> Any:
        options = {"store": directory_url, "intervals": QUICK} | options
        return joblib.parallel_config(backend="starburst", n_jobs=n_jobs, **options)

    def gone() -> bool:
        # An exception holds frames, which hold the block's backend and the exception: a cycle,
        # which a callback may make in its thread long after the block.
        gc.collect()
        return not keys(directory_url, "sessions/")

    yield make
    until(gone, "sessions are gone")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


def square(x: float) -> float:
    return x * x


def executor_of_block() -> StarburstExecutor:
    """The executor behind the block that is open."""
    backend, _ = joblib.parallel.get_active_backend()
    executor: StarburstExecutor = backend._executor
    return executor


# --- being found -----------------------------------------------------------------


def test_one_import_is_what_makes_the_backend_known() -> None:
    script = """
import joblib
try:
    joblib.parallel_config(backend="starburst")
except ValueError as error:
    print("Invalid backend: starburst" in str(error))
import starburst_executor.joblib_backend
print(type(joblib.parallel_config(backend="starburst").parallel_config["backend"]).__name__)
"""
    assert run_python("-c", script).stdout == "True\nStarburstBackend\n"


def test_the_package_itself_does_not_import_joblib() -> None:
    script = "import sys, starburst_executor.executor; print('joblib' in sys.modules)"
    assert run_python("-c", script).stdout == "False\n"


def test_parallel_takes_the_backend_and_its_options_without_a_block(
    directory_url: str,
) -> None:
    parallel = Parallel(n_jobs=2, backend="starburst", store=directory_url, keep=True)
    assert parallel(delayed(square)(i) for i in range(5)) == [0, 1, 4, 9, 16]
    assert parallel(delayed(square)(i) for i in range(3)) == [0, 1, 4]
    del parallel
    manifests = [key for key in keys(directory_url) if key.endswith("session.json")]
    assert len(manifests) == 1


# --- results ---------------------------------------------------------------------


def test_results_come_in_order_and_one_session_serves_all_calls(block: Block) -> None:
    with block():
        assert Parallel()(delayed(square)(i) for i in range(10)) == [i * i for i in range(10)]
        first = executor_of_block().session_id
        assert Parallel()(delayed(lambda x: -x)(i) for i in range(3)) == [0, -1, -2]
        assert Parallel()([]) == []
        assert executor_of_block().session_id == first


def test_a_managed_parallel_can_be_called_again(block: Block) -> None:
    with block(), Parallel(n_jobs=2) as parallel:
        for n in (3, 5):
            assert parallel(delayed(square)(i) for i in range(n)) == [i * i for i in range(n)]


def test_generator_gives_results_in_order_while_later_calls_run(block: Block, gate: Gate) -> None:
    calls = [delayed(square)(3), delayed(gate.hold)("late")]
    with block():
        results = Parallel(return_as="generator")(calls)
        assert next(results) == 9
        assert not gate.is_open()
        gate.open()
        assert list(results) == ["late"]


def test_generator_unordered_gives_what_is_there_first(block: Block, gate: Gate) -> None:
    calls = [delayed(gate.hold)("late"), delayed(square)(3)]
    with block():
        results = Parallel(return_as="generator_unordered")(calls)
        assert next(results) == 9
        gate.open()
        assert list(results) == ["late"]


def test_a_generator_outlives_its_block(block: Block, gate: Gate) -> None:
    with block():
        results = Parallel(return_as="generator")(delayed(gate.hold)(i) for i in range(3))
    gate.open()
    assert list(results) == [0, 1, 2]


def test_pre_dispatch_reads_no_more_calls_than_it_says(block: Block, gate: Gate) -> None:
    read: list[int] = []

    def calls() -> Iterator[Any]:
        for i in range(10):
            read.append(i)
            yield delayed(gate.hold)(i)

    with block():
        parallel = Parallel(return_as="generator", pre_dispatch="1.5*n_jobs")
        results = parallel(calls())
        gate.await_arrivals(2)
        assert read == [0, 1, 2]
        gate.open()
        assert list(results) == list(range(10))


def test_an_array_given_to_many_calls_is_stored_once(block: Block, directory_url: str) -> None:
    array = np.arange(100_000.0)
    with block():
        sums = Parallel(batch_size=1)(delayed(np.sum)(array) for _ in range(12))
        blobs = [key for key in keys(directory_url) if "/blobs/" in key]
    assert sums == [array.sum()] * 12
    assert len(blobs) == 1


# --- batches ---------------------------------------------------------------------


def test_a_batch_of_calls_is_one_task(block: Block) -> None:
    with block():
        Parallel(batch_size=5, pre_dispatch="all")(delayed(square)(i) for i in range(20))
        assert executor_of_block().status().total == 4


def test_batches_of_short_calls_grow(block: Block) -> None:
    with block():
        assert len(Parallel()(delayed(square)(i) for i in range(2_000))) == 2_000
        assert executor_of_block().status().total < 200


def test_workers_do_not_take_the_next_call_for_as_short_as_the_last(
    block: Block, directory_url: str
) -> None:
    """They remember run times by function."""
    with block():
        for _ in range(2):
            Parallel(batch_size=1)(delayed(square)(i) for i in range(4))
        functions = [key for key in keys(directory_url) if "/functions/" in key]
        limits = 1  # the initializer lies there too
        assert len(functions) == 2 + limits


def test_only_the_time_on_the_worker_makes_batches_larger_or_smaller() -> None:
    """A slow store or a worker that takes its time to start says nothing about the calls."""
    backend = StarburstBackend()
    backend.parallel = Parallel()
    backend.batch_completed(1, 0.001)
    assert backend.compute_batch_size() == 1
    for _ in range(3):
        future = _done((0.01, ["result"]))
        assert backend.retrieve_result_callback(future) == ["result"]
    assert backend.compute_batch_size() == 2


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


# --- failures --------------------------------------------------------------------


def test_an_exception_comes_as_itself_and_the_block_goes_on(block: Block) -> None:
    with block():
        with pytest.raises(ZeroDivisionError) as caught:
            Parallel()(delayed(lambda x: 1 / (x - 2))(i) for i in range(100))
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "<lambda>" in str(caught.value.__cause__)
        assert Parallel()(delayed(square)(i) for i in range(3)) == [0, 1, 4]


def test_calls_that_run_when_another_fails_are_stopped(block: Block, gate: Gate) -> None:
    def fail() -> None:
        until(lambda: gate.arrivals())
        raise ValueError("no")

    with block():
        with pytest.raises(ValueError, match="no"):
            Parallel()([delayed(gate.hold)(), delayed(fail)()])
        [held] = gate.await_arrivals()
        status = executor_of_block().status()
        assert (status.failed, status.cancelled) == (1, 1)
        until(lambda: not is_alive(held), "the process that ran it is ended")


def test_a_call_that_takes_too_long_times_out_and_is_stopped(block: Block, gate: Gate) -> None:
    with block():
        with pytest.raises(multiprocessing.TimeoutError):
            Parallel(timeout=0.5)([delayed(gate.hold)(i) for i in range(2)])
        assert executor_of_block().status().cancelled == 2
        assert Parallel(timeout=60)(delayed(square)(i) for i in range(3)) == [0, 1, 4]


def test_a_time_out_ends_an_unordered_generator_too(block: Block, gate: Gate) -> None:
    with block(), pytest.raises(multiprocessing.TimeoutError):
        list(
            Parallel(timeout=0.5, return_as="generator_unordered")(
                [delayed(gate.hold)(i) for i in range(2)]
            )
        )


def test_a_crash_fails_the_call_and_not_the_block(block: Block) -> None:
    with block():
        with pytest.raises(TaskCrashed):
            Parallel()(delayed(os._exit)(3) for _ in range(2))
        assert Parallel()(delayed(square)(i) for i in range(3)) == [0, 1, 4]


def test_what_cannot_be_pickled_is_named(block: Block) -> None:
    with block(), pytest.raises(SerializationError, match="lock"):
        Parallel()(delayed(print)(threading.Lock()) for _ in range(3))


def test_an_iterable_that_raises_in_the_middle_raises_here(block: Block) -> None:
    def calls() -> Iterator[Any]:
        for i in range(20):
            if i == 10:
                raise LookupError("no more input")
            yield delayed(square)(i)

    with block(), pytest.raises(LookupError, match="no more input"):
        Parallel()(calls())


def test_a_session_ended_by_somebody_else_raises_and_does_not_hang(
    block: Block, gate: Gate
) -> None:
    """The next batch is submitted by a callback, which nobody waits for."""
    with block():
        results = Parallel(return_as="generator", pre_dispatch=2)(
            delayed(gate.hold)(i) for i in range(6)
        )
        gate.await_arrivals(2)
        executor = executor_of_block()
        executor._engine.lifecycle.refusal = RuntimeError("ended by a test")
        gate.open()
        with pytest.raises(RuntimeError, match="ended by a test"):
            list(results)
        executor._engine.lifecycle.refusal = None


def test_a_generator_given_up_stops_its_own_calls_and_no_others(
    block: Block, gate: Gate, tmp_path: Path
) -> None:
    other = Gate(tmp_path / "other")
    with block(n_jobs=4):
        calls = [delayed(square)(2), delayed(gate.hold)()]
        given_up = Parallel(return_as="generator")(calls)
        kept = Parallel(return_as="generator")([delayed(other.hold)(i) for i in (7, 8)])
        assert next(given_up) == 4
        with pytest.warns(UserWarning, match="have been cancelled"):
            given_up.close()
        assert executor_of_block().status().cancelled == 1
        other.open()
        assert list(kept) == [7, 8]


SCRIPT = """
import sys
import joblib
from joblib import Parallel, delayed
import starburst_executor.joblib_backend
from pathlib import Path
from tests.support.tasks import Gate

gate = Gate(Path(sys.argv[2]))
with joblib.parallel_config(backend="starburst", n_jobs=2, store=sys.argv[1]):
    print(sum(Parallel()(delayed(lambda x: x * x)(i) for i in range(10))), flush=True)
    if sys.argv[3] == "hold":
        Parallel()(delayed(gate.hold)(i) for i in range(4))
"""


def test_a_script_that_ends_with_its_block_leaves_nothing_behind(
    directory_url: str, gate: Gate
) -> None:
    ended = run_python("-c", SCRIPT, directory_url, gate.folder, "end")
    assert (ended.stdout, ended.stderr) == ("285\n", "")
    assert not keys(directory_url, "sessions/")


def test_an_interrupt_stops_the_calls_and_leaves_nothing_behind(
    directory_url: str, gate: Gate
) -> None:
    command = [sys.executable, "-c", SCRIPT, directory_url, str(gate.folder), "hold"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        held = gate.await_arrivals(2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert not any(is_alive(pid) for pid in held)
    assert not keys(directory_url, "sessions/")


# --- jobs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "n_jobs", "jobs"),
    [
        ({"max_workers": 10}, 4, 4),
        ({"max_workers": 10}, 1, 1),
        ({"max_workers": 10}, -1, 10),
        ({"max_workers": 10}, -3, 8),
        ({"max_workers": 10}, -30, 1),
        ({"max_workers": 10}, None, 10),
        ({"max_workers": 10, "slots": 2}, -1, 20),
        ({}, -1, joblib.cpu_count()),
        ({}, 1000, 1000),
    ],
)
def test_jobs_are_counted_as_joblib_counts_cpus(
    options: dict[str, int], n_jobs: int | None, jobs: int
) -> None:
    assert StarburstBackend(**options).effective_n_jobs(n_jobs) == jobs
    with joblib.parallel_config(backend="starburst", **options):
        assert joblib.effective_n_jobs(n_jobs) == jobs


def test_no_jobs_are_refused(block: Block) -> None:
    with block(), pytest.raises(ValueError, match="n_jobs == 0"):
        Parallel(n_jobs=0)(delayed(square)(i) for i in range(3))


def test_one_job_runs_here_without_a_session(block: Block, directory_url: str) -> None:
    with block(n_jobs=1):
        assert Parallel()([delayed(os.getpid)()]) == [os.getpid()]
    assert not Path(directory_url).exists()


def test_another_number_of_jobs_changes_the_number_of_workers(block: Block) -> None:
    with block(n_jobs=3, slots=2):
        Parallel()([delayed(square)(1)])
        executor = executor_of_block()
        assert executor.status().workers_wanted == 2
        Parallel(n_jobs=2)([delayed(square)(1)])
        assert executor.status().workers_wanted == 1
        assert executor_of_block() is executor


# --- nesting ---------------------------------------------------------------------


def test_parallel_within_a_call_runs_in_threads_and_below_that_in_sequence(
    block: Block,
) -> None:
    def place() -> tuple[str, int]:
        backend, _ = joblib.parallel.get_active_backend()
        return type(backend).__name__, os.getpid()

    def inner() -> list[Any]:
        below = Parallel(n_jobs=2)(delayed(place)() for _ in range(2))
        return [place(), *below]

    def outer() -> list[Any]:
        return [place(), *Parallel(n_jobs=2)(delayed(inner)() for _ in range(2))]

    with block():
        for own, *nested in Parallel()(delayed(outer)() for _ in range(2)):
            assert own[0] == "ThreadingBackend"
            assert own[1] != os.getpid()
            sequential = ("SequentialBackend", own[1])
            assert nested == [[sequential] * 3] * 2


def test_processes_share_the_cpus_of_this_machine(block: Block) -> None:
    with block(n_jobs=2):
        limits = Parallel()([delayed(os.getenv)("OMP_NUM_THREADS")])
    assert limits == [str(max(joblib.cpu_count() // 2, 1))]


def test_threads_of_libraries_can_be_limited_and_the_users_initializer_runs(
    block: Block,
) -> None:
    def initialize(value: str) -> None:
        os.environ["SET_BY_TEST"] = value + os.environ["MKL_NUM_THREADS"]

    options = {"initializer": initialize, "initargs": ("limit ",)}
    with block(inner_max_num_threads=3, **options):
        calls = [delayed(os.getenv)(name) for name in ("OMP_NUM_THREADS", "SET_BY_TEST")]
        assert Parallel()(calls) == ["3", "limit 3"]


def test_numpy_is_not_there_before_the_limits_are(block: Block) -> None:
    """Its BLAS reads them when it is loaded, and never again."""

    def initialize() -> None:
        import sys

        assert "numpy" not in sys.modules

    with block(initializer=initialize):
        assert Parallel()(delayed(np.square)(i) for i in range(3)) == [0, 1, 4]


# --- wrong input -----------------------------------------------------------------


def test_an_option_that_does_not_exist_is_named_at_once(block: Block) -> None:
    with pytest.raises(TypeError, match=r"no argument 'stor'; it has max_workers, .*store"):
        joblib.parallel_config(backend="starburst", stor="s3://bucket")
    with block(), pytest.raises(TypeError, match="no argument 'bogus'"):
        Parallel(bogus=1)([delayed(square)(1)])


def test_an_option_that_comes_too_late_is_refused(block: Block, tmp_path: Path) -> None:
    with block():
        Parallel()([delayed(square)(1)])
        with pytest.raises(
            ValueError, match=r"store given to Parallel, but this block already has session"
        ):
            Parallel(store=str(tmp_path / "other"))([delayed(square)(1)])


def test_a_store_that_cannot_be_used_is_refused_before_any_call(
    block: Block, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with block(store=str(tmp_path / "file")), pytest.raises(Exception, match="file"):
        Parallel()([delayed(square)(1)])


# --- scikit-learn ----------------------------------------------------------------


@pytest.fixture
def iris() -> tuple[Any, Any]:
    from sklearn.datasets import load_iris  # type: ignore[import-untyped]

    features, labels = load_iris(return_X_y=True)
    return np.tile(features, (20, 1)), np.tile(labels, 20)  # so that it travels as a blob


def grid_search() -> Any:
    from sklearn.model_selection import GridSearchCV  # type: ignore[import-untyped]
    from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]
    from sklearn.svm import SVC  # type: ignore[import-untyped]

    estimator = make_pipeline(StandardScaler(), SVC())
    grid = {"svc__C": [0.1, 1, 10], "svc__gamma": [0.01, 0.1]}
    return GridSearchCV(estimator, grid, cv=3)


def assert_grid_search_is_as_without(store: str, iris: tuple[Any, Any]) -> None:
    expected = grid_search().fit(*iris)
    options = {"store": store, "intervals": QUICK}
    with joblib.parallel_config(backend="starburst", n_jobs=2, **options):
        search = grid_search().fit(*iris)
        assert executor_of_block().status().completed > 0
        blobs = [key for key in keys(store, "sessions/") if "/blobs/" in key]
    assert search.best_params_ == expected.best_params_
    scores = search.cv_results_["mean_test_score"]
    assert np.array_equal(scores, expected.cv_results_["mean_test_score"])
    assert len(blobs) == 1  # the features; the labels are small
    until(lambda: not keys(store, "sessions/"), "the session is gone")


def test_grid_search_runs_on_it_unchanged(directory_url: str, iris: tuple[Any, Any]) -> None:
    assert_grid_search_is_as_without(directory_url, iris)


def test_grid_search_runs_over_s3(
    ministack: S3Server, s3_env: Callable[..., None], iris: tuple[Any, Any]
) -> None:
    s3_env(ministack)
    assert_grid_search_is_as_without(ministack.fresh_url(), iris)


def test_cross_val_score_runs_on_it_unchanged(block: Block, iris: tuple[Any, Any]) -> None:
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    expected = cross_val_score(SVC(), *iris, cv=4)
    with block():
        scores = cross_val_score(SVC(), *iris, cv=4)
        assert executor_of_block().status().completed > 0
    assert np.array_equal(scores, expected)


def test_an_estimator_with_a_bug_raises_its_own_error(block: Block, iris: tuple[Any, Any]) -> None:
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    with block(), pytest.raises(ValueError, match="'no such kernel'"):
        cross_val_score(SVC(kernel="no such kernel"), *iris, error_score="raise")

"""How an executor ends: shut down, left, detached, forked, or with its interpreter."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

from starburst_executor import (
    SerializationError,
    SessionDetached,
    SessionNotFound,
    StarburstExecutor,
)
from starburst_executor.launchers.local import LocalLauncher
from tests.support.sessions import Make, is_alive, keys, live_workers, run_python, worker_pids
from tests.support.tasks import (
    ExitsWhenUnpickled,
    Gate,
    double,
    odd_fails,
    returns_what_exits,
    until,
)

# Before any test, so that their processes are not taken for what a test left.
pytestmark = pytest.mark.usefixtures("threads", "processes", "warm")


# --- shutdown ----------------------------------------------------------------------


def test_shutdown_waits_and_refuses_more(fresh: Callable[[], Executor]) -> None:
    executor = fresh()
    futures = [executor.submit(double, i) for i in range(10)]
    executor.shutdown()
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(double, 1)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(double, [1])
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)


def test_shutdown_without_waiting_lets_tasks_finish(
    fresh: Callable[[], Executor], gate: Gate
) -> None:
    executor = fresh()
    futures = [executor.submit(gate.hold, i) for i in range(5)]
    executor.shutdown(wait=False)
    assert not any(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(double, 1)
    gate.open()
    assert [future.result() for future in futures] == list(range(5))
    executor.shutdown(wait=True)


def test_shutdown_can_cancel_what_has_not_begun(fresh: Callable[[], Executor], gate: Gate) -> None:
    executor = fresh()
    futures = [executor.submit(gate.hold, i) for i in range(12)]
    gate.await_arrivals(2)
    executor.shutdown(wait=False, cancel_futures=True)
    until(lambda: futures[-1].cancelled(), "the last one cancelled")
    gate.open()
    executor.shutdown(wait=True)
    done = [future.result() for future in futures if not future.cancelled()]
    assert 2 <= len(done) < 12
    assert all(future.done() for future in futures)


def test_leaving_the_with_block_waits(fresh: Callable[[], Executor], gate: Gate) -> None:
    opening = threading.Timer(0.2, gate.open)
    with fresh() as executor:
        future = executor.submit(gate.hold, 7)
        opening.start()
    opening.join()
    assert future.done()
    assert future.result() == 7


def test_shutdown_from_a_callback_does_not_hang(make: Make, gate: Gate) -> None:
    executor = make(1)
    ended = threading.Event()
    future = executor.submit(gate.hold)
    future.add_done_callback(lambda _: executor.shutdown())
    future.add_done_callback(lambda _: ended.set())
    gate.open()
    assert ended.wait(60)
    executor.shutdown()


def _open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_after_shutdown_nothing_is_left(make: Make, directory_url: str, gate: Gate) -> None:
    before = set(threading.enumerate())
    descriptors = _open_files()
    with make() as executor:
        futures = [executor.submit(gate.hold, i) for i in range(2)]
        gate.await_arrivals(2)
        until(lambda: len(worker_pids(executor)) == 2, "both heartbeats")
        pids = worker_pids(executor).values()
        gate.open()
    assert all(future.done() for future in futures)
    assert keys(directory_url) == []
    assert not any(map(is_alive, pids))
    assert live_workers(executor) == set()
    assert not set(threading.enumerate()) - before
    assert _open_files() == descriptors


def test_what_was_kept_can_be_read_after_shutdown(make: Make) -> None:
    with make(keep=True) as executor:
        executor.submit(print, "hello").result()
        executor.submit(odd_fails, 1)
    assert executor.status().completed == 1
    assert [outcome.state for outcome in executor.collect()] == ["completed", "failed"]
    assert "hello" in executor.logs()


def test_what_was_removed_cannot_be_read_after_shutdown(make: Make) -> None:
    with make() as executor:
        future = executor.submit(double, 1)
    assert future.result() == 2
    for read in (executor.status, executor.collect):
        with pytest.raises(SessionNotFound, match=executor.session_id):
            read()


def test_an_executor_that_is_never_used_starts_no_worker(make: Make, directory_url: str) -> None:
    with make() as executor:
        assert executor.futures == []
        assert executor.status().total == 0
        assert live_workers(executor) == set()
    assert keys(directory_url) == []


def test_two_executors_at_once_do_not_disturb_each_other(make: Make) -> None:
    with make(1) as one, make(1) as other:
        firsts = [one.submit(double, i) for i in range(20)]
        seconds = [other.submit(double, -i) for i in range(20)]
        assert [f.result() for f in firsts] == [2 * i for i in range(20)]
        assert [f.result() for f in seconds] == [-2 * i for i in range(20)]
        assert one.session_id != other.session_id


def test_max_workers_can_be_read_as_on_the_pools(make: Make) -> None:
    executor = make(3)
    assert executor._max_workers == 3
    executor.scale(5)
    assert executor._max_workers == 5
    assert executor.status().workers_wanted == 5
    executor.shutdown()


# --- leaving early -----------------------------------------------------------------


def test_an_exception_leaves_the_block_when_tasks_are_done_and_keeps_the_session(
    make: Make, directory_url: str, gate: Gate
) -> None:
    executor = make()
    future = executor.submit(gate.hold, 5)
    gate.await_arrivals()
    gate.open()
    with pytest.raises(LookupError, match="mine") as caught, executor:
        raise LookupError("mine")
    assert future.done()
    assert future.result() == 5
    [note] = caught.value.__notes__
    assert executor.session_id in note
    assert directory_url in note
    assert "cleanup" in note
    assert "attach" in note
    assert executor.collect()[0].value == 5
    assert live_workers(executor) == set()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_block_and_stops_the_workers_at_once(
    make: Make,
    gate: Gate,
    kind: type[BaseException],
    caplog: pytest.LogCaptureFixture,
) -> None:
    executor = make()
    futures = [executor.submit(gate.hold, i) for i in range(5)]
    gate.await_arrivals(2)
    with pytest.raises(kind) as caught, executor:
        raise kind
    assert live_workers(executor) == set()
    assert executor.session_id in caught.value.__notes__[0]
    assert f"cleanup --force {executor.session_id}" in caplog.text
    for future in futures:
        assert isinstance(future.exception(timeout=1), SessionDetached)
    status = executor.status()
    assert (status.pending, status.running, status.workers) == (5, 0, 0)


def test_an_interrupt_while_the_block_waits_stops_the_workers_at_once(
    tmp_path: Path, directory_url: str, gate: Gate
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path
            from starburst_executor import StarburstExecutor

            def wait_for_ever(folder):
                import threading
                Path(folder).mkdir()
                threading.Event().wait()

            with StarburstExecutor(1, store=sys.argv[1]) as ex:
                ex.submit(wait_for_ever, sys.argv[2])
                print(ex.session_id, flush=True)
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script), directory_url, str(gate.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    session_id = process.stdout.readline().strip()
    until(gate.folder.exists, "the task running")
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in printed
    assert f"cleanup --force {session_id}" in printed
    assert LocalLauncher().live(f"{directory_url}/sessions/{session_id}") == set()
    executor = StarburstExecutor.attach(session_id, store=directory_url)
    executor.cleanup(force=True)
    assert keys(directory_url) == []


def test_detach_makes_leaving_the_block_immediate(make: Make, gate: Gate) -> None:
    with make() as executor:
        done = executor.submit(double, 2)
        assert done.result() == 4
        futures = [executor.submit(gate.hold, i) for i in range(3)]
        session_id = executor.detach()
        assert session_id == executor.session_id == executor.detach()
    assert done.result() == 4
    for future in futures:
        with pytest.raises(SessionDetached, match=session_id):
            future.result(timeout=0)
    with pytest.raises(SessionDetached, match=session_id):
        executor.submit(double, 1)
    executor.shutdown()
    assert live_workers(executor)
    assert executor.status().total == 4
    gate.open()
    until(lambda: executor.status().completed == 4, "the workers carry on")


def test_a_callback_may_submit_while_the_executor_is_detached(make: Make, gate: Gate) -> None:
    executor = make()
    tried = threading.Event()

    def again(_: object) -> None:
        with contextlib.suppress(SessionDetached):
            executor.submit(double, 1)
        tried.set()

    for i in range(20):
        executor.submit(double, i).add_done_callback(again)
    assert executor.detach()
    assert tried.wait(60)


# --- processes and interpreters ----------------------------------------------------


def test_a_forked_child_is_refused_and_its_end_does_nothing(make: Make, tmp_path: Path) -> None:
    said = tmp_path / "said"
    with make() as executor:
        assert executor.submit(double, 1).result() == 2
        pid = _forked(executor, said)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert said.read_text().splitlines() == ["RuntimeError"] * 7
        assert executor.submit(double, 2).result() == 4


def _forked(executor: StarburstExecutor, said: Path) -> int:
    """A forked child in which each method is tried, and whose leaving must do nothing."""
    with _no_fork_warning(), executor._engine.lifecycle.admission:  # as another thread may hold it
        pid = os.fork()
    if pid:
        return pid
    try:
        lines = []
        calls: list[Callable[[], object]] = [
            lambda: executor.submit(double, 1),
            lambda: executor.map(double, [1]),
            executor.flush,
            executor.status,
            executor.detach,
            executor.cleanup,
            lambda: executor.futures,
        ]
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                lines.append(type(error).__name__ if "fork" in str(error) else str(error))
        said.write_text("\n".join(lines))
        executor.shutdown()
        executor.__exit__(None, None, None)
        executor._ending.leave_at_exit()
        os._exit(0)
    finally:
        os._exit(1)


@contextlib.contextmanager
def _no_fork_warning() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on
        yield


def _script(tmp_path: Path, text: str) -> Path:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(text))
    return script


def test_a_script_without_main_guard_runs_once(tmp_path: Path, directory_url: str) -> None:
    script = _script(
        tmp_path,
        """
        import sys
        from dataclasses import dataclass
        from starburst_executor import StarburstExecutor

        print("script")

        @dataclass
        class Point:
            x: int

        def move(point, by=OFFSET if "OFFSET" in globals() else 1):
            return Point(point.x + by)

        with StarburstExecutor(2, store=sys.argv[1]) as ex:
            points = list(ex.map(move, [Point(1), Point(2)]))
            assert points == [Point(2), Point(3)], points
            assert isinstance(points[0], Point)
        print("done")
        """,
    )
    ran = run_python(script, directory_url)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("script\ndone\n", "", 0)
    assert keys(directory_url) == []


def test_an_exit_while_a_result_unpickles_fails_its_future_alone(
    warm: StarburstExecutor,
) -> None:
    failing = warm.submit(returns_what_exits)
    with pytest.raises(SerializationError, match="SystemExit: while unpickling"):
        failing.result(60)
    with pytest.raises(SerializationError, match="SystemExit: while unpickling"):
        warm.submit(double, ExitsWhenUnpickled()).result(60)

    assert warm.submit(double, 21).result(60) == 42


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_callback_that_ends_its_thread_harms_no_other_future(
    warm: StarburstExecutor, end: type[BaseException], tmp_path: Path
) -> None:
    def ends(_: Future[Any]) -> None:
        raise end

    called: list[object] = []
    gate = Gate(tmp_path / "gate")
    future = warm.submit(gate.hold, 1)
    future.add_done_callback(ends)
    future.add_done_callback(called.append)
    gate.open()
    future.result(60)

    assert warm.submit(double, 21).result(60) == 42
    assert called == [future]


def test_local_modules_travel_with_the_session(tmp_path: Path, directory_url: str) -> None:
    code = tmp_path / "code"
    (code / "shapes").mkdir(parents=True)
    (code / "shapes" / "__init__.py").write_text("from shapes.circle import area\n")
    (code / "shapes" / "circle.py").write_text(
        "import lengths\ndef area(r):\n    return 3 * lengths.square(r)\n"
    )
    (code / "lengths.py").write_text("def square(x):\n    return x * x\n")
    script = _script(
        code,
        """
        import os, sys
        import shapes
        from starburst_executor import StarburstExecutor
        os.chdir("/")
        sys.path[0] = "/nowhere"
        with StarburstExecutor(1, store=sys.argv[1]) as ex:
            print(ex.submit(shapes.area, 2).result())
            def origin():
                return sys.modules["shapes"].__spec__.origin if "shapes" in sys.modules else ""
            where = ex.submit(origin).result()
            assert not where.startswith(sys.argv[2]), where
        """,
    )
    ran = run_python("-P", script, directory_url, code, PYTHONPATH=str(code))
    assert ran.stdout == "12\n", ran.stderr


def test_an_interpreter_that_ends_with_all_done_leaves_nothing(
    tmp_path: Path, directory_url: str
) -> None:
    script = _script(
        tmp_path,
        """
        import sys
        from starburst_executor import StarburstExecutor
        ex = StarburstExecutor(2, store=sys.argv[1])
        unused = StarburstExecutor(2, store=sys.argv[1])
        print(ex.submit(pow, 2, 5).result())
        """,
    )
    ran = run_python(script, directory_url)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("32\n", "", 0)
    assert keys(directory_url) == []


def test_a_shutdown_that_comes_while_the_interpreter_ends_is_done_by_its_end(
    tmp_path: Path, directory_url: str
) -> None:
    """As when joblib lets go of its backend last: Python 3.12 starts no threads then."""
    script = _script(
        tmp_path,
        """
        import sys, threading
        from starburst_executor import StarburstExecutor
        ex = StarburstExecutor(1, store=sys.argv[1])
        print(ex.submit(pow, 2, 5).result())
        threading._register_atexit(ex.shutdown)  # called before what was registered earlier
        """,
    )
    ran = run_python(script, directory_url)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("32\n", "", 0)
    assert keys(directory_url) == []


def test_an_interpreter_that_ends_early_leaves_the_session_running_and_says_so(
    tmp_path: Path, directory_url: str, gate: Gate
) -> None:
    script = _script(
        tmp_path,
        """
        import sys, os
        from starburst_executor import StarburstExecutor

        def hold(path):
            import os, threading
            while not os.path.exists(path):
                threading.Event().wait(0.01)
            return "held"

        ex = StarburstExecutor(1, store=sys.argv[1])
        futures = [ex.submit(hold, sys.argv[2]) for _ in range(3)]
        print(ex.session_id)
        """,
    )
    opened = gate.folder.with_suffix(".open")
    ran = run_python(script, directory_url, opened)
    session_id = ran.stdout.strip()
    assert ran.returncode == 0
    assert session_id in ran.stderr
    assert "attach" in ran.stderr
    executor = StarburstExecutor.attach(session_id, store=directory_url)
    if sys.version_info[:2] != (3, 12):  # which starts no process while it ends
        assert len(live_workers(executor)) == 1
    gate.open()
    assert [future.result(60) for future in executor.futures] == ["held"] * 3
    executor.cleanup(force=True)
    assert keys(directory_url) == []

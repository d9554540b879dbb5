"""Executors that nobody holds any more: they end as by `shutdown`, or go on and say so."""

from __future__ import annotations

import gc
import logging
import textwrap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from starburst_executor import StarburstExecutor, TaskFuture
from tests.support.sessions import QUICK, is_alive, keys, run_python, worker_pids
from tests.support.tasks import Gate, double, fail_to_start, until


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@pytest.fixture(autouse=True)
def before() -> None:
    """Notes the threads of others, such as of an executor that a whole file of tests shares."""
    _others.clear()
    _others.update(threading.enumerate())


_others: set[threading.Thread] = set()


def _threads() -> set[str]:
    new = set(threading.enumerate()) - _others
    return {t.name for t in new if t.name.startswith("starburst-")}


def _ended(store: str) -> None:
    until(lambda: keys(store, "sessions/") == [], "the session's objects gone")
    until(lambda: _threads() <= {"starburst-dropped"}, "its threads ended")


def test_a_dropped_executor_with_all_done_ends_as_by_shutdown(
    directory_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    executor = StarburstExecutor(1, store=directory_url, intervals=QUICK)
    assert executor.submit(double, 2).result() == 4
    pids = worker_pids(executor).values()
    assert pids
    known = weakref.ref(executor)
    caplog.clear()
    del executor
    _ended(directory_url)
    assert not any(map(is_alive, pids))
    assert known() is None
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_a_dropped_executor_in_a_cycle_is_collected_too(directory_url: str) -> None:
    executor = StarburstExecutor(1, store=directory_url, intervals=QUICK)
    executor.submit(double, 2).result()
    executor.itself = executor  # type: ignore[attr-defined]
    del executor
    gc.collect()
    _ended(directory_url)


def test_a_dropped_executor_that_was_never_used_ends(directory_url: str) -> None:
    StarburstExecutor(1, store=directory_url, intervals=QUICK)
    _ended(directory_url)


def test_a_dropped_executor_with_unfinished_tasks_goes_on_and_says_so_once(
    directory_url: str, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    executor = StarburstExecutor(1, store=directory_url, intervals=QUICK)
    session_id = executor.session_id
    futures = [executor.submit(gate.hold, i) for i in range(3)]
    del executor
    gc.collect()
    until(lambda: session_id in caplog.text, "said")
    gate.open()
    assert [future.result(60) for future in futures] == [0, 1, 2]
    _ended(directory_url)
    said = [r.getMessage() for r in caplog.records if "dropped" in r.getMessage()]
    assert len(said) == 1
    assert "unfinished tasks: 3" in said[0]


def test_futures_of_a_dropped_executor_can_still_be_cancelled(
    directory_url: str, gate: Gate
) -> None:
    futures = _submitted(directory_url, gate)
    gate.await_arrivals()
    assert futures[-1].cancel()
    gate.open()
    assert futures[0].result(60) == 0
    _ended(directory_url)


def _submitted(store: str, gate: Gate) -> list[TaskFuture[Any]]:
    executor = StarburstExecutor(1, store=store, intervals=QUICK)
    return [executor.submit(gate.hold, i) for i in range(12)]


def test_futures_of_a_dropped_executor_learn_that_it_broke(directory_url: str) -> None:
    def submitted() -> TaskFuture[int]:
        executor = StarburstExecutor(
            1, store=directory_url, intervals=QUICK, initializer=fail_to_start
        )
        return executor.submit(double, 1)

    with pytest.raises(Exception, match="no licence here"):
        submitted().result(60)
    until(lambda: _threads() <= {"starburst-dropped"}, "its threads ended")


def test_an_interpreter_that_ends_leaves_a_dropped_executor_running_and_says_so(
    tmp_path: Path, directory_url: str, gate: Gate
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from starburst_executor import StarburstExecutor

            def hold(path):
                import os, threading
                while not os.path.exists(path):
                    threading.Event().wait(0.01)
                return "held"

            def main():
                executor = StarburstExecutor(1, store=sys.argv[1])
                executor.submit(hold, sys.argv[2])
                print(executor.session_id)

            main()
            """
        )
    )
    ran = run_python(script, directory_url, gate.folder.with_suffix(".open"))
    assert ran.returncode == 0
    assert "is left running" in ran.stderr
    gate.open()
    with StarburstExecutor.attach(ran.stdout.strip(), store=directory_url) as executor:
        assert [future.result(60) for future in executor.futures] == ["held"]
    executor.cleanup(force=True)


def test_submitting_after_the_interpreter_ended_raises_what_the_standard_library_does(
    tmp_path: Path, directory_url: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, threading, time
            from concurrent.futures import ThreadPoolExecutor
            from starburst_executor import StarburstExecutor

            def late():
                threading.main_thread().join()
                for executor in (threads, ours, busy):
                    while True:  # until its turn has come
                        try:
                            executor.submit(pow, 2, 2)
                        except RuntimeError as error:
                            print(error, flush=True)
                            break
                        time.sleep(0.01)

            threads = ThreadPoolExecutor(1)
            ours = StarburstExecutor(1, store=sys.argv[1])
            ours.submit(pow, 2, 5).result()
            busy = StarburstExecutor(1, store=sys.argv[1])
            busy.submit(time.sleep, 30)
            threading.Thread(target=late).start()
            """
        )
    )
    ran = run_python(script, directory_url)
    text = "cannot schedule new futures after interpreter shutdown"
    assert ran.stdout.splitlines() == [text] * 3, ran.stderr
    for key in {key.split("/")[1] for key in keys(directory_url, "sessions/")}:
        StarburstExecutor.attach(key, store=directory_url).cleanup(force=True)

"""A heartbeat says that the worker's loop goes on, so none is sent for one that is stuck."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from starburst_executor import StarburstExecutor
from starburst_executor.runtime import SystemRuntime
from starburst_executor.worker import children, pulse
from starburst_executor.worker.pool import ProcessPool, SlotsBroken
from starburst_executor.worker.pulse import Pulse, Watchdog
from tests.support.bench import Bench, same
from tests.support.shop import PATIENCE, Shop
from tests.support.tasks import double, until


class Clock(SystemRuntime):
    """A runtime whose clock a test turns."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


# --- the pulse ----------------------------------------------------------------------


def test_a_loop_that_is_stuck_in_a_call_is_said_to_be_so_until_it_returns() -> None:
    clock = Clock()
    loop = Pulse(clock)
    with loop.during("read session.json"):
        assert not loop.stopped
        clock.now += pulse.PATIENCE + 30
        said: str = loop.stopped
        assert said == "for 150 s, since it began: read session.json"
    assert not loop.stopped


def test_a_loop_that_waits_goes_on() -> None:
    clock = Clock()
    loop = Pulse(clock)
    loop.beat(3600)
    clock.now += 3600
    assert not loop.stopped
    clock.now += pulse.PATIENCE
    assert loop.stopped


def test_no_heartbeat_is_sent_while_the_loop_hangs_and_the_task_is_run_once_it_goes_on(
    lone: StarburstExecutor,
    shop: Shop,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(pulse, "PATIENCE", 0.2)
    entered, go_on = threading.Event(), threading.Event()
    beats: list[int] = []

    def refused() -> int:
        return sum("no heartbeat" in record.message for record in caplog.records)

    def hang(operation: str, key: str) -> None:
        if operation == "put" and "/workers/" in key:
            beats.append(refused())
        if operation == "list" and "queue" in key:
            entered.set()
            assert go_on.wait(PATIENCE)

    shop.store.fault = hang
    future = lone.submit(double, 2)
    monkeypatch.setattr(shop.worker.heartbeats, "_holding", lambda: True)
    with caplog.at_level(logging.ERROR):
        shop.open()
        assert entered.wait(PATIENCE)
        until(lambda: refused() >= 3, "heartbeats were not sent")
        assert max(beats) == 0  # none after the first that was not
        go_on.set()
        assert future.result(PATIENCE) == 4
    until(lambda: max(beats) > 0, "heartbeats are sent again")


# --- the watchdog -------------------------------------------------------------------


def test_a_process_whose_loop_never_goes_on_is_too_late_after_some_looks_of_its_own() -> None:
    clock = Clock()
    loop = Pulse(clock)
    watchdog = Watchdog(loop, clock, stuck=30)
    clock.now += 36_000  # the whole process was stopped
    assert not watchdog.is_too_late()
    loop.beat()
    assert not watchdog.is_too_late()
    clock.now += 36_000
    assert [watchdog.is_too_late() for _ in range(3)] == [False, False, True]


def test_the_watchdog_ends_a_process_that_would_not_end_by_itself() -> None:
    program = """
import threading
from starburst_executor.runtime import SystemRuntime
from starburst_executor.worker import pulse
pulse.PATIENCE, pulse._LOOK = 0.0, 0.01
runtime = SystemRuntime()
loop = pulse.Pulse(runtime)
dog = pulse.Watchdog(loop, runtime, stuck=0.03)
threading.Thread(target=dog.run, daemon=True).start()
with loop.during("read session.json"):
    threading.Event().wait()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.returncode == 70
    assert "has not gone on" in ended.stderr
    assert "read session.json" in ended.stderr


# --- children -----------------------------------------------------------------------


def test_children_that_never_get_ready_break_the_pool(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "hangs"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(children, "READY", 0.05)
    pool = bench.open()
    assert isinstance(pool, ProcessPool)
    bench.start(same, 1)
    pool._thread.join(PATIENCE)
    with pytest.raises(SlotsBroken, match="not ready after"):
        pool.take()

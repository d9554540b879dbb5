"""A worker that is told to end while its main thread holds any lock."""

from __future__ import annotations

import contextlib
from pathlib import Path

from starburst_executor import SessionNotFound, StarburstExecutor
from tests.support.sessions import QUICK, live_workers, run_python
from tests.support.tasks import double, until

TOLD_WITH_A_LOCK_HELD = """
import os, signal, sys, threading
from starburst_executor.runtime import SystemRuntime
from starburst_executor.worker.process import serve

class Told(threading.Event):
    def wait(self, timeout=None):
        if threading.current_thread() is threading.main_thread():
            with self._cond:  # the lock that `set` takes
                os.kill(os.getpid(), getattr(signal, sys.argv[2]))
                sum(range(1000))  # what handler there is runs here
        return super().wait(timeout)

SystemRuntime.signal = lambda self: Told()
print(serve(sys.argv[1]))
"""


def test_a_worker_leaves_though_the_signal_met_it_with_a_lock_held(
    directory_url: str, tmp_path: Path
) -> None:
    script = tmp_path / "told.py"
    script.write_text(TOLD_WITH_A_LOCK_HELD)
    one = StarburstExecutor(1, store=directory_url, intervals=QUICK, idle_timeout=0.2)
    try:
        assert one.submit(double, 1).result(60) == 2
        until(lambda: not live_workers(one), "its own worker has left")
        url = one._engine.session.url
        for name in ("SIGTERM", "SIGINT"):
            run = run_python(script, url, name)
            assert run.stdout == f"it got {name}\n", run.stderr
    finally:
        with contextlib.suppress(SessionNotFound):
            one.cleanup(force=True)

"""The rows of the table, each a measuring function."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.places import S3Place, directory, s3
from starburst_executor import Intervals, StarburstExecutor

__all__ = ["ROWS", "Result", "Row"]


@dataclass
class Result:
    """One line of the table."""

    what: str
    required: str
    reached: str
    good: bool
    detail: str = ""


class Row(NamedTuple):
    """A measurement."""

    name: str
    run: Callable[[], Iterator[Result]]


def same(value: Any) -> Any:
    return value


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def warm(ex: StarburstExecutor, workers: int, seconds: float = 1.0) -> None:
    """Run tasks until this many workers are up."""
    while True:
        wait([ex.submit(nap, seconds) for _ in range(workers)])
        if ex.status().workers >= workers:
            return


def _per_task(place: S3Place, tasks: int) -> tuple[float, str]:
    counts = place.requests()
    total = counts.total()
    wire = place.on_the_wire()
    detail = " ".join(f"{name} {number}" for name, number in sorted(counts.items()))
    return total / tasks, f"{total} requests ({detail}); on the wire {wire}"


def requests_of_tiny_tasks() -> Iterator[Result]:
    tasks = 10_000
    with s3(20) as place:
        place.begin()
        began = time.perf_counter()
        with StarburstExecutor(4, store=place.url) as ex:
            assert sum(ex.map(same, range(tasks))) == sum(range(tasks))
        seconds = time.perf_counter() - began
        reached, detail = _per_task(place, tasks)
    yield Result(
        "S3 requests per task: 10,000 no-op tasks by map, 4 workers",
        "at most 0.2",
        f"{reached:.3f}",
        reached <= 0.2,
        f"{seconds:.1f} s; {detail}",
    )


_LONG = """
import sys, time
from concurrent.futures import wait
from starburst_executor import StarburstExecutor
with StarburstExecutor(8, store=sys.argv[1]) as ex:
    wait([ex.submit(time.sleep, 5) for _ in range(40)])
"""


def requests_of_long_tasks() -> Iterator[Result]:
    tasks = 40
    with s3(20) as place:
        place.begin()
        # A separate script, so that no module of this benchmark is shipped.
        subprocess.run([sys.executable, "-P", "-c", _LONG, place.url], check=True)
        reached, detail = _per_task(place, tasks)
    yield Result(
        "S3 requests per task: 40 tasks of 5 s, submitted singly, 8 workers",
        "at most 10",
        f"{reached:.1f}",
        reached <= 10,
        detail,
    )


def requests_when_idle() -> Iterator[Result]:
    minutes = 3
    with s3(20) as place:
        ex = StarburstExecutor(1, store=place.url, idle_timeout=3600)
        ex.submit(same, 1).result()
        time.sleep(75)  # until its back-off has settled
        place.begin()
        time.sleep(60 * minutes)
        assert place.proxy is not None
        idle = place.proxy.counts()
        yield Result(
            "requests per minute: an idle worker, settled",
            "at most 6",
            f"{idle['requests'] / minutes:.1f}",
            idle["requests"] <= 6 * minutes,
            str(idle),
        )
        future = ex.submit(nap, 60 * minutes + 100)
        time.sleep(60)
        place.begin()
        time.sleep(60 * minutes)
        counts = place.requests()  # this process's only: the worker still runs
        yield Result(
            "requests per minute: a client waiting for one long task",
            "at most 20",
            f"{counts.total() / minutes:.1f}",
            counts.total() <= 20 * minutes,
            str(dict(counts)),
        )
        ex.cancel(future)
        ex.shutdown()


def submitting() -> Iterator[Result]:
    tasks = 100_000
    with directory() as store:
        # Without workers competing for the machine, this measures the client.
        ex = StarburstExecutor(4, store=store)
        ex._engine.autoscaler.close()
        began = time.perf_counter()
        results = ex.map(same, range(tasks))
        ex.flush()
        seconds = time.perf_counter() - began
        del results
        ex.cleanup(force=True)
    rate = tasks / seconds
    yield Result(
        "submitting 100,000 tasks by map, until all are stored, directory store",
        "at least 20,000 tasks/s",
        f"{rate:,.0f} tasks/s",
        rate >= 20_000,
        f"{seconds:.2f} s",
    )


def efficiency() -> Iterator[Result]:
    workers = 16
    for tasks, seconds, required in ((320, 1.0, 0.92), (1600, 0.1, 0.80)):
        with s3(20) as place, StarburstExecutor(workers, store=place.url) as ex:
            warm(ex, workers)
            place.begin()
            began = time.perf_counter()
            for _ in ex.map(nap, [seconds] * tasks):
                pass
            took = time.perf_counter() - began
            wire = place.on_the_wire()
        reached = tasks * seconds / workers / took
        yield Result(
            f"parallel efficiency, 16 warm workers, {tasks} tasks of {seconds:g} s, 20 ms a reply",
            f"at least {required:.2f}",
            f"{reached:.3f}",
            reached >= required,
            f"{took:.2f} s; {wire} requests",
        )


def against_process_pool() -> Iterator[Result]:
    tasks = range(10_000)
    began = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        assert sum(pool.map(same, tasks, chunksize=1)) == sum(tasks)
    theirs = time.perf_counter() - began
    with directory() as store:
        began = time.perf_counter()
        with StarburstExecutor(2, store=store) as ex:
            assert sum(ex.map(same, tasks)) == sum(tasks)
        ours = time.perf_counter() - began
    yield Result(
        "10,000 no-op tasks by map, 2 workers, directory store, against ProcessPoolExecutor(2)",
        "at most 3 x",
        f"{ours / theirs:.2f} x",
        ours <= 3 * theirs,
        f"{ours:.2f} s against {theirs:.2f} s, including startup and shutdown",
    )


def latency() -> Iterator[Result]:
    intervals = Intervals(poll_first=0.05, poll_last=30)
    with (
        s3(20) as place,
        StarburstExecutor(1, store=place.url, intervals=intervals) as ex,
    ):
        warm(ex, 1, 0.0)
        times = []
        for _ in range(30):
            began = time.perf_counter()
            ex.submit(same, 1).result()
            times.append(time.perf_counter() - began)
    median = statistics.median(times)
    yield Result(
        "one task on a warm worker, submit to result, 20 ms a reply, median of 30",
        "at most 0.4 s",
        f"{median:.3f} s",
        median <= 0.4,
        f"{min(times):.3f} to {max(times):.3f} s",
    )


def first_result() -> Iterator[Result]:
    times = []
    for _ in range(5):
        with directory() as store:
            began = time.perf_counter()
            with StarburstExecutor(1, store=store) as ex:
                ex.submit(same, 1).result()
                times.append(time.perf_counter() - began)
    median = statistics.median(times)
    yield Result(
        "first result of a fresh executor, directory store, one worker, median of 5",
        "at most 1.5 s",
        f"{median:.2f} s",
        median <= 1.5,
        f"{min(times):.2f} to {max(times):.2f} s",
    )


_ATTACH = """
import resource, sys, time
from starburst_executor import StarburstExecutor
began = time.perf_counter()
ex = StarburstExecutor.attach(sys.argv[1], store=sys.argv[2])
status = ex.status()
seconds = time.perf_counter() - began
assert status.completed == 100_000, status
one = ex.futures[77_777].result()
assert one == 77_777
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
ex.cleanup()
"""


def attaching() -> Iterator[Result]:
    with directory() as store:
        with StarburstExecutor(2, store=store, keep=True) as ex:
            for _ in ex.map(same, range(100_000)):
                pass
        output = subprocess.run(
            [sys.executable, "-c", _ATTACH, ex.session_id, store],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    seconds, mib = map(float, output.split())
    yield Result(
        "attach + status on a finished session of 100,000 tasks",
        "at most 3 s, under 400 MB",
        f"{seconds:.2f} s, {mib:.0f} MB",
        seconds <= 3 and mib < 400,
        "memory with all 100,000 futures created and one result read",
    )


def big_argument() -> Iterator[Result]:
    with directory() as store:
        script = _BIG.format(store=store)
        output = subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True
        ).stdout
    blobs, client, worker = map(float, output.split())
    limit = 3 * 256
    yield Result(
        "one 256 MB numpy argument given to 8 tasks",
        "uploaded once; client and worker under 3 x 256 MB",
        f"{blobs:.0f} blob; client {client:.0f} MB, worker {worker:.0f} MB",
        blobs == 1 and client < limit and worker < limit,
        "peak resident memory; the larger of the worker's poller and child",
    )


_BIG = """
import resource, pathlib
import numpy as np
from starburst_executor import StarburstExecutor
store = {store!r}

def total(array, i):
    import os, resource
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in open(f"/proc/{{os.getppid()}}/status"):
        if line.startswith("VmHWM"):
            parent = int(line.split()[1])
    return float(array[i::1024].sum()), own, parent

array = np.ones(256 * 2**20 // 8)
with StarburstExecutor(2, store=store) as ex:
    results = [f.result() for f in [ex.submit(total, array, i) for i in range(8)]]
    blobs = len(list(pathlib.Path(store, "sessions", ex.session_id, "blobs").iterdir()))
peak = max(max(own, parent) for _, own, parent in results)
print(blobs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, peak / 1024)
"""


def simulated() -> Iterator[Result]:
    from tests.simulation.world import run_scale

    result = run_scale(workers=1000, tasks=100_000, seconds=1.0, seed=0)
    good = (
        result.efficiency >= 0.90
        and result.requests_per_task <= 5
        and result.peak_writes_per_second <= 3500
    )
    yield Result(
        "the protocol under the simulator: 1,000 workers, 100,000 x 1 s",
        "efficiency 0.90, 5 requests per task, 3,500 writes/s",
        f"{result.efficiency:.3f}, {result.requests_per_task:.2f}, {result.peak_writes_per_second}",
        good,
        "writes: the maximum in any second under the session's prefix",
    )


_SYNCED = """
import sys, time
from starburst_executor import StarburstExecutor
wanted = ["numpy==2.4.6", "scipy==1.17.1", "pandas==3.1.1"]
with StarburstExecutor(1, store=sys.argv[1], environment="sync", requirements=wanted) as ex:
    began = time.perf_counter()
    ex.submit(exec, "import numpy, scipy.optimize, pandas").result()
    print(time.perf_counter() - began)
"""


def environments() -> Iterator[Result]:
    """First: nothing is cached. Second: unpacked. Third: already there."""
    with directory() as store, tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "UV_CACHE_DIR": f"{folder}/uv", "PIP_NO_CACHE_DIR": "1"}

        def start(cache: str) -> float:
            env["STARBURST_CACHE"] = f"{folder}/{cache}"
            command = [sys.executable, "-c", _SYNCED, store]
            return float(subprocess.check_output(command, env=env))

        first = start("one")
        while not list(Path(store).glob("environments/*/pack")):
            time.sleep(0.5)
        second, third = start("two"), start("two")
    yield Result(
        "numpy, scipy and pandas for a worker: unpacked, against installed with nothing cached",
        "at least 5 x",
        f"{first / second:.1f} x",
        first / second >= 5,
        f"launch to first task: {first:.1f} s, {second:.1f} s; once there {third:.1f} s",
    )


ROWS = (
    Row("requests-tiny", requests_of_tiny_tasks),
    Row("requests-long", requests_of_long_tasks),
    Row("submitting", submitting),
    Row("efficiency", efficiency),
    Row("process-pool", against_process_pool),
    Row("latency", latency),
    Row("first-result", first_result),
    Row("attaching", attaching),
    Row("big-argument", big_argument),
    Row("requests-idle", requests_when_idle),
    Row("environments", environments),
    Row("simulated", simulated),
)

"""The report of a session: its figures, and the page as a browser shows it."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest
from click.testing import CliRunner

from starburst_executor import SessionNotFound, StarburstExecutor
from starburst_executor.cli.main import main
from starburst_executor.inspection.report import page
from starburst_executor.inspection.report.charts import charts, chosen_tasks
from starburst_executor.inspection.report.page import headline
from starburst_executor.inspection.report.review import (
    Observed,
    Review,
    Run,
    Stay,
    Trace,
    observe,
    review,
)
from starburst_executor.protocol import codec
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.manifest import (
    Heartbeat,
    Intervals,
    Lane,
    Limits,
    Manifest,
    WorkerState,
)
from starburst_executor.protocol.outcome import Failure, Outcome, encode_outcome
from starburst_executor.protocol.records import (
    Interruption,
    PastAttempt,
    Piece,
    Record,
    State,
    Task,
)
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.tasks_object import Queued, encode_tasks
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.url import open_store
from tests.support.browser import dom
from tests.support.sessions import QUICK, worker_pids
from tests.support.tasks import Gate, until

# --- figures -----------------------------------------------------------------------


def manifest(**changes: Any) -> Manifest:
    given: dict[str, Any] = {
        "session_id": "20260131-120000-abcdef", "owner": "ada@host", "python": "3.11",
        "package": "1", "created": 0, "deadline": 9e9, "workers": 1, "spec": WorkerSpec(),
        "limits": Limits(), "intervals": Intervals(), "lanes": (Lane(client="c"),),
    }  # fmt: skip
    return Manifest(**{**given, **changes})


T = 1000.0  # the times below are seconds from here; 0 itself would mean "never"


def attempt(number: int, worker: str, since: float, start: float, end: float, how: str) -> Run:
    return Run(number, worker, T + since, T + start, T + start, T + end, how)


def task(place: int, state: str, stored: float, over: float, *runs: Run) -> Trace:
    return Trace(place, f"0-{place}", state, T + stored, T + over, runs)


def trace(
    place: int,
    start: float,
    end: float,
    *,
    worker: str = "w",
    stored: float = 0,
    how: str = "completed",
) -> Trace:
    run = attempt(1, worker, stored, start, end, how)
    return task(place, how, stored, end, run)


def stay(start: float, end: float, worker: str = "w", slots: int = 1) -> Stay:
    return Stay(
        worker=worker,
        host="h",
        slots=slots,
        started=T + start,
        ended=T + end,
        why="left: idle",
    )


def reviewed(traces: list[Trace], stays: list[Stay], **changes: Any) -> Review:
    return review(
        Observed(
            manifest=manifest(**changes), store="/store", now=T + 1000, traces=traces, stays=stays,
            failures=[], grouped=0, batches=1,
        )
    )  # fmt: skip


def test_every_second_of_a_worker_is_accounted_for_once() -> None:
    traces = [trace(0, 3, 5), trace(1, 6, 10), trace(2, 12, 14, stored=12)]
    work = reviewed(traces, [stay(1, 14)]).work
    assert (work.useful, work.starting, work.handover, work.tail, work.idle) == (
        8,
        2,
        1,
        0,
        2,
    )
    assert work.paid == 13
    assert work.efficiency == 8 / 13


def test_idling_before_the_first_task_and_after_the_last_is_not_judged() -> None:
    busy = [trace(0, 100, 150, stored=100), trace(1, 150, 200, stored=100)]
    found = reviewed(busy, [stay(0, 600)])
    assert found.work.efficiency == 1
    assert found.work.paid == 100
    assert found.seconds == 100
    assert "nothing to do" not in headline(found)[1]


def test_a_worker_free_beside_the_last_task_counts_as_tail() -> None:
    traces = [trace(0, 0, 2, worker="a"), trace(1, 0, 10, worker="b")]
    found = reviewed(traces, [stay(0, 10, "a"), stay(0, 10, "b")], workers=2)
    assert found.work.tail == 8
    assert found.worst is not None
    assert found.worst.name == "tail"
    assert found.speedup == 1.2


def test_waiting_for_workers_that_are_not_there_is_named_though_nobody_paid_for_it() -> None:
    found = reviewed([trace(0, 60, 61)], [stay(59, 61)])
    assert found.work.missing == 59
    assert found.work.paid == 2
    assert "missing workers (59.0 s of slot time)" in headline(found)[1]


def test_all_slots_of_a_worker_are_paid_for() -> None:
    found = reviewed([trace(0, 0, 10), trace(1, 0, 5)], [stay(0, 10, slots=2)])
    assert found.work.paid == 20
    assert found.work.efficiency == 0.75


def test_a_lost_attempt_is_no_useful_work_and_its_task_waits_on() -> None:
    lost = attempt(1, "a", 0, 0.5, 3, "lost")
    again = attempt(2, "b", 3, 8, 10, "completed")
    both = task(0, "completed", 0, 10, lost, again)
    found = reviewed([both], [stay(0, 3, "a"), stay(0, 10, "b")], workers=2)
    assert (found.work.repeated, found.work.useful) == (2.5, 2)
    assert (found.lost, found.retried) == (1, 1)


def test_clocks_that_disagree_make_no_wait_below_nought() -> None:
    found = reviewed([trace(0, 9.5, 12, stored=10)], [stay(9, 12)])
    assert found.waits.most == 0
    assert found.work.useful == 2.5


def test_curves_end_at_what_was_finished() -> None:
    traces = [trace(i, i, i + 1, how="failed" if i % 2 else "completed") for i in range(10)]
    last = reviewed(traces, [stay(0, 10)]).stretches[-1]
    assert (last.finished, last.failed) == (10, 5)
    assert last.busy == pytest.approx(1)


@pytest.mark.parametrize(
    ("traces", "says"),
    [
        ([], "Nothing was submitted to this session."),
        ([task(0, "pending", 0, 1)], "None of 1 task has started."),
        ([trace(0, 0, 10)],
         "1 task took 10.0 s for 10.0 s of work: no faster than running them one after another."),
        ([trace(i, 0, 90, worker=f"{i}") for i in range(4)],
         ("4 tasks took 1 min 30 s for 6 min of work: "
          "4 times as fast as running them one after another.")),
        ([trace(0, 8, 10)],
         "1 task took 10.0 s for 2.0 s of work: slower than running them one after another."),
        ([trace(0, 0, 4), task(1, "pending", 0, 4)],
         ("1 of 2 tasks so far took 4.0 s for 4.0 s of work: "
          "no faster than running them one after another.")),
    ],
)  # fmt: skip
def test_the_headline_says_whether_it_was_worth_it(traces: list[Trace], says: str) -> None:
    workers = sorted({run.worker for one in traces for run in one.runs})
    found = reviewed(traces, [stay(0, max(t.over for t in traces) - T, w) for w in workers])
    assert headline(found)[0] == says


def test_of_many_tasks_those_are_shown_that_were_lost_or_ran_long() -> None:
    traces = [trace(i, 0, 1) for i in range(100)]
    traces[50] = trace(50, 0, 7)
    traces[70] = task(70, "failed", 0, 9, attempt(1, "w", 0, 0.5, 1, "lost"))
    shown = [one.place for one in chosen_tasks(traces)]
    assert len(shown) == 40
    assert {50, 70} <= set(shown)
    assert shown == sorted(shown)


def test_a_worker_of_two_slots_has_a_row_for_each() -> None:
    traces = [trace(0, 0, 5), trace(1, 1, 3), trace(2, 3.5, 6)]
    spec = {c.name: c.spec for c in charts(reviewed(traces, [stay(0, 6, slots=2)]))}["workers"]
    assert [value["lane"] for value in spec["data"]["values"]] == [0, 1, 1]


# --- a session made for the purpose ------------------------------------------------


def big_session(url: str, tasks: int, workers: int) -> Session:
    """Records of a finished session, as workers would have written them."""
    store, runtime = open_store(url), SystemRuntime()
    now = runtime.time()
    session = Session.create(store, manifest(created=now, workers=workers), runtime)
    rng = random.Random(1)
    free = [now + rng.uniform(1, 8) for _ in range(workers)]
    for worker, started in enumerate(free):
        beat = Heartbeat(
            worker=f"w-{worker:04d}",
            host="h",
            state=WorkerState.LEFT,
            started=started,
            ended=now + 600,
        )
        store.put(session.key(f"ended/{beat.worker}"), codec.encode(beat))
    for first in range(0, tasks, 256):
        size = min(256, tasks - first)
        batch = Batch(0, first, size)
        record = Record(tasks=tuple(_big_task(rng, free) for _ in range(size)), nonce="n")
        calls = [Queued("f" * 64, b"arguments")] * size
        session.put_batch(batch, encode_tasks(calls, {}))
        store.put(session.key(batch.record_key), codec.encode(record))
        session.mark(batch, record)
    runtime.close()
    return session


def _big_task(rng: random.Random, free: list[float]) -> Task:
    worker = (
        min(range(len(free)), key=free.__getitem__) if len(free) < 50 else rng.randrange(len(free))
    )
    began, ran = free[worker] + 0.004, rng.lognormvariate(-0.5, 0.8)
    past: tuple[PastAttempt, ...] = ()
    if rng.random() < 0.002:
        past = (
            PastAttempt(
                attempt=1,
                worker=f"w-{worker:04d}",
                claimed=began,
                started=began,
                ended=began + ran,
                how=Interruption.LOST,
            ),
        )
        began += ran
    free[worker] = began + ran
    good = rng.random() > 0.01
    return Task(
        state=State.COMPLETED if good else State.FAILED,
        attempt=1 + len(past),
        worker=f"w-{worker:04d}",
        claimed=began - 0.003,
        started=began,
        ended=began + ran,
        past=past,
        outcome=Piece(inline=b"" if good else _FAILED),
    )


_FAILED = encode_outcome(
    Outcome(
        failure=Failure(
            kind="raised",
            type="ValueError",
            message="<img src=x onerror=alert(1)>",
            traceback='  File "x.py", line 3, in f\nValueError: <img src=x onerror=alert(1)>',
        )
    )
)


@pytest.mark.slow
def test_100_000_tasks_make_a_small_page_that_opens_quickly(tmp_path: Path) -> None:
    session = big_session(str(tmp_path / "store"), 100_000, 200)
    began = time.monotonic()
    found = page.write(session, tmp_path / "report.html")
    assert time.monotonic() - began < 60  # some 5 s on an idle machine
    session.runtime.close()  # type: ignore[attr-defined]
    assert sum(found.counts.values()) == 100_000
    assert (tmp_path / "report.html").stat().st_size < 2_500_000
    for chart in charts(found):
        assert len(msgspec.json.encode(chart.spec)) < 1_500_000, chart.name
        assert len(chart.spec["data"]["values"]) <= 6000, chart.name
    began = time.monotonic()
    shown = dom(tmp_path / "report.html")
    assert time.monotonic() - began < 30  # some 2 s on an idle machine
    assert shown.body["data-drawn"] == "yes"
    assert shown.texts["headline"].startswith("100,000 tasks took")
    assert any("tasks begun: " in label for label in shown.labels), "hovering names tasks"


# --- a real session, with all that can go wrong ------------------------------------


def succeed(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def refuse(number: int) -> None:
    raise ValueError(f"<b>{number}</b> is not welcome")


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def dawdle() -> None:
    time.sleep(60)


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Store and id of a session whose tasks failed, crashed, ran too long and lost a worker."""
    folder = tmp_path_factory.mktemp("eventful")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        executor = StarburstExecutor(
            2,
            store=folder / "store",
            name="<script>alert(1)</script>",
            keep=True,
            intervals=QUICK,
            task_timeout=10,
        )
        gate = Gate(folder / "gate")
        futures = [executor.submit(gate.hold, "victim")]
        task = gate.await_arrivals(1)[0]
        worker = _parent(task)
        assert worker in worker_pids(executor).values()
        os.kill(worker, signal.SIGKILL)
        gate.await_arrivals(2)
        gate.open()
        futures += [executor.submit(refuse, i) for i in range(3)]
        futures += [executor.submit(crash), executor.submit(dawdle)]
        futures += [executor.submit(succeed, 0.01 * i) for i in range(20)]
        wait(futures)
        executor.shutdown()
        yield str(folder / "store"), executor.session_id


def _parent(pid: int) -> int:
    """The worker whose child runs the task: the nearest ancestor that is one."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def written(eventful: tuple[str, str], tmp_path: Path) -> Path:
    """Its report, as the command line writes it."""
    store, session_id = eventful
    target = tmp_path / "report.html"
    done = CliRunner().invoke(main, ["report", session_id, "--store", store, "-o", str(target)])
    assert done.exit_code == 0, done.output
    assert "26 tasks took" in done.output
    assert f"Written to {target}." in done.output
    return target


def test_the_command_line_prints_the_figures_as_json(
    eventful: tuple[str, str], tmp_path: Path
) -> None:
    store, session_id = eventful
    target = tmp_path / "report.html"
    done = CliRunner().invoke(
        main, ["report", session_id, "--store", store, "-o", str(target), "--json"]
    )
    said = json.loads(done.output)
    schema = json.loads((Path(__file__).parents[1] / "cli" / "schemas" / "report.json").read_text())
    jsonschema.validate(said, schema)
    assert said["report"]["counts"] == {"completed": 21, "failed": 5}
    assert said["report"]["lost"] == 1
    assert 0 < said["report"]["efficiency"] < 1
    assert said["report"]["file"] == str(target)
    assert target.exists()


def test_the_page_tells_what_happened(written: Path) -> None:
    shown = dom(written)
    assert shown.body["data-drawn"] == "yes"
    assert "26 tasks took" in shown.texts["headline"]
    assert "efficiency 0." in shown.texts["advice"]
    for name in ("time", "workers", "tasks", "done", "live", "runs", "waits"):
        assert shown.texts[name].strip(), f"the chart {name} is empty"
    failures = shown.texts["failures"]
    assert "ValueError: <b>0</b> is not welcome" in failures
    assert "signal 11" in failures
    assert "timeout" in failures
    assert "attempt" in shown.texts["slowest"]
    assert "lost: its process ended" in shown.texts["stays"]
    assert "writes of workers" in shown.texts["cost"]
    assert "counted by each of them" in shown.texts["cost"]
    assert "estimated" not in shown.texts["cost"]


def test_lost_and_retried_attempts_can_be_seen(written: Path) -> None:
    shown = dom(written)
    lost = [label for label in shown.labels if "ended: lost" in label]
    assert any("task: 0-0" in label and "attempt: 1 of 2" in label for label in lost)
    again = [label for label in shown.labels if "task: 0-0" in label and "attempt: 2 of 2" in label]
    assert any("ended: completed" in label for label in again)


def test_hovering_names_the_task(written: Path) -> None:
    shown = dom(written, script=_HOVER)
    assert "task 0-0" in " ".join(shown.texts["vg-tooltip-element"].split())


_HOVER = """
const mark = document.querySelector('#workers [aria-label*="task: 0-0"]');
for (const kind of ["pointerover", "pointermove", "mouseover", "mousemove"])
  mark.dispatchEvent(new MouseEvent(kind, { bubbles: true, clientX: 300, clientY: 300 }));
"""


def test_the_page_follows_light_and_dark(written: Path) -> None:
    script = "document.body.dataset.paper = getComputedStyle(document.body).backgroundColor"
    papers = {dom(written, dark=dark, script=script).body["data-paper"] for dark in (False, True)}
    assert papers == {"rgb(255, 255, 255)", "rgb(20, 23, 28)"}


def test_the_page_fits_a_narrow_window(written: Path) -> None:
    script = "document.body.dataset.over = document.documentElement.scrollWidth - innerWidth"
    assert int(dom(written, width=500, script=script).body["data-over"] or "1") <= 0


def test_nothing_that_a_task_or_user_wrote_becomes_markup(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text
    assert "</b> is not welcome" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_the_page_needs_nothing_from_elsewhere(written: Path) -> None:
    own = written.read_text(encoding="utf-8").replace(
        page.library().replace("</script", "<\\/script"), ""
    )
    assert "http://" not in own
    assert "https://" not in own
    assert 'src="' not in own
    assert "<link" not in own


def test_a_lost_attempt_was_over_when_its_worker_died_not_when_somebody_noticed(
    directory_url: str,
) -> None:
    store, runtime = open_store(directory_url), SystemRuntime()
    now = runtime.time()
    session = Session.create(store, manifest(created=now), runtime)
    beat = Heartbeat(
        worker="w",
        state=WorkerState.LOST,
        reason="no heartbeat for 61 s",
        started=now,
        written=now + 40,
        ended=now + 40,
    )
    store.put(session.key("ended/w"), codec.encode(beat))
    past = PastAttempt(
        attempt=1,
        worker="w",
        claimed=now + 1,
        started=now + 2,
        ended=now + 120,
        how=Interruption.LOST,
    )
    batch = Batch(0, 0, 1)
    session.put_batch(batch, encode_tasks([Queued("f" * 64, b"")], {}))
    record = Record(tasks=(Task(attempt=1, lost=1, losses=1, past=(past,)),), round=1)
    store.put(session.key(batch.record_key), codec.encode(record))
    seen = observe(session)
    runtime.close()
    assert seen.traces[0].runs[0].ended == now + 60, "the last beat, and the time to the next"
    assert seen.stays[0].ended == now + 60
    assert seen.stays[0].why == "lost: no heartbeat for 61 s"


# --- doors -------------------------------------------------------------------------


def test_an_executor_writes_its_report_while_at_work(directory_url: str, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    with StarburstExecutor(1, store=directory_url, intervals=QUICK) as executor:
        future = executor.submit(gate.hold)
        gate.await_arrivals()
        until(lambda: executor.status().running == 1 or future.running())
        executor.report(tmp_path / "report.html")
        gate.open()
    assert "so far" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_session_without_tasks_has_a_page_without_charts(
    directory_url: str, tmp_path: Path
) -> None:
    with StarburstExecutor(1, store=directory_url) as executor:
        executor.report(tmp_path / "report.html")
    shown = dom(tmp_path / "report.html")
    assert shown.texts["headline"].strip() == "Nothing was submitted to this session."
    assert shown.body["data-drawn"] == "yes"
    assert "svg" not in shown.tags


def test_a_session_that_is_not_there_is_said_so(directory_url: str, tmp_path: Path) -> None:
    runtime = SystemRuntime()
    gone = Session(open_store(directory_url), "gone", runtime)
    with pytest.raises(SessionNotFound, match="there is no session 'gone'"):
        page.write(gone, tmp_path / "report.html")
    done = CliRunner().invoke(main, ["report", "gone", "--store", directory_url])
    assert done.exit_code == 3


def test_without_the_extra_the_message_says_what_to_install(
    eventful: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    page.library.cache_clear()
    store, session_id = eventful
    target = tmp_path / "report.html"
    done = CliRunner().invoke(main, ["report", session_id, "--store", store, "-o", str(target)])
    assert done.exit_code == 1
    assert "pip install 'starburst-executor[report]'" in done.output
    assert not target.exists()


def test_a_page_that_cannot_be_written_is_said_so(eventful: tuple[str, str]) -> None:
    store, session_id = eventful
    done = CliRunner().invoke(
        main, ["report", session_id, "--store", store, "-o", "/nowhere/report.html"]
    )
    assert done.exit_code == 1
    assert "/nowhere/report.html" in done.output

"""What a session has cost so far, and the limits on it.

Reckoned by hand here, counted on the wire, refused in time.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from starburst_executor import StarburstExecutor, list_sessions
from starburst_executor.aws import prices
from starburst_executor.cli.main import main
from starburst_executor.client.codec import python_version
from starburst_executor.coordination.recovery import Recovery
from starburst_executor.costs import estimate
from starburst_executor.costs import prices as table
from starburst_executor.costs.alert import CostAlert
from starburst_executor.costs.bill import CostSummary, CostTracker, WorkerLifetime, summarize
from starburst_executor.costs.limits import affordable_workers, check_workers
from starburst_executor.costs.prices import Prices
from starburst_executor.costs.session_prices import rate_for, rate_of
from starburst_executor.protocol.manifest import Heartbeat, Intervals, Lane, Limits, Manifest
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.session_prices import SessionPrices
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.url import open_store
from tests.support.fakes import MemoryStore
from tests.support.servers import S3Server, latency_proxy
from tests.support.sessions import QUICK, CountingStore, keys, worker_pids
from tests.support.tasks import Gate, until

FARGATE = WorkerSpec(launcher="ecs", cpu=4, memory="8GB")
SPOT = replace(FARGATE, use_spot=True)
RATE = SessionPrices(
    worker_hour=3.6,
    fallback_hour=7.2,
    write=0.01,
    read=0.001,
    market="spot",
    region="r",
    source="a test",
    taken=date(2026, 1, 2),
)


class Clock(SystemRuntime):
    """A runtime whose clocks stand still until they are moved."""

    now = 10_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def manifest(**changes: Any) -> Manifest:
    given: dict[str, Any] = {
        "session_id": "s",
        "python": "3.11",
        "package": "0",
        "created": 10_000.0,
        "deadline": 99_999.0,
        "workers": 3,
        "spec": SPOT,
        "limits": Limits(),
        "intervals": Intervals(),
        "rate": RATE,
    }
    return Manifest(**{**given, **changes})


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    yield clock
    clock.close()


@pytest.fixture
def session(clock: Clock) -> Session:
    store = CountingStore(MemoryStore(clock, resolution=0))
    return Session.create(store, manifest(), clock)


def beat(session: Session, worker: str, lived: float, **changes: Any) -> Heartbeat:
    """A heartbeat by a clock that is an hour fast."""
    now = session.runtime.time() + 3600
    found = Heartbeat(worker=worker, started=now - lived, written=now, **changes)
    session.beat(found)
    return found


def look(session: Session, own: CostTracker | None = None, **changes: Any) -> CostSummary:
    found = (own or CostTracker(session)).look(manifest(**changes), session.beats())
    assert found is not None
    return found


def counted(session: Session, what: str) -> int:
    store = session.store
    assert isinstance(store, CountingStore)
    return store.counts[what]


# --- arithmetic ----------------------------------------------------------------------


def test_a_bill_is_seconds_times_price_by_market_and_requests() -> None:
    lives = [
        WorkerLifetime(3600, 10, 100, "spot"),
        WorkerLifetime(1800, 0, 0, "on-demand", live=True),  # Spot had no capacity
        WorkerLifetime(5, 1, 1),  # billed for a minute
    ]
    found = summarize(manifest(), lives, writes=9, reads=99)
    assert found is not None
    assert found.compute == pytest.approx(3.6 + 3.6 + 0.06)
    assert (found.writes, found.reads) == (20, 200)
    assert found.requests == pytest.approx(0.2 + 0.2)
    assert found.total == found.compute + found.requests
    assert found.hourly == 7.2
    assert found.worker_seconds == 3600 + 1800 + 60
    assert (found.vcpu_seconds, found.gb_seconds) == (4 * 5460, 8 * 5460)
    assert found.prices == "Spot prices of r from a test, 2026-01-02"


def test_workers_of_this_machine_cost_nothing_and_their_requests_do() -> None:
    rate = SessionPrices(write=0.01, read=0.001, source="a test", taken=date(2026, 1, 2))
    local = manifest(spec=WorkerSpec(), rate=rate)
    found = summarize(local, [WorkerLifetime(3600, 10, 100)])
    assert found is not None
    assert (found.compute, found.vcpu_seconds, found.hourly) == (0, 0, 0)
    assert found.total == pytest.approx(0.2)
    assert summarize(manifest(spec=WorkerSpec(), rate=None), [WorkerLifetime(3600)]) is None


def test_an_estimate_and_the_bill_of_just_such_a_run_agree() -> None:
    listed = table.built_in("us-east-1", use_spot=True)
    expected = estimate.estimate_run(
        SPOT, listed, tasks=10, task_seconds=600, workers=10, startup=60
    )
    made = manifest(rate=rate_of(SPOT, listed), workers=10)
    found = summarize(made, [WorkerLifetime(660, live=True)] * 10)
    assert found is not None
    assert found.compute == pytest.approx(expected.cost.compute)
    assert found.hourly == pytest.approx(expected.hourly)
    assert found.vcpu_seconds == expected.cost.vcpu_seconds
    assert found.prices == str(expected.cost.prices)


# --- what heartbeats tell ------------------------------------------------------------


def test_a_live_worker_is_billed_until_now_though_its_clock_is_fast(
    session: Session, clock: Clock
) -> None:
    beat(session, "w-1", 600, writes=5, reads=7)
    clock.now += 15
    found = look(session)
    assert found.worker_seconds == 615
    assert (found.writes, found.reads) == (5, 7)
    assert found.hourly == 3.6


def test_a_worker_that_left_is_billed_to_its_last_word(session: Session, clock: Clock) -> None:
    session.bury(beat(session, "w-1", 600))
    clock.now += 1000
    found = look(session)
    assert (found.worker_seconds, found.hourly, found.workers) == (600, 0, 1)


def test_a_worker_that_is_not_heard_of_is_billed_to_its_last_heartbeat(
    session: Session, clock: Clock
) -> None:
    beat(session, "w-1", 600)
    clock.now += 1000
    assert look(session).worker_seconds == 600


def test_a_lost_workers_seconds_and_requests_stay_on_the_bill(
    session: Session, clock: Clock
) -> None:
    beat(session, "w-1", 600, writes=5, reads=7)
    before = look(session)
    assert Recovery(session, Intervals(), 3).look([], {"w-1"})
    assert not session.beats().entries
    clock.now += 500
    after = look(session)
    assert (after.worker_seconds, after.writes, after.reads) == (600, 5, 7)
    assert after.total == before.total


def test_a_lost_worker_whose_heartbeat_is_damaged_left_when_the_store_heard_of_it_last(
    session: Session, clock: Clock
) -> None:
    session.store.put(session.key("workers/w-1"), b"{")
    heard = clock.now
    clock.now += 30
    Recovery(session, Intervals(), 3).look([], {"w-1"})
    kept = session.heartbeat("w-1", "ended")
    assert kept is not None
    assert (kept.started, kept.written, kept.ended) == (heard, heard, heard)


def test_one_that_was_taken_for_lost_and_lives_is_billed_once(
    session: Session, clock: Clock
) -> None:
    session.bury(beat(session, "w-1", 600))
    clock.now += 20
    beat(session, "w-1", 620)
    found = look(session)
    assert (found.workers, found.worker_seconds) == (1, 620)


def test_a_look_at_a_great_session_reads_some_workers_and_takes_the_rest_to_be_alike(
    session: Session, clock: Clock
) -> None:
    for number in range(300):
        session.bury(beat(session, f"w-{number:03d}", 600, writes=2))
    own = CostTracker(session)
    first = look(session, own)
    assert (first.workers, first.unread) == (300, 300 - 128)
    assert first.worker_seconds == pytest.approx(300 * 600)
    assert first.writes == 600
    assert str(first).startswith("about $")
    look(session, own)
    last = look(session, own)
    assert (last.unread, last.worker_seconds) == (0, 300 * 600)
    read = counted(session, "get ended")
    look(session, own)
    assert counted(session, "get ended") == read == 300


def test_a_live_worker_is_read_again_with_its_next_heartbeat_and_not_at_each_look(
    session: Session, clock: Clock
) -> None:
    own = CostTracker(session)
    for second in range(120):
        if second % 20 == 0:
            beat(session, "w-1", 600 + second, writes=second)
        found = look(session, own)
        assert found.worker_seconds == 600 + second
        clock.now += 1
    assert counted(session, "get workers") == 6
    assert counted(session, "list ended") == 1


def test_one_that_ended_meanwhile_is_read_for_its_last_word(session: Session, clock: Clock) -> None:
    own = CostTracker(session)
    first = beat(session, "w-1", 600, writes=1)
    look(session, own)
    clock.now += 30
    session.bury(replace(first, written=first.written + 25, writes=50))
    found = look(session, own)
    assert (found.worker_seconds, found.writes) == (625, 50)


def test_requests_of_clients_are_those_of_their_lanes_and_ones_own(
    session: Session,
) -> None:
    lanes = (
        Lane(client="gone", taken=False, writes=10, reads=20),
        Lane(client="here"),
        Lane(client="elsewhere"),
    )
    found = look(session, lanes=lanes)
    assert (found.writes, found.reads, found.clients_out) == (10, 20, 2)
    own = look(session, CostTracker(session, client=True), lanes=lanes)
    tally = session.store.tally
    assert (own.writes, own.reads) == (10 + tally.writes, 20 + tally.reads)
    assert own.clients_out == 1


def test_where_nothing_costs_anything_nothing_is_read(session: Session) -> None:
    beat(session, "w-1", 600)
    beats = session.beats()
    before = dict(session.store.counts)  # type: ignore[attr-defined]
    assert CostTracker(session).look(manifest(rate=None), beats) is None
    assert session.store.counts == before  # type: ignore[attr-defined]


# --- prices of a session -------------------------------------------------------------


@pytest.fixture
def ecs_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cluster that is configured and never asked; in the cache, $1 for a worker of 1 vCPU."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in {
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "STARBURST_CLUSTER": "cluster",
        "STARBURST_LAUNCHER": "ecs",
        "STARBURST_STORE": "s3://bucket/prefix",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",  # where nobody answers
        "STARBURST_REGION": "eu-west-1",
        "STARBURST_SUBNETS": "subnet-1",
        "STARBURST_SECURITY_GROUPS": "sg-1",
        "STARBURST_EXECUTION_ROLE_ARN": "arn:aws:iam::1:role/execution",
        "STARBURST_TASK_ROLE_ARN": "arn:aws:iam::1:role/task",
        "STARBURST_LOG_GROUP": "group",
        "STARBURST_ASSIGN_PUBLIC_IP": "false",
    }.items():
        monkeypatch.setenv(name, value)
    kept = {
        f"eu-west-1 fargate X86_64 {market}": Prices(
            region="eu-west-1", use_spot=market == "spot", vcpu_hour=hour, write=0.01, read=0.001,
            source="the AWS Pricing API", taken=datetime.now(UTC).date(),
        )
        for market, hour in (("spot", 0.25), ("on-demand", 1.0))
    }  # fmt: skip
    prices.cache_file().parent.mkdir(parents=True)
    prices.cache_file().write_bytes(msgspec.json.encode(kept))


def test_a_session_on_spot_keeps_the_price_on_demand_for_what_falls_back(
    ecs_settings: None, clock: Clock
) -> None:
    spec = WorkerSpec(launcher="ecs", use_spot=True)
    found = rate_for(spec, "s3://bucket/prefix", SystemRuntime())
    assert found is not None
    assert (found.worker_hour, found.fallback_hour) == (0.25, 1.0)
    assert (found.hour(""), found.hour("spot"), found.hour("on-demand")) == (0.25, 0.25, 1)
    assert str(found).startswith("Spot prices of eu-west-1 from the AWS Pricing API, ")


def test_local_workers_over_s3_pay_for_requests_by_the_table_without_asking(
    clock: Clock,
) -> None:
    found = rate_for(WorkerSpec(), "s3://bucket/prefix", clock)
    assert found is not None
    assert (found.worker_hour, found.write) == (0, 0.000005)
    assert "S3 prices of us-east-1 from the built-in table" in str(found)
    assert rate_for(WorkerSpec(), "/a/directory", clock) is None


# --- limits --------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"max_hourly_cost": 5}, {"by": "setting"}])
def test_a_session_that_would_cost_too_much_an_hour_is_refused_before_anything_is_asked(
    limit: dict[str, Any], ecs_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit.pop("by", None):
        monkeypatch.setenv("STARBURST_MAX_HOURLY_COST", "5")
    with pytest.raises(ValueError, match=r"max_workers=6 would cost \$6 .* use max_workers=5"):
        StarburstExecutor(6, **limit)


@pytest.fixture
def dear(directory_url: str) -> Session:
    """A session with five workers on Spot for $18 an hour, all that it allows; nobody is there."""
    made = manifest(workers=5, max_hourly_cost=18.0, python=python_version())
    return Session.create(open_store(directory_url), made, SystemRuntime())


def test_a_session_cannot_be_scaled_beyond_its_limit(dear: Session) -> None:
    url = dear.store.url
    executor = StarburstExecutor.attach("s", store=url, launcher="local")
    with pytest.raises(ValueError, match="use max_workers=5"):
        executor.scale(6)
    run = CliRunner().invoke(main, ["scale", "s", "6", "--store", url])
    assert run.exit_code == 2
    assert "max_hourly_cost=18" in run.output
    assert dear.load().workers == 5
    executor.scale(4)
    assert dear.load().workers == 4
    executor.detach()


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        ({"max_workers": 6}, 5),
        ({"max_hourly_cost": 11}, 3),
        ({"max_hourly_cost": 3}, 0),
    ],
)
def test_attaching_is_refused_where_it_would_cost_too_much_and_changes_nothing(
    asked: dict[str, Any], allowed: int, dear: Session
) -> None:
    before = dear.load()
    right = f"use max_workers={allowed}" if allowed else "; try smaller workers"
    with pytest.raises(ValueError, match=right):
        StarburstExecutor.attach("s", store=dear.store.url, launcher="local", **asked)
    assert dear.load() == before


def test_whoever_attaches_may_set_other_limits(dear: Session) -> None:
    executor = StarburstExecutor.attach(
        "s",
        store=dear.store.url,
        launcher="local",
        max_workers=6,
        max_hourly_cost=22,
        cost_alert=7,
    )
    status = executor.status()
    assert status.cost is not None
    assert status.workers_wanted == 6
    assert (status.cost.max_hourly_cost, status.cost.cost_alert) == (22, 7)
    executor.detach()


def test_a_session_whose_price_is_not_known_is_refused_where_a_limit_is_to_be_kept() -> None:
    unknown = manifest(rate=None, max_hourly_cost=5.0)
    with pytest.raises(ValueError, match="pricing:GetProducts"):
        check_workers(unknown)
    check_workers(replace(unknown, max_hourly_cost=None))
    check_workers(replace(unknown, spec=WorkerSpec()))


def test_no_more_workers_are_launched_than_the_limit_allows() -> None:
    wanted = manifest(workers=10, max_hourly_cost=11.0)
    assert affordable_workers(wanted) == 3
    assert affordable_workers(replace(wanted, workers=2)) == 2
    assert affordable_workers(replace(wanted, max_hourly_cost=None)) == 10


@pytest.mark.parametrize("name", ["max_hourly_cost", "cost_alert"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("5", TypeError),
        (True, TypeError),
        (0, ValueError),
        (-1, ValueError),
        (float("nan"), ValueError),
    ],
)
def test_what_is_no_amount_of_dollars_is_refused(
    name: str, value: Any, error: type[Exception], directory_url: str
) -> None:
    with pytest.raises(error, match=rf"{name} must be a .*number of US dollars"):
        StarburstExecutor(1, store=directory_url, **{name: value})
    assert keys(directory_url) == []


# --- the alarm -----------------------------------------------------------------------


def test_the_alarm_rings_once_and_says_how_dear_it_has_become(
    session: Session, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    alarm = CostAlert(session)
    alerted = manifest(cost_alert=1.0)
    beat(session, "w-1", 600)
    for _ in range(1200):
        clock.now += 1
        if clock.now % 20 == 0:
            beat(session, "w-1", 600 + clock.now - 10_000)
        alarm.look(alerted)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1
    assert "session s has cost $1.05, now $3.60 an hour: more than" in said[0]
    assert "its cost_alert of $1.00" in said[0]
    assert counted(session, "get workers") <= 1 + 1200 / 60


def test_without_an_alert_the_alarm_reads_nothing(session: Session) -> None:
    before = dict(session.store.counts)  # type: ignore[attr-defined]
    CostAlert(session).look(manifest())
    assert session.store.counts == before  # type: ignore[attr-defined]


# --- whole sessions, on S3 -----------------------------------------------------------


def square(x: int) -> int:
    return x * x


def test_what_is_counted_is_what_the_wire_saw(
    ministack: S3Server, s3_env: Callable[..., None]
) -> None:
    url = ministack.fresh_url()
    with latency_proxy(ministack, 0) as proxy:
        s3_env(ministack, proxy.endpoint)
        with StarburstExecutor(2, store=url, keep=True, intervals=QUICK) as executor:
            list(executor.map(square, range(200)))
        wire = proxy.counts()
    s3_env(ministack)
    status = StarburstExecutor.attach(executor.session_id, store=url)
    found = status.status().cost
    status.cleanup(force=True)
    assert found is not None
    writes = wire["PUT"] + wire["LIST"] + wire.get("POST", 0)
    # Not in it: each worker's last word and the client's giving back its lane, and what is asked
    # after that; and this attached client's own look is.
    assert found.writes == pytest.approx(writes, abs=12)
    assert found.reads == pytest.approx(wire["GET"], abs=12)
    assert found.writes > 30
    assert found.compute == 0
    assert found.total == pytest.approx(found.writes * 5e-6 + found.reads * 4e-7)


def test_a_killed_workers_requests_are_on_the_bill_and_the_alert_is_seen_by_all(
    ministack: S3Server,
    s3_env: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    s3_env(ministack)
    url = ministack.fresh_url()
    gate = Gate(tmp_path / "gate")
    executor = StarburstExecutor(1, store=url, intervals=QUICK, cost_alert=0.00001)
    futures = [executor.submit(gate.hold, n) for n in range(2)]
    gate.await_arrivals(1)
    [(worker, pid)] = worker_pids(executor).items()
    until(lambda: _writes(executor, worker) > 1, "it said what it asked for")
    os.kill(pid, signal.SIGKILL)
    gate.await_arrivals(2)
    gate.open()
    wait(futures)
    status = executor.status()
    assert status.cost is not None
    assert (status.cost.workers, status.cost.alert) == (2, True)
    assert "Alert:     at $0.00001, passed" in str(status)
    session_id = executor.detach()
    [one] = list_sessions(url)
    assert one.alert is not None
    assert "cost_alert" in one.alert
    listed = CliRunner().invoke(main, ["list", "--store", url])
    assert one.alert[:40] in listed.stderr
    said = CliRunner().invoke(main, ["status", session_id, "--json", "--store", url])
    shown = json.loads(said.output)["status"]["cost"]
    assert (shown["alert"], shown["workers"]) == (True, 2)
    caplog.clear()
    again = StarburstExecutor.attach(session_id, store=url)
    assert "more than its cost_alert" in caplog.text
    again.cleanup(force=True)


def _writes(executor: StarburstExecutor, worker: str) -> int:
    found = executor._engine.session.heartbeat(worker)
    return found.writes if found else 0


def test_a_session_of_which_nothing_costs_anything_shows_no_cost(
    directory_url: str,
) -> None:
    with StarburstExecutor(1, store=directory_url, intervals=QUICK) as executor:
        executor.submit(abs, -1).result()
        status = executor.status()
    assert status.cost is None
    assert "Cost" not in str(status)

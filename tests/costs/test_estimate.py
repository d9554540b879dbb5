"""Arithmetic of cost: worked by hand here, for a mistake in it is believed."""

from __future__ import annotations

import dataclasses
from datetime import date

import pytest

from starburst_executor.costs import estimate
from starburst_executor.costs.prices import (
    TABLE_DATE,
    Prices,
    affordable,
    billed_seconds,
    built_in,
    check_hourly_cost,
    fitting,
    spent,
    worker_hour,
)
from starburst_executor.protocol.worker_spec import WorkerSpec

FARGATE = WorkerSpec(launcher="ecs", cpu=4, memory="8GB")
EC2 = WorkerSpec(
    launcher="ecs",
    cpu=2,
    memory="4GB",
    launch_type="EC2",
    instance_type="c8a.xlarge",
)
ROUND = Prices(
    region="r",
    vcpu_hour=1.0,
    gb_hour=0.5,
    address_hour=0.25,
    write=0.01,
    read=0.001,
    source="a test",
    taken=date(2026, 1, 2),
)


# --- prices --------------------------------------------------------------------------


def test_four_vcpus_and_eight_gb_cost_what_the_price_list_says() -> None:
    prices = built_in("us-east-1")
    hourly = worker_hour(FARGATE, prices, public_ip=False)
    assert hourly == pytest.approx(0.19748)
    arm = built_in("us-east-1", architecture="ARM64")
    assert worker_hour(FARGATE, arm, public_ip=False) == pytest.approx(0.158)


def test_a_public_address_costs_half_a_cent_an_hour_on_top() -> None:
    prices = built_in("us-east-1")
    both = [worker_hour(FARGATE, prices, public_ip=ip) for ip in (True, False)]
    assert both[0] - both[1] == pytest.approx(0.005)


def test_spot_is_cheaper_for_both_architectures() -> None:
    for architecture in ("X86_64", "ARM64"):
        spot = built_in("us-east-1", use_spot=True, architecture=architecture)
        full = built_in("us-east-1", architecture=architecture)
        assert spot.vcpu_hour < 0.4 * full.vcpu_hour
        assert spot.gb_hour < 0.4 * full.gb_hour


def test_prices_say_where_they_are_from_and_when() -> None:
    text = str(built_in("us-east-1", use_spot=True))
    assert "Spot prices of us-east-1" in text
    assert "built-in table" in text
    assert f"{TABLE_DATE}" in text


def test_prices_of_another_region_say_so() -> None:
    prices = built_in("sa-east-1")
    assert prices.region == "us-east-1"
    assert "because prices for sa-east-1 are not available" in str(prices)


def test_workers_of_this_machine_cost_nothing() -> None:
    assert worker_hour(WorkerSpec(), ROUND) == 0


def test_workers_share_the_price_of_the_instance_that_they_fit_on() -> None:
    prices = dataclasses.replace(ROUND, instance_hour=0.2, instance_vcpus=4, instance_gb=8)
    assert worker_hour(EC2, prices) == pytest.approx(0.1)
    memory_bound = dataclasses.replace(prices, instance_gb=7.5)
    assert worker_hour(EC2, memory_bound) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"cpu=2 .* c8a.xlarge, which has 1 vCPUs"):
        worker_hour(EC2, dataclasses.replace(prices, instance_vcpus=1))


# --- what was spent ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lived", "billed"), [(0, 60), (59.2, 60), (60, 60), (60.1, 61), (3600, 3600)]
)
def test_a_worker_is_billed_by_the_second_and_for_a_minute_at_least(
    lived: float, billed: float
) -> None:
    assert billed_seconds(lived) == billed


def test_spent_is_seconds_times_size_times_price_and_requests() -> None:
    found = spent(FARGATE, ROUND, [1800, 1770, 30], writes=100, reads=1000)
    seconds = 1800 + 1770 + 60
    assert found.workers == 3
    assert found.vcpu_seconds == 4 * seconds
    assert found.gb_seconds == 8 * seconds
    assert found.compute == pytest.approx(seconds / 3600 * (4 * 1 + 8 * 0.5 + 0.25))
    assert found.requests == pytest.approx(1 + 1)
    assert found.total == found.compute + found.requests
    assert found.prices is ROUND


def test_no_workers_cost_nothing() -> None:
    assert spent(FARGATE, ROUND, []).total == 0


def test_requests_cost_what_the_readme_reckons() -> None:
    prices = built_in("us-east-1")
    found = spent(FARGATE, prices, [], writes=81_000, reads=70_000)
    assert found.total == pytest.approx(0.43, abs=0.005)


# --- limits --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quota", "used", "cpu", "fit"),
    [
        (6, 0, 4, 1),
        (16, 4, 4, 3),
        (4, 4, 0.25, 0),
        (2, 6, 1, 0),
        (0.3, 0, 0.1, 3),
        (0, 0, 1, 0),
    ],
)
def test_workers_that_fit_in_a_quota(quota: float, used: float, cpu: float, fit: int) -> None:
    assert fitting(quota, used, cpu) == fit


def test_workers_that_a_limit_affords() -> None:
    assert affordable(1.0, 0.1) == 10
    assert affordable(1.0, 0.11) == 9
    assert affordable(0.05, 0.1) == 0
    assert affordable(0.0, 0.0) is None


def test_too_costly_workers_are_refused_with_the_number_that_is_not() -> None:
    check_hourly_cost(1.0, 10, 0.1, ROUND)
    check_hourly_cost(0.0, 10, 0.0, ROUND)
    with pytest.raises(ValueError, match=r"\$1\.1 an hour .*a test.* max_workers=10"):
        check_hourly_cost(1.0, 11, 0.1, ROUND)


# --- estimates -----------------------------------------------------------------------


def test_one_task_for_each_worker_is_one_wave() -> None:
    found = estimate.estimate_run(
        FARGATE, ROUND, tasks=10, task_seconds=600, workers=10, startup=60
    )
    assert (found.workers, found.waves, found.seconds) == (10, 1, 660)
    assert found.cost.vcpu_seconds == 4 * 10 * 660
    assert found.hourly == pytest.approx(10 * 8.25)


def test_no_more_workers_than_tasks_are_reckoned_with() -> None:
    found = estimate.estimate_run(FARGATE, ROUND, tasks=3, task_seconds=600, workers=100)
    assert found.workers == 3


def test_a_quota_makes_waves() -> None:
    found = estimate.estimate_run(
        FARGATE, ROUND, tasks=10, task_seconds=600, workers=10, fit=4, startup=0
    )
    assert (found.workers, found.waves, found.seconds) == (4, 3, 1800)
    # In the last wave two work, and two wait for as long as an idle worker does.
    assert found.cost.vcpu_seconds == 4 * (2 * 1800 + 2 * (1200 + 300))


def test_slots_share_a_worker() -> None:
    spec = WorkerSpec(launcher="ecs", cpu=4, memory="8GB", slots=4)
    found = estimate.estimate_run(spec, ROUND, tasks=10, task_seconds=100, workers=10, startup=0)
    assert (found.workers, found.waves) == (3, 1)


def test_short_tasks_cost_a_minute_for_each_worker() -> None:
    found = estimate.estimate_run(FARGATE, ROUND, tasks=10, task_seconds=1, workers=10, startup=0)
    assert found.cost.vcpu_seconds == 4 * 10 * 60


def test_requests_of_tiny_tasks_follow_the_seconds_and_not_the_tasks() -> None:
    few = estimate.estimate_run(FARGATE, ROUND, tasks=1000, task_seconds=0.01, workers=1)
    own = estimate.estimate_run(FARGATE, ROUND, tasks=1000, task_seconds=60, workers=1)
    assert few.cost.requests < own.cost.requests
    reads = 1000 * 3 * ROUND.read
    assert few.cost.requests < 4000 * ROUND.write + reads


@pytest.mark.parametrize("bad", [{"tasks": 0}, {"workers": 0}, {"task_seconds": -1.0}])
def test_nothing_to_estimate_is_refused(bad: dict[str, float]) -> None:
    given = {"tasks": 1, "workers": 1, "task_seconds": 1.0, **bad}
    with pytest.raises(ValueError, match="must be positive"):
        estimate.estimate_run(FARGATE, ROUND, **given)  # type: ignore[arg-type]


def test_a_quota_without_room_is_named() -> None:
    with pytest.raises(ValueError, match="starburst-executor quota"):
        estimate.estimate_run(FARGATE, ROUND, tasks=1, task_seconds=1, workers=1, fit=0)

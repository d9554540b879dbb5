"""Collect results while other tasks still run: first the early ones, then all."""

from __future__ import annotations

import time
from concurrent.futures import wait

from starburst_executor import StarburstExecutor, TaskOutcome


def largest_prime_factor(number: int, pause: float) -> int:
    time.sleep(pause)  # stands in for longer work
    factor = 2
    while factor * factor <= number:
        if number % factor:
            factor += 1
        else:
            number //= factor
    return number


def show(title: str, outcomes: list[TaskOutcome]) -> None:
    values = ", ".join(str(outcome.value) for outcome in outcomes)
    print(f"{title}: {len(outcomes)} outcomes\n  {values}\n")


with StarburstExecutor(max_workers=2) as executor:
    quick = [executor.submit(largest_prime_factor, 10**9 + i, 0.0) for i in range(12)]
    wait(quick)
    slow = [executor.submit(largest_prime_factor, 10**10 + i, 1.5) for i in range(2)]

    show("so far", executor.collect())  # does not wait
    print(executor.status(), "\n")
    show("in the end", executor.collect(wait=True))  # downloads only what is new

"""Monte Carlo: a portfolio's possible value in a year, from 400 tasks of 20 simulated years."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter

from starburst_executor import StarburstExecutor

TASKS, YEARS_EACH, DAYS = 400, 20, 252  # trading days
START = 100_000.0  # dollars
HOLDINGS = {  # share of the portfolio, mean daily return, daily volatility
    "stocks": (0.7, 0.00035, 0.012),
    "bonds": (0.3, 0.00012, 0.003),
}


def simulate(seed: int) -> list[tuple[float, float]]:
    """Simulate years; return each one's final value and deepest fall from a peak."""
    draw = random.Random(seed)
    return [simulate_year(draw) for _ in range(YEARS_EACH)]


def simulate_year(draw: random.Random) -> tuple[float, float]:
    value = peak = START
    fall = 0.0
    for _ in range(DAYS):
        value *= 1 + sum(w * draw.gauss(mu, s) for w, mu, s in HOLDINGS.values())
        peak = max(peak, value)
        fall = max(fall, 1 - value / peak)
    return value, fall


def print_histogram(values: list[float], bars: int = 15, width: int = 50) -> None:
    low, high = min(values), max(values)
    step = (high - low) / bars
    bins = Counter(min(int((value - low) / step), bars - 1) for value in values)
    for i in range(bars):
        bar = "#" * round(width * bins[i] / max(bins.values()))
        print(f"{low + i * step:>12,.0f} {bar}".rstrip())


began = time.perf_counter()
with StarburstExecutor() as executor:
    years = [year for task in executor.map(simulate, range(TASKS)) for year in task]
values = sorted(value for value, _ in years)
falls = sorted(fall for _, fall in years)

print(f"{TASKS} tasks, {len(years):,} years, {time.perf_counter() - began:.1f} s\n")
for percent in (5, 25, 50, 75, 95):
    value, fall = (column[len(column) * percent // 100] for column in (values, falls))
    print(f"{percent:>3} % end below {value:>9,.0f}, and fell by less than {fall:.1%}")
losses = sum(value < START for value in values)
print(f"mean {statistics.mean(values):,.0f}, risk of a loss {losses / len(values):.1%}\n")
print_histogram(values)

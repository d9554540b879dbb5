"""tqdm progress bars around `as_completed` and `map`."""

from __future__ import annotations

import random
import sys
from concurrent.futures import as_completed

from tqdm import tqdm  # type: ignore[import-untyped]

from starburst_executor import StarburstExecutor


def longest_run(seed: int) -> int:
    """Longest run of heads in 20,000 tosses."""
    tosses = random.Random(seed).choices("HT", k=20_000)
    return max(len(run) for run in "".join(tosses).split("T"))


with StarburstExecutor(max_workers=2) as executor:
    calls = executor.map(longest_run, range(100))
    lengths = list(tqdm(calls, total=100, desc="map", file=sys.stdout))

    futures = [executor.submit(longest_run, seed) for seed in range(100, 140)]
    ended = tqdm(as_completed(futures), total=40, desc="submit", file=sys.stdout)
    lengths += [future.result() for future in ended]

for length in range(min(lengths), max(lengths) + 1):
    print(f"{length:>3} heads in a row {'#' * lengths.count(length)}")

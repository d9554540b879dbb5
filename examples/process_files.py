"""A directory of files, one task each: a month of web server logs, written by this script.

Local workers read the same disk. Workers elsewhere need paths they can open, such as s3:// URLs.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from concurrent.futures import as_completed
from pathlib import Path

from starburst_executor import StarburstExecutor


def write_logs(folder: Path, days: int) -> list[Path]:
    """Write one log file per day, with a line per request: its status and time."""
    paths = []
    for day in range(1, days + 1):
        draw = random.Random(day)
        count = draw.randrange(2_000, 6_000)
        statuses = draw.choices((200, 304, 404, 500), (90, 6, 3, day % 7), k=count)
        lines = [f"GET / {s} {draw.expovariate(1 / 40):.0f}ms" for s in statuses]
        paths.append(folder / f"access-{day:02d}.log")
        paths[-1].write_text("\n".join(lines) + "\n")
    return paths


def read_log(path: Path) -> tuple[str, Counter[str], int]:
    """Name of the file, its requests by status, and the slowest in milliseconds."""
    rows = [line.split() for line in path.read_text().splitlines()]
    slowest = max(int(row[3].removesuffix("ms")) for row in rows)
    return path.name, Counter(row[2] for row in rows), slowest


with tempfile.TemporaryDirectory() as folder, StarburstExecutor() as executor:
    paths = write_logs(Path(folder), days=30)
    futures = [executor.submit(read_log, path) for path in paths]
    reports = [future.result() for future in as_completed(futures)]

print(f"{len(reports)} files read\n")
print("file           requests   errors   slowest")
for name, counts, slowest in sorted(reports):
    count, errors = counts.total(), counts["500"] / counts.total()
    bar = "#" * round(500 * errors)
    print(f"{name} {count:>8,} {errors:>8.1%} {slowest:>6} ms  {bar}".rstrip())
total = sum((counts for _, counts, _ in reports), Counter[str]())
print("\ntotal:", ", ".join(f"{s}: {n:,}" for s, n in sorted(total.items())))

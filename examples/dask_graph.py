"""A dask graph: dask splits the work into ordered pieces, and workers run them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import dask.config
from dask.delayed import delayed

from starburst_executor import StarburstExecutor


@delayed  # type: ignore[untyped-decorator]
def count_words(path: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in path.read_text().split():
        counts[word] = counts.get(word, 0) + 1
    return counts


@delayed  # type: ignore[untyped-decorator]
def merge(parts: list[dict[str, int]]) -> dict[str, int]:
    words = sorted({word for part in parts for word in part})
    return {word: sum(part.get(word, 0) for part in parts) for word in words}


with TemporaryDirectory() as name:
    pages = [Path(name) / f"page-{number}.txt" for number in range(12)]
    for number, page in enumerate(pages):
        page.write_text("moon " * number + "star " * (12 - number) + "sky " * 3)

    counted = [count_words(page) for page in pages]
    total = merge([merge(counted[:6]), merge(counted[6:])])

    with (
        StarburstExecutor(max_workers=2) as executor,
        dask.config.set(scheduler="processes", pool=executor),
    ):
        words = total.compute()
        tasks = executor.status().completed

for word, count in words.items():
    print(f"{word:<5} {count:>3} {'#' * (count // 2)}")
print(f"{len(pages)} pages, {tasks} tasks")

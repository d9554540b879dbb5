"""Run each poisonous task among many harmless ones, and print what became of them.

python -m benchmarks.poisons [--followers 1000] [--only WORD]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.places import directory
from starburst_executor import StarburstExecutor
from tests.support.poisons import POISONS, innocent

_PATIENCE = 120.0  # seconds after which unfinished tasks count as lost


def _run(
    ex: StarburstExecutor,
    poison: Callable[[], None],
    count: int,
    usual: dict[str, object],
) -> tuple[int, int]:
    """Count harmless tasks that did not end, and those that did not end as usual."""
    half = count // 2
    before: list[Future[Any]] = [ex.submit(innocent, i) for i in range(half)]
    culprit: Future[Any] = ex.submit(poison)
    after = [ex.submit(innocent, i) for i in range(half, count)]
    followers = [*before, *after]
    ended, lost = wait(followers, _PATIENCE)
    wait([culprit], _PATIENCE)
    found = [f.result()[1] for f in ended if f.exception() is None]
    right = sum(one == usual for one in found)
    return len(lost) + (not culprit.done()), len(ended) - right


@click.command(help=__doc__)
@click.option("--followers", default=1000, help="Harmless tasks per poison.")
@click.option("--only", default="", help="Only the poisons with this word in their name.")
def main(followers: int, only: str) -> None:
    console = Console()
    table = Table("poison", "lost", "failed", "seconds")
    with directory() as store, StarburstExecutor(2, store=store) as ex:
        usual = ex.submit(innocent, 0).result()[1]
        for poison in POISONS:
            if only in poison.__name__:
                began = time.perf_counter()
                lost, failed = _run(ex, poison, followers, usual)
                seconds = time.perf_counter() - began
                row = poison.__name__, str(lost), str(failed), f"{seconds:.1f}"
                console.log(*row)
                table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()


__all__ = ["main"]

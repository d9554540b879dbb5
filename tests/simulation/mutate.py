"""Shows that every rule of the protocol is needed: `python -m tests.simulation.mutate [WORD ...]`.

For each rule, the product without it is put through the forced schedules that should fail then,
and, with `--random N`, through up to N random ones. A mutant that survives is a rule that nothing
notices to be missing: force a schedule that does, or delete the rule.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.simulation.chaos import Chaos
from tests.simulation.mutants import MUTANTS
from tests.simulation.mutation import Mutant, Verdict
from tests.simulation.schedule import Kind, drawn

__all__ = ["main"]

LONGEST = 60  # real seconds for one schedule: a mutant may never come to rest


class _Endless(Exception):
    """A schedule takes too long."""


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a mutant survives."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutate", description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutants whose name has one of these")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="random schedules too")
    options = parser.parse_args(arguments)
    logging.getLogger("starburst_executor").setLevel(logging.CRITICAL)
    began = time.perf_counter()
    survivors = count = 0
    for mutant in MUTANTS:
        if options.words and not any(word in mutant.name for word in options.words):
            continue
        with _bounded():
            verdict = mutant.judge()
        count += 1
        survivors += not verdict.killed
        _say(_row(mutant, verdict, _at_random(mutant, options.random)))
    seconds = time.perf_counter() - began
    _say(f"\n{count} mutants, {survivors} survive; {seconds:.0f} s")
    return 1 if survivors else 0


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _row(mutant: Mutant, verdict: Verdict, at_random: str) -> str:
    fate = (
        f"killed by {verdict.by} (schedule {verdict.schedules})" if verdict.killed else "SURVIVES"
    )
    lines = [f"{mutant.name}", f"    {fate}"]
    if verdict.why:
        lines.append(f"    {verdict.why[:110]}")
    if at_random:
        lines.append(f"    {at_random}")
    return "\n".join(lines)


def _at_random(mutant: Mutant, most: int) -> str:
    """Which random schedule is the first to notice."""
    if not most:
        return ""
    kinds = list(Kind)
    with mutant.applied():
        for number in range(most):
            kind, seed = kinds[number % len(kinds)], number // len(kinds)
            try:
                with _bounded():
                    Chaos(drawn(seed, kind)).play()
            except Exception:
                return f"random schedule {number + 1} notices: {kind} {seed}"
    return f"{most} random schedules notice nothing"


@contextmanager
def _bounded() -> Iterator[None]:
    def end(*_: object) -> None:
        raise _Endless(f"no end within {LONGEST} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())

"""Plays random schedules for hours: `python -m tests.simulation.soak --schedules 100000`.

Stops at the first that fails, with its seed and with what is left of it once it has been shrunk.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time

from tests.simulation.schedule import Kind, drawn
from tests.simulation.shrink import failure_of, shrink

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Play; 1 if a schedule fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.soak", description=__doc__)
    parser.add_argument("--schedules", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=10_000, help="the seed to begin with")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--kind", choices=[str(kind) for kind in Kind], help="only of this kind")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    options = parser.parse_args(arguments)
    logging.getLogger("starburst_executor").setLevel(logging.CRITICAL)
    began, failures = time.perf_counter(), 0
    kinds = [Kind(options.kind)] if options.kind else list(Kind)
    for number in range(options.schedules):
        failures += not _holds(options.first + number // len(kinds), kinds[number % len(kinds)])
        seconds = time.perf_counter() - began
        last = number + 1 == options.schedules or seconds > options.seconds
        stop = last or (failures and not options.keep_going)
        if stop or (number + 1) % 1000 == 0:
            done = number + 1
            cpu = time.process_time()
            _say(f"{done:,} schedules in {seconds:.0f} s ({cpu:.0f} s of CPU); {failures} fail")
        if stop:
            break
    return 1 if failures else 0


def _holds(seed: int, kind: Kind) -> bool:
    error, _ = failure_of(drawn(seed, kind))
    if error is None:
        return True
    _say(f"{kind} {seed}: {str(error)[:2000]}")
    small = shrink(drawn(seed, kind))
    again, chaos = failure_of(small)
    _say(f"shrunk:\n{small}\nfails with {str(again)[:1000]}\n{chaos.world.sim.report(60)}")
    return False


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())

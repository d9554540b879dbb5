"""A client that submits in bursts until it detaches or is killed: a program of its own.

It prints what it knows to be stored: the session's id, then how many tasks of its own there are.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from pathlib import Path

from starburst_executor import Intervals, StarburstExecutor

BRISK = Intervals(
    lease=4, heartbeat=0.5, poll_first=0.05, poll_last=0.3, look_first=0.02, look_last=0.2,
    commit=0.2, session_check=1,
)  # fmt: skip


def work(folder: str, name: str, number: int, seconds: float) -> tuple[str, int]:
    """Say that it was begun, take some time, and return what nothing else returns."""
    Path(folder, f"{name}-{number}.{os.getpid()}.{os.urandom(4).hex()}").touch()
    threading.Event().wait(seconds)
    if number % 10 == 9:
        raise ValueError(f"{name}-{number}")
    return name, number


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(store: str, session_id: str, folder: str, name: str, seed: str) -> None:
    rng = random.Random(seed)
    if session_id == "-":
        executor = StarburstExecutor(3, store=store, intervals=BRISK, max_attempts=1000)
    else:
        executor = StarburstExecutor.attach(session_id, store=store)
    say(executor.session_id)
    submitted = 0
    for _ in range(rng.randint(2, 4)):
        for _ in range(rng.randint(5, 40)):
            executor.submit(work, folder, name, submitted, rng.choice([0.0, 0.0, 0.05, 0.3, 1.5]))
            submitted += 1
        executor.flush()
        say(str(submitted))
        threading.Event().wait(rng.uniform(0, 1.5))
    executor.detach()


if __name__ == "__main__":
    main(*sys.argv[1:])

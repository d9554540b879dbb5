"""Submit in one process, leave, and pick the session up in another.

python detach_attach.py                 submits, detaches, and starts the second process
python detach_attach.py SESSION_ID      the second process: attaches and collects
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import as_completed

from starburst_executor import StarburstExecutor


def collatz_steps(number: int) -> tuple[int, int]:
    """Count the steps from a number to 1, halving even numbers and taking odd ones to 3n + 1."""
    start, steps = number, 0
    while number != 1:
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        steps += 1
    return start, steps


def submit_and_leave() -> str:
    executor = StarburstExecutor(max_workers=2, name="collatz")
    for number in range(1, 201):
        executor.submit(collatz_steps, 10**30 + number)
    session_id = executor.detach()  # everything is stored; this process may exit
    print(f"process {os.getpid()} submitted 200 tasks and detached from {session_id}")
    return session_id


def attach_and_collect(session_id: str) -> None:
    executor = StarburstExecutor.attach(session_id)
    print(f"process {os.getpid()} attached to {len(executor.futures)} tasks")
    results = [future.result() for future in as_completed(executor.futures)]
    print(executor.status())
    number, steps = max(results, key=lambda result: result[1])
    print(f"longest path: {steps} steps from {number}")
    executor.cleanup(force=True)  # delete the session; otherwise it stays readable


if len(sys.argv) > 1:
    attach_and_collect(sys.argv[1])
else:
    subprocess.run([sys.executable, __file__, submit_and_leave()], check=True)

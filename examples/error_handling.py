"""What can go wrong with a task, and how to handle it: an exception, a crash, a timeout."""

from __future__ import annotations

import os
import time

from starburst_executor import StarburstExecutor, TaskCrashed, TaskTimeout


def parse(text: str) -> float:
    return 1 / float(text)


def fragile(number: int, retry: int) -> int:
    if number % 4 == 0 and retry == 0:
        print(f"about to crash on {number}")
        os.abort()  # as a C library might
    return number * number


with StarburstExecutor(max_workers=2, task_timeout=2) as executor:
    # 1. The task raises: the same exception is raised here.
    try:
        executor.submit(parse, "zero").result()
    except ValueError as error:
        print(f"1. raised in the task and here: {error!r}")
        print(f"   remote traceback ends: {str(error.__cause__).splitlines()[-2]!r}\n")

    # 2. The task kills its process: only this task fails, and it can be submitted again.
    futures = {n: executor.submit(fragile, n, 0) for n in range(8)}
    squares = {}
    for number, future in futures.items():
        try:
            squares[number] = future.result()
        except TaskCrashed as error:
            print(f"2. {str(error).splitlines()[0]}")
            squares[number] = executor.submit(fragile, number, 1).result()
    print(f"   with retries: {squares}\n")

    # 3. The task runs too long.
    try:
        executor.submit(time.sleep, 3600).result()
    except TaskTimeout as error:
        print(f"3. {error}\n")

    # 4. Collect all outcomes, including failures; nothing is raised.
    outcomes = executor.collect(wait=True)
    failed = [outcome for outcome in outcomes if not outcome.ok]
    print(f"4. {len(outcomes)} outcomes, {len(failed)} of them failures:")
    for outcome in failed:
        kind = type(outcome.error).__name__
        print(f"   task {outcome.task_id:<5} {kind:<12} after {outcome.seconds:.1f} s")

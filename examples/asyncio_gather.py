"""asyncio: await tasks alongside other coroutines, and cancel what is no longer needed."""

from __future__ import annotations

import asyncio
import time

from starburst_executor import StarburstExecutor


def count_primes(below: int) -> int:
    sieve = bytearray([1]) * below
    sieve[:2] = b"\0\0"
    for number in range(2, int(below**0.5) + 1):
        if sieve[number]:
            sieve[number * number :: number] = bytes(len(sieve[number * number :: number]))
    return sum(sieve)


async def tick(stop: asyncio.Event) -> int:
    """Show that the event loop stays responsive while workers are busy."""
    ticks = 0
    while not stop.is_set():
        await asyncio.sleep(0.01)
        ticks += 1
    return ticks


async def main(executor: StarburstExecutor) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    ticking = asyncio.create_task(tick(stop))
    limits = [10**exponent for exponent in range(1, 8)]
    counts = await asyncio.gather(
        *(loop.run_in_executor(executor, count_primes, limit) for limit in limits)
    )
    for limit, count in zip(limits, counts, strict=True):
        print(f"{count:>8,} primes below {limit:>12,}")

    # A submitted future can be awaited too; a timeout stops the waiting.
    future = executor.submit(time.sleep, 60)
    try:
        await asyncio.wait_for(asyncio.wrap_future(future), timeout=0.5)
    except TimeoutError:
        print("gave up on a task after half a second")
    await asyncio.to_thread(executor.cancel, future)  # stops it even while it is running
    stop.set()
    print(f"the event loop kept ticking: {await ticking > 10}")


with StarburstExecutor(max_workers=2) as executor:
    asyncio.run(main(executor))

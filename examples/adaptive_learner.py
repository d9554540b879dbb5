"""adaptive: sample a function where it is interesting, as results come in."""

from __future__ import annotations

import adaptive  # type: ignore[import-untyped]

from starburst_executor import StarburstExecutor

WIDTH, HEIGHT = 72, 12


def peak(x: float) -> float:
    """A slope with a narrow peak that a coarse grid would miss."""
    return x + 0.01**2 / (0.01**2 + (x - 0.31) ** 2)


learner = adaptive.Learner1D(peak, bounds=(-1, 1))
with StarburstExecutor(max_workers=2) as executor:
    # ntasks is required: adaptive can only count the workers of executors that it knows.
    adaptive.BlockingRunner(learner, npoints_goal=80, executor=executor, ntasks=4)

columns = [0] * WIDTH
for x in learner.data:
    columns[min(int((x + 1) / 2 * WIDTH), WIDTH - 1)] += 1
for level in range(HEIGHT, 0, -1):
    print("".join("#" if count >= level else " " for count in columns))
print("-1" + f"{'evaluated at':^{WIDTH - 3}}" + "1")
near = sum(abs(x - 0.31) < 0.1 for x in learner.data)
print(f"{learner.npoints} evaluations, {near} of them within a tenth of the peak")

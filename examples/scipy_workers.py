"""`workers=executor.map`: scipy's optimizers evaluate whole populations on workers."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import differential_evolution  # type: ignore[import-untyped]

from starburst_executor import StarburstExecutor

TIMES = np.linspace(0, 10, 200)
TRUE = (2.0, 0.3, 1.7)  # amplitude, decay, frequency


def oscillation(parameters: Any) -> Any:
    amplitude, decay, frequency = parameters
    return amplitude * np.exp(-decay * TIMES) * np.cos(frequency * TIMES)


MEASURED = oscillation(TRUE) + np.random.default_rng(7).normal(0, 0.1, TIMES.size)


def misfit(parameters: Any) -> float:
    return float(np.mean((oscillation(parameters) - MEASURED) ** 2))


with StarburstExecutor(max_workers=2) as executor:
    fit = differential_evolution(
        misfit,
        bounds=[(0.5, 4), (0, 1), (0.5, 4)],
        workers=executor.map,
        updating="deferred",  # evaluate a whole generation at once
        popsize=10,
        maxiter=12,
        rng=1,
    )
    tasks = executor.status().completed

print(f"{tasks} tasks, the first misfit {misfit((1, 0.5, 1)):.3f}, the last {fit.fun:.4f}")
for name, value, true in zip(("amplitude", "decay", "frequency"), fit.x, TRUE, strict=True):
    print(f"{name:<10}{value:6.2f} (true value {true})")

"""emcee: an ensemble of walkers samples a posterior, and workers compute the likelihoods."""

from __future__ import annotations

from typing import Any

import emcee  # type: ignore[import-untyped]
import numpy as np

from starburst_executor import StarburstExecutor

WALKERS, STEPS, BURN_IN = 32, 20, 5
X = np.linspace(0, 10, 50)
Y = 1.5 * X - 2.0 + np.random.default_rng(3).normal(0, 1, X.size)  # slope, offset


def log_probability(parameters: Any) -> float:
    slope, offset = parameters
    return float(-0.5 * np.sum((Y - slope * X - offset) ** 2))


np.random.seed(5)  # emcee draws from NumPy's global generator
start = np.polyfit(X, Y, 1) + np.random.normal(0, [0.05, 0.3], (WALKERS, 2))
with StarburstExecutor(max_workers=2) as executor:
    sampler = emcee.EnsembleSampler(WALKERS, 2, log_probability, pool=executor)
    sampler.run_mcmc(start, STEPS)

samples = sampler.get_chain(discard=BURN_IN, flat=True)
print(f"{len(samples)} samples, acceptance {sampler.acceptance_fraction.mean():.0%}")
for name, values in zip(("slope", "offset"), samples.T, strict=True):
    low, middle, high = np.quantile(values, [0.16, 0.5, 0.84])
    print(f"\n{name}: {middle:.2f} ({low:.2f} to {high:.2f})")
    counts, edges = np.histogram(values, bins=9)
    for count, edge in zip(counts, edges, strict=False):
        print(f"{edge:7.2f} {'#' * int(40 * count / counts.max())}")

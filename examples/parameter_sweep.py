"""A parameter sweep with scipy: infections, by reproduction number and vaccination rate."""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy.integrate import solve_ivp  # type: ignore[import-untyped]

from starburst_executor import StarburstExecutor

REPRODUCTION = np.linspace(1.0, 6.0, 11)  # infections that one case initially causes
VACCINATED = np.linspace(0.0, 0.9, 19)  # share of the population
RECOVERY = 1 / 7  # per day
SHADES = " .:-=+*#%@"


def infected_share(reproduction: float, vaccinated: float) -> float:
    """Share of the population infected within two years, from the SIR equations."""

    def change(_: float, state: np.ndarray) -> list[float]:
        susceptible, infectious = state
        new = reproduction * RECOVERY * susceptible * infectious
        return [-new, new - RECOVERY * infectious]

    start = [1 - vaccinated - 1e-4, 1e-4]
    solution = solve_ivp(change, (0, 730), start, rtol=1e-6)
    return float(start[0] - solution.y[0, -1])


grid = list(product(REPRODUCTION, VACCINATED))
with StarburstExecutor() as executor:
    shares = np.array(list(executor.map(infected_share, *zip(*grid, strict=True))))
table = shares.reshape(len(REPRODUCTION), len(VACCINATED))

print(f"{len(grid)} parameter sets; darker means more people are infected\n")
for row, reproduction in reversed(list(zip(table, REPRODUCTION, strict=True))):
    cells = "".join(SHADES[min(int(10 * share), 9)] * 3 for share in row)
    print(f"R0 {reproduction:.1f} |{cells}|")
print(f"        0 %{'vaccinated':^46}90 %\n")
worst = int(shares.argmax())
print(
    f"worst: R0 {grid[worst][0]:.1f}, {grid[worst][1]:.0%} vaccinated -> {shares[worst]:.1%} "
    "infected"
)

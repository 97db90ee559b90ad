"""Compare two settings seed by seed: the smallest difference that is found, and equivalence.

Both take one number for each seed, the difference of two runs with this seed. Seeds are random, and
the test scenes are fixed. The interval in ablations.py covers other scenes too.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

POWER = 0.8
# Of gIoU, less than half of GRPO's difference from base. The margin was chosen before the rows that
# have no runs yet.
MARGIN = 0.05


@cache
def student(freedom: float, share: float = 0.975) -> float:
    """Return a quantile of Student's t, above the median, by summing up its density."""
    x = np.linspace(0, 20, 20_001)
    gammas = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    height = math.exp(gammas) / math.sqrt(math.pi * freedom)
    density = height * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    half = 0.001 * (np.cumsum(density) - (density + density[0]) / 2)  # from 0 to x
    return float(np.interp(share - 0.5, half, x))


def power(shift: float, freedom: int) -> float:
    """Return the probability that a two-sided t test at the 5 % level finds a difference.

    The true mean is `shift` standard errors from 0. So T = (z + shift) / s follows the noncentral t
    distribution: z is normal, and freedom * s**2 is chi-squared. The sum runs over values of s.
    """
    s = np.linspace(0, 5, 2001)[1:]
    log_density = (freedom - 1) * np.log(s) - freedom * s**2 / 2
    density = np.exp(log_density - log_density.max())
    limit = student(freedom) * s
    above = [math.erfc((x - shift) / math.sqrt(2)) / 2 for x in limit]  # P(z + shift > x)
    below = [math.erfc((x + shift) / math.sqrt(2)) / 2 for x in limit]
    return float(np.average(np.add(above, below), weights=density))


@cache
def detected_shift(count: int) -> float:
    """Return the shift, in standard errors, that `count` pairs find with a power of POWER."""
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        if power(middle, count - 1) < POWER:
            low = middle
        else:
            high = middle
    return high


def smallest_difference(count: int, spread: float) -> float:
    """Return the smallest true difference that a paired t test finds with 80 % power.

    `count` is the number of paired seeds, at least 2. `spread` is the standard deviation of their
    differences. The test is two-sided, at the 5 % level.
    """
    return detected_shift(count) * spread / math.sqrt(count)


def equivalence_bound(differences: Sequence[float]) -> float:
    """Return the smallest margin within which two settings are equivalent, at the 5 % level.

    Two one-sided t tests (TOST; Schuirmann, 1987) reject a difference outside the margin. This is
    so if the 90 % interval of the mean lies within the margin. Needs at least two differences.
    """
    count = len(differences)
    error = np.std(differences, ddof=1) / math.sqrt(count)
    return float(abs(np.mean(differences)) + student(count - 1, 0.95) * error)

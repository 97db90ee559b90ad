"""Compare two settings seed by seed: the smallest difference that a test can find, and equivalence.

A difference is that of two runs with the same seed. Here only the seeds count as random. In the
interval of ablations.py, the test scenes count as random too.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

POWER = 0.8
# A difference in gIoU. It is less than half of the difference between the rows GRPO and base of
# ablations.py. The margin was chosen after the rows of tables 3 and 4, and before those of "later
# objectives".
MARGIN = 0.05


def student(freedom: float, share: float = 0.975) -> float:
    """Return a quantile of Student's t."""
    return float(stats.t.ppf(share, freedom))


def power(shift: float, freedom: int) -> float:
    """Return the probability that a two-sided t test at the 5 % level finds a difference.

    The true mean is `shift` standard errors from 0. So the t statistic follows the noncentral
    t distribution.
    """
    limit = student(freedom)
    above = stats.nct.sf(limit, freedom, shift)
    below = stats.nct.sf(limit, freedom, -shift)  # equals nct.cdf(-limit, ...), which can be NaN
    return float(above + below)


def detected_shift(count: int) -> float:
    """Return the shift, in standard errors, that `count` pairs show with a power of POWER."""
    return optimize.brentq(lambda shift: power(shift, count - 1) - POWER, 0.0, 100.0)


def smallest_difference(count: int, spread: float) -> float:
    """Return the smallest true difference that a paired t test finds with 80 % power.

    `count` is the number of paired seeds, at least 2. `spread` is the standard deviation of their
    differences. The test is two-sided, at the 5 % level.
    """
    return detected_shift(count) * spread / math.sqrt(count)


def equivalence_bound(differences: Sequence[float]) -> float:
    """Return the smallest margin within which two settings are equivalent, at the 5 % level.

    Two one-sided t tests (TOST; Schuirmann, 1987) reject a difference outside the margin. They do
    so if the 90 % interval of the mean lies within the margin. Needs at least two differences.
    """
    count = len(differences)
    error = np.std(differences, ddof=1) / math.sqrt(count)
    return float(abs(np.mean(differences)) + student(count - 1, 0.95) * error)

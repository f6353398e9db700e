"""How sure an accuracy is: the 95 % interval of a share of right answers."""

import math

from scipy import stats

NORMAL = float(stats.norm.ppf(0.975))


def accuracy_interval(value: float, standard_error: float, items: int) -> tuple[float, float]:
    """95 %: Wilson's for right or wrong answers, which holds at 0 and 1 too; else normal, within 0 and 1."""
    binary = math.sqrt(max(0.0, value * (1 - value)) / max(1, items - 1))
    if items and math.isclose(standard_error, binary, rel_tol=1e-3, abs_tol=1e-9):
        held = stats.binomtest(round(value * items), items).proportion_ci(method="wilson")
        return float(held.low), float(held.high)
    return max(0.0, value - NORMAL * standard_error), min(1.0, value + NORMAL * standard_error)

"""How many units each layer keeps when those of all layers compete for one budget."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import gcd

import numpy as np
import torch
from torch import Tensor


def allocate(
    scores: Sequence[Tensor],
    sizes: Sequence[Sequence[int]],
    budget: float,
    runs: Callable[[int], int] = lambda _: 1,
    amount: Callable[[list[int]], float] = sum,
) -> list[int]:
    """The size of each layer, one of its possible `sizes`: as many units in all as the budget allows.

    Of all ways to share out that many, it is the one whose units have the highest sum of scores, a tensor [units] a
    layer; where every size is possible, those are the first of one ranking. A size comes from so many `runs` of
    neighbours that keep alike. The budget bounds the `amount` of the sizes, which is to grow with their sum. ValueError
    where even the least sizes are beyond it.
    """
    unit = gcd(*(size for each in sizes for size in each))
    worth, chosen = np.zeros(1), []
    for score, possible in zip(scores, sizes, strict=True):
        worth, choice = _with_layer(worth, _worth(score, possible, runs), [size // unit for size in possible])
        chosen.append(choice)

    def shared_out(total: int) -> list[int]:
        found = []
        for choice in reversed(chosen):
            found.append(int(choice[total]))
            total -= found[-1]
        return [size * unit for size in reversed(found)]

    totals = np.isfinite(worth).nonzero()[0].tolist()
    index = bisect_right(totals, budget, key=lambda total: amount(shared_out(total)))
    if not index:
        raise ValueError(f"the least sizes are beyond the budget of {budget}")
    return shared_out(totals[index - 1])


def _worth(score: Tensor, sizes: Sequence[int], runs: Callable[[int], int]) -> list[float]:
    """The sum of the best scores for each size."""
    worth: dict[int, Tensor] = {}  # of each number from every run, by the number of runs
    for parts in {runs(size) for size in sizes}:
        best = score.double().cpu().view(parts, -1).sort(dim=1, descending=True).values.sum(0).cumsum(0)
        worth[parts] = torch.cat([best.new_zeros(1), best])
    return [float(worth[runs(size)][size // runs(size)]) for size in sizes]


def _with_layer(worth: np.ndarray, layer: Sequence[float], sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The most that every total is worth with one layer more, -inf where none makes it, and that layer's size there."""
    found = np.full(len(worth) + max(sizes), -np.inf)
    choice = np.zeros(len(found), dtype=np.int32)
    for value, size in zip(layer, sizes, strict=True):
        reach = slice(size, size + len(worth))
        better = worth + value > found[reach]
        found[reach][better] = (worth + value)[better]
        choice[reach][better] = size
    return found, choice

"""SparseSSM (2025): which entries of A_log go on remembering, by either of its published scores or by magnitude."""

from typing import Any

import torch
from torch import Tensor

from ssmcompress.edits import Forget
from ssmcompress.prune import masks, scores
from ssmcompress.prune.targets import Target


def remembering(A_log: Tensor, method: str, target: Target, statistic: Any = None) -> Tensor:
    """The entries of A_log [D, N] or [H] that stay, bool of its shape: they compete over the whole layer, or N of M.

    `sparsessm` counts the tokens at which an entry is among those to go by A_log² Σ h² (June 2025); `sparsessm_v2`
    sums (Σ exp(Δ A))² Σ h² over time (October 2025). What has no memory any more is the first to go again.
    """
    if target.pattern is None and target.sparsity == 0:
        return torch.ones_like(A_log, dtype=torch.bool)

    def lowest(score: Tensor) -> Tensor:
        score = score.view_as(A_log).masked_fill(A_log >= Forget.fill, -torch.inf)
        if target.pattern is not None:
            return ~masks.n_of_m(score, *target.pattern)
        return ~masks.unstructured(score, target.sparsity, target.scope)

    if method == "magnitude":
        return ~lowest(scores.magnitude(A_log))
    if method == "sparsessm":
        importance = A_log.float().square()
        return ~lowest(scores.votes(statistic.energy, lambda energy: lowest(importance * energy.view_as(A_log))))
    return ~lowest(scores.fading(statistic.energy, statistic.decay))

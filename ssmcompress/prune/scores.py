"""How much each weight matters. Pure tensors; scores are float32, higher matters more."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def magnitude(weight: Tensor) -> Tensor:
    """|w| of any shape (Han et al., 2015)."""
    return weight.float().abs()


def wanda(weight: Tensor, norm: Tensor) -> Tensor:
    """|w_ij| · ‖x_j‖₂: weight [out, in], norm [in], or a depthwise weight [C, 1, K], norm [C] (Sun et al., 2024)."""
    return weight.float().abs() * (norm[:, None, None] if weight.dim() == 3 else norm)


def taylor(weight: Tensor, squared_gradient: Tensor) -> Tensor:
    """w² F: what the loss would gain to second order, with the Fisher diagonal F (LeCun et al., 1989)."""
    return weight.float().square() * squared_gradient


def flap(weight: Tensor, variance: Tensor) -> Tensor:
    """Var(x_j) Σ_i w_ij² of each input of out_proj: weight [out, in], variance [in] → [in] (FLAP, eq. 5)."""
    return variance * weight.float().square().sum(0)


def last(B: Tensor, C: Tensor, gain: Tensor) -> Tensor:
    """Σ gain² ‖B_n‖² ‖C_n‖² of each state, its H∞ norm without data (LAST, eq. 7).

    B, C [groups, N, in] are the rows that make them, gain [channels, N] what a channel's decay makes of an input.
    """
    return (B.float().square().sum(-1) * C.float().square().sum(-1)).sum(0) * gain.square().sum(0)


def standardised(score: Tensor) -> Tensor:
    """The z-score of each entry of [n] (FLAP, AL-AM)."""
    return (score - score.mean()) / score.std().clamp_min(torch.finfo(score.dtype).tiny)


def tail_share(score: Tensor) -> Tensor:
    """s_i over the sum of all s_j ≥ s_i, [n], at most 1, which the highest has (LAST)."""
    above = torch.where(score >= score[:, None], score, 0).sum(1)
    return score / above.clamp_min(torch.finfo(score.dtype).tiny)


def cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos of each token's vectors [tokens, d] before and after a block, over tokens: a scalar (ShortGPT)."""
    return 1 - cosine_similarity(before.double(), after.double(), dim=-1).mean()


def per_unit(values: Tensor, units: Tensor) -> Tensor:
    """The sum of values [width] over the indices that each unit owns, units [units, indices] → [units]."""
    return values.double()[units].sum(1).float()


def votes(saliency: Tensor, lowest: Callable[[Tensor], Tensor]) -> Tensor:
    """Minus the number of tokens at which each entry is among the `lowest`, [tokens, …] → […] (SparseSSM, first score).

    The first token, before which all states are zero, has no say.
    """
    total = torch.zeros_like(saliency[0], dtype=torch.float32)
    for each in saliency[1:]:
        total -= lowest(each).view_as(total).float()
    return total


def fading(energy: Tensor, decay: Tensor) -> Tensor:
    """Σ_t δ_t² S_t / (t + 1) of energies S and decays δ [tokens, …] → […]: SparseSSM's second score, up to a factor."""
    total = torch.zeros_like(energy[0], dtype=torch.float64)
    for t, (each, left) in enumerate(zip(energy, decay, strict=True)):
        total += left.double().square() * each.double() / (t + 1)
    return total.float()

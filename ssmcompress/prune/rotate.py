"""A basis for the states of Mamba-2 in which few of them do the work of all."""

import torch
from torch import Tensor

NOTHING = torch.finfo(torch.float32).tiny  # a state of less is never held, or never read


def bases(held: Tensor, read: Tensor, fewer: int) -> tuple[Tensor, Tensor]:
    """The bases of B and of C [groups, fewer, states] float32, of which the scan loses least with so few states.

    held [groups, states, states] is E[h hᵀ], read is E[C Cᵀ]. All states of a head decay alike, so that a scan of W B
    and V C is, exactly, the scan of B and C with the state projected by Vᵀ W: an oblique projector, since W Vᵀ = 1.
    The one of least tr[(1 - Vᵀ W) E[h hᵀ] (1 - Vᵀ W)ᵀ E[C Cᵀ]] comes from balanced truncation: with L Lᵀ and R Rᵀ the
    two moments and Rᵀ L = U Σ Yᵀ, it is W = Σ^-½ Uᵀ Rᵀ and Vᵀ = L Y Σ^-½ of the largest values, and it loses the sum of
    the squares of the others.
    """
    L, R, U, values, Y = _balanced(held, read)
    scale = values.clamp_min(torch.finfo(values.dtype).eps * values[:, :1]).rsqrt()[:, :fewer]
    scale = scale.where(values[:, :fewer] > NOTHING, 0)
    B = scale[:, :, None] * (U[:, :, :fewer].mT @ R.mT)
    C = scale[:, :, None] * (Y[:, :fewer] @ L.mT)
    return B.float(), C.float()


def worths(held: Tensor, read: Tensor) -> Tensor:
    """What the scan would lose without each state of the best basis, [states] float32, summed over groups: Σ²."""
    return _balanced(held, read)[3].square().sum(0).float()


def _balanced(held: Tensor, read: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """L, R, and U, Σ and Yᵀ of Rᵀ L."""
    L, R = _root(held), _root(read)
    return (L, R, *torch.linalg.svd(R.mT @ L))


def _root(moment: Tensor) -> Tensor:
    """A square root of a moment [groups, N, N], float64; what rounding made negative is zero."""
    values, vectors = torch.linalg.eigh(moment.double())
    return vectors * values.clamp_min(0).sqrt()[:, None]

"""A basis for the states of Mamba-2 in which few of them do the work of all."""

import torch
from torch import Tensor


def bases(held: Tensor, read: Tensor, fewer: int) -> tuple[Tensor, Tensor]:
    """The bases of B and of C [groups, fewer, states] float32, of which the scan loses least with so few states.

    held [groups, states, states] is E[h hᵀ], read is E[C Cᵀ]. All states of a head decay alike, so that a scan of W B
    and V C is, exactly, the scan of B and C with the state projected by Vᵀ W: an oblique projector, since W Vᵀ = 1.
    The one of least tr[(1 - Vᵀ W) E[h hᵀ] (1 - Vᵀ W)ᵀ E[C Cᵀ]] comes from balanced truncation: with L Lᵀ and R Rᵀ the
    two moments and Rᵀ L = U Σ Yᵀ, it is W = Σ^-½ Uᵀ Rᵀ and Vᵀ = L Y Σ^-½ of the largest values, and it loses the sum of
    the squares of the others.
    """
    L, R = _root(held), _root(read)
    U, values, Y = torch.linalg.svd(R.mT @ L)
    scale = values[:, :fewer].clamp_min(torch.finfo(values.dtype).eps * values[:, :1]).rsqrt()
    B = scale[:, :, None] * (U[:, :, :fewer].mT @ R.mT)
    C = scale[:, :, None] * (Y[:, :fewer] @ L.mT)
    return B.float(), C.float()


def _root(moment: Tensor) -> Tensor:
    """A square root of a moment [groups, N, N], float64; what rounding made negative is zero."""
    values, vectors = torch.linalg.eigh(moment.double())
    return vectors * values.clamp_min(0).sqrt()[:, None]

"""How much each token of one prompt matters: a score [L], from a mixer's output or from what its scan took in."""

import torch
from torch import Tensor

from ssmcompress.arch.scan import Scan
from ssmcompress.kernels.reference import step_size

BLOCK = 256  # tokens at a time, where a score needs a number for every state


def importance(output: Tensor, kind: str) -> Tensor:
    """output [L, d] of a mixer: mean of its positive part (clip), or of all; l1, l2 (Zhan et al., 2024, eq. 5)."""
    if kind == "clip":
        return output.float().clamp_min(0).mean(-1)
    if kind == "mean":
        return output.float().mean(-1)
    return output.float().norm(p=int(kind.removeprefix("l")), dim=-1)


def influence(scan: Scan) -> Tensor:
    """How much the last token's output would change without each: the largest over channels (Simba, 2025).

    |C_T exp(A ΔΣ) Δ_t B_t x_t| for one row of a scan, ΔΣ the steps from t to the last; without a scan of its own.
    """
    delta = step_size(scan.dt[0].float(), scan.dt_bias, scan.limit)
    left = delta.flip(0).cumsum(0).flip(0) - delta
    heads = scan.x.shape[2] // scan.B.shape[2]
    last = scan.C[0, -1].float()
    found = []
    for start in range(0, len(delta), BLOCK):
        part = slice(start, start + BLOCK)
        read = torch.exp(left[part, :, None] * scan.A) * (scan.B[0, part].float() * last).repeat_interleave(heads, 1)
        weight = (read.sum(-1) * delta[part]).abs()
        found.append((weight * scan.x[0, part].float().abs().amax(-1)).amax(-1))
    return torch.cat(found)


def energy(scan: Scan) -> Tensor:
    """The squared influence of each token on all outputs from its own on, summed over channels.

    A column of the hidden attention matrix (Ali et al., 2024) without the matrix: the Gramian of what is read later,
    Q_t = C_t C_tᵀ + a_{t+1} a_{t+1}ᵀ ⊙ Q_{t+1}, goes backwards, and the energy is Δ² x² Bᵀ Q B. One row of a scan.
    """
    delta = step_size(scan.dt[0].float(), scan.dt_bias, scan.limit)
    heads = scan.x.shape[2] // scan.B.shape[2]
    states, device = scan.B.shape[-1], scan.B.device
    decayed = torch.zeros(scan.x.shape[2], states, states, device=device)
    found = torch.empty(len(delta), device=device)
    for t in reversed(range(len(delta))):
        B, C = (part[0, t].float().repeat_interleave(heads, 0) for part in (scan.B, scan.C))
        gramian = decayed + C[:, :, None] * C[:, None]
        read = torch.einsum("hn,hnm,hm->h", B, gramian, B)
        found[t] = (read * delta[t].square() * scan.x[0, t].float().square().sum(-1)).sum()
        a = torch.exp(delta[t, :, None] * scan.A).expand(-1, states)
        decayed = a[:, :, None] * a[:, None] * gramian
    return found

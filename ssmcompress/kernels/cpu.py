"""Portable kernels in plain torch: the chunked Mamba-1 scan with its own backward, and the Mamba-2 chunk algorithm.

They run on every device and dtype torch has, sum in float32 (float64 for float64 input) and carry state in and out.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmcompress.kernels import reference
from ssmcompress.kernels.chunks import ChunkScan

SCAN_CHUNK = 16
SSD_CHUNK = 64


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, left: Tensor | None = None, silu: bool = True
) -> Tensor:
    """Causal depthwise convolution, then SiLU: x [B, L, C], weight [C, K], left [B, C, K-1] → [B, L, C]."""
    kernel, length = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, kernel - 1, 0)) if left is None else torch.cat([left.to(x.dtype).transpose(1, 2), x], 1)
    taps = weight.to(x.dtype)
    y = padded[:, :length] * taps[:, 0]
    for k in range(1, kernel):
        y = torch.addcmul(y, padded[:, k : k + length], taps[:, k])
    if bias is not None:
        y = y + bias.to(x.dtype)
    return F.silu(y) if silu else y


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1 scan: u, dt, z [B, L, D], A [D, N], B, C [B, L, N], state [B, D, N] → y, state (Mamba, alg. 2)."""
    work = accumulator(u)
    wide = u.to(work)
    delta = F.softplus(dt.to(work) if dt_bias is None else dt.to(work) + dt_bias.to(work))
    if state is None:
        state = wide.new_zeros(u.shape[0], *A.shape)
    with _exact(u):
        y, state = _Scan.apply(wide, delta, A.to(work), B.to(work), C.to(work), state.to(work))
    if D is not None:
        y = y + D.to(work) * wide
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(u.dtype), state


def selective_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> Tensor:
    """One token of :func:`selective_scan`: u, dt, z [B, D], B, C [B, N], state [B, D, N] in place → y [B, D]."""
    work = accumulator(u)
    gate = None if z is None else z.to(work)
    y = reference.selective_step(state, u.to(work), dt.to(work), A, B.to(work), C.to(work), D, gate, dt_bias)
    return y.to(u.dtype)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2 scan by chunks: x [B, L, H, P], dt [B, L, H], A [H], B, C [B, L, G, N] → y, state (Mamba-2, §6).

    Matrices are multiplied in the dtype of x (:class:`chunks.ChunkScan`).
    """
    with _exact(x):
        batch, length, heads, width = x.shape
        groups, size = B.shape[2:]
        work = accumulator(x)
        if state is None:
            state = torch.zeros(batch, heads, width, size, dtype=work, device=x.device)
        if x.numel() == 0:
            return torch.zeros_like(x), state
        delta = reference.step_size(dt.to(work), dt_bias, dt_limit)
        chunk = min(SSD_CHUNK, length)
        pad = -length % chunk

        def blocks(tensor: Tensor, *shape: int) -> Tensor:
            padded = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad)) if pad else tensor
            return padded.reshape(batch, -1, chunk, *shape)

        y, state = ChunkScan.apply(
            blocks(x, groups, heads // groups, width),
            blocks(delta, groups, heads // groups),
            A.to(work).view(groups, -1),
            blocks(B, groups, size),
            blocks(C, groups, size),
            state.to(work).view(batch, groups, -1, width, size),
        )
        y = y.reshape(batch, -1, heads, width)[:, :length]
        if D is not None:
            y = torch.addcmul(y, x, D.to(x.dtype)[:, None])
        return y, state.reshape(batch, heads, width, size)


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """One token of :func:`ssd`: x [B, H, P], dt [B, H], B, C [B, G, N], state [B, H, P, N] in place → y [B, H, P]."""
    work = accumulator(x)
    y = reference.ssd_step(state, x.to(work), dt.to(work), A, B.to(work), C.to(work), D, dt_bias, dt_limit)
    return y.to(x.dtype)


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64 input, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _exact(tensor: Tensor) -> AbstractContextManager[Any]:
    """No autocast inside; some devices (meta) have none to switch off."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class _Scan(torch.autograd.Function):
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t, y_t = C_t · h_t; only the states between chunks are kept."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, state):  # type: ignore[no-untyped-def]
        y = torch.empty_like(u)
        kept = []
        for span in _spans(u.shape[1]):
            kept.append(state)
            states, _ = _chunk_states(u[:, span], delta[:, span], A, B[:, span], state)
            y[:, span] = torch.einsum("lbdn,bln->bld", states, C[:, span])
            state = states[-1]
        ctx.save_for_backward(u, delta, A, B, C, *kept)
        return y, state.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):  # type: ignore[no-untyped-def]
        u, delta, A, B, C, *kept = ctx.saved_tensors
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(u)
        grad_B, grad_C, grad_A = torch.empty_like(B), torch.empty_like(C), torch.zeros_like(A)
        carried = grad_state.clone()
        for span, state in reversed(list(zip(_spans(u.shape[1]), kept, strict=True))):
            states, decay = _chunk_states(u[:, span], delta[:, span], A, B[:, span], state)
            before = torch.cat([state[None], states[:-1]])
            grads = torch.einsum("bld,bln->lbdn", grad_y[:, span], C[:, span])
            for t in reversed(range(len(grads))):
                grads[t] += carried
                carried = grads[t] * decay[t]
            grad_C[:, span] = torch.einsum("bld,lbdn->bln", grad_y[:, span], states)
            grad_B[:, span] = torch.einsum("lbdn,bld->bln", grads, delta[:, span] * u[:, span])
            inflow = torch.einsum("lbdn,bln->bld", grads, B[:, span])
            exponent = grads * before * decay
            grad_u[:, span] = inflow * delta[:, span]
            grad_delta[:, span] = inflow * u[:, span] + torch.einsum("lbdn,dn->bld", exponent, A)
            grad_A += torch.einsum("lbdn,bld->dn", exponent, delta[:, span])
        return grad_u, grad_delta, grad_A, grad_B, grad_C, carried


def _spans(length: int) -> list[slice]:
    return [slice(start, min(start + SCAN_CHUNK, length)) for start in range(0, length, SCAN_CHUNK)]


def _chunk_states(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States after each token of a chunk and their decays [L, B, D, N], time first: a step is contiguous."""
    decay = torch.exp(delta.transpose(0, 1)[..., None] * A)
    states = (delta * u).transpose(0, 1)[..., None] * B.transpose(0, 1)[:, :, None]
    for t in range(len(states)):
        state = states[t].addcmul_(decay[t], state)
    return states, decay

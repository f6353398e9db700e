"""The truth every fast kernel is measured against: the recurrences written out one token at a time, in any dtype.

Layout is channels last. A padded position arrives as u = 0 and dt = -1e4, so that Δ = 0 and the state passes through.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = -1e4


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, left: Tensor | None = None, silu: bool = True
) -> Tensor:
    """Causal depthwise convolution, then SiLU: x [B, L, C], weight [C, K], bias [C], left [B, C, K-1] → [B, L, C]."""
    batch, length, channels = x.shape
    kernel = weight.shape[1]
    past = x.new_zeros(batch, kernel - 1, channels) if left is None else left.to(x.dtype).transpose(1, 2)
    padded = torch.cat([past, x], dim=1)
    terms = [padded[:, k : k + length] * weight[:, k].to(x.dtype) for k in range(kernel)]
    y = torch.stack(terms).sum(0)
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
    if state is None:
        state = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for t in range(u.shape[1]):
        state, y = _selective_step(state, u[:, t], dt[:, t], A, B[:, t], C[:, t], D, dt_bias)
        outputs.append(y)
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u)
    return (y if z is None else y * F.silu(z)).to(u.dtype), state


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
    new, y = _selective_step(state, u, dt, A, B, C, D, dt_bias)
    state.copy_(new)
    return (y if z is None else y * F.silu(z)).to(u.dtype)


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
    """Mamba-2 scan: x [B, L, H, P], dt [B, L, H], A [H], B, C [B, L, G, N] → y, state [B, H, P, N] (Mamba-2, eq. 2)."""
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        state, y = _ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, dt_bias, dt_limit)
        outputs.append(y)
    return (torch.stack(outputs, dim=1) if outputs else x).to(x.dtype), state


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
    new, y = _ssd_step(state, x, dt, A, B, C, D, dt_bias, dt_limit)
    state.copy_(new)
    return y.to(x.dtype)


def step_size(dt: Tensor, bias: Tensor | None, limit: tuple[float, float] = (0.0, float("inf"))) -> Tensor:
    """Δ = softplus(dt + bias) within limit, and exactly 0 where dt marks padding (dt = PAD), whatever the limit."""
    delta = F.softplus(dt if bias is None else dt + bias.to(dt.dtype))
    if limit == (0.0, float("inf")):
        return delta
    return torch.where(dt < PAD / 2, delta, delta.clamp(*limit))  # bfloat16 rounds PAD towards zero


def _selective_step(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    delta = step_size(dt, dt_bias)
    state = torch.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None]
    y = (state * C[:, None]).sum(-1)
    return state, (y if D is None else y + D * u)


def _ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    heads = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(heads, dim=1), C.repeat_interleave(heads, dim=1)
    delta = step_size(dt, dt_bias, dt_limit)
    state = torch.exp(delta * A)[..., None, None] * state + (delta[..., None] * x)[..., None] * B[:, :, None]
    y = (state * C[:, :, None]).sum(-1)
    return state, (y if D is None else y + D[:, None] * x)

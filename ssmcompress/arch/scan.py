"""What the scan of a mixer takes in, and how its steps are lengthened."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssmcompress.kernels.reference import PAD, step_size


class Scan(NamedTuple):
    """What a mixer's scan takes in, in the form both families share: a Mamba-1 channel is a head of one channel.

    x [B, L, H, P], dt [B, L, H] before bias and softplus, A [H, N] or [H, 1], B and C [B, L, G, N], dt_bias [H].
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    dt_bias: Tensor | None
    limit: tuple[float, float] = (0.0, float("inf"))

    def states(self) -> Iterator[Tensor]:
        """The state [B, H, P, N] after each token, one token at a time (Mamba-2, eq. 2)."""
        return (state for _, state in self.steps())

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """exp(Δ A) [B, H, N] or [B, H, 1] of each token, and the state [B, H, P, N] after it."""
        heads = self.x.shape[2] // self.B.shape[2]
        delta = step_size(self.dt, self.dt_bias, self.limit)
        state = self.x.new_zeros(self.x.shape[0], *self.x.shape[2:], self.B.shape[-1])
        for t in range(self.x.shape[1]):
            step = delta[:, t, :, None]
            b = self.B[:, t].repeat_interleave(heads, dim=1)[:, :, None]
            left = torch.exp(step * self.A)
            state = left[:, :, None] * state + step[..., None] * self.x[:, t, :, :, None] * b
            yield left, state


def stride(
    dt: Tensor, B: Tensor, strides: Tensor | None, bias: Tensor | None, limit: tuple[float, float] = (0.0, float("inf"))
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """dt [B, L, H], B [B, L, …] and limit with which a state decays `strides` [B, L] times over a token, read in once.

    Its step Δ is so many times as long, and B so much smaller: Δ B x stays.
    """
    if strides is None:
        return dt, B, limit
    times = strides.to(dt.dtype)
    steps = step_size(dt, bias, limit) * times[..., None]
    longer = steps + torch.log(-torch.expm1(-steps)) - (0 if bias is None else bias)  # softplus, undone
    longer = torch.where(steps > 0, longer, PAD).to(dt.dtype)
    return longer, B / times.view(*times.shape, *(1,) * (B.dim() - 2)), (0.0, float("inf"))

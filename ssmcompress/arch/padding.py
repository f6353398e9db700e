"""Padding in a batch: positions that must leave no trace in a convolution or a state."""

import torch
from torch import Tensor

from ssmcompress.kernels.reference import PAD


def real_positions(mask: Tensor | None, length: int) -> Tensor | None:
    """The padding mask [B, L] of the tokens at hand as booleans, or None where nothing is padding."""
    if mask is None or mask.dim() != 2:
        return None
    mask = mask[:, -length:].bool()
    return None if bool(mask.all()) else mask


def silence(tensor: Tensor, mask: Tensor | None, value: float = 0.0) -> Tensor:
    """Tensor [B, L, …] with its padded positions set to value."""
    return tensor if mask is None else tensor.masked_fill(~mask[..., None], value)


def hold(dt: Tensor, mask: Tensor | None) -> Tensor:
    """The dt [B, L, …] that makes padded positions pass the state through untouched."""
    return silence(dt, mask, PAD)


def begun(x: Tensor, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [B, L, C] and what came before it [B, C, K-1], with inputs [C, K-1] before the first real token of each row."""
    batch, _, channels = x.shape
    left = inputs.expand(batch, *inputs.shape)
    if mask is None:
        return x, left
    first = mask.int().argmax(1)
    places = first[:, None] + torch.arange(inputs.shape[1], device=x.device)
    whole = torch.cat([x.new_zeros(batch, inputs.shape[1], channels), x], dim=1)
    whole = whole.scatter(1, places[..., None].expand(-1, -1, channels), left.transpose(1, 2))
    return whole[:, inputs.shape[1] :], whole[:, : inputs.shape[1]].transpose(1, 2)

"""What makes up for removed units: the norm they shared, the projection that reads what is left, or its bias."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmcompress import parallel
from ssmcompress.calib.taps import observe

RIDGE = 0.01  # of the mean square of an input: how strongly the new weights are held to the old ones


def rescaled(norm: Any, alive: Tensor, energy: Tensor) -> Tensor:
    """The weight [D] of a norm whose mean is that of `alive` [D] alone, corrected for the energy that went.

    energy [D] is the mean square of what the dense norm takes in, times its gate where it has one. Each group's weight
    is scaled by the root of the mean energy of what stays over that of all, so that what stays comes out of the norm,
    on average, as large as before.
    """
    size = getattr(norm, "group_size", len(alive))
    stays, mean = alive.view(-1, size), energy.view(-1, size)
    left = (mean * stays).sum(1) / stays.sum(1)
    scale = (left / mean.mean(1).clamp_min(torch.finfo(mean.dtype).tiny)).sqrt()
    return (norm.weight.float().view_as(stays) * scale[:, None].to(norm.weight.device)).flatten()


def refitted(dense: nn.Module, cut: nn.Module, hidden: Sequence[Tensor]) -> Tensor:
    """The out_proj weight [d, D'] with which the cut block comes closest to the dense one on hidden [b, L, d].

    Least squares of the two projections' outputs, held to the old weights by a ridge.
    """
    weight = cast(Any, dense).mixer.out_proj.weight.float()
    narrow = cast(Any, cut).mixer.out_proj.weight.double()
    square = narrow.new_zeros(narrow.shape[1], narrow.shape[1])
    cross = torch.zeros_like(narrow)
    for rows in hidden:
        x, y = _inputs(cut, rows), F.linear(_inputs(dense, rows), weight)
        square += (x.T @ x).double()
        cross += (y.T @ x).double()
    square, cross = parallel.total(square), parallel.total(cross)
    ridge = RIDGE * square.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    square.diagonal().add_(ridge)
    solved = torch.linalg.solve(square, (cross + ridge * narrow).T).T
    return solved.float()


def compensated(projection: Any, gone: Tensor, mean: Tensor) -> Tensor:
    """The bias [d] of a projection that stands in for the mean [D] of its inputs that go, indices `gone` (FLAP, eq. 6).

    It is W E[x_j] of those, and the bias that the projection has.
    """
    bias = projection.weight.float()[:, gone] @ mean.to(projection.weight.device)[gone]
    return bias if projection.bias is None else bias + projection.bias.float()


def _inputs(block: nn.Module, hidden: Tensor) -> Tensor:
    """What the block's out_proj takes in, [tokens, width] float32."""
    seen: list[Tensor] = []

    def watch(module: str, x: Any) -> None:
        if module == "out_proj":
            seen.append(x.flatten(0, 1).float())

    with observe(cast(Any, block).mixer, watch):
        block(hidden)
    return seen[0]

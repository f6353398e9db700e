"""Groups of B and C that become one: the mean of those that follow one another."""

import torch
from torch import Tensor

from ssmcompress.arch.axis import Axis


def merged(axis: Axis, name: str, tensor: Tensor, after: int) -> Tensor:
    """A tensor of a block in which every unit has the mean of its run, of which there are `after`: float32 at least.

    It is the mean of weights, before the convolution and its activation; that of B and C themselves only as far as
    groups are alike (SSM-Pruner, which merges the B and C of heads).
    """
    made = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    for part in axis.slices:
        if part.tensor == name:
            owned = torch.tensor([part.indices(unit) for unit in range(axis.size)], device=tensor.device)
            rows = made.movedim(part.dim, 0)  # a view
            runs = rows[owned].unflatten(0, (after, -1))  # [runs, units, indices, …]
            rows[owned] = runs.mean(1, keepdim=True).expand_as(runs).flatten(0, 1)
    return made

"""Which whole blocks, or scans, may go: so that a scan is left, and tokens that leave still save something."""

import torch
from torch import Tensor

from ssmcompress.arch.base import Arch
from ssmcompress.arch.registry import arch_for
from ssmcompress.policy import WATCHING
from ssmcompress.steps import LAYER, SSM


def units(arch: Arch, axis: str) -> Tensor:
    """The layers [layers] (bool) that are units of the axis of whole blocks, or of that of their scans."""
    return torch.tensor([axis == LAYER or block["state"] > 0 for block in arch.sizes])


def fewest(arch: Arch, axis: str) -> int:
    """How many units of an axis must stay: more than one where tokens leave after blocks, or by what scans hold."""
    policy = arch.policy if axis in (LAYER, SSM) else None
    if policy is None:
        return 1
    if axis == LAYER:
        return 2
    return len(policy.layers) if policy.method in WATCHING else 1


def stands(arch: Arch, axis: str, keep: Tensor) -> bool:
    """Whether these units [layers] (bool) leave a scan, if there is one, and what the token policy needs."""
    there = units(arch, SSM)
    scans, policy = there & keep, arch.policy
    if there.any() and not scans.any():
        return False
    if policy is None:
        return True
    layers = keep.nonzero().flatten().tolist() if axis == LAYER else list(range(arch.layers))
    left = policy.within(layers).layers
    return bool(left) and (policy.method not in WATCHING or all(bool(scans[layers[anchor]]) for anchor in left))


def may_go(arch: Arch, axis: str, there: Tensor) -> list[int]:
    """The units that may go next, of those that are there, [layers] bool."""
    return [unit for unit in there.nonzero().flatten().tolist() if stands(arch, axis, less(there, unit))]


def strongest(arch: Arch, axis: str, score: Tensor, after: int) -> Tensor:
    """The `after` units of highest score [layers], of equals the first, but for those that may not go: bool [layers].

    They go one by one, for what may go depends on what is left.
    """
    keep = units(arch, axis)
    weakest = score.argsort(descending=True, stable=True).flip(0).tolist()
    while int(keep.sum()) > after:
        keep = less(keep, next(unit for unit in weakest if keep[unit] and stands(arch, axis, less(keep, unit))))
    return keep


def less(there: Tensor, gone: int) -> Tensor:
    """The units [layers] (bool) without one."""
    return there & (torch.arange(len(there)) != gone)


def unreduced(arch: Arch) -> Arch:
    """The model of which no token leaves: any block of it, or scan, can be thought away."""
    return arch if arch.policy is None else arch_for(arch.resized(arch.sizes, rotated=arch.rotated))

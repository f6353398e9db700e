"""The slow truth beside `surgery`: the dense model in which removed units are silent, and norms count only the others.

Units whose weights are zero still widen the mean of a norm that they pass: the gated norm of Mamba-2, and the
weightless norms of Falcon Mamba. There the sum is divided by the number of entries that stay. Rotated states are the
dense ones, of which only a projection is read. Groups that went are copies of the one that their heads read instead.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmcompress.arch.base import ROTATION, Arch
from ssmcompress.arch.mamba2 import Mamba2Mixer
from ssmcompress.arch.surgery import removed
from ssmcompress.edits import Add, Edit, Keep
from ssmcompress.steps import GROUP, SSM, WIDTH

WEIGHTLESS = {"state": ("b_layernorm", "c_layernorm"), "dt_rank": ("dt_layernorm",)}


class KeptNorm(nn.Module):
    """An RMS norm over groups of entries whose mean counts only those `alive`, with a gate where it has a weight."""

    def __init__(self, norm: Any, alive: Tensor) -> None:
        super().__init__()
        self.weight = norm.weight if isinstance(norm.weight, nn.Parameter) else None
        self.group_size = getattr(norm, "group_size", len(alive))
        self.eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        self.alive = alive & getattr(norm, "alive", alive)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x [..., groups · group_size] → the same shape."""
        wide = x.float() if gate is None else x.float() * F.silu(gate.float())
        grouped = wide.unflatten(-1, (-1, self.group_size))
        counted = self.alive.view(-1, self.group_size).sum(-1, keepdim=True)
        variance = grouped.square().sum(-1, keepdim=True) / counted
        y = (grouped * torch.rsqrt(variance + self.eps)).flatten(-2).to(x.dtype)
        return y if self.weight is None else self.weight * y


class ProjectedMixer(Mamba2Mixer):
    """Mamba-2 that reads of its states what `projector` [groups, states, states] leaves."""

    projector: Tensor

    def _basis(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        return B, torch.einsum("blgn,gnm->blgm", C, self.projector)


@torch.no_grad()
def mask(model: nn.Module, arch: Arch, edits: Iterable[Edit]) -> None:
    """Silences the removed units of a dense model in place, so that it computes what the smaller one does."""
    blocks, edits = arch.blocks(model), list(edits)
    added = {edit.tensor: edit.values for edit in edits if isinstance(edit, Add)}
    for layer, block in enumerate(blocks):
        into, out = (added.get(arch.prefix(layer) + name) for name in ROTATION)
        if into is not None and out is not None:
            read = readers(edits, layer, len(into))
            block.mixer.__class__, block.mixer.projector = ProjectedMixer, (out.mT @ into)[read]
    for edit in edits:
        if not isinstance(edit, Keep):
            continue
        if edit.axis == WIDTH:
            _mask_width(model, arch, edit.keep)
        elif edit.layer is None:
            for layer in (~edit.keep).nonzero().flatten().tolist():
                mixer = blocks[layer].mixer
                for tensor in _readout(mixer) if edit.axis == SSM else mixer.out_proj.parameters():
                    tensor.zero_()
        elif edit.axis == GROUP:
            _share_groups(blocks[edit.layer], arch, edit)
        else:
            _mask_block(blocks[edit.layer], arch, edit)


def readers(edits: Iterable[Edit], layer: int, groups: int) -> Tensor:
    """The group [groups] that the heads of each read: its run's that stays, or its own."""
    for edit in edits:
        if isinstance(edit, Keep) and (edit.axis, edit.layer) == (GROUP, layer):
            stays = edit.keep.nonzero().flatten()
            return stays.repeat_interleave(groups // len(stays))
    return torch.arange(groups)


def _share_groups(block: nn.Module, arch: Arch, edit: Keep) -> None:
    axis = arch.axes(edit.layer or 0)[GROUP]
    read = readers([edit], edit.layer or 0, axis.size)
    parameters = dict(block.named_parameters())
    for part in axis.slices:
        rows = parameters[part.tensor].transpose(0, part.dim)
        for group, other in enumerate(read.tolist()):
            rows[part.indices(group)] = rows[part.indices(other)]


def _mask_width(model: nn.Module, arch: Arch, keep: Tensor) -> None:
    blocks = arch.blocks(model)
    for module in (model, *blocks):
        for name, parameter in module.named_parameters():
            for dim, gone in removed(arch.residual(), keep, name).items():
                parameter.index_fill_(dim, gone, 0.0)
    for block in cast(Any, blocks):
        block.norm = KeptNorm(block.norm, keep)
    cast(Any, model).backbone.norm_f = KeptNorm(arch.final_norm(model), keep)


def _readout(mixer: Any) -> list[Tensor]:
    """The rows of C, by which the states are read: in Mamba-2 those of the convolution, which C passes; none at all."""
    if hasattr(mixer, "x_proj"):
        return [mixer.x_proj.weight[-mixer.ssm_state_size :]]
    rows = mixer.n_groups * mixer.ssm_state_size if hasattr(mixer, "n_groups") else 0
    return [parameter[len(parameter) - rows :] for parameter in mixer.conv1d.parameters()]


def _mask_block(block: nn.Module, arch: Arch, edit: Keep) -> None:
    axis = arch.axes(edit.layer or 0)[edit.axis]
    for name, parameter in block.named_parameters():
        for dim, gone in removed(axis, edit.keep, name).items():
            parameter.index_fill_(dim, gone, 0.0)
    mixer = cast(Any, block.mixer)
    for silent in removed(axis, edit.keep, "mixer.norm.weight").values():
        alive = torch.ones(len(mixer.norm.weight), dtype=torch.bool).index_fill(0, silent, False)
        mixer.norm = KeptNorm(mixer.norm, alive)
    for name in WEIGHTLESS.get(edit.axis, ()):
        if hasattr(mixer, name):
            setattr(mixer, name, KeptNorm(getattr(mixer, name), edit.keep))

"""Removes units from a model: every tensor that an axis couples is cut, and what it cuts keeps its bits."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch, Axis, mixers, use_backend
from ssmcompress.arch.registry import arch_for
from ssmcompress.edits import Edit, Keep, Mask, Replace
from ssmcompress.errors import InputError, UnsupportedError

LAYER, SSM, WIDTH = WHOLE = "layer", "ssm", "width"  # axes of the model: blocks, their scans, residual dimensions
BLOCK = re.compile(r"backbone\.layers\.(\d+)\.(.+)")


class Surgery:
    """What is left of a model when only some units stay. Names and indices are the source's unless called new.

    Raises UnsupportedError for an axis the model does not have or a shape that no config says, InputError for edits of
    another number of units or layers.
    """

    def __init__(self, arch: Arch, edits: Iterable[Edit]) -> None:
        self.source = arch
        self.keeps = [edit for edit in edits if isinstance(edit, Keep)]
        for edit in self.keeps:
            self._check(edit)
        kept = {edit.axis: edit.keep for edit in self.keeps if edit.layer is None}
        blocks, scans = (kept.get(axis, torch.ones(arch.layers, dtype=torch.bool)) for axis in (LAYER, SSM))
        self.layers = [layer for layer in range(arch.layers) if blocks[layer]]
        self.width = int(kept[WIDTH].sum()) if WIDTH in kept else arch.width
        self.silent = {layer for layer in self.layers if arch.has_scan(layer) and not scans[layer]}

    @cached_property
    def arch(self) -> Arch:
        """The family, bound to the config of what is left."""
        sizes = [dict(self.source.sizes[layer]) for layer in self.layers]
        for edit in self.keeps:
            if edit.layer in self.layers:
                sizes[self.layers.index(edit.layer)][edit.axis] = int(edit.keep.sum())
        for layer in self.silent:
            sizes[self.layers.index(layer)] |= dict.fromkeys(self.source.scan_axes, 0)
        return arch_for(self.source.narrowed(self.width).resized(sizes))

    def names(self, tensors: Iterable[str]) -> dict[str, str]:
        """New name → name, of the tensors that stay, in their order."""
        found = {}
        for name in tensors:
            inside = BLOCK.fullmatch(name)
            if inside is None:
                found[name] = name
            elif (layer := int(inside[1])) in self.layers and not (
                layer in self.silent and inside[2] in self.source.scan_only
            ):
                found[self.source.prefix(self.layers.index(layer)) + inside[2]] = name
        return found

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of a tensor."""
        for dim, indices in self.indices(name, tensor.shape).items():
            tensor = tensor.index_select(dim, indices.to(tensor.device))
        return tensor

    def shape(self, name: str, shape: torch.Size) -> torch.Size:
        """The shape of what stays of a tensor."""
        left = {dim: len(indices) for dim, indices in self.indices(name, shape).items()}
        return torch.Size(left.get(dim, size) for dim, size in enumerate(shape))

    def indices(self, name: str, shape: torch.Size) -> dict[int, Tensor]:
        """The indices that stay of a tensor of this shape, by the dimension that is cut."""
        inside = BLOCK.fullmatch(name)
        stays: dict[int, Tensor] = {}
        layer, tensor = inside.groups() if inside else (-1, name)
        for axis, keep in self._cuts(int(layer)):
            for dim, gone in removed(axis, keep, tensor).items():
                stays.setdefault(dim, torch.ones(shape[dim], dtype=torch.bool))[gone] = False
        return {dim: stay.nonzero().flatten() for dim, stay in stays.items()}

    def lift(self, edit: Edit, shapes: Mapping[str, torch.Size]) -> Edit:
        """An edit of what is left as an edit of the source, whose tensors have these shapes.

        What it says of removed entries is of no account: a mask keeps them, new values are zero there.
        """
        if isinstance(edit, Keep):
            return self._lift_units(edit)
        name = self.names(shapes)[edit.tensor]
        whole = edit.keep if isinstance(edit, Mask) else edit.values
        full = torch.full(shapes[name], isinstance(edit, Mask), dtype=whole.dtype)
        where = self.indices(name, shapes[name])
        grid = [where.get(dim, torch.arange(size)) for dim, size in enumerate(shapes[name])]
        full[torch.meshgrid(*grid, indexing="ij")] = whole.cpu()
        return Mask(name, full) if isinstance(edit, Mask) else Replace(name, full)

    def operate(self, model: PreTrainedModel) -> PreTrainedModel:
        """The smaller model, with copies of what stays of the weights, on the same device and kernels."""
        state = {key: tensor for key, tensor in model.state_dict().items() if key not in tied(model)}
        small = self.arch.assemble(
            {new: self.cut(old, state[old]).clone() for new, old in self.names(state).items()}, model.device
        )
        small.generation_config = model.generation_config
        use_backend(small, next(mixers(model)).backend)
        return small.train(model.training)

    def _cuts(self, layer: int) -> Iterator[tuple[Axis, Tensor]]:
        """What is cut of one block (or outside, -1), axis by axis, and which units of it stay."""
        for edit in self.keeps:
            if edit.layer == layer:
                yield self.source.axes(layer)[edit.axis], edit.keep
            elif edit.axis == WIDTH:
                yield self.source.residual(), edit.keep
        if layer in self.silent:
            yield Axis(SSM, 1, self.source.scan_rows(layer), None), torch.zeros(1, dtype=torch.bool)

    def _lift_units(self, edit: Keep) -> Keep:
        layer = None if edit.layer is None else self.layers[edit.layer]
        if edit.axis in (LAYER, SSM):  # what it says of blocks that went is of no account
            keep = torch.full((self.source.layers,), edit.axis != LAYER)
            keep[self.layers] = edit.keep
            return replace(edit, keep=keep)
        before = next((each.keep for each in self.keeps if (each.axis, each.layer) == (edit.axis, layer)), None)
        keep = torch.ones(self._units(layer)[edit.axis], dtype=torch.bool) if before is None else before.clone()
        keep[keep.nonzero().flatten()] = edit.keep
        return replace(edit, layer=layer, keep=keep)

    def _units(self, layer: int | None) -> dict[str, int]:
        """How many units a Keep of each axis speaks of."""
        layers, width = self.source.layers, self.source.width
        return self.source.sizes[layer or 0] | {WIDTH: width, SSM: layers, LAYER: layers}

    def _check(self, edit: Keep) -> None:
        inside = edit.layer is None if edit.axis in WHOLE else edit.layer in range(self.source.layers)
        known = self._units(edit.layer if inside else None)
        if edit.axis not in known:
            raise UnsupportedError(
                f"{self.source.model_type} has no axis {edit.axis!r}.", hint=f"It has {', '.join(known)}."
            )
        if not inside or len(edit.keep) != known[edit.axis]:
            raise InputError(
                f"The edits choose among {len(edit.keep)} units in {edit.tensor}; the model has {known[edit.axis]}, and"
                f" {self.source.layers} layers.",
                hint="Are these the edits of another model?",
            )


def removed(axis: Axis, keep: Tensor, tensor: str) -> dict[int, Tensor]:
    """The indices of a block's tensor that go with the units that do not stay, by dimension."""
    gone: dict[int, list[int]] = {}
    for part in axis.slices:
        if part.tensor == tensor:
            into = gone.setdefault(part.dim, [])
            for unit in (~keep).nonzero().flatten().tolist():
                into += part.indices(unit)
    return {dim: torch.tensor(indices, dtype=torch.long) for dim, indices in gone.items()}


def tied(model: nn.Module) -> set[str]:
    """The names of a model's state dict that repeat another tensor."""
    return {"lm_head.weight"} if model.config.tie_word_embeddings else set()

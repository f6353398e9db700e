"""Removes units from a model and adds tensors to it: what an axis couples is cut together, and keeps its bits."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssmcompress.arch.axis import Axis
from ssmcompress.arch.base import BIAS, OFFSET, ROTATION, Arch
from ssmcompress.arch.mixer import mixers, use_backend
from ssmcompress.arch.registry import arch_for
from ssmcompress.edits import Add, Edit, Keep, Mask, Reduce, Replace
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.steps import LAYER, SSM, WHOLE, WIDTH

BLOCK = re.compile(r"backbone\.layers\.(\d+)\.(.+)")


class Surgery:
    """What is left of a model when only some units stay, and what is new. Names and indices are the source's unless
    called new.

    Raises UnsupportedError for an axis the model does not have or a shape that no config says, InputError for edits of
    another number of units or layers, or tensors that have no place.
    """

    def __init__(self, arch: Arch, edits: Iterable[Edit]) -> None:
        edits = list(edits)
        self.source = arch
        self.keeps = [edit for edit in edits if isinstance(edit, Keep)]
        self.added = {edit.tensor: edit.values for edit in edits if isinstance(edit, Add)}
        for edit in self.keeps:
            self._check(edit)
        kept = {edit.axis: edit.keep for edit in self.keeps if edit.layer is None}
        blocks, scans = (kept.get(axis, torch.ones(arch.layers, dtype=torch.bool)) for axis in (LAYER, SSM))
        self.layers = [layer for layer in range(arch.layers) if blocks[layer]]
        self.width = int(kept[WIDTH].sum()) if WIDTH in kept else arch.width
        self.silent = {layer for layer in self.layers if arch.has_scan(layer) and not scans[layer]}
        self.policy = next((edit.policy for edit in reversed(edits) if isinstance(edit, Reduce)), arch.policy)
        if self.policy is not None and max(self.policy.layers, default=0) >= arch.layers:
            raise InputError(
                f"Tokens are to leave after block {max(self.policy.layers)}; the model has {arch.layers}.",
                hint="The edits were made for another model.",
            )
        self._check_added()

    @cached_property
    def arch(self) -> Arch:
        """The family, bound to the config of what is left."""
        sizes = [dict(self.source.sizes[layer]) for layer in self.layers]
        self._require_alike()
        rotated = [self.source.rotated[layer] for layer in self.layers]
        for edit in self.keeps:
            if edit.layer in self.layers:
                sizes[self.layers.index(edit.layer)][edit.axis] = int(edit.keep.sum())
        for new, layer in enumerate(self.layers):
            basis = self.added.get(self.source.prefix(layer) + ROTATION[0])
            if layer in self.silent:
                rotated[new], sizes[new] = None, sizes[new] | dict.fromkeys(self.source.scan_axes, 0)
            elif basis is not None:
                rotated[new], sizes[new]["state"] = sizes[new]["state"], basis.shape[1]
        bias, offset = (any(name.endswith(new) for name in self.added) for new in (BIAS, OFFSET))
        policy = self.policy and self.policy.within(self.layers)
        narrow = self.source.narrowed(self.width)
        told = narrow.resized(sizes, out_proj_bias=bias, state_offset=offset, rotated=rotated, policy=policy)
        found = arch_for(told)
        if policy is not None:
            found.require_anchors(policy.layers, policy.method)
        return found

    def names(self, tensors: Iterable[str]) -> dict[str, str]:
        """New name → name, of the tensors that stay, in their order, and of those that are new."""
        found = {}
        for name in dict.fromkeys([*tensors, *self.added]):
            inside = BLOCK.fullmatch(name)
            if inside is None:
                found[name] = name
            elif (layer := int(inside[1])) in self.layers and not self._went(layer, inside[2]):
                found[self.source.prefix(self.layers.index(layer)) + inside[2]] = name
        return found

    def shapes(self, stored: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        """The shapes of the source's tensors, given, and of the new ones, before anything is cut."""
        return dict(stored) | {name: values.shape for name, values in self.added.items()}

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
        inside, stays = BLOCK.fullmatch(name), dict[int, Tensor]()
        layer, tensor = (-1, name) if inside is None else (int(inside[1]), inside[2])
        new = () if inside is None else self.source.additions(layer).get(tensor, ())
        for axis, keep in self._cuts(layer):
            for dim, gone in removed(axis, keep, tensor).items():
                stays.setdefault(dim, torch.ones(shape[dim], dtype=torch.bool))[gone] = False
            stays |= {dim: keep for dim, size in enumerate(new) if size == axis.name}
        return {dim: stay.nonzero().flatten() for dim, stay in stays.items()}

    def lift(self, edit: Edit, shapes: Mapping[str, torch.Size]) -> Edit:
        """An edit of what is left as an edit of the source, whose tensors have these shapes.

        What it says of removed entries is of no account: a mask keeps them, new values are zero there.
        """
        if isinstance(edit, Keep):
            return self._lift_units(edit)
        if isinstance(edit, Reduce):
            layers = tuple(self.layers[layer] for layer in edit.policy.layers)
            return Reduce(edit.policy.model_copy(update={"layers": layers}))
        whole = edit.keep if isinstance(edit, Mask) else edit.values
        if isinstance(edit, Add):
            name, shape = self._whole(edit)
        else:
            name = self.names(shapes)[edit.tensor]
            shape = self.shapes(shapes)[name]
        where = self.indices(name, shape)
        if not where and name in shapes:  # the whole of it is left
            return replace(edit, tensor=name)
        full = torch.full(shape, isinstance(edit, Mask), dtype=whole.dtype, device=whole.device)
        grid = [where.get(dim, torch.arange(size)) for dim, size in enumerate(shape)]
        full[torch.meshgrid(*grid, indexing="ij")] = whole
        if isinstance(edit, Mask):
            return replace(edit, tensor=name, keep=full)
        return Add(name, full) if name not in shapes else Replace(name, full)

    def _whole(self, edit: Add) -> tuple[str, torch.Size]:
        """The name of a new tensor in terms of the source, and its shape if nothing had been cut."""
        inside = BLOCK.fullmatch(edit.tensor)
        assert inside is not None
        layer = self.layers[int(inside[1])]
        sizes = zip(self.source.additions(layer)[inside[2]], edit.values.shape, strict=True)
        known = self._units(layer)
        return self.source.prefix(layer) + inside[2], torch.Size(known.get(str(name), size) for name, size in sizes)

    def operate(self, model: PreTrainedModel) -> PreTrainedModel:
        """The smaller model, with copies of what stays of the weights, on the same device and kernels."""
        state = {key: tensor for key, tensor in model.state_dict().items() if key not in tied(model)}
        names = self.names(state)
        for name, values in self.added.items():  # no narrower than the weights they meet
            state[name] = values.to(model.device, torch.promote_types(values.dtype, model.dtype))
        small = self.arch.assemble({new: self.cut(old, state[old]).clone() for new, old in names.items()}, model.device)
        small.generation_config = model.generation_config
        use_backend(small, next(mixers(model)).backend)
        return small.train(model.training)

    def _went(self, layer: int, tensor: str) -> bool:
        """Whether a tensor of a block went with its scan."""
        return layer in self.silent and tensor in self.source.scan_only

    def _cuts(self, layer: int) -> Iterator[tuple[Axis, Tensor]]:
        """What is cut of one block (or outside, -1), axis by axis, and which units of it stay."""
        for edit in self.keeps:
            if edit.layer == layer:
                yield self.source.axes(layer)[edit.axis], edit.keep
            elif edit.axis == WIDTH:
                yield self.source.residual(), edit.keep
        if layer in self.silent:
            yield self.source.scan(layer), torch.zeros(1, dtype=torch.bool)

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
        runs = self.source.runs(edit.axis, int(edit.keep.sum()))
        if edit.keep.numel() % runs or len(edit.keep.view(runs, -1).sum(1).unique()) > 1:
            raise InputError(
                f"The edits choose units in {edit.tensor} unevenly: of each of {runs} runs as many must stay.",
                hint="Make them again.",
            )

    def _check_added(self) -> None:
        for name, values in self.added.items():
            inside = BLOCK.fullmatch(name)
            known = inside is not None and int(inside[1]) < self.source.layers
            shape = self._place(int(inside[1]), inside[2]) if inside is not None and known else None
            if shape is None or not _fits(shape, values.shape):
                raise InputError(
                    f"The edits add {name} of the shape {list(values.shape)}, for which the model has no place.",
                    hint="Are these the edits of another model?",
                )

    def _place(self, layer: int, name: str) -> tuple[int | None, ...] | None:
        """The shape that a new tensor must have, None where it may be any; None where it has no place."""
        known, places = self._units(layer), self.source.additions(layer)
        if name not in places:
            return None
        return tuple(known[size] if isinstance(size, str) else size for size in places[name])

    def _require_alike(self) -> None:
        """InputError unless each new tensor is for every layer that has a place for it, and bases are of one size."""
        news: dict[str, list[torch.Size | None]] = {}
        for layer in self.layers:
            for place in self.source.additions(layer):
                if not self._went(layer, place):
                    new = self.added.get(self.source.prefix(layer) + place)
                    news.setdefault(place, []).append(None if new is None else new.shape)
        partly = any(None in shapes and any(shapes) for shapes in news.values())
        into, out = (news.get(name) for name in ROTATION)
        if partly or into != out:
            raise InputError("The edits add different tensors to different layers.", hint="Make them again.")


def _fits(expected: tuple[int | None, ...], shape: torch.Size) -> bool:
    return len(expected) == len(shape) and all(want in (None, size) for want, size in zip(expected, shape, strict=True))


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

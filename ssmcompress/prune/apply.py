"""A pruning step becomes edits: score each weight with what calibration saw, keep the best, go on to the next block."""

import time
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmcompress.arch.base import DECAYS, Arch
from ssmcompress.calib.states import DecaysInTime, EntriesInTime
from ssmcompress.calib.stats import Hessian, SquaredSum, Statistic
from ssmcompress.calib.stream import Room
from ssmcompress.calib.walk import Walk
from ssmcompress.edits import Edit, Forget, Mask, Replace, TensorEdit, apply, apply_edit
from ssmcompress.events import Emit, LayerDone, Phase, ignore
from ssmcompress.prune import masks, scores
from ssmcompress.prune.sparsegpt import sparsegpt
from ssmcompress.prune.sparsessm import remembering
from ssmcompress.prune.targets import Target, targets
from ssmcompress.steps import Prune

STATISTICS: dict[str, type[Statistic]] = {
    "wanda": SquaredSum,
    "sparsegpt": Hessian,
    "sparsessm": EntriesInTime,
    "sparsessm_v2": DecaysInTime,
}
BLOCK = 128  # columns whose errors SparseGPT spreads before it goes on to the next ones


@torch.no_grad()
def find_edits(
    model: nn.Module,
    arch: Arch,
    step: Prune,
    windows: Tensor | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    emit: Emit = ignore,
    finished: MutableMapping[int, list[Edit]] | None = None,
    room: Room | None = None,
) -> list[Edit]:
    """The edits of a step, already made to the model; windows [n, L] of token ids, which magnitude does not need.

    Layers that are in `finished` get the edits found there; the others are added to it, one by one. New values are
    rounded to the dtype the checkpoint stores, so that applying the edits to it gives the same model.
    """
    pruner = _Pruner(arch, step, dtypes or {}, {} if finished is None else finished)
    emit(Phase(f"pruning by {step.method}", arch.layers))
    head: Statistic | None = None
    if step.method == "magnitude":
        for layer, block in enumerate(arch.blocks(model)):
            started = time.perf_counter()
            kept = pruner.block(layer, block, {})
            emit(LayerDone(layer, arch.layers, time.perf_counter() - started, kept=kept))
    else:
        assert windows is not None, f"{step.method} needs calibration"
        collect = STATISTICS[step.method]
        taps = dict.fromkeys(map(_tap, pruner.inner), collect)
        walk = Walk(taps, pruner.walked, known=tuple(pruner.finished), room=room)
        hidden = walk.run(model, arch, windows, emit)
        if pruner.outer:
            head = collect.of(hidden[0])
            for rows in hidden:
                head.add(arch.final_norm(model)(rows))
            head.gather()
    for module in pruner.outer:
        name = arch.outer_weight(module)
        pruner.found += pruner.weight(name, model.get_parameter(name).data, module, head)
    return pruner.found


class _Pruner:
    """Makes a step's edits one weight at a time, and gathers them."""

    def __init__(
        self,
        arch: Arch,
        step: Prune,
        dtypes: Mapping[str, torch.dtype],
        finished: MutableMapping[int, list[Edit]],
    ) -> None:
        self.arch, self.method, self.dtypes, self.finished = arch, step.method, dtypes, finished
        self.targets = targets(arch, step)
        self.inner = tuple(module for module in self.targets if module not in arch.outer)
        self.outer = tuple(module for module in self.targets if module in arch.outer)
        self.found: list[Edit] = []

    def block(self, layer: int, block: nn.Module, statistics: Mapping[str, Statistic]) -> float | None:
        """Prunes the targets of one block; returns the share of their entries that stays, None without any."""
        there = [module for module in self.inner if module in self.arch.modules(layer)]
        names = {module: self.arch.weight(layer, module) for module in there}
        prefix = self.arch.prefix(layer)
        weights = {module: block.get_parameter(name.removeprefix(prefix)).data for module, name in names.items()}
        made = self.finished.get(layer)
        if made is None:
            made = []
            for module, weight in weights.items():
                made += self.weight(names[module], weight, module, statistics.get(_tap(module)))
            self.finished[layer] = made
        else:
            apply(made, {names[module]: weight for module, weight in weights.items()})
        self.found += made
        size = sum(weight.numel() for weight in weights.values())
        left = sum(int((weight != _mask(module).fill).sum()) for module, weight in weights.items())
        return left / size if weights else None

    def walked(
        self, layer: int, block: nn.Module, statistics: Mapping[str, Statistic], _hidden: Sequence[Tensor]
    ) -> tuple[nn.Module, float | None]:
        """The block itself, pruned, and the share of its targets' entries that stays."""
        return block, self.block(layer, block, statistics)

    def weight(self, name: str, weight: Tensor, module: str, statistic: Statistic | None) -> list[TensorEdit]:
        """Prunes one weight in place; returns the edits that do it."""
        if module == DECAYS:
            values, keep = weight, remembering(weight, self.method, self.targets[module], statistic)
        else:
            values, keep = prune_weight(weight, self.method, self.targets[module], statistic)
        made: list[TensorEdit] = [_mask(module)(name, keep)]
        if values is not weight:
            made.insert(0, Replace(name, values.to(self.dtypes.get(name, weight.dtype))))
        for edit in made:
            apply_edit(edit, weight)
        return made


def _tap(module: str) -> str:
    return "scan" if module == DECAYS else module


def _mask(module: str) -> type[Mask]:
    return Forget if module == DECAYS else Mask


def prune_weight(weight: Tensor, method: str, target: Target, statistic: Any = None) -> tuple[Tensor, Tensor]:
    """New values and kept entries of one weight, [out, in] or [C, 1, K] (whose statistic is by channel)."""
    if target.pattern is None and target.sparsity == 0:
        return weight, torch.ones_like(weight, dtype=torch.bool)
    if method == "sparsegpt":
        return sparsegpt(weight, statistic.value, sparsity=target.sparsity, pattern=target.pattern, block=BLOCK)
    score = scores.magnitude(weight) if method == "magnitude" else scores.wanda(weight, statistic.norm)
    flat = score.flatten(1)
    if target.pattern is not None:
        keep = masks.n_of_m(flat, *target.pattern)
    else:
        keep = masks.unstructured(flat, target.sparsity, target.scope)
    return weight, keep.view_as(weight)

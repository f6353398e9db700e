"""A pruning step becomes edits: score every target's weight with what calibration saw, keep the best, go on to the next block."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmcompress.arch.base import Arch
from ssmcompress.calib.stats import Hessian, SquaredSum
from ssmcompress.calib.walk import Walk
from ssmcompress.edits import Edit, Mask, Replace, apply_edit
from ssmcompress.events import Emit, ignore
from ssmcompress.prune import masks, scores
from ssmcompress.prune.sparsegpt import sparsegpt
from ssmcompress.prune.targets import Target, targets
from ssmcompress.recipe import Prune

STATISTICS = {"wanda": SquaredSum, "sparsegpt": Hessian}


@torch.no_grad()
def find_edits(
    model: nn.Module,
    arch: Arch,
    step: Prune,
    windows: Tensor | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    emit: Emit = ignore,
) -> list[Edit]:
    """The edits of a step, which the model already has when this returns; windows [n, L] of token ids, none for magnitude.

    New values are rounded to the dtype the checkpoint stores them in, so that applying the edits to it gives the same model.
    """
    chosen = targets(arch, step)
    dtypes = dtypes or {}
    found: list[Edit] = []

    def edit(layer: int, block: nn.Module, statistics: Mapping[str, Any]) -> float:
        kept = total = 0
        for module, target in chosen.items():
            name, weight = arch.weight(layer, module), block.mixer.get_submodule(module).weight.data
            values, keep = prune_weight(weight, step.method, target, statistics.get(module))
            made: list[Edit] = [Mask(name, keep)]
            if values is not weight:
                made.insert(0, Replace(name, values.to(dtypes.get(name, weight.dtype))))
            for each in made:
                apply_edit(each, weight)
            found.extend(made)
            kept, total = kept + int(keep.sum()), total + keep.numel()
        return kept / total

    if step.method == "magnitude":
        for layer, block in enumerate(arch.blocks(model)):
            edit(layer, block, {})
    else:
        assert windows is not None, f"{step.method} needs calibration"
        Walk(tuple(chosen), STATISTICS[step.method], edit).run(model, arch, windows, emit)
    return found


def prune_weight(weight: Tensor, method: str, target: Target, statistic: Any = None) -> tuple[Tensor, Tensor]:
    """New values and kept entries of one weight: matrices [out, in], convolutions [C, 1, K] with their channels' norms [C]."""
    if target.pattern is None and target.sparsity == 0:
        return weight, torch.ones_like(weight, dtype=torch.bool)
    if method == "sparsegpt":
        return sparsegpt(weight, statistic.value, sparsity=target.sparsity, pattern=target.pattern)
    score = scores.magnitude(weight) if method == "magnitude" else scores.wanda(weight, statistic.norm)
    flat = score.flatten(1)
    if target.pattern is not None:
        keep = masks.n_of_m(flat, *target.pattern)
    else:
        keep = masks.unstructured(flat, target.sparsity, target.scope)
    return weight, keep.view_as(weight)


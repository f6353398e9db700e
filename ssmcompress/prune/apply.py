"""A pruning step becomes edits: score each weight with what calibration saw, keep the best, go on to the next block."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmcompress.arch.base import Arch
from ssmcompress.calib.stats import Hessian, SquaredSum
from ssmcompress.calib.walk import Walk
from ssmcompress.edits import Edit, Mask, Replace, apply_edit
from ssmcompress.events import Emit, LayerDone, Phase, ignore
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
    """The edits of a step, already made to the model; windows [n, L] of token ids, which magnitude does not need.

    New values are rounded to the dtype the checkpoint stores, so that applying the edits to it gives the same model.
    """
    chosen = targets(arch, step)
    dtypes = dtypes or {}
    found: list[Edit] = []

    def edit(layer: int, block: nn.Module, statistics: Mapping[str, Any]) -> float:
        kept = total = 0
        for module, target in chosen.items():
            name = arch.weight(layer, module)
            weight = block.get_parameter(f"mixer.{module}.weight").data
            values, keep = prune_weight(weight, step.method, target, statistics.get(module))
            made: list[Edit] = [Mask(name, keep)]
            if values is not weight:
                made.insert(0, Replace(name, values.to(dtypes.get(name, weight.dtype))))
            for each in made:
                apply_edit(each, weight)
            found.extend(made)
            kept, total = kept + int(keep.sum()), total + keep.numel()
        return kept / total

    emit(Phase(f"pruning by {step.method}", arch.layers))
    if step.method == "magnitude":
        for layer, block in enumerate(arch.blocks(model)):
            started = time.perf_counter()
            kept = edit(layer, block, {})
            emit(LayerDone(layer, arch.layers, time.perf_counter() - started, kept=kept))
    else:
        assert windows is not None, f"{step.method} needs calibration"
        Walk(tuple(chosen), STATISTICS[step.method], edit).run(model, arch, windows, emit)
    return found


def prune_weight(weight: Tensor, method: str, target: Target, statistic: Any = None) -> tuple[Tensor, Tensor]:
    """New values and kept entries of one weight, [out, in] or [C, 1, K] (whose statistic is by channel)."""
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

"""Which residual dimensions stay, in the whole model at once, and what makes up for the others in its norms."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch
from ssmcompress.calib.stats import Activity, SquaredSum
from ssmcompress.calib.walk import Walk
from ssmcompress.edits import Edit, Keep, Replace
from ssmcompress.events import Emit, Phase, ignore
from ssmcompress.prune import scores
from ssmcompress.prune.correct import rescaled
from ssmcompress.prune.sizes import best
from ssmcompress.prune.units import squared_gradients
from ssmcompress.steps import WIDTH, Cut


@torch.no_grad()
def find_width(
    model: PreTrainedModel,
    arch: Arch,
    step: Cut,
    after: int,
    windows: Tensor | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    seed: int = 0,
    emit: Emit = ignore,
) -> list[Edit]:
    """The residual dimensions that stay, `after` of them, and the norms' new weights where the step corrects them.

    windows [n, L] of token ids, which magnitude and random do without. The model is left as it is.
    """
    fisher = {}
    if step.criterion == "taylor" and windows is not None:
        fisher = squared_gradients(model, windows, arch.coupled(WIDTH), emit)
    stream = _Stream(arch)
    if (step.criterion == "minitron" or step.new_values) and windows is not None:
        emit(Phase("observing the residual stream", arch.layers))
        stream.walk(model, windows, emit)
    if step.criterion == "minitron":
        score = stream.activity
    elif step.criterion == "random":
        score = torch.rand(arch.width, generator=torch.Generator().manual_seed(seed))
    else:
        score = _owned(model, arch, fisher)
    keep = Keep(WIDTH, None, best(score, after))
    if not step.new_values:
        return [keep]
    norms = {f"{arch.prefix(i)}norm.weight": cast(Any, block).norm for i, block in enumerate(arch.blocks(model))}
    norms["backbone.norm_f.weight"] = arch.final_norm(model)
    made: list[Edit] = [keep]
    for (name, norm), energy in zip(norms.items(), stream.energy, strict=True):
        values = rescaled(norm, keep.keep, energy)
        made.append(Replace(name, values.to((dtypes or {}).get(name, values.dtype))))
    return made


class _Stream:
    """What the norms of a dense model take in and give out."""

    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        self.activity = torch.zeros(arch.width)  # Σ over blocks of the root of Σ over windows (mean |norm output|)²
        self.energy: list[Tensor] = []  # before each norm, the mean square of every dimension [d]

    def walk(self, model: PreTrainedModel, windows: Tensor, emit: Emit) -> None:
        """Goes once through the model with windows [n, L] of token ids."""

        def see(_layer: int, block: nn.Module, statistics: Mapping[str, Any], hidden: Any) -> tuple[nn.Module, None]:
            self.activity += statistics["in_proj"].norm.cpu()
            self._measure(hidden)
            return block, None

        self._measure(Walk({"in_proj": Activity}, see).run(model, self.arch, windows, emit))

    def _measure(self, hidden: Any) -> None:
        seen = SquaredSum(self.arch.width)
        for rows in hidden:
            seen.add(rows)
        seen.gather()
        self.energy.append((seen.total / seen.count).float().cpu())


def _owned(model: nn.Module, arch: Arch, fisher: Mapping[str, Tensor]) -> Tensor:
    """The sum [d] over all entries that a dimension owns of their squares, or with the Fisher diagonal of w² F."""
    total, axis = torch.zeros(arch.width), arch.residual()
    blocks = {arch.prefix(i): block for i, block in enumerate(arch.blocks(model))}
    for prefix, module in ({"": model} | blocks).items():
        for name, parameter in module.named_parameters():
            for part in axis.slices:
                if part.tensor == name and (fisher or parameter.dim() > 1):
                    one = fisher.get(prefix + name)
                    score = scores.magnitude(parameter).square() if one is None else scores.taylor(parameter, one)
                    total += score.movedim(part.dim, 0).reshape(arch.width, -1).sum(1).cpu()
    return total

"""Scores the units of an axis, block by block, and keeps the best of each layer."""

import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch, Axis, Slice, fill_buffers, mixers, use_backend
from ssmcompress.arch.surgery import Surgery, removed
from ssmcompress.calib.states import States, StatesInTime
from ssmcompress.calib.stats import Activity, Spread, SquaredSum, Statistic
from ssmcompress.calib.walk import Walk
from ssmcompress.edits import Edit, Keep, Replace
from ssmcompress.events import Advance, Emit, LayerDone, Phase, ignore
from ssmcompress.prune import scores
from ssmcompress.prune.correct import refitted, rescaled
from ssmcompress.prune.sizes import best, first, fullest
from ssmcompress.steps import Cut

Fisher = Mapping[str, Tensor]
TAPS: dict[str, dict[str, type[Statistic]]] = {  # what a method observes; the others know enough from the weights
    "joint": {"scan": States},
    "ghost": {"scan": States},
    "sparsessm": {"scan": StatesInTime},
    "minitron": {"conv1d": Activity},
    "flap": {"out_proj": Spread},
    "wanda": {"dt_proj": SquaredSum},
}


@torch.no_grad()
def find_units(
    model: PreTrainedModel,
    arch: Arch,
    step: Cut,
    after: int,
    windows: Tensor | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    seed: int = 0,
    emit: Emit = ignore,
    finished: MutableMapping[int, list[Edit]] | None = None,
) -> list[Edit]:
    """The units of a block's axis that stay, `after` in every layer, and the new values that make up for the others.

    The model is left as it is; each block takes in what the cut blocks before it make of windows [n, L] of token ids,
    where the step needs them. Layers in `finished` keep what was found there; the others are added to it. New values
    are rounded to the dtype that the checkpoint stores.
    """
    fisher = {}
    if step.criterion == "taylor" and windows is not None:
        fisher = squared_gradients(model, windows, fullest(arch, step.axis), emit)
    emit(Phase(f"choosing {step.axis}s by {step.criterion}", arch.layers))
    cutter = _Cutter(model, arch, step, after, dtypes or {}, fisher, seed, {} if finished is None else finished)
    if step.calibrated and windows is not None:
        without = (layer for layer, sizes in enumerate(arch.sizes) if not sizes[step.axis])
        Walk(cutter.taps, cutter.block, known=(*cutter.finished, *without)).run(model, arch, windows, emit)
        return cutter.found
    for layer, block in enumerate(arch.blocks(model)):
        started = time.perf_counter()
        _, kept = cutter.block(layer, block, {}, ())
        emit(LayerDone(layer, arch.layers, time.perf_counter() - started, kept=kept))
    return cutter.found


class _Cutter:
    """Cuts one block at a time, and gathers the edits that do it."""

    def __init__(
        self,
        model: PreTrainedModel,
        arch: Arch,
        step: Cut,
        after: int,
        dtypes: Mapping[str, torch.dtype],
        fisher: Fisher,
        seed: int,
        finished: MutableMapping[int, list[Edit]],
    ) -> None:
        self.arch, self.step, self.after = arch, step, after
        self.dtypes, self.fisher, self.seed, self.finished = dtypes, fisher, seed, finished
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.small = Surgery(arch, first(arch, step.axis, after)).arch.build("meta")
        use_backend(self.small, next(mixers(model)).backend)
        self.taps = TAPS.get(step.criterion, {}) | ({"norm": SquaredSum} if step.correction == "rescale" else {})
        self.found: list[Edit] = []

    def block(
        self, layer: int, block: nn.Module, statistics: Mapping[str, Any], hidden: Sequence[Tensor]
    ) -> tuple[nn.Module, float | None]:
        """The cut block, and the share of its units that stays; None where it has none."""
        size = self.arch.sizes[layer][self.step.axis]
        if not size:
            return block, None
        if layer not in self.finished:
            self.finished[layer] = self._choose(layer, block, statistics, hidden)
        self.found += self.finished[layer]
        return self._cut(layer, block, self.finished[layer]), self.after / size

    def _choose(
        self, layer: int, block: nn.Module, statistics: Mapping[str, Any], hidden: Sequence[Tensor]
    ) -> list[Edit]:
        axis = self.arch.axes(layer)[self.step.axis]
        scorer = Scorer(self.arch, axis, layer, block, statistics, self.fisher, self.seed, self.after)
        groups = self.arch.config.n_groups if self.step.axis == "head" else 1
        keep = Keep(self.step.axis, layer, best(scorer.score(self.step.criterion), self.after, groups))
        made: list[Edit] = [keep]
        if self.step.correction == "rescale":
            norm, name = cast(Any, block).mixer.norm, "mixer.norm.weight"
            gone = removed(axis, keep.keep, name)[0]
            alive = torch.ones(len(norm.weight), dtype=torch.bool).index_fill(0, gone, False)
            made.append(self._replace(layer, name, rescaled(norm, alive, statistics["norm"].norm.square().cpu())))
        elif self.step.correction == "refit":
            name = "mixer.out_proj.weight"
            new = self._replace(layer, name, refitted(block, self._cut(layer, block, made), hidden))
            made.append(Surgery(self.arch, made).lift(new, self.shapes))
        return made

    def _replace(self, layer: int, name: str, values: Tensor) -> Replace:
        whole = self.arch.prefix(layer) + name
        return Replace(whole, values.to(self.dtypes.get(whole, values.dtype)))

    def _cut(self, layer: int, block: nn.Module, made: Sequence[Edit]) -> nn.Module:
        """The block with its other units removed and its new values, as the smaller model has it."""
        surgery, prefix = Surgery(self.arch, made), self.arch.prefix(layer)
        state = {prefix + name: tensor for name, tensor in block.state_dict().items()}
        for edit in made:
            if isinstance(edit, Replace):
                state[edit.tensor] = edit.values.to(state[edit.tensor])
        left = self.arch.blocks(self.small)[layer]
        left.load_state_dict({name.removeprefix(prefix): surgery.cut(name, state[name]) for name in state}, assign=True)
        fill_buffers(left, next(block.parameters()).device)
        return left.eval()


@torch.enable_grad()
def squared_gradients(model: PreTrainedModel, windows: Tensor, axis: Axis, emit: Emit = ignore) -> dict[str, Tensor]:
    """The mean over windows of the squared gradient of the loss, of every tensor the axis cuts (Fisher diagonal)."""
    emit(Phase("squared gradients", len(windows)))
    tensors = {part.tensor for part in axis.slices}
    wanted = {name: p for name, p in model.named_parameters() if {name, name.split(".", 3)[-1]} & tensors}
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in wanted.items()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    for ids in windows.split(1):
        logits = cast(Any, model)(ids, use_cache=False).logits.float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for name, gradient in zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True):
            total[name] += gradient.float().square() / len(windows)
        emit(Advance())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required[name])
    return total


@dataclass(frozen=True)
class Scorer:
    """What is known of one axis of one block when its units are scored."""

    arch: Arch
    axis: Axis
    layer: int
    block: nn.Module
    statistics: Mapping[str, Any] = field(default_factory=dict)
    fisher: Fisher = field(default_factory=dict)
    seed: int = 0
    after: int = 0

    def score(self, method: str) -> Tensor:
        """The score of every unit, [units] float32: higher matters more."""
        return getattr(self, f"_{method}")()

    def _magnitude(self) -> Tensor:
        names = {f"mixer.{module}.weight" for module in self.arch.modules(self.layer)}
        return self._owned({name: scores.magnitude(self._tensor(name)).square() for name in names})

    def _taylor(self) -> Tensor:
        prefix, names = self.arch.prefix(self.layer), {part.tensor for part in self.axis.slices}
        return self._owned({name: scores.taylor(self._tensor(name), self.fisher[prefix + name]) for name in names})

    def _random(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.layer)
        return torch.rand(self.axis.size, generator=generator)

    def _minitron(self) -> Tensor:
        return self._inputs("conv1d", self.statistics["conv1d"].norm.square()).sqrt()

    def _flap(self) -> Tensor:
        weight = self._tensor("mixer.out_proj.weight")
        return self._inputs("out_proj", scores.flap(weight, self.statistics["out_proj"].variance))

    def _wanda(self) -> Tensor:
        weight = self._tensor("mixer.dt_proj.weight")
        return self._inputs("dt_proj", scores.wanda(weight, self.statistics["dt_proj"].norm).square().sum(0))

    def _joint(self) -> Tensor:
        return self.statistics["scan"].joint.sum(0)

    def _ghost(self) -> Tensor:
        return (self.statistics["scan"].energy * self.statistics["scan"].readout).sum(0)

    def _sparsessm(self) -> Tensor:
        return scores.votes(self.statistics["scan"].total.cpu(), self.axis.size - self.after)

    def _last(self) -> Tensor:
        cuts = [part for part in self.axis.slices if part.tensor in ("mixer.x_proj.weight", "mixer.in_proj.weight")]
        B, C = (self._tensor(part.tensor)[_indices(self.axis, part)].transpose(0, 1) for part in cuts)
        mixer = cast(Any, self.block.mixer)
        if mixer.A_log.dim() == 1:  # one decay a head: it is the same for all states
            return scores.last(B, C, torch.ones(1, self.axis.size))
        delta = F.softplus(mixer.dt_proj.bias.float())[:, None]
        return scores.last(B, C, delta / (1 - torch.exp(-delta * mixer.A_log.float().exp())))

    def _tensor(self, name: str) -> Tensor:
        return self.block.get_parameter(name)

    def _inputs(self, module: str, values: Tensor) -> Tensor:
        """The sum of values over the inputs of a module that each unit owns."""
        name, dim = f"mixer.{module}.weight", 0 if module == "conv1d" else 1
        part = next(part for part in self.axis.slices if (part.tensor, part.dim) == (name, dim))
        return scores.per_unit(values.cpu(), _indices(self.axis, part))

    def _owned(self, saliency: Mapping[str, Tensor]) -> Tensor:
        """The sum of saliencies, by tensor, over all entries that each unit owns."""
        total = torch.zeros(self.axis.size)
        for part in self.axis.slices:
            if part.tensor in saliency:
                values = saliency[part.tensor].movedim(part.dim, 0)
                values = values.reshape(len(values), -1).sum(1)
                total += scores.per_unit(values.cpu(), _indices(self.axis, part))
        return total


def _indices(axis: Axis, part: Slice) -> Tensor:
    """The indices of a cut that each unit owns, [units, indices]."""
    return torch.tensor([part.indices(unit) for unit in range(axis.size)])

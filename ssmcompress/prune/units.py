"""Scores the units of an axis, block by block, and keeps the best of each layer."""

import time
from collections.abc import Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssmcompress import parallel
from ssmcompress.arch.axis import Axis, Slice
from ssmcompress.arch.base import BIAS, ROTATION, Arch, fill_buffers
from ssmcompress.arch.mixer import mixers, use_backend
from ssmcompress.arch.surgery import Surgery, removed
from ssmcompress.calib.states import Gramians, States, StatesInTime
from ssmcompress.calib.stats import Activity, Spread, SquaredSum, Statistic
from ssmcompress.calib.stream import Room
from ssmcompress.calib.walk import Walk
from ssmcompress.edits import Add, Edit, Keep, Replace
from ssmcompress.events import Advance, Emit, LayerDone, Phase, ignore
from ssmcompress.prune import masks, scores
from ssmcompress.prune.correct import compensated, refitted, rescaled
from ssmcompress.prune.merge import merged
from ssmcompress.prune.rotate import bases, worths
from ssmcompress.prune.sizes import best, each_layer, outline
from ssmcompress.steps import Cut

Fisher = Mapping[str, Tensor]
TAPS: dict[str, dict[str, type[Statistic]]] = {  # what a method observes; the others know enough from the weights
    "rotate": {"scan": Gramians},
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
    after: int | Sequence[int],
    windows: Tensor | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    seed: int = 0,
    emit: Emit = ignore,
    finished: MutableMapping[int, list[Edit]] | None = None,
    chosen: Sequence[Keep] = (),
    room: Room | None = None,
) -> list[Edit]:
    """The units of a block's axis that stay, and the new values that make up for the others.

    `after` stay in every layer that has any, or of each its own number; where they are `chosen` already, those, an edit
    a layer. The model is left as it is; each block takes in what the cut blocks before it make of windows [n, L] of
    token ids, where the step needs them. Layers in `finished` keep what was found there; the others are added to it.
    New values are rounded to the dtype that the checkpoint stores.
    """
    fisher = {}
    if step.criterion == "taylor" and windows is not None and not chosen:
        fisher = squared_gradients(model, windows, arch.coupled(step.axis), emit)
    doing = "merging" if step.merges else "removing" if chosen else "choosing"
    by = "" if step.merges or chosen else f" by {step.criterion}"
    emit(Phase(f"{doing} {step.axis}s{by}", arch.layers))
    cutter = _Cutter(model, arch, step, after, dtypes or {}, fisher, seed, {} if finished is None else finished, chosen)
    if step.calibrated and windows is not None:
        known = (*cutter.finished, *without(arch, step.axis))
        Walk(cutter.taps, cutter.block, known=known, room=room).run(model, arch, windows, emit)
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
        after: int | Sequence[int],
        dtypes: Mapping[str, torch.dtype],
        fisher: Fisher,
        seed: int,
        finished: MutableMapping[int, list[Edit]],
        chosen: Sequence[Keep] = (),
    ) -> None:
        self.arch, self.step, self.after = arch, step, each_layer(arch, step.axis, after)
        self.chosen = {edit.layer: edit for edit in chosen}
        self.axes = [arch.axes(layer)[step.axis] for layer in range(arch.layers)]
        self.dtypes, self.fisher, self.seed, self.finished = dtypes, fisher, seed, finished
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.small = Surgery(arch, outline(arch, step, after)).arch.build("meta")
        self.held: nn.Module | None = None  # of its blocks the one that is in memory
        use_backend(self.small, next(mixers(model)).backend)
        self.taps = {} if chosen and not step.rotates else dict(TAPS.get(step.criterion, {}))
        self.taps |= {"norm": SquaredSum} if step.correction == "rescale" else {}
        self.taps |= {"out_proj": Spread} if step.correction == "bias" else {}
        self.found: list[Edit] = []

    def block(
        self, layer: int, block: nn.Module, statistics: Mapping[str, Any], hidden: Sequence[Tensor]
    ) -> tuple[nn.Module, float | None]:
        """The cut block, and the share of its units that stays; None where it has none."""
        size = self.axes[layer].size
        if not size:
            return block, None
        if layer not in self.finished:
            self.finished[layer] = self._choose(layer, block, statistics, hidden)
        self.found += self.finished[layer]
        return self._cut(layer, block, self.finished[layer]), self.after[layer] / size

    def _choose(
        self, layer: int, block: nn.Module, statistics: Mapping[str, Any], hidden: Sequence[Tensor]
    ) -> list[Edit]:
        made = self._fewer(layer, block, statistics)
        if self.step.correction == "rescale":
            keep = cast(Keep, made[0])
            norm, name = cast(Any, block).mixer.norm, "mixer.norm.weight"
            gone = removed(self.axes[layer], keep.keep, name)[0]
            alive = torch.ones(len(norm.weight), dtype=torch.bool).index_fill(0, gone, False)
            made.append(self._replace(layer, name, rescaled(norm, alive, statistics["norm"].norm.square().cpu())))
        elif self.step.correction == "refit":
            name = "mixer.out_proj.weight"
            new = self._replace(layer, name, refitted(block, self._cut(layer, block, made), hidden))
            made.append(Surgery(self.arch, made).lift(new, self.shapes))
        elif self.step.correction == "bias":
            gone = removed(self.axes[layer], cast(Keep, made[0]).keep, "mixer.out_proj.weight")[1]
            bias = compensated(cast(Any, block).mixer.out_proj, gone, statistics["out_proj"].mean)
            made.append(self._biased(layer, bias))
        return made

    def _fewer(self, layer: int, block: nn.Module, statistics: Mapping[str, Any]) -> list[Edit]:
        """The units that stay, with the means of merged ones; or the bases that take all of them to so few."""
        axis, after = self.axes[layer], self.after[layer]
        if self.step.rotates:
            held, read = statistics["scan"].moments
            return [self._add(layer, *each) for each in zip(ROTATION, bases(held, read, after), strict=True)]
        if self.chosen:
            return [self.chosen[layer]]
        if self.step.merges:
            news = {name: merged(axis, name, block.get_parameter(name), after) for name in sorted(axis.tensors)}
            first = Keep(axis.name, layer, best(torch.zeros(axis.size), after, after))
            return [first, *(self._replace(layer, name, values) for name, values in news.items())]
        scorer = Scorer(self.arch, axis, layer, block, statistics, self.fisher, self.seed, after)
        runs = self.arch.runs(axis.name, after)
        return [Keep(axis.name, layer, best(scorer.score(self.step.criterion), after, runs))]

    def _biased(self, layer: int, values: Tensor) -> Edit:
        if self.arch.biased:
            return self._replace(layer, BIAS, values)
        weight = self._replace(layer, "mixer.out_proj.weight", values)  # its dtype, for a product takes no other
        return self._add(layer, BIAS, weight.values)

    def _add(self, layer: int, name: str, values: Tensor) -> Add:
        return Add(self.arch.prefix(layer) + name, values.cpu())

    def _replace(self, layer: int, name: str, values: Tensor) -> Replace:
        whole = self.arch.prefix(layer) + name
        return Replace(whole, values.to(self.dtypes.get(whole, values.dtype)))

    def _cut(self, layer: int, block: nn.Module, made: Sequence[Edit]) -> nn.Module:
        """The block with its other units removed and its new values, as the smaller model has it."""
        surgery, prefix = Surgery(self.arch, made), self.arch.prefix(layer)
        state = {prefix + name: tensor for name, tensor in block.state_dict().items()}
        for edit in made:
            if isinstance(edit, Replace):
                state[edit.tensor] = edit.values.to(state.get(edit.tensor, state[f"{prefix}norm.weight"]))
        left = self.arch.blocks(self.small)[layer]
        if self.held is not None and self.held is not left:
            self.held.to("meta")
        self.held = left
        cut = {name.removeprefix(prefix): surgery.cut(name, state[name]) for name in state}
        left.load_state_dict(cut, assign=True)
        fill_buffers(left, next(block.parameters()).device)
        return left.eval()


def without(arch: Arch, axis: str) -> list[int]:
    """The layers that have no units of an axis."""
    return [layer for layer, sizes in enumerate(arch.sizes) if not sizes[axis]]


@torch.enable_grad()
def squared_gradients(
    model: PreTrainedModel, windows: Tensor, tensors: Set[str], emit: Emit = ignore
) -> dict[str, Tensor]:
    """The mean over windows of the squared gradient of the loss (Fisher diagonal), of tensors named as in a block."""
    emit(Phase("squared gradients", len(windows)))
    wanted = {name: p for name, p in model.named_parameters() if {name, name.split(".", 3)[-1]} & tensors}
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in wanted.items()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    for ids in windows.split(1):
        logits = cast(Any, model)(ids, use_cache=False).logits.float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for name, gradient in zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True):
            total[name] += gradient.float().square()
        emit(Advance())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required[name])
    count = parallel.total(torch.tensor(len(windows)))
    return {name: parallel.total(each) / count for name, each in total.items()}


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

    def comparable(self, method: str) -> Tensor:
        """The score of every unit, [units] float32, on a scale that layers share; their order is that of `score`.

        For flap the mean of its inputs' z-scores (FLAP, AL-AM), for last the share of the states that count at least as
        much (LAST). Taylor's are nats, votes of SparseSSM are tokens and random draws have one law, in every
        layer alike; other scores are divided by the layer's sum.
        """
        if method == "flap":
            values = scores.standardised(self._fluctuation())
            return self._inputs("out_proj", values) * (self.axis.size / len(values))
        found = self.score(method)
        if method == "last":
            return scores.tail_share(found)
        if method in ("taylor", "sparsessm", "random"):
            return found
        return found / found.sum().clamp_min(torch.finfo(found.dtype).tiny)

    def _magnitude(self) -> Tensor:
        """The sum of the squared weights that are a unit's own."""
        names = {f"mixer.{module}.weight" for module in self.arch.prunable} & self.axis.tensors
        return self._owned({name: scores.magnitude(self._tensor(name)).square() for name in names})

    def _taylor(self) -> Tensor:
        """The sum of their squares times their squared gradients (the diagonal Fisher of the calibration text)."""
        prefix = self.arch.prefix(self.layer)
        return self._owned(
            {name: scores.taylor(self._tensor(name), self.fisher[prefix + name]) for name in self.axis.tensors}
        )

    def _random(self) -> Tensor:
        """A draw of its own in every layer: a control."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.layer)
        return torch.rand(self.axis.size, generator=generator)

    def _minitron(self) -> Tensor:
        """The norm of what a unit gives out, before the convolution (Minitron-SSM, Taghibakhshi et al., 2025)."""
        return self._inputs("conv1d", self.statistics["conv1d"].norm.square()).sqrt()

    def _flap(self) -> Tensor:
        """How much the inputs of out_proj fluctuate, times its weights (FLAP, An et al., 2024)."""
        return self._inputs("out_proj", self._fluctuation())

    def _fluctuation(self) -> Tensor:
        return scores.flap(self._tensor("mixer.out_proj.weight"), self.statistics["out_proj"].variance)

    def _wanda(self) -> Tensor:
        """The norm of a step-size rank's inputs, times its weights (WANDA, Sun et al., 2024)."""
        weight = self._tensor("mixer.dt_proj.weight")
        return self._inputs("dt_proj", scores.wanda(weight, self.statistics["dt_proj"].norm).square().sum(0))

    def _joint(self) -> Tensor:
        """E[C² h²]: what a state adds to the output, over the calibration text."""
        return self.statistics["scan"].joint.sum(0)

    def _ghost(self) -> Tensor:
        """E[h²] E[C²]: how full a state is, and how much it is read (GHOST)."""
        return (self.statistics["scan"].energy * self.statistics["scan"].readout).sum(0)

    def _rotate(self) -> Tensor:
        """The Hankel values of the best basis (balanced truncation): what `prune.rotate` keeps of it."""
        return worths(*self.statistics["scan"].moments).cpu()

    def _sparsessm(self) -> Tensor:
        """How many tokens would drop a state first, by h² (SparseSSM, Tuo and Wang, 2025), in its structured form."""
        gone = self.axis.size - self.after
        return scores.votes(self.statistics["scan"].total.cpu(), lambda saliency: masks.lowest(saliency, gone))

    def _last(self) -> Tensor:
        """The H∞ norm of each state's path from input to output, at the usual step (LAST, Gwak et al., 2024)."""
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

"""Which units stay where those of all layers compete: scored on the dense model, before any is cut."""

import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch
from ssmcompress.calib.stream import Room
from ssmcompress.calib.walk import Walk
from ssmcompress.edits import Edit, Keep
from ssmcompress.events import Emit, Event, LayerDone, Note, Phase, ignore
from ssmcompress.prune.shares import shared_out
from ssmcompress.prune.sizes import Size, Weights, best
from ssmcompress.prune.units import TAPS, Scorer, squared_gradients, without
from ssmcompress.steps import Cut


def choose(
    model: PreTrainedModel,
    arch: Arch,
    step: Cut,
    size: Size,
    weights: Weights,
    windows: Tensor | None = None,
    seed: int = 0,
    emit: Emit = ignore,
    finished: MutableMapping[int, list[Edit]] | None = None,
    room: Room | None = None,
) -> list[Keep]:
    """The units that stay, one edit a layer: the best of the whole model that the step's budget has room for.

    The choice is kept in `finished`, under the number behind the last layer's, so that a later run cuts the same.
    """
    finished = {} if finished is None else finished
    if arch.layers not in finished:
        scores = rank(model, arch, step, size.layers, windows, seed, emit, room)
        layers = shared_out(arch, step, weights, scores)
        finished[arch.layers] = [
            Keep(step.axis, layer, best(score, after, arch.runs(step.axis, after)))
            for layer, (score, after) in enumerate(zip(scores, layers, strict=True))
            if after
        ]
    chosen = [edit for edit in finished[arch.layers] if isinstance(edit, Keep)]
    told = ", ".join(str(int(edit.keep.sum())) for edit in chosen)
    emit(Note(f"{step.axis}s that stay, by layer: {told}."))
    return chosen


@torch.no_grad()
def rank(
    model: PreTrainedModel,
    arch: Arch,
    step: Cut,
    even: Sequence[int],
    windows: Tensor | None = None,
    seed: int = 0,
    emit: Emit = ignore,
    room: Room | None = None,
) -> list[Tensor]:
    """The scores [units] of every layer's units on one scale, from the dense model and windows [n, L] of token ids.

    `even` is how many of each layer would stay if layers kept alike, for methods that vote with a number in mind.
    """
    fisher = {}
    if step.criterion == "taylor" and windows is not None:
        fisher = squared_gradients(model, windows, arch.coupled(step.axis), emit)
    emit(Phase(f"scoring {step.axis}s by {step.criterion}", arch.layers))
    found: list[Tensor] = []
    bare = without(arch, step.axis)

    def look(
        layer: int, block: nn.Module, statistics: Mapping[str, Any], _hidden: Sequence[Tensor]
    ) -> tuple[nn.Module, None]:
        scorer = Scorer(arch, arch.axes(layer)[step.axis], layer, block, statistics, fisher, seed, even[layer])
        found.append(torch.empty(0) if layer in bare else scorer.comparable(step.criterion).cpu())
        return block, None

    def tell(event: Event) -> None:  # nothing has changed yet, so that no layer has an error
        emit(replace(event, error=None) if isinstance(event, LayerDone) else event)

    if (taps := TAPS.get(step.criterion)) and windows is not None:
        Walk(taps, look, known=bare, room=room).run(model, arch, windows, tell)
        return found
    for layer, block in enumerate(arch.blocks(model)):
        started = time.perf_counter()
        look(layer, block, {}, ())
        emit(LayerDone(layer, arch.layers, time.perf_counter() - started))
    return found

"""Which whole blocks stay, or whose scans: those whose loss costs most, or those that turn their output most."""

import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ssmcompress import parallel
from ssmcompress.arch.base import Arch
from ssmcompress.arch.surgery import Surgery
from ssmcompress.edits import Edit, Keep
from ssmcompress.events import Emit, LayerDone, Note, Phase, ignore
from ssmcompress.prune.blocks import less, may_go, strongest, units, unreduced
from ssmcompress.prune.scores import cosine_distance
from ssmcompress.steps import LAYER, Cut

Blocks = Sequence[Callable[[Tensor], Tensor]]


@torch.no_grad()
def find_blocks(
    model: PreTrainedModel,
    arch: Arch,
    step: Cut,
    after: int,
    windows: Tensor | None = None,
    seed: int = 0,
    emit: Emit = ignore,
    finished: MutableMapping[int, list[Edit]] | None = None,
) -> list[Edit]:
    """The blocks that stay, `after` of them, or that keep their scan; windows [n, L] of ids, which random does without.

    What `finished` holds of a greedy search is not searched again.
    """
    emit(Phase(f"choosing {step.axis}s by {step.criterion}", arch.layers))
    if step.criterion == "random":
        score = torch.rand(arch.layers, generator=torch.Generator().manual_seed(seed))
        return [Keep(step.axis, None, strongest(arch, step.axis, score, after))]
    assert windows is not None
    search = _Search(model, arch, step.axis, windows)
    if step.criterion == "shedder":
        keep = search.shed(units(arch, step.axis), after, emit, {} if finished is None else finished)
    else:
        keep = strongest(arch, step.axis, search.similarity(emit), after)
    return [Keep(step.axis, None, keep)]


class _Search:
    """A model's blocks, and beside each what takes its place without the unit: nothing, or the block without a scan."""

    def __init__(self, model: PreTrainedModel, arch: Arch, axis: str, windows: Tensor) -> None:
        self.model, self.arch, self.axis, self.windows = model, arch, axis, windows
        self.blocks: Blocks = list(arch.blocks(model))
        self.without: Blocks = [_nothing] * arch.layers
        if axis != LAYER:
            silent = Surgery(unreduced(arch), [Keep(axis, None, torch.zeros(arch.layers, dtype=torch.bool))])
            self.without = list(arch.blocks(silent.operate(model)))

    def shed(self, there: Tensor, after: int, emit: Emit, finished: MutableMapping[int, list[Edit]]) -> Tensor:
        """Takes away one unit after the other, each time the one without which the text is likeliest (Mamba-Shedder).

        Which are `there` and which stay, [layers] bool.
        """
        turns = int(there.sum()) - after
        for turn in range(turns):
            started = time.perf_counter()
            if turn not in finished:
                costs = {gone: self.cost(less(there, gone)) for gone in may_go(self.arch, self.axis, there)}
                finished[turn] = [Keep(self.axis, None, less(there, min(costs, key=lambda gone: costs[gone])))]
                left = int(there.sum()) - 1
                emit(Note(f"{left} {self.axis}s: {min(costs.values()):.4f} nats a token."))
            there = cast(Keep, finished[turn][0]).keep
            emit(LayerDone(turn, turns, time.perf_counter() - started))
        return there

    def cost(self, keep: Tensor) -> float:
        """Nats a token that the windows cost a model of which only these units stay."""
        blocks = [(self.without, self.blocks)[stays][layer] for layer, stays in enumerate(keep.tolist())]
        return likelihood(self.model, self.arch, self.windows, blocks)

    def similarity(self, emit: Emit) -> Tensor:
        """1 - cos of the residual stream [layers] after each block with the unit and without, in the dense model.

        Of whole blocks that is the stream after and before (ShortGPT, eq. 1).
        """
        hidden = [self.model.get_input_embeddings()(ids).float() for ids in self.windows.split(1)]
        score = torch.zeros(len(self.blocks))
        for layer, block in enumerate(self.blocks):
            started = time.perf_counter()
            for i, rows in enumerate(hidden):
                less, hidden[i] = self.without[layer](rows), block(rows)
                score[layer] += cosine_distance(less.flatten(0, 1), hidden[i].flatten(0, 1)).float()
            emit(LayerDone(layer, len(self.blocks), time.perf_counter() - started))
        return parallel.total(score) / parallel.total(torch.tensor(len(hidden)))


def _nothing(hidden: Tensor) -> Tensor:
    return hidden


def likelihood(model: PreTrainedModel, arch: Arch, windows: Tensor, blocks: Blocks) -> float:
    """Nats a token that windows [n, L] cost the model with these blocks in place of its own."""
    head = cast(Any, model).lm_head
    total = torch.zeros((), dtype=torch.float64)
    for ids in windows.split(1):
        hidden = model.get_input_embeddings()(ids).float()
        for block in blocks:
            hidden = block(hidden)
        logits = head(arch.final_norm(model)(hidden).to(head.weight.dtype)).float()
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).double().cpu()
    return float(parallel.total(total) / parallel.total(torch.tensor(len(windows))))

"""Which whole blocks stay: those whose loss costs most, or those that turn the residual stream most."""

import time
from collections.abc import MutableMapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch
from ssmcompress.arch.surgery import LAYER
from ssmcompress.edits import Edit, Keep
from ssmcompress.events import Emit, LayerDone, Note, Phase, ignore
from ssmcompress.prune.scores import cosine_distance
from ssmcompress.prune.sizes import best
from ssmcompress.steps import Cut


@torch.no_grad()
def find_layers(
    model: PreTrainedModel,
    arch: Arch,
    step: Cut,
    after: int,
    windows: Tensor | None = None,
    seed: int = 0,
    emit: Emit = ignore,
    finished: MutableMapping[int, list[Edit]] | None = None,
) -> list[Edit]:
    """The blocks that stay, `after` of them; windows [n, L] of token ids, which random does not need.

    What `finished` holds of a greedy search is not searched again.
    """
    emit(Phase(f"choosing layers by {step.criterion}", arch.layers))
    if step.criterion == "shedder":
        assert windows is not None
        keep = _shed(model, arch, after, windows, emit, {} if finished is None else finished)
    else:
        score = _similarity(model, arch, windows, emit) if step.criterion == "similarity" else _random(arch, seed)
        keep = best(score, after)
    return [Keep(LAYER, None, keep)]


def _random(arch: Arch, seed: int) -> Tensor:
    return torch.rand(arch.layers, generator=torch.Generator().manual_seed(seed))


def _similarity(model: PreTrainedModel, arch: Arch, windows: Tensor | None, emit: Emit) -> Tensor:
    """1 - cos of the residual stream [layers] before and after each block, in the dense model (ShortGPT, eq. 1)."""
    assert windows is not None
    hidden = [model.get_input_embeddings()(ids).float() for ids in windows.split(1)]
    score = torch.zeros(arch.layers)
    for layer, block in enumerate(arch.blocks(model)):
        started = time.perf_counter()
        for i, rows in enumerate(hidden):
            hidden[i] = block(rows)
            score[layer] += cosine_distance(rows.flatten(0, 1), hidden[i].flatten(0, 1)).float() / len(hidden)
        emit(LayerDone(layer, arch.layers, time.perf_counter() - started))
    return score


def _shed(
    model: PreTrainedModel,
    arch: Arch,
    after: int,
    windows: Tensor,
    emit: Emit,
    finished: MutableMapping[int, list[Edit]],
) -> Tensor:
    """Takes away one block after the other, each time the one without which the text is likeliest (Mamba-Shedder)."""
    left = list(range(arch.layers))
    for turn in range(arch.layers - after):
        started = time.perf_counter()
        if turn not in finished:
            costs = {gone: likelihood(model, arch, windows, [each for each in left if each != gone]) for gone in left}
            left.remove(min(costs, key=lambda gone: costs[gone]))
            finished[turn] = [Keep(LAYER, None, torch.isin(torch.arange(arch.layers), torch.tensor(left)))]
            emit(Note(f"{len(left)} layers: {min(costs.values()):.4f} nats a token."))
        left = cast(Keep, finished[turn][0]).keep.nonzero().flatten().tolist()
        emit(LayerDone(turn, arch.layers - after, time.perf_counter() - started))
    return torch.isin(torch.arange(arch.layers), torch.tensor(left))


def likelihood(model: PreTrainedModel, arch: Arch, windows: Tensor, layers: Sequence[int]) -> float:
    """Nats a token that windows [n, L] cost a model of these blocks only."""
    blocks = arch.blocks(model)
    head = cast(Any, model).lm_head
    total = 0.0
    for ids in windows.split(1):
        hidden = model.get_input_embeddings()(ids).float()
        for layer in layers:
            hidden = blocks[layer](hidden)
        logits = head(arch.final_norm(model)(hidden).to(head.weight.dtype)).float()
        total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    return total / len(windows)

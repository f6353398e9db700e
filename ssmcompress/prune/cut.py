"""A step along an axis becomes edits: how many units stay, and which."""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch
from ssmcompress.calib.stream import Room
from ssmcompress.edits import Edit, Keep
from ssmcompress.events import Emit, Note, ignore
from ssmcompress.prune.depth import find_blocks
from ssmcompress.prune.ranking import choose
from ssmcompress.prune.shares import sized
from ssmcompress.prune.sizes import Weights, outline
from ssmcompress.prune.units import find_units
from ssmcompress.prune.width import find_width
from ssmcompress.steps import LAYER, SSM, WIDTH, Cut


def cut(
    model: PreTrainedModel,
    arch: Arch,
    step: Cut,
    weights: Weights,
    windows: Tensor | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    seed: int = 0,
    emit: Emit = ignore,
    finished: MutableMapping[int, list[Edit]] | None = None,
    room: Room | None = None,
) -> list[Edit]:
    """The units of the step's axis that stay, and the new values that make up for the others.

    windows [n, L] of token ids are what some methods need; dtypes are those the checkpoint stores; the residual stream
    of units within a block has `room`.
    The model is left as it is. What `finished` holds of an earlier run is not searched again, and it is added to.
    Raises UnsupportedError for an axis or a size that cannot be.
    """
    found = sized(arch, step, weights)
    if found.note:
        emit(Note(found.note))
    if found.after == found.before:  # then nothing went that a correction could make up for
        return outline(arch, step, found.layers or found.after)
    if step.axis in (LAYER, SSM):
        return find_blocks(model, arch, step, found.after, windows, seed, emit, finished)
    if step.axis == WIDTH:
        return find_width(model, arch, step, found.after, windows, dtypes, seed, emit)
    finished = {} if finished is None else finished
    chosen: list[Keep] = []
    if step.reach == "model":
        chosen = choose(model, arch, step, found, weights, windows, seed, emit, finished, room)
    kept = {each.layer: int(each.keep.sum()) for each in chosen}
    after = [kept.get(layer, 0) for layer in range(arch.layers)] if chosen else found.layers or found.after
    return find_units(model, arch, step, after, windows, dtypes, seed, emit, finished, chosen, room)

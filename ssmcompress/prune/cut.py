"""A step along an axis becomes edits: how many units stay, and which."""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch
from ssmcompress.arch.surgery import LAYER, SSM, WIDTH
from ssmcompress.edits import Edit
from ssmcompress.events import Emit, Note, ignore
from ssmcompress.prune.depth import find_blocks
from ssmcompress.prune.sizes import Weights, size
from ssmcompress.prune.units import find_units
from ssmcompress.prune.width import find_width
from ssmcompress.steps import Cut


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
) -> list[Edit]:
    """The units of the step's axis that stay, and the new values that make up for the others.

    windows [n, L] of token ids are what some methods need; dtypes are those the checkpoint stores.
    The model is left as it is. What `finished` holds of an earlier run is not searched again, and it is added to.
    Raises UnsupportedError for an axis or a size that cannot be.
    """
    found = size(arch, step, weights)
    if found.note:
        emit(Note(found.note))
    if step.axis in (LAYER, SSM):
        return find_blocks(model, arch, step, found.after, windows, seed, emit, finished)
    if step.axis == WIDTH:
        return find_width(model, arch, step, found.after, windows, dtypes, seed, emit)
    return find_units(model, arch, step, found.after, windows, dtypes, seed, emit, finished)

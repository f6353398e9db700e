"""A step along an axis becomes edits: how many units stay, and which."""

from collections.abc import MutableMapping

from torch import Tensor
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch
from ssmcompress.arch.surgery import LAYER
from ssmcompress.edits import Edit, Keep
from ssmcompress.events import Emit, Note, ignore
from ssmcompress.prune.depth import find_layers
from ssmcompress.prune.sizes import Weights, size
from ssmcompress.prune.units import find_units
from ssmcompress.recipe import Cut


def cut(
    model: PreTrainedModel,
    arch: Arch,
    step: Cut,
    weights: Weights,
    windows: Tensor | None = None,
    seed: int = 0,
    emit: Emit = ignore,
    finished: MutableMapping[int, list[Edit]] | None = None,
) -> list[Keep]:
    """The units of the step's axis that stay; windows [n, L] of token ids, which some methods do not need.

    The model is left as it is. What `finished` holds of an earlier run is not searched again, and it is added to.
    Raises UnsupportedError for an axis or a size that cannot be.
    """
    found = size(arch, step, weights)
    if found.note:
        emit(Note(found.note))
    find = find_layers if step.axis == LAYER else find_units
    return find(model, arch, step, found.after, windows, seed, emit, finished)

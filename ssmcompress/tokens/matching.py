"""The most similar one of some tokens to each of others: in blocks, so that memory grows with the length alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512  # tokens at a time


def match(
    features: Tensor, sources: Tensor, targets: Tensor, positions: Tensor | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """The target of largest cosine to each source, as an index of features [L, d], and that cosine: [S], [S].

    sources [S] and targets [T] are rising indices. With a window only targets count whose position differs by so much
    at most; a source that has none gets -1 and a cosine of -inf.
    """
    unit = F.normalize(features.float(), dim=-1)
    best = torch.full_like(sources, -1)
    cosine = unit.new_full((len(sources),), float("-inf"))
    near = unit[targets]
    for start in range(0, len(sources), BLOCK):
        part = slice(start, start + BLOCK)
        block = sources[part]
        first, end = 0, len(targets)
        if window is not None and positions is not None:
            reach = torch.stack([positions[block[0]] - window, positions[block[-1]] + window + 1])
            first, end = torch.searchsorted(positions[targets], reach).tolist()
        if first == end:
            continue
        similar = unit[block] @ near[first:end].T
        if window is not None and positions is not None:
            apart = (positions[block][:, None] - positions[targets[first:end]]).abs() > window
            similar = similar.masked_fill(apart, float("-inf"))
        cosine[part], index = similar.max(1)
        best[part] = targets[first:end][index].where(cosine[part] > float("-inf"), -1)
    return best, cosine

"""The rules by which tokens leave: pure functions of one prompt's tokens, those that may leave, in their order."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ssmcompress.arch.scan import Scan
from ssmcompress.policy import TokenPolicy
from ssmcompress.tokens import importance as scores
from ssmcompress.tokens.matching import match


@dataclass(frozen=True)
class Row:
    """Tokens of one prompt that may leave: output [L, d] of the mixer, positions [L]; where they are in its scan."""

    layer: int
    output: Tensor
    positions: Tensor
    scan: Scan | None = None  # of the prompt up to the token after the last of these
    places: Tensor | None = None  # [L] of these in that


@dataclass(frozen=True)
class Removal:
    """Which tokens leave [r], and into which others they merge [r] (-1: none); `lost` [r] do so in the residual alone.

    `topmost` merges, of the mixer's output, only the larger half of what leaves, channel by channel.
    """

    gone: Tensor
    into: Tensor
    lost: Tensor
    topmost: bool = False

    @classmethod
    def of(cls, gone: Tensor) -> "Removal":
        """Tokens that leave without a trace."""
        return cls(gone, torch.full_like(gone, -1), torch.ones_like(gone, dtype=torch.bool))


def utrc(row: Row, count: int, policy: TokenPolicy) -> Removal:
    """Of the less important half those most like one of the other half, merged or lost (Zhan et al., 2024, §4)."""
    order = scores.importance(row.output, policy.importance).argsort(stable=True)
    sources, targets = (part.sort().values for part in order.tensor_split([len(order) // 2]))
    return _closest(row, sources, targets, count, policy, policy.pruned)


def tome(row: Row, count: int, policy: TokenPolicy) -> Removal:
    """Of every second token, those most like one of the others, merged (ToMe, Bolya, 2023; PuMer, Cao, 2023)."""
    every = torch.arange(len(row.output), device=row.output.device)
    return _closest(row, every[::2], every[1::2], count, policy, 0.0)


def released(row: Row, count: int, policy: TokenPolicy) -> Removal:
    """What the published code of UTRC computes, whatever the text: the first even positions, all into position 1.

    It sorts every channel by itself before it matches, so that rows are no tokens any more, and the first is the
    largest in every channel.
    """
    gone = 2 * torch.arange(count, device=row.output.device)
    return Removal(gone, torch.ones_like(gone), torch.zeros_like(gone, dtype=torch.bool), topmost=True)


def evit(row: Row, count: int, policy: TokenPolicy) -> Removal:
    """The least important ones (EViT, Liang et al., 2022)."""
    return _least(scores.importance(row.output, policy.importance), count)


def watched(score: Callable[[Scan], Tensor], row: Row, count: int, policy: TokenPolicy) -> Removal:
    """Those of least score of the scan."""
    assert row.scan is not None and row.places is not None
    return _least(score(row.scan)[row.places], count)


def drop_earliest(row: Row, count: int, policy: TokenPolicy) -> Removal:
    """The first ones: a control."""
    return Removal.of(torch.arange(count, device=row.output.device))


def stride(row: Row, count: int, policy: TokenPolicy) -> Removal:
    """Evenly spaced ones: a control."""
    return Removal.of((2 * torch.arange(count, device=row.output.device) + 1) * len(row.output) // (2 * count))


def random(row: Row, count: int, policy: TokenPolicy) -> Removal:
    """Any, by the seed, the block and their number alone: a control."""
    drawn = (policy.seed * 1009 + row.layer) * 1_000_003 + len(row.output)
    generator = torch.Generator().manual_seed(drawn % 2**63)
    gone = torch.randperm(len(row.output), generator=generator)[:count].sort().values
    return Removal.of(gone.to(row.output.device))


RULES: dict[str, Callable[[Row, int, TokenPolicy], Removal]] = {
    "utrc": utrc,
    "utrc-released": released,
    "evit": evit,
    "tome": tome,
    "pumer": tome,
    "simba": partial(watched, scores.influence),
    "hidden-attention": partial(watched, scores.energy),
    "drop-earliest": drop_earliest,
    "stride": stride,
    "random": random,
}


def _least(score: Tensor, count: int) -> Removal:
    return Removal.of(score.argsort(stable=True)[:count].sort().values)


def _closest(row: Row, sources: Tensor, targets: Tensor, count: int, policy: TokenPolicy, share: float) -> Removal:
    """The sources most like a target; this share of them, the least like it, is lost in the output."""
    into, cosine = match(row.output, sources, targets, row.positions, policy.match_window)
    chosen = cosine.argsort(descending=True, stable=True)[:count]
    lost = torch.zeros_like(chosen, dtype=torch.bool)
    lost[len(chosen) - int(share * len(chosen) + 0.5) :] = True
    return Removal(sources[chosen], into[chosen], lost | (into[chosen] < 0))

"""A policy at work on the port between blocks (`arch.backbone`): each row by itself, whatever its batch and padding."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ssmcompress.arch.backbone import GONE, Tokens
from ssmcompress.arch.scan import Scan
from ssmcompress.policy import WATCHING, TokenPolicy
from ssmcompress.tokens.rules import RULES, Removal, Row
from ssmcompress.tokens.schedule import removable


class Selection:
    """Lets tokens leave by a policy, and merges them where it says so."""

    def __init__(self, policy: TokenPolicy) -> None:
        self.policy = policy
        self.layers, self.special = policy.layers, policy.special
        self.watches, self.carries = policy.method in WATCHING, policy.decay == "carry"

    def __call__(self, layer: int, tokens: Tokens) -> Tokens:
        """The tokens that go on, rows of different number padded in front."""
        counts = [removable(int(free), self.policy) for free in tokens.free.sum(1)]
        if not any(counts):
            return tokens
        rows = [self._row(layer, tokens, b, count) for b, count in enumerate(counts)]
        output, residual, positions, free = zip(*rows, strict=True)
        return Tokens(_packed(output), _packed(residual), _packed(positions, GONE), _packed(free))

    def _row(self, layer: int, tokens: Tokens, b: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        there = tokens.positions[b] != GONE
        real = slice(None) if bool(there.all()) else there
        output, residual, positions, free = (
            part[b, real] for part in (tokens.output, tokens.residual, tokens.positions, tokens.free)
        )
        if count:
            places = free.nonzero().flatten()
            scan = None if tokens.scan is None else _scan(tokens.scan, b, real, int(places[-1]) + 2)
            removal = RULES[self.policy.method](
                Row(layer, output[places], positions[places], scan, places), count, self.policy
            )
            stays = torch.ones_like(free).index_fill(0, places[removal.gone], False)
            output, residual = (
                merged(part, places, removal, stays, self.policy.merge, whole)
                for part, whole in ((output, False), (residual, True))
            )
            positions, free = positions[stays], free[stays]
        return output, residual, positions, free


def merged(x: Tensor, places: Tensor, removal: Removal, stays: Tensor, merge: str, whole: bool) -> Tensor:
    """x [stays] of x [L, d], stays [L] bool, with what merges into each: all that has a place to go, or but the lost.

    The mean of a token and its sources, or (b + a) / 2 for one source after the other in the order of the text.
    """
    kept, taken = x[stays], (removal.into >= 0) if whole else ~removal.lost
    if not bool(taken.any()):
        return kept
    gone, into = removal.gone[taken].sort()
    into = removal.into[taken][into]
    targets, which, number = into.unique(return_inverse=True, return_counts=True)
    sources = x[places[gone]].float()
    if removal.topmost and not whole:
        sources = sources.topk(len(gone) // 2, dim=0).values
        which, number = which[: len(sources)], torch.full_like(number, len(sources))
    if merge == "mean":
        own, share = 1 / (1 + number), 1 / (1 + number[which])
    else:
        own = 0.5**number
        share = 0.5 ** (number[which] - _rank(which))
    new = x[places[targets]].float() * own[:, None]
    new = new.index_add(0, which, sources * share[:, None])
    return kept.index_copy_(0, (stays.cumsum(0) - 1)[places[targets]], new.to(x.dtype))


def install(model: nn.Module, policy: TokenPolicy | None) -> None:
    """Lets a model of ours reduce tokens by a policy; without one, and by one that keeps all, it is dense."""
    cast(Any, model).backbone.select = None if policy is None or policy.keep == 1 else Selection(policy)


def _rank(which: Tensor) -> Tensor:
    """How many equal entries come before each [r]."""
    order = which.argsort(stable=True)
    ranked = which[order]
    rank = torch.empty_like(which)
    rank[order] = torch.arange(len(which), device=which.device) - torch.searchsorted(ranked, ranked)
    return rank


def _scan(scan: Scan, b: int, real: Tensor | slice, end: int) -> Scan:
    """What the scan took in of one row before `end`: one token beyond those that may leave.

    From there on predictions are wanted, and what comes later must have no say in them.
    """
    x, dt, B, C = (part[b, real][None, :end] for part in (scan.x, scan.dt, scan.B, scan.C))
    return scan._replace(x=x, dt=dt, B=B, C=C)


def _packed(rows: tuple[Tensor, ...], padding: float = 0.0) -> Tensor:
    """Rows [L, …] of different lengths as one tensor, padded in front."""
    if len(rows) == 1:
        return rows[0][None]
    if len({len(row) for row in rows}) == 1:
        return torch.stack(rows)
    return pad_sequence(list(rows), batch_first=True, padding_value=padding, padding_side="left")

"""Continuations under a model that reduces tokens: what is scored never leaves, and is what is left of a plain loop."""

import pytest
import torch

from ssmcompress.checkpoint.source import load
from ssmcompress.errors import InputError
from ssmcompress.measure.continuations import likelihoods
from ssmcompress.policy import RULES, TokenPolicy
from ssmcompress.tokens.selection import install


def pairs():
    draw = torch.Generator().manual_seed(0)
    sizes = ((30, 10), (7, 1), (2, 12), (25, 3))
    return [tuple(torch.randint(1, 4096, (n,), generator=draw).tolist() for n in size) for size in sizes]


@pytest.mark.parametrize("method", RULES)
def test_no_token_that_is_scored_leaves(method):
    model = load("ref:mamba", dtype=torch.float32).model
    install(model, TokenPolicy(method=method, layers=(1, 3), keep=0.5))
    together = {i: nats for i, nats, _ in likelihoods(model, pairs(), batch=4, longest=64)}
    for i, (context, after) in enumerate(pairs()):
        ((_, nats, _),) = likelihoods(model, [(context, after)], batch=1, longest=64)
        assert nats == pytest.approx(together[i], rel=1e-4)
        last = len(context) + len(after) - 2  # of what is read: the last token is only predicted
        left = set(model.backbone.kept[-1][0].tolist())
        assert set(range(len(context) - 1, last + 1)) <= left
        if len(context) > 8:
            assert len(left) < last + 1  # and of the context some do


@pytest.mark.parametrize("pair", [([], [5]), ([5], []), ([5], list(range(1, 40)))])
def test_what_cannot_be_scored_is_refused(pair):
    model = load("ref:mamba", dtype=torch.float32).model
    with pytest.raises(InputError, match="cannot be scored in 32"):
        list(likelihoods(model, [pair], batch=1, longest=32))

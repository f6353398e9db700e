"""How far tokens go, as a passage tells it, beside the positions that the backbone kept."""

import pytest
import torch

from ssmcompress.checkpoint.source import load
from ssmcompress.measure.passage import passage
from ssmcompress.measure.text import documents
from ssmcompress.steps import ReduceTokens
from ssmcompress.tokens.schedule import resolved
from ssmcompress.tokens.selection import install


@pytest.fixture(scope="module")
def checkpoint():
    return load("ref:mamba", dtype=torch.float32)


@pytest.mark.parametrize("rule", ["utrc", "drop-earliest"])
def test_every_token_is_counted_in_the_blocks_that_read_it(checkpoint, rule):
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    install(model, resolved(ReduceTokens(method=rule, keep=0.7), checkpoint.arch, special=(0,)))
    found = passage(model, tokenizer, documents(), 50)
    kept = [set(each[0].tolist()) for each in model.backbone.kept[:-1]]
    install(model, None)
    assert found.depth == len(kept) == 6
    assert found.seen == tuple(sum(i in each for each in kept) for i in range(50))
    assert found.seen[0] == found.seen[-1] == 6 and min(found.seen) == 2
    assert "".join(found.tokens).startswith("<|endoftext|>= Robert Boulter =")
    if rule == "drop-earliest":
        assert list(found.seen[1:-1]) == sorted(found.seen[1:-1])


def test_there_is_none_where_every_token_stays(checkpoint):
    assert passage(checkpoint.model, checkpoint.tokenizer, documents(), 50) is None

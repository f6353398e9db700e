"""Whole blocks and their scans: the greedy search against brute force, and similarity against its definition."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from ssmcompress.arch.masked import mask
from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.edits import Keep
from ssmcompress.policy import TokenPolicy
from ssmcompress.prune.depth import find_blocks, likelihood
from ssmcompress.steps import Cut
from tests.unit.arch import models
from tests.unit.arch.models import CONFIGS


@pytest.fixture(params=["mamba", "mamba2"])
def four(request):
    """A random model of four blocks, in which B, C and dt are large enough for scans to matter."""
    config = copy.deepcopy(CONFIGS[request.param])
    config.num_hidden_layers = 4
    torch.manual_seed(3)
    model = arch_for(config).build("cpu").eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("x_proj.weight", "in_proj.weight")):
            parameter.data *= 10
    return model


def nats(model, ids):
    logits = model(ids).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@torch.no_grad()
@pytest.mark.parametrize("axis", ["layer", "ssm"])
def test_the_greedy_search_is_the_one_by_hand(four, axis):
    arch, ids = arch_for(four.config), models.tokens(3, 14)
    keep = torch.ones(4, dtype=torch.bool)
    for _ in range(2):
        costs = {}
        for layer in keep.nonzero().flatten().tolist():
            without = keep.clone()
            without[layer] = False
            costs[layer] = nats(Surgery(arch, [Keep(axis, None, without)]).operate(four), ids)
        keep[min(costs, key=costs.get)] = False
    (found,) = find_blocks(four, arch, Cut(axis=axis, keep=2), 2, ids)
    assert found.axis == axis and torch.equal(found.keep, keep)


@torch.no_grad()
def test_the_likelihood_is_the_models(four):
    ids = models.tokens(3, 14)
    assert likelihood(four, arch_for(four.config), ids, list(four.backbone.layers)) == pytest.approx(
        nats(four, ids), rel=1e-5
    )


@pytest.mark.parametrize("axis", ["layer", "ssm"])
def test_a_search_goes_on_where_it_was_stopped(four, axis):
    arch, ids, finished = arch_for(four.config), models.tokens(3, 14), {}
    (whole,) = find_blocks(four, arch, Cut(axis=axis, keep=1), 1, ids, finished=finished)
    assert sorted(finished) == [0, 1, 2]
    begun = {0: finished[0]}
    (again,) = find_blocks(four, arch, Cut(axis=axis, keep=1), 1, ids, finished=begun)
    assert torch.equal(again.keep, whole.keep) and sorted(begun) == [0, 1, 2]


@torch.no_grad()
def test_similarity_keeps_the_blocks_that_turn_the_stream_most(four):
    arch, ids = arch_for(four.config), models.tokens(3, 14)
    streams = [four.backbone.embeddings(ids)]
    for block in arch.blocks(four):
        streams.append(block(streams[-1]))
    turned = [float(1 - F.cosine_similarity(a, b, dim=-1).mean()) for a, b in itertools.pairwise(streams)]
    (found,) = find_blocks(four, arch, Cut(axis="layer", method="similarity", keep=2), 2, ids)
    assert set(found.keep.nonzero().flatten().tolist()) == set(sorted(range(4), key=turned.__getitem__)[2:])


@torch.no_grad()
def test_similarity_keeps_the_scans_that_turn_their_block_most(four):
    arch, ids = arch_for(four.config), models.tokens(3, 14)
    twin = copy.deepcopy(four)
    mask(twin, arch, [Keep("ssm", None, torch.zeros(4, dtype=torch.bool))])
    stream, turned = four.backbone.embeddings(ids), []
    for block, silent in zip(arch.blocks(four), arch.blocks(twin), strict=True):
        less, stream = silent(stream), block(stream)
        turned.append(float(1 - F.cosine_similarity(less, stream, dim=-1).mean()))
    (found,) = find_blocks(four, arch, Cut(axis="ssm", method="similarity", keep=2), 2, ids)
    assert set(found.keep.nonzero().flatten().tolist()) == set(sorted(range(4), key=turned.__getitem__)[2:])


@pytest.mark.parametrize("method", ["shedder", "similarity", "random"])
def test_a_block_without_a_scan_keeps_none(four, method):
    without = [Keep("ssm", None, torch.tensor([True, False, True, True]))]
    model = Surgery(arch_for(four.config), without).operate(four)
    step = Cut(axis="ssm", method=method, keep=2)
    for seed in range(3):
        (found,) = find_blocks(model, arch_for(model.config), step, 2, models.tokens(2, 14), seed)
        assert int(found.keep.sum()) == 2 and not found.keep[1]


def gated(four, *scans):
    """The model where only these blocks have a scan."""
    keep = torch.tensor([layer in scans for layer in range(4)])
    return Surgery(arch_for(four.config), [Keep("ssm", None, keep)]).operate(four)


METHODS = pytest.mark.parametrize("method", ["shedder", "similarity", "random"])


@METHODS
@pytest.mark.parametrize("scan", range(4))
def test_the_only_block_with_a_scan_stays(four, method, scan):
    model, step = gated(four, scan), Cut(axis="layer", method=method, keep=2)
    for after, seed in itertools.product((1, 2), range(3)):
        (found,) = find_blocks(model, arch_for(model.config), step, after, models.tokens(2, 14), seed)
        assert int(found.keep.sum()) == after and found.keep[scan]


@METHODS
def test_where_no_block_has_a_scan_any_may_go(four, method):
    model, step = gated(four), Cut(axis="layer", method=method, keep=2)
    (found,) = find_blocks(model, arch_for(model.config), step, 1, models.tokens(2, 14))
    assert int(found.keep.sum()) == 1


def leaving(four, method, *anchors):
    """The family of a model of which tokens leave after these blocks."""
    arch = arch_for(four.config)
    policy = TokenPolicy(method=method, layers=anchors, keep=0.8)
    return arch_for(arch.resized(arch.sizes, policy=policy))


@METHODS
@pytest.mark.parametrize("anchor", range(3))
def test_a_block_stays_before_and_behind_which_tokens_leave(four, method, anchor):
    arch, step = leaving(four, "utrc", anchor), Cut(axis="layer", method=method, keep=2)
    for after, seed in itertools.product((2, 3), range(4)):
        found = find_blocks(four, arch, step, after, models.tokens(2, 14), seed)
        assert int(found[0].keep.sum()) == after and Surgery(arch, found).arch.policy.layers


@METHODS
def test_scans_that_tokens_leave_by_stay(four, method):
    arch, step = leaving(four, "simba", 0, 2), Cut(axis="ssm", method=method, keep=2)
    for seed in range(4):
        found = find_blocks(four, arch, step, 2, models.tokens(2, 14), seed)
        assert found[0].keep.tolist() == [True, False, True, False]
        assert Surgery(arch, found).arch.policy.layers == (0, 2)


def test_random_depends_on_the_seed_alone(four):
    arch, step = arch_for(four.config), Cut(axis="layer", method="random", keep=2)
    first, again = (find_blocks(four, arch, step, 2, seed=5)[0].keep for _ in range(2))
    assert torch.equal(first, again) and int(first.sum()) == 2
    assert len({tuple(find_blocks(four, arch, step, 2, seed=s)[0].keep.tolist()) for s in range(9)}) > 1

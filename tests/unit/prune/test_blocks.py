"""Which blocks and scans may go: what Surgery refuses is never chosen, and whatever number is told can be reached."""

import itertools

import pytest
import torch

from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.edits import Keep
from ssmcompress.errors import UnsupportedError
from ssmcompress.policy import TokenPolicy
from ssmcompress.prune.blocks import fewest, less, may_go, stands, strongest, units, unreduced
from ssmcompress.prune.sizes import best
from tests.unit.arch.models import ALL

SCANS = {"one": "..s..", "some": "s.ss.", "all": "sssss"}
POLICIES = {
    "none": None,
    "early": ("utrc", (0,)),
    "late": ("utrc", (3,)),
    "several": ("utrc", (0, 2)),
    "watching": ("simba", (2,)),
    "watching-two": ("simba", (0, 2)),
}


def five(scans="sssss", method=None, layers=()):
    """A model of five blocks, which have a scan where an s stands, with a policy of these anchors."""
    arch = arch_for(ALL["gated-mamba"])
    bare, whole = arch.sizes
    policy = method and TokenPolicy(method=method, layers=layers, keep=0.8)
    return arch_for(arch.resized([whole if scan == "s" else bare for scan in scans], policy=policy))


def known():
    """Every model for which there is such a policy."""
    for (scans, where), (policy, told) in itertools.product(SCANS.items(), POLICIES.items()):
        if told is None or told[0] != "simba" or all(where[anchor] == "s" for anchor in told[1]):
            yield pytest.param(five(where, *(told or ())), id=f"{scans}-{policy}")


def subsets(there):
    """Every choice of these units but none, [layers] bool."""
    for bits in itertools.product([False, True], repeat=len(there)):
        if any(bits) and not (torch.tensor(bits) & ~there).any():
            yield torch.tensor(bits)


@pytest.mark.parametrize("axis", ["layer", "ssm"])
@pytest.mark.parametrize("arch", known())
def test_what_stands_is_what_surgery_makes_with_a_scan_left(arch, axis):
    least = len(arch.sizes)
    for keep in subsets(units(arch, axis)):
        try:
            made = any(block["state"] for block in Surgery(arch, [Keep(axis, None, keep)]).arch.sizes)
        except UnsupportedError:
            made = False
        assert stands(arch, axis, keep) == made
        least = min(least, int(keep.sum())) if made else least
    assert fewest(arch, axis) == least


@pytest.mark.parametrize("axis", ["layer", "ssm"])
@pytest.mark.parametrize("arch", known())
def test_every_number_is_reached_whatever_goes_first(arch, axis):
    there = units(arch, axis)
    for seed in range(20):
        score = torch.rand(5, generator=torch.Generator().manual_seed(seed))
        for after in range(fewest(arch, axis), int(there.sum()) + 1):
            keep = strongest(arch, axis, score, after)
            assert int(keep.sum()) == after and stands(arch, axis, keep)
            assert after == fewest(arch, axis) or may_go(arch, axis, keep)


def test_where_nothing_is_needed_they_are_the_best_and_of_equals_the_first():
    score = torch.tensor([2.0, 0.0, 3.0, 2.0, 1.0])
    for after in range(1, 6):
        assert torch.equal(strongest(five(), "layer", score, after), best(score, after))
    assert strongest(five(), "ssm", torch.zeros(5), 2).tolist() == [True, True, False, False, False]


def test_one_unit_less_is_the_others():
    there = torch.tensor([True, False, True])
    assert less(there, 2).tolist() == [True, False, False] and there.tolist() == [True, False, True]


def test_a_model_of_which_no_token_leaves_is_otherwise_the_same():
    for name in ("mamba", "pruned-mamba", "pruned-mamba2-rotated", "pruned-mamba2-grouped"):
        arch = arch_for(ALL[name])
        policy = TokenPolicy(layers=(0,), keep=0.8)
        reduced = arch_for(arch.resized(arch.sizes, rotated=arch.rotated, policy=policy))
        assert reduced.policy == policy and unreduced(arch) is arch
        assert unreduced(reduced).config.to_dict() == arch.config.to_dict()

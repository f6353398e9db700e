"""Units shared out over layers, against every way there is to share them out."""

import itertools

import pytest
import torch

from ssmcompress.prune.allocation import allocate
from ssmcompress.prune.sizes import best

CASES = {
    "every size": ([5, 4, 6], [range(1, 6), range(1, 5), range(1, 7)], lambda _: 1),
    "powers of two": ([16, 16, 8, 4], [(1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4)], lambda _: 1),
    "by eight, and an odd one": ([24, 19, 32], [(8, 16, 24), (8, 16, 19), (8, 16, 24, 32)], lambda _: 1),
    "groups": ([6, 4, 8], [(2, 4, 6), (2, 4), (2, 4, 6, 8)], lambda _: 2),
    "groups that are merged": ([8, 4, 6], [(1, 2, 4, 8), (1, 2, 4), (1, 2, 3, 6)], lambda size: size),
    "one layer without any": ([4, 0, 2], [(1, 2, 4), (0,), (1, 2)], lambda size: max(1, size)),
    "one layer": ([9], [(2, 4, 9)], lambda _: 1),
}


def worth(scores, sizes, runs):
    return sum(float(score[best(score, size, runs(size))].sum()) for score, size in zip(scores, sizes, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_no_other_way_is_worth_more(name, seed):
    units, sizes, runs = CASES[name]
    torch.manual_seed(seed)
    scores = [torch.randn(count, dtype=torch.float64) * (layer + 1) for layer, count in enumerate(units)]
    ways = list(itertools.product(*sizes))
    for budget in range(sum(min(each) for each in sizes), sum(units) + 2):
        most = max(sum(way) for way in ways if sum(way) <= budget)
        wanted = max(worth(scores, way, runs) for way in ways if sum(way) == most)
        found = allocate(scores, sizes, budget, runs)
        assert tuple(found) in ways and sum(found) == most
        assert worth(scores, found, runs) == pytest.approx(wanted)


def test_where_every_size_is_possible_it_is_one_ranking():
    torch.manual_seed(0)
    scores = [torch.rand(count).index_fill(0, torch.tensor([2]), 1.0 + count) for count in (7, 5, 9)]
    bar = torch.cat(scores).sort(descending=True).values[11]
    assert allocate(scores, [range(1, 8), range(1, 6), range(1, 10)], 12) == [int((s >= bar).sum()) for s in scores]


def test_one_possible_size_at_least_stays_in_every_layer():
    scores = [torch.zeros(8), torch.ones(8)]
    assert allocate(scores, [(2, 4, 8), (2, 4, 8)], 6) == [2, 4]
    with pytest.raises(ValueError, match="least sizes"):
        allocate(scores, [(2, 4, 8), (2, 4, 8)], 3)


def test_a_budget_may_bound_what_units_of_layers_cost():
    scores, sizes = [torch.rand(6), torch.rand(6)], [range(1, 7)] * 2

    def amount(found):
        return 100 + 3 * found[0] + 5 * found[1]

    for most in range(108, 150):
        assert amount(allocate(scores, sizes, most, amount=amount)) <= most
    assert allocate(scores, sizes, 148, amount=amount) == [6, 6]

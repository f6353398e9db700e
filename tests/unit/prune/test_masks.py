"""Masks bit for bit against a plain loop: odd shapes, ties, ragged groups."""

import pytest
import torch

from ssmcompress.calib.stats import SquaredSum
from ssmcompress.errors import InputError
from ssmcompress.prune.masks import n_of_m, parse_pattern, unstructured
from ssmcompress.prune.scores import magnitude, wanda
from tests.unit.prune import brute

SHAPES = [(1, 1), (3, 1), (1, 17), (5, 12), (7, 13), (4, 64), (2, 3, 11)]


def scores(shape: tuple[int, ...], kind: str) -> torch.Tensor:
    torch.manual_seed(sum(shape))
    if kind == "distinct":
        return torch.rand(shape)
    if kind == "ties":
        return torch.randint(0, 3, shape).float()
    return torch.zeros(shape)


@pytest.mark.parametrize("kind", ["distinct", "ties", "constant"])
@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_unstructured_equals_the_plain_loop(shape, scope, kind):
    score = scores(shape, kind)
    for sparsity in (0.0, 0.1, 0.29, 0.5, 2 / 3, 0.99):
        keep = unstructured(score, sparsity, scope)
        assert torch.equal(keep, brute.unstructured(score, sparsity, scope))
        size = score.numel() if scope == "tensor" else shape[-1]
        gone = (~keep).sum() if scope == "tensor" else (~keep).sum(-1)
        assert (gone == int(size * sparsity)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_unstructured_takes_other_dtypes(dtype):
    score = torch.rand(9, 200).to(dtype)
    assert torch.equal(unstructured(score, 0.4), brute.unstructured(score, 0.4, "row"))


def test_unstructured_equals_a_stable_sort_on_a_large_tensor_with_many_ties():
    torch.manual_seed(0)
    score = magnitude(torch.randn(300, 500).bfloat16())
    gone = score.flatten().sort(stable=True).indices[: int(score.numel() * 0.6)]
    expected = torch.ones(score.numel(), dtype=torch.bool)
    expected[gone] = False
    assert torch.equal(unstructured(score, 0.6, "tensor"), expected.view(300, 500))


def test_a_view_that_is_not_contiguous_gives_the_same_mask():
    score = scores((12, 5), "ties").T
    for scope in ("row", "tensor"):
        assert torch.equal(unstructured(score, 0.5, scope), unstructured(score.contiguous(), 0.5, scope))
    assert torch.equal(n_of_m(score, 2, 4), n_of_m(score.contiguous(), 2, 4))


def test_infinite_scores_stay_and_zeros_go():
    score = torch.tensor([[float("inf"), 0.0, 1.0, float("inf")]])
    assert unstructured(score, 0.5).tolist() == [[True, False, False, True]]


def test_sparsity_zero_keeps_all():
    for scope in ("row", "tensor"):
        assert unstructured(torch.zeros(3, 5), 0.0, scope).all()


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(InputError, match=r"not in \[0, 1\)"):
        unstructured(torch.rand(2, 2), sparsity)


def test_an_unknown_scope_is_refused():
    with pytest.raises(InputError, match="scope 'layer'"):
        unstructured(torch.rand(2, 2), 0.5, "layer")


def test_a_score_that_is_not_a_number_is_refused():
    score = torch.rand(2, 8)
    score[1, 3] = torch.nan
    for attempt in (
        lambda: unstructured(score, 0.0),
        lambda: unstructured(score, 0.5, "tensor"),
        lambda: n_of_m(score, 2, 4),
    ):
        with pytest.raises(InputError, match="not a number"):
            attempt()


@pytest.mark.parametrize("kind", ["distinct", "ties", "constant"])
@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 3), (7, 16)])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 12, 13, 48])
def test_n_of_m_equals_the_plain_loop(width, pattern, kind):
    score = scores((5, width), kind)
    keep = n_of_m(score, *pattern)
    assert torch.equal(keep, brute.n_of_m(score, *pattern))
    n, m = pattern
    whole = width - width % m
    assert (keep[:, :whole].unflatten(-1, (-1, m)).sum(-1) == n).all() if whole else True


def test_n_of_m_keeps_two_of_four_and_a_ragged_last_group_by_its_share():
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0, 9.0, 8.0, 7.0], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    expected = [[1, 0, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 1, 1]]
    assert n_of_m(score, 2, 4).int().tolist() == expected


def test_n_of_m_on_a_convolution_groups_the_taps_of_a_channel():
    score = scores((6, 1, 4), "distinct")
    assert torch.equal(n_of_m(score, 2, 4)[:, 0], brute.n_of_m(score[:, 0], 2, 4))


@pytest.mark.parametrize(("text", "pattern"), [("2:4", (2, 4)), ("1:2", (1, 2)), ("4:8", (4, 8))])
def test_patterns(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text", ["4:2", "4:4", "0:4", "2:0", "a:b", "2", "", ":", "2:4:8", "-2:4", " 2:4", "2.0:4", "²:4"]
)
def test_patterns_that_make_no_sense_are_refused(text):
    with pytest.raises(InputError, match="0 < N < M"):
        parse_pattern(text)


def statistic(inputs: torch.Tensor) -> SquaredSum:
    seen = SquaredSum(inputs.shape[-1])
    seen.add(inputs)
    return seen


@pytest.mark.parametrize("shape", [(6, 16), (5, 13), (1, 7)])
def test_wanda_masks_equal_the_plain_loop_from_the_inputs_on(shape):
    torch.manual_seed(1)
    weight = torch.randn(shape).bfloat16().float()  # ties, as in stored checkpoints
    inputs = torch.randn(40, shape[1]) * torch.rand(shape[1]) * 3
    keep = unstructured(wanda(weight, statistic(inputs).norm), 0.5)
    assert torch.equal(keep, brute.wanda(weight, inputs, 0.5))


def test_wanda_with_constant_inputs_equals_magnitude_by_row():
    torch.manual_seed(2)
    weight = torch.randn(8, 24)
    score = wanda(weight, statistic(torch.full((3, 10, 24), 0.7)).norm)
    assert torch.equal(unstructured(score, 0.5), unstructured(magnitude(weight), 0.5))
    assert torch.equal(n_of_m(score, 2, 4), n_of_m(magnitude(weight), 2, 4))


def test_an_input_that_is_always_zero_loses_its_weights_first():
    weight = torch.rand(4, 6) + 1
    inputs = torch.rand(10, 6) + 0.1
    inputs[:, 3] = 0
    keep = unstructured(wanda(weight, statistic(inputs).norm), 0.2)
    assert (~keep).int().sum(0).tolist() == [0, 0, 0, 4, 0, 0]

"""SparseGPT against a plain column loop in float64, and against what it must beat."""

import pytest
import torch

from ssmcompress.calib.stats import Hessian, SquaredSum
from ssmcompress.errors import InputError
from ssmcompress.prune import masks, scores
from ssmcompress.prune.sparsegpt import sparsegpt


def correlated(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    factors = torch.randn(tokens, width // 4) @ torch.randn(width // 4, width)
    return factors + 0.3 * torch.randn(tokens, width)


def hessian(inputs: torch.Tensor) -> torch.Tensor:
    seen = Hessian(inputs.shape[-1])
    seen.add(inputs)
    return seen.value


def by_elimination(weight: torch.Tensor, keep: torch.Tensor, matrix: torch.Tensor, damp: float) -> torch.Tensor:
    """The same updates the slow way: remove one input after another, each time with the inverse of what is left."""
    weight, matrix = weight.double().clone(), matrix.double().clone()
    width = weight.shape[1]
    matrix += torch.eye(width) * damp * matrix.diagonal().mean()
    for j in range(width):
        inverse = torch.linalg.inv(matrix[j:, j:])
        error = torch.where(keep[:, j], 0.0, weight[:, j]) / inverse[0, 0]
        weight[:, j:] -= error[:, None] * inverse[0]
        weight[:, j] = torch.where(keep[:, j], weight[:, j], 0.0)
    return weight


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": (2, 4)}])
@pytest.mark.parametrize(("width", "block"), [(40, 16), (37, 128), (24, 8)])
def test_values_equal_the_elimination_of_one_input_after_another(width, block, target):
    inputs, weight = correlated(200, width), torch.randn(6, width)
    values, keep = sparsegpt(weight, hessian(inputs), block=block, **target)
    expected = by_elimination(weight, keep, hessian(inputs), 0.01)
    assert torch.allclose(values.double(), expected, atol=2e-4)
    assert (values[~keep] == 0).all()
    assert not values[~keep].signbit().any()


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize(("width", "block"), [(256, 128), (70, 32), (13, 128)])
def test_with_an_identity_hessian_it_is_magnitude_by_block(width, block, scale):
    torch.manual_seed(0)
    weight = torch.randn(9, width)
    values, keep = sparsegpt(weight, scale * torch.eye(width), sparsity=0.5, block=block)
    parts = [masks.unstructured(part, 0.5, "tensor") for part in scores.magnitude(weight).split(block, dim=1)]
    assert torch.equal(keep, torch.cat(parts, dim=1))
    assert torch.equal(values, weight * keep)


def test_with_an_identity_hessian_a_pattern_is_that_of_magnitude():
    torch.manual_seed(0)
    weight = torch.randn(5, 30)
    values, keep = sparsegpt(weight, torch.eye(30), pattern=(2, 4), block=6)  # the block grows to hold whole groups
    assert torch.equal(keep, masks.n_of_m(scores.magnitude(weight), 2, 4))
    assert torch.equal(values, weight * keep)


def test_every_group_has_its_zeros_and_the_ragged_last_its_share():
    inputs = correlated(300, 50)
    _, keep = sparsegpt(torch.randn(7, 50), hessian(inputs), pattern=(2, 4), block=16)
    assert (keep[:, :48].unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    assert (keep[:, 48:].sum(-1) == 1).all()


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"sparsity": 0.75}, {"pattern": (2, 4)}])
def test_it_reconstructs_better_than_wanda_on_correlated_inputs(target):
    inputs, weight = correlated(512, 64), torch.randn(32, 64)
    seen = SquaredSum(64)
    seen.add(inputs)
    score = scores.wanda(weight, seen.norm)
    keep = masks.n_of_m(score, *target["pattern"]) if "pattern" in target else masks.unstructured(score, **target)
    values, kept = sparsegpt(weight, hessian(inputs), **target)
    assert kept.sum() == keep.sum()
    assert ((weight - values) @ inputs.T).norm() < 0.9 * ((weight - weight * keep) @ inputs.T).norm()


def test_sparsity_zero_leaves_the_bits_alone():
    weight = torch.randn(4, 20)
    values, keep = sparsegpt(weight, hessian(correlated(50, 20)), sparsity=0.0)
    assert torch.equal(values, weight) and keep.all()


def test_inputs_that_are_always_zero_lose_their_weights_and_change_nothing_else():
    inputs, weight = correlated(100, 24), torch.randn(5, 24)
    dead = inputs.clone()
    dead[:, [3, 17]] = 0
    live = [j for j in range(24) if j not in (3, 17)]
    before = weight.clone()
    values, _ = sparsegpt(weight, hessian(dead), sparsity=0.0)
    assert torch.equal(weight, before)  # the caller's weight is not touched
    assert not values[:, [3, 17]].any()
    assert torch.equal(values[:, live], weight[:, live])
    _, keep = sparsegpt(weight, hessian(dead), sparsity=0.5)
    assert not keep[:, [3, 17]].any()


def test_inputs_that_are_always_zero_do_not_change_the_damping():
    matrix, weight = 1e-6 * hessian(correlated(100, 28)), torch.randn(5, 28)
    matrix[24:] = matrix[:, 24:] = 0
    values, keep = sparsegpt(weight, matrix, pattern=(2, 4))
    alone, kept = sparsegpt(weight[:, :24], matrix[:24, :24], pattern=(2, 4))
    assert torch.equal(keep[:, :24], kept)
    assert torch.allclose(values[:, :24], alone, atol=1e-5)


def test_fewer_tokens_than_inputs_are_enough():
    values, keep = sparsegpt(torch.randn(4, 64), hessian(correlated(8, 64)), sparsity=0.5)
    assert values.isfinite().all()
    assert keep.sum() == 2 * 64


def test_inputs_that_are_all_zero_are_survived():
    values, _ = sparsegpt(torch.randn(4, 8), torch.zeros(8, 8), sparsity=0.5)
    assert not values.any()


def test_more_damping_rescues_a_matrix_that_is_a_little_indefinite():
    matrix = torch.eye(12)
    matrix[0, 1] = matrix[1, 0] = 1.05
    values, _ = sparsegpt(torch.randn(3, 12), matrix, sparsity=0.5)
    assert values.isfinite().all()


@pytest.mark.parametrize("broken", [-torch.eye(6), torch.full((6, 6), torch.nan), torch.full((6, 6), torch.inf)])
def test_a_matrix_beyond_rescue_is_refused(broken):
    with pytest.raises(InputError, match="not positive definite"):
        sparsegpt(torch.randn(3, 6), broken, sparsity=0.5)

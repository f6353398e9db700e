"""Statistics: chunks, merging, masks, and what must not pass."""

import pytest
import torch

from ssmcompress.calib.stats import Activity, Hessian, Spread, SquaredSum
from ssmcompress.errors import InputError, UnsupportedError


def seen(kind, *chunks, mask=None):
    statistic = kind(chunks[0].shape[-1])
    for chunk in chunks:
        statistic.add(chunk, mask)
    return statistic


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(6, 700, 5) * torch.tensor([1.0, 1e-3, 1e3, 0.0, 5.0])


def test_the_norm_is_that_of_every_input_over_all_tokens(inputs):
    statistic = seen(SquaredSum, inputs)
    assert statistic.count == 4200
    assert statistic.norm.dtype == torch.float32
    assert torch.equal(statistic.norm, inputs.double().flatten(0, 1).norm(dim=0).float())


def test_the_hessian_is_twice_the_mean_outer_product(inputs):
    rows = inputs.double().flatten(0, 1)
    expected = 2 * sum(torch.outer(row, row) for row in rows) / len(rows)
    assert torch.allclose(seen(Hessian, inputs).value.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_chunks_give_what_one_pass_gives(inputs, size):
    whole, parts = seen(SquaredSum, inputs), seen(SquaredSum, *inputs.split(size))
    assert torch.equal(whole.norm, parts.norm)
    assert whole.count == parts.count
    whole, parts = seen(Hessian, inputs), seen(Hessian, *inputs.split(size))
    assert torch.allclose(whole.value, parts.value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [SquaredSum, Hessian])
def test_merging_gives_what_the_concatenation_gives(inputs, kind):
    whole, merged = seen(kind, inputs), seen(kind, inputs[:2])
    other = seen(kind, inputs[2:])
    before = other.total.clone()
    merged.merge(other)
    assert merged.count == whole.count
    assert torch.allclose(merged.total, whole.total, rtol=1e-5, atol=1e-4)
    merged.add(inputs)
    assert torch.equal(other.total, before)  # merging shares no memory


@pytest.mark.parametrize("kind", [SquaredSum, Hessian])
def test_masked_tokens_do_not_count(inputs, kind):
    mask = torch.rand(6, 700) < 0.5
    inputs[~mask] = torch.nan
    some = seen(kind, inputs, mask=mask)
    alone = seen(kind, inputs[mask])
    assert some.count == int(mask.sum())
    assert torch.equal(some.total, alone.total)
    some.require_fired("in_proj")


def test_half_precision_inputs_are_summed_in_full(inputs):
    ones = torch.ones(3000, 5, dtype=torch.bfloat16)
    assert torch.equal(seen(SquaredSum, ones).norm, torch.full((5,), 3000.0).sqrt())
    assert torch.equal(seen(Hessian, ones).value, torch.full((5, 5), 2.0))


def test_the_inputs_are_left_alone_and_not_followed_by_gradients():
    for dtype in (torch.float32, torch.float64):
        inputs = torch.full((4, 3), 2.0, dtype=dtype, requires_grad=True)
        for kind in (SquaredSum, Hessian):
            assert not seen(kind, inputs).total.requires_grad
        assert (inputs == 2).all()


@pytest.mark.parametrize("kind", [SquaredSum, Hessian])
def test_a_tap_that_never_fired_is_told(kind):
    statistic = kind(3)
    with pytest.raises(UnsupportedError, match=r"No calibration input reached layers\.0\.out_proj"):
        statistic.require_fired("layers.0.out_proj")
    statistic.add(torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(UnsupportedError):
        statistic.require_fired("layers.0.out_proj")
    statistic.add(torch.zeros(1, 3))
    statistic.require_fired("layers.0.out_proj")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_told(bad):
    statistic = seen(SquaredSum, torch.tensor([[1.0, bad]]))
    with pytest.raises(InputError, match="not finite"):
        statistic.require_fired("in_proj")


def test_another_width_is_refused():
    with pytest.raises(ValueError, match="width 4 where 3"):
        SquaredSum(3).add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="width 4 where 3"):
        Hessian(3).merge(Hessian(4))


def test_the_spread_is_mean_and_sample_variance(inputs):
    rows = inputs.double().flatten(0, 1)
    for found in (seen(Spread, inputs), seen(Spread, *inputs.split(2))):
        assert torch.allclose(found.mean.double(), rows.mean(0), rtol=1e-5)
        assert torch.allclose(found.variance.double(), rows.var(0), rtol=1e-5)


def test_activity_counts_every_window_once(inputs):
    expected = inputs.double().abs().mean(1).square().sum(0).sqrt().float()
    for found in (seen(Activity, inputs), seen(Activity, *inputs.split(4))):
        assert torch.allclose(found.norm, expected)
    assert seen(Activity, inputs[:, :5]).count == 30

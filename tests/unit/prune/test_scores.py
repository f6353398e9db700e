"""Scores against their definitions, entry by entry."""

import pytest
import torch

from ssmcompress.prune.masks import lowest
from ssmcompress.prune.scores import fading, magnitude, standardised, tail_share, votes, wanda


def test_magnitude_is_the_absolute_value_in_float32():
    weight = torch.tensor([[-1.5, 0.0], [0.25, -0.0]], dtype=torch.bfloat16)
    assert torch.equal(magnitude(weight), torch.tensor([[1.5, 0.0], [0.25, 0.0]]))
    assert magnitude(weight).dtype == torch.float32


def test_wanda_weighs_each_input_by_its_norm():
    torch.manual_seed(0)
    weight, norm = torch.randn(5, 7), torch.rand(7)
    score = wanda(weight, norm)
    for i in range(5):
        for j in range(7):
            assert score[i, j] == weight[i, j].abs() * norm[j]


def test_wanda_weighs_each_channel_of_a_convolution():
    torch.manual_seed(0)
    weight, norm = torch.randn(4, 1, 4), torch.rand(4)  # as many channels as taps: the right axis must be taken
    score = wanda(weight, norm)
    for c in range(4):
        assert torch.equal(score[c], weight[c].abs() * norm[c])


def test_a_state_is_voted_out_at_every_token_where_it_is_among_the_least():
    saliency = torch.tensor([[9.0, 0.0, 0.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    for gone, expected in ((1, [-2, -1, 0]), (2, [-2, -3, -1])):
        assert votes(saliency, lambda row, gone=gone: lowest(row, gone)).tolist() == expected
    assert votes(saliency[:1], lambda row: lowest(row, 1)).tolist() == [0, 0, 0]


def test_early_tokens_weigh_more_where_energies_fade():
    energy = torch.tensor([[0.0, 0.0], [2.0, 1.0], [0.0, 3.0]])
    decay = torch.tensor([[9.0, 9.0], [0.5, 1.0], [1.0, 2.0]])
    assert fading(energy, decay).tolist() == [2 * 0.25 / 2, 1 / 2 + 3 * 4 / 3]


def test_scores_of_a_layer_become_comparable():
    score = torch.tensor([1.0, 4.0, 4.0, 0.0])
    assert torch.allclose(standardised(score).std(), torch.tensor(1.0)) and standardised(score).mean().abs() < 1e-6
    assert tail_share(score).tolist() == pytest.approx([1 / 9, 0.5, 0.5, 0.0])
    assert standardised(torch.ones(3)).tolist() == tail_share(torch.zeros(3)).tolist() == [0, 0, 0]

"""Scores against their definitions, entry by entry."""

import torch

from ssmcompress.prune.scores import magnitude, votes, wanda


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
    assert votes(saliency, 1).tolist() == [-2, -1, 0]
    assert votes(saliency, 2).tolist() == [-2, -3, -1]

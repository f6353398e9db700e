"""What our side of the CUDA kernels hands them, seen on the CPU."""

from types import SimpleNamespace

import pytest
import torch

from ssmcompress.kernels import cuda, reference


def strict(x, weight, bias=None, initial_states=None, activation=None):
    """`causal_conv1d_fn` with its demands on x and initial_states, both [B, C, L] with channels last."""
    for given in (x, initial_states):
        assert given is None or (given.stride(1) == 1 and not given.stride(0) % 8 and not given.stride(2) % 8)
        assert given is None or not given.data_ptr() % 16
    left = initial_states
    return reference.conv(x.transpose(1, 2), weight, bias, left, activation == "silu").transpose(1, 2)


@pytest.mark.parametrize("projected", [48, 44, 37])  # columns of in_proj: heads that were removed leave any number
@pytest.mark.parametrize("channels", [24, 18])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(("batch", "length"), [(2, 9), (1, 9), (1, 1), (2, 1)])
def test_the_convolution_is_handed_what_its_kernel_takes(
    monkeypatch, projected, channels, biased, begun, batch, length
):
    monkeypatch.setattr(cuda, "_module", lambda name: SimpleNamespace(causal_conv1d_fn=strict))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, projected, generator=draw)[..., 5 : 5 + channels]
    weight = torch.randn(channels, 4, generator=draw)
    bias = torch.randn(channels, generator=draw) if biased else None
    left = torch.randn(batch, channels, 3, generator=draw) if begun else None
    found = cuda.conv(x, weight, bias, left)
    torch.testing.assert_close(found, reference.conv(x, weight, bias, left), rtol=1e-6, atol=1e-6)

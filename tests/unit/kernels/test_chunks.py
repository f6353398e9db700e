"""The decays of the chunk algorithm: exact where they count, zero where they do not, never subnormal."""

import pytest
import torch

from ssmcompress.kernels import cpu, reference
from ssmcompress.kernels.chunks import FORGOTTEN, _decay


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
)
def test_decays_are_exponentials_below_the_diagonal_and_zero_above(dtype: torch.dtype, tolerance: float):
    log = torch.linspace(0, 3, 8).double().mul(-torch.arange(1, 9)).view(1, 8)
    expected = (log[..., :, None] - log[..., None, :]).exp().tril()
    torch.testing.assert_close(_decay(log, dtype).double(), expected, rtol=tolerance, atol=1.1 * FORGOTTEN)


def test_no_decay_is_subnormal_however_strong():
    log = torch.cumsum(-torch.rand(4, 64, generator=torch.Generator().manual_seed(0)).double() * 30, -1)
    decay = _decay(log, torch.float32)
    assert ((decay == 0) | (decay >= 0.99 * FORGOTTEN)).all()
    assert (decay.diagonal(dim1=-2, dim2=-1) == 1).all()
    assert (decay == 0).sum() > decay.numel() * 0.9


def test_strong_decays_leave_values_and_gradients_right():
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (1, 70, 3, 4), "dt": (1, 70, 3), "B": (1, 70, 1, 5), "C": (1, 70, 1, 5)}
    given = {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()}
    results = []
    for ssd in (reference.ssd, cpu.ssd):
        inputs = {key: value.clone().requires_grad_() for key, value in given.items()}
        A = torch.tensor([-0.1, -5.0, -80.0], dtype=torch.float64, requires_grad=True)
        y, state = ssd(inputs["x"], inputs["dt"], A, inputs["B"], inputs["C"])
        (y.square().sum() + state.square().sum()).backward()
        results.append([y, state, A.grad, *(value.grad for value in inputs.values())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmcompress.arch.scan import Scan
from ssmcompress.kernels import reference
from ssmcompress.tokens.importance import energy, importance, influence


def scan(family: str) -> Scan:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    length, heads, width, states, groups = 9, 4, (1 if family == "mamba" else 3), 5, (1 if family == "mamba" else 2)
    A = -torch.rand(heads, states if family == "mamba" else 1, generator=random)
    return Scan(
        normal(1, length, heads, width),
        normal(1, length, heads),
        A,
        normal(1, length, groups, states),
        normal(1, length, groups, states),
        normal(heads),
    )


def outputs(given: Scan, x: Tensor) -> Tensor:
    """y [L, H, P] of the reference recurrences."""
    if given.A.shape[1] == 1:
        return reference.ssd(x, given.dt, given.A[:, 0], given.B, given.C, None, given.dt_bias)[0][0]
    found = reference.selective_scan(
        x[..., 0], given.dt, given.A, given.B[:, :, 0], given.C[:, :, 0], dt_bias=given.dt_bias
    )
    return found[0][0, ..., None]


def without(given: Scan, t: int) -> Tensor:
    x = given.x.clone()
    x[:, t] = 0
    return outputs(given, x)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_influence_is_what_the_last_output_loses_without_a_token(family: str) -> None:
    given = scan(family)
    whole = outputs(given, given.x)
    lost = torch.stack([(whole - without(given, t))[-1].abs().max() for t in range(given.x.shape[1])])
    torch.testing.assert_close(influence(given), lost, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_energy_is_what_all_outputs_lose_without_a_token(family: str) -> None:
    given = scan(family)
    whole = outputs(given, given.x)
    lost = torch.stack([(whole - without(given, t)).square().sum() for t in range(given.x.shape[1])])
    torch.testing.assert_close(energy(given), lost, rtol=1e-4, atol=1e-5)


def test_importance_by_hand() -> None:
    output = torch.tensor([[3.0, -4.0]])
    expected: dict[str, Any] = {"clip": 1.5, "mean": -0.5, "l1": 7.0, "l2": 5.0}
    for kind, value in expected.items():
        assert importance(output, kind).tolist() == [value]

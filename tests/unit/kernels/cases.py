"""Random inputs for the kernels, in float64, and the comparison of values and gradients with the reference."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[..., tuple[Tensor, Tensor]]


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal float64 numbers of their own seed."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conv_inputs(batch: int, length: int, channels: int, kernel: int) -> dict[str, Tensor]:
    """x, weight, bias, left."""
    return {
        "x": normal(1, batch, length, channels),
        "weight": normal(2, channels, kernel),
        "bias": normal(3, channels),
        "left": normal(4, batch, channels, kernel - 1),
    }


def scan_inputs(batch: int, length: int, width: int, size: int) -> dict[str, Tensor]:
    """All inputs of the Mamba-1 scan, A negative."""
    return {
        "u": normal(1, batch, length, width),
        "dt": normal(2, batch, length, width) - 2,
        "A": -normal(3, width, size).exp(),
        "B": normal(4, batch, length, size),
        "C": normal(5, batch, length, size),
        "D": normal(6, width),
        "z": normal(7, batch, length, width),
        "dt_bias": normal(8, width) - 1,
        "state": normal(9, batch, width, size),
    }


def ssd_inputs(batch: int, length: int, heads: int, width: int, groups: int, size: int) -> dict[str, Tensor]:
    """All tensor inputs of the Mamba-2 scan, A negative."""
    return {
        "x": normal(1, batch, length, heads, width),
        "dt": normal(2, batch, length, heads) - 2,
        "A": -normal(3, heads).exp(),
        "B": normal(4, batch, length, groups, size),
        "C": normal(5, batch, length, groups, size),
        "D": normal(6, heads),
        "dt_bias": normal(7, heads) - 1,
        "state": normal(8, batch, heads, width, size),
    }


def values_and_gradients(kernel: Kernel, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and the gradients of a fixed random projection of them, by name."""
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
    found = kernel(**leaves)
    outputs: Sequence[Tensor] = found if isinstance(found, tuple) else (found,)
    loss = sum((y.double() * normal(20 + i, *y.shape)).sum() for i, y in enumerate(outputs))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {f"out{i}": y.detach() for i, y in enumerate(outputs)} | dict(zip(leaves, gradients, strict=True))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within the relative tolerance of the expected one."""
    errors = {name: error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= tolerance, errors


def padded(inputs: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """The inputs with three positions of padding appended: input 0 and dt = -1e4."""
    long = dict(inputs)
    for name in (key, "dt", "B", "C", *(("z",) if "z" in inputs else ())):
        value = -1e4 if name == "dt" else 0.0
        shape = (0, 0) * (inputs[name].dim() - 2) + (0, 3)
        long[name] = F.pad(inputs[name], shape, value=value)
    return long

"""How much each weight matters. Pure tensors; scores are float32, higher matters more."""

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w| of any shape (Han et al., 2015)."""
    return weight.float().abs()


def wanda(weight: Tensor, norm: Tensor) -> Tensor:
    """|w_ij| · ‖x_j‖₂: weight [out, in], norm [in], or a depthwise weight [C, 1, K], norm [C] (Sun et al., 2024)."""
    return weight.float().abs() * (norm[:, None, None] if weight.dim() == 3 else norm)

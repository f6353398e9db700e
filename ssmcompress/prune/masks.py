"""Which weights stay, given their scores. Counts are exact: of equal scores those with the higher index stay."""

import torch
from torch import Tensor

from ssmcompress.errors import InputError

SCOPES = ("row", "tensor")


def unstructured(score: Tensor, sparsity: float, scope: str = "row") -> Tensor:
    """Keeps all but the int(size · sparsity) lowest scores of each row (last dim) or the whole tensor: bool, as score.

    The row scope is that of the WANDA paper. The tensor scope is the usual rule for magnitudes, with an exact count: a
    threshold at that sorted position would zero it and all its equals too. Raises InputError for a sparsity outside
    [0, 1) or a NaN.
    """
    if scope not in SCOPES:
        raise InputError(f"The scope {scope!r} is unknown.", hint=f"Choose from {', '.join(SCOPES)}.")
    if not 0 <= sparsity < 1:
        raise InputError(f"The sparsity {sparsity} is not in [0, 1).", hint="0.5 zeroes half of the weights.")
    rows = score if scope == "row" else score.reshape(1, -1)
    return ~lowest(rows, int(rows.shape[-1] * sparsity)).view(score.shape)


def n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Keeps the n highest of every m consecutive scores of a row (last dim): bool, as score.

    A last group of r < m keeps ceil(r · n / m), no smaller share than the others. Raises InputError for a NaN.
    """
    width = score.shape[-1]
    whole = width - width % m
    drop = torch.zeros_like(score, dtype=torch.bool)
    drop[..., :whole] = lowest(score[..., :whole].unflatten(-1, (width // m, m)), m - n).flatten(-2)
    rest = width - whole
    drop[..., whole:] = lowest(score[..., whole:], rest - -(-rest * n // m))
    return ~drop


def parse_pattern(text: str) -> tuple[int, int]:
    """The (n, m) of "n:m": n of every m consecutive inputs are kept. Raises InputError unless 0 < n < m."""
    n, _, m = text.partition(":")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise InputError(f"The pattern {text!r} is not N:M with 0 < N < M.", hint="2:4 keeps 2 of every 4 inputs.")
    return int(n), int(m)


def lowest(rows: Tensor, count: int) -> Tensor:
    """True at the `count` lowest of each row [..., width], of equals the first, as a stable sort has it."""
    if bool(rows.isnan().any()):
        raise InputError("A score is not a number.", hint="Are all weights and calibration inputs finite?")
    if count == 0 or rows.numel() == 0:
        return torch.zeros_like(rows, dtype=torch.bool)
    threshold = rows.kthvalue(count, dim=-1, keepdim=True).values
    below, equal = rows < threshold, rows == threshold
    short = count - below.sum(-1, keepdim=True)
    if bool((equal.sum(-1, keepdim=True) > short).any()):
        equal &= equal.cumsum(-1, dtype=torch.int32) <= short
    return below | equal

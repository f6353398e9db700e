"""SparseGPT: zeroes weights and moves what they did onto those that stay (Frantar and Alistarh, 2023)."""

import torch
from torch import Tensor

from ssmcompress.errors import InputError
from ssmcompress.prune.masks import n_of_m, unstructured

RETRIES = 4  # each with ten times the damping


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float = 0.0,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
    damp: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """New values (float32) and kept entries (bool) of a weight [out, in], given the Hessian [in, in] of its inputs.

    The lowest w² / U_jj² go, U the upper Cholesky factor of the inverse Hessian: int(size · sparsity) of every block of
    columns, or with a pattern (n, m) all but n of every m inputs. Inputs that are always zero lose their weights, and
    weights that are zero already stay so.
    `damp` is a share of the mean diagonal. Raises InputError where the Hessian cannot be factored.
    """
    weight = weight.float().clone()
    factor = _inverse_factor(hessian.float(), damp)
    weight[:, hessian.diagonal() == 0] = 0
    alive = weight != 0
    keep = torch.ones_like(weight, dtype=torch.bool)
    if pattern is not None:
        block = -(-block // pattern[1]) * pattern[1]  # groups lie within a block
    for start in range(0, weight.shape[1], block):
        columns = slice(start, start + block)
        part = weight[:, columns], keep[:, columns], alive[:, columns]
        errors = _prune_block(*part, factor[columns, columns], sparsity, pattern)
        weight[:, start + block :] -= (errors @ factor[columns, start + block :]) * alive[:, start + block :]
    return weight, keep


def _prune_block(
    weight: Tensor,
    keep: Tensor,
    alive: Tensor,
    factor: Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> Tensor:
    """Prunes weight and keep [out, b] in place, column by column, where alive; returns the scaled errors [out, b]."""
    scale = factor.diagonal()
    if pattern is None:
        keep.copy_(unstructured((weight / scale).square(), sparsity, "tensor"))
    errors = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        if pattern is not None and j % pattern[1] == 0:
            group = slice(j, j + pattern[1])
            keep[:, group] = n_of_m((weight[:, group] / scale[group]).square(), *pattern)
        kept = torch.where(keep[:, j], weight[:, j], 0.0)
        errors[:, j] = (weight[:, j] - kept) / scale[j]
        weight[:, j] = kept
        weight[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :] * alive[:, j + 1 :]
    return errors


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, in which dead inputs count as average ones."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    live = diagonal != 0
    mean = diagonal[live].mean() if bool(live.any()) else hessian.new_ones(())
    diagonal[~live] = 1
    for attempt in range(RETRIES):
        diagonal += damp * mean * 10**attempt
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper
    raise InputError(
        "The Hessian of the calibration inputs is not positive definite.",
        hint="Are the calibration inputs finite? Give more --windows, or use --method wanda.",
    )

"""Pruning as a plain loop over plain numbers: slow, and plainly right."""

import torch


def drop_lowest(scores: list[float], count: int) -> list[bool]:
    """Which of the scores stay when the lowest `count` go, of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    gone = set(order[:count])
    return [i not in gone for i in range(len(scores))]


def unstructured(score: torch.Tensor, sparsity: float, scope: str) -> torch.Tensor:
    """Rows or the whole tensor, int(size · sparsity) entries each."""
    if scope == "tensor":
        flat = score.flatten().tolist()
        return torch.tensor(drop_lowest(flat, int(len(flat) * sparsity)), dtype=torch.bool).view(score.shape)
    rows = score.flatten(0, -2).tolist()
    kept = [drop_lowest(row, int(len(row) * sparsity)) for row in rows]
    return torch.tensor(kept, dtype=torch.bool).view(score.shape)


def n_of_m(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Groups of m along each row; a last group of r keeps the least number that is no smaller share than n of m."""
    kept = []
    for row in score.tolist():
        kept.append([])
        for start in range(0, len(row), m):
            group = row[start : start + m]
            keep = next(k for k in range(len(group) + 1) if k * m >= n * len(group))
            kept[-1] += drop_lowest(group, len(group) - keep)
    return torch.tensor(kept, dtype=torch.bool).view(score.shape)


def wanda(weight: torch.Tensor, inputs: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The mask of a weight [out, in] whose inputs [tokens, in] are given, per row."""
    norms = [sum(float(x) ** 2 for x in inputs[:, j]) ** 0.5 for j in range(inputs.shape[1])]
    score = torch.stack([weight[:, j].abs() * torch.tensor(norm) for j, norm in enumerate(norms)], dim=1)
    return unstructured(score, sparsity, "row")

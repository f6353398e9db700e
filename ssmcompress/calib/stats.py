"""What calibration remembers of a module's inputs: sums that stream over chunks and merge across parts."""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from ssmcompress import parallel
from ssmcompress.errors import InputError, UnsupportedError

ROWS = 1024  # tokens widened to float64 at a time


class Statistic(ABC):
    """A sum over tokens of something that a tap shows, and how many tokens there were."""

    def __init__(self, width: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.width = width
        self.count = 0
        self.total = torch.zeros(shape, dtype=dtype)

    @classmethod
    @abstractmethod
    def of(cls, x: Any) -> Self:
        """An empty one for what a tap shows, such as x."""

    @abstractmethod
    def add(self, x: Any) -> None:
        """Takes in what a tap shows of whole windows."""

    def merge(self, other: Self) -> None:
        """Takes in what another one of the same width has seen."""
        if other.width != self.width:
            raise ValueError(f"a statistic of width {other.width} where {self.width} is expected")
        self.total = self.total + other.total.to(self.total.device)
        self.count += other.count

    def gather(self) -> None:
        """Takes in what the other processes have seen."""
        self.total = parallel.total(self.total)
        self.count = int(parallel.total(torch.tensor(self.count)))

    def require_fired(self, name: str) -> None:
        """Raises UnsupportedError if no token was seen, InputError if one was not finite."""
        if not self.count:
            raise UnsupportedError(f"No calibration input reached {name}.", hint="Leave it out with --exclude.")
        if not bool(self.total.isfinite().all()):
            raise InputError(f"The calibration inputs of {name} are not finite.", hint="Are the model's weights sound?")


class Moment(Statistic):
    """A statistic of a module's inputs, token by token."""

    @classmethod
    def of(cls, x: Any) -> Self:
        """An empty one for inputs such as x."""
        return cls(x.shape[-1])  # type: ignore[call-arg]  # every kind takes its width alone

    def add(self, x: Any, mask: Tensor | None = None) -> None:
        """Takes in inputs [..., width], of which mask [...] (bool) selects those that count."""
        if x.shape[-1] != self.width:
            raise ValueError(f"inputs of width {x.shape[-1]} where {self.width} is expected")
        rows = x.detach().reshape(-1, self.width) if mask is None else x.detach()[mask]
        self.total = self.total.to(rows.device)
        self._accumulate(rows)
        self.count += len(rows)

    @abstractmethod
    def _accumulate(self, rows: Tensor) -> None:
        """Adds inputs [tokens, width] to the total."""


class SquaredSum(Moment):
    """Σ x_j² over tokens in float64, so that neither chunks nor their order change a float32 score (WANDA)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, (width,), torch.float64)

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ over all tokens [width], float32: the root of the sum, comparable between inputs of one pass."""
        return self.total.sqrt().float()

    def _accumulate(self, rows: Tensor) -> None:
        for part in rows.split(ROWS):
            self.total += part.double().square().sum(0)


class Hessian(Moment):
    """Σ x xᵀ over tokens in float32 (SparseGPT)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, (width, width), torch.float32)

    @property
    def value(self) -> Tensor:
        """(2 / tokens) Σ x xᵀ [width, width]: the Hessian of the squared error of a linear layer's output."""
        return self.total * (2 / self.count)

    def _accumulate(self, rows: Tensor) -> None:
        rows = rows.float()
        self.total.addmm_(rows.T, rows)


class Spread(Moment):
    """Σ x_j and Σ x_j² over tokens in float64: how much each input fluctuates (FLAP)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, (2, width), torch.float64)

    @property
    def mean(self) -> Tensor:
        """E[x_j] [width], float32."""
        return (self.total[0] / self.count).float()

    @property
    def variance(self) -> Tensor:
        """The sample variance of x_j over all tokens [width], float32."""
        centred = self.total[1] - self.total[0].square() / self.count
        return (centred.clamp_min(0) / max(1, self.count - 1)).float()

    def _accumulate(self, rows: Tensor) -> None:
        for part in rows.split(ROWS):
            wide = part.double()
            self.total += torch.stack([wide.sum(0), wide.square().sum(0)])


class Activity(Moment):
    """Σ over windows of (mean over tokens of |x_j|)² in float64 (Minitron-SSM); inputs are [n, L, width]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, (width,), torch.float64)

    @property
    def norm(self) -> Tensor:
        """The root of the sum [width], float32."""
        return self.total.sqrt().float()

    def add(self, x: Any, mask: Tensor | None = None) -> None:
        """Takes in windows [n, L, width], each of which counts once whatever its length."""
        for i, window in enumerate(x):
            super().add(window, None if mask is None else mask[i])

    def _accumulate(self, rows: Tensor) -> None:
        self.total += rows.abs().double().mean(0).square()

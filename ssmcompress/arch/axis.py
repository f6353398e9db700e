"""An axis of a model: a kind of unit that can be removed, and where it runs through the tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slice:
    """Where an axis cuts one tensor: unit i owns the indices offset + r·period + i·width + (0 … width-1) of dim."""

    tensor: str
    dim: int
    offset: int = 0
    width: int = 1
    period: int = 0
    repeats: int = 1

    def indices(self, unit: int) -> list[int]:
        """The indices along dim that unit i owns."""
        starts = (self.offset + r * self.period + unit * self.width for r in range(self.repeats))
        return [start + k for start in starts for k in range(self.width)]


@dataclass(frozen=True)
class Axis:
    """A kind of unit that can be removed from a block, and every tensor that must shrink with it (methods: §1.5)."""

    name: str
    size: int
    slices: tuple[Slice, ...]
    config_key: str | None  # the stock config field that can say the new size; None: no stock config can

    @property
    def tensors(self) -> set[str]:
        """The names of what it cuts."""
        return {part.tensor for part in self.slices}

    def parameters(self, shapes: Mapping[str, torch.Size]) -> int:
        """Parameters one unit owns, given the shapes of the block's tensors."""
        return sum(
            len(part.indices(0)) * shapes[part.tensor].numel() // shapes[part.tensor][part.dim] for part in self.slices
        )

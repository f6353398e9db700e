"""What calibration remembers of a scan: how large its states are, how they are read, and how that goes by time."""

import math
from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from ssmcompress.arch.scan import Scan
from ssmcompress.calib.stats import Statistic
from ssmcompress.edits import Forget


class States(Statistic):
    """Sums over tokens, float64 [groups, states], of h², C² and C² h², with h² summed over a group's channels."""

    def __init__(self, groups: int, size: int) -> None:
        super().__init__(size, (3, groups, size), torch.float64)

    @classmethod
    def of(cls, x: Any) -> Self:
        """An empty one for such a scan."""
        return cls(*x.C.shape[2:])

    @property
    def energy(self) -> Tensor:
        """E[h²] [groups, states], float32."""
        return (self.total[0] / self.count).float()

    @property
    def readout(self) -> Tensor:
        """E[C²] [groups, states], float32."""
        return (self.total[1] / self.count).float()

    @property
    def joint(self) -> Tensor:
        """E[C² h²] [groups, states], float32: what the output of the scan would lose with each state."""
        return (self.total[2] / self.count).float()

    def add(self, x: Any) -> None:
        """Takes in a scan of whole windows."""
        scan: Scan = x
        read = scan.C.double().square()
        self.total = self.total.to(read.device)
        for t, state in enumerate(scan.states()):
            energy = state.square().sum(2).unflatten(1, (read.shape[2], -1)).sum(2).double()  # [B, G, N]
            self.total += torch.stack([energy.sum(0), read[:, t].sum(0), (energy * read[:, t]).sum(0)])
        self.count += read.shape[0] * read.shape[1]


class Gramians(Statistic):
    """Sums over tokens, float64 [groups, states, states], of h hᵀ over a group's channels, and of C Cᵀ."""

    def __init__(self, groups: int, size: int) -> None:
        super().__init__(size, (2, groups, size, size), torch.float64)

    @classmethod
    def of(cls, x: Any) -> Self:
        """An empty one for such a scan."""
        return cls(*x.C.shape[2:])

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """E[h hᵀ] and E[C Cᵀ], each [groups, states, states]."""
        held, read = self.total / self.count
        return held, read

    def add(self, x: Any) -> None:
        """Takes in a scan of whole windows."""
        scan: Scan = x
        groups = scan.C.shape[2]
        self.total = self.total.to(scan.C.device)
        for state in scan.states():
            rows = state.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 3)  # [G, everything else, N]
            self.total[0] += (rows.mT @ rows).double()
        reads = scan.C.flatten(0, 1).transpose(0, 1).double()
        self.total[1] += reads.mT @ reads
        self.count += scan.C.shape[0] * scan.C.shape[1]


class _InTime(Statistic):
    """Sums over windows, all of one length, of what stands before each token; before the first one that is nothing.

    They are plain sums, in which every window counts the same, where SparseSSM's released code weighs later ones more.
    """

    def add(self, x: Any) -> None:
        """Takes in a scan of whole windows; what the last token leaves is read by none."""
        scan: Scan = x
        self.total = self.total.to(scan.A.device)
        before = None
        for t, (decay, state) in enumerate(scan.steps()):
            if before is not None:
                self._accumulate(t, scan, decay, before.square())
            before = state
        self.count += scan.C.shape[0] * scan.C.shape[1]

    @abstractmethod
    def _accumulate(self, t: int, scan: Scan, decay: Tensor, energy: Tensor) -> None:
        """Adds what token t meets: its decay exp(Δ A) [B, H, N] or [B, H, 1], and h² [B, H, P, N] before it."""


class StatesInTime(_InTime):
    """Σ over windows and channels of A_log² h² before each token, float64 [tokens, states] (SparseSSM, thm. 1)."""

    def __init__(self, length: int, size: int) -> None:
        super().__init__(size, (length, size), torch.float64)

    @classmethod
    def of(cls, x: Any) -> Self:
        """An empty one for such a scan."""
        return cls(x.C.shape[1], x.C.shape[3])

    def _accumulate(self, t: int, scan: Scan, decay: Tensor, energy: Tensor) -> None:
        A_log = scan.A.neg().log()
        weight = A_log.square() * (A_log < Forget.fill - 0.5)  # the logarithm of an exponential is not quite it
        self.total[t] += (weight[None, :, None] * energy).sum((0, 1, 2)).double()


class EntriesInTime(_InTime):
    """Σ over windows of h² before each token, by entry of A_log: float32, 4 bytes a token and entry of one layer."""

    parts = 1

    def __init__(self, length: int, *shape: int) -> None:
        super().__init__(math.prod(shape), (self.parts, length, *shape), torch.float32)

    @classmethod
    def of(cls, x: Any) -> Self:
        """An empty one for such a scan."""
        return cls(x.C.shape[1], *x.A.shape)

    @property
    def energy(self) -> Tensor:
        """Σ h² before each token [tokens, D, N], or [tokens, H, 1] over all states that a head's decay is for."""
        return self.total[0]

    def _accumulate(self, t: int, scan: Scan, decay: Tensor, energy: Tensor) -> None:
        self.total[0, t] += energy.sum((0, 2)).sum_to_size(scan.A.shape)


class DecaysInTime(EntriesInTime):
    """The same, and Σ over windows of exp(Δ A): twice the memory."""

    parts = 2

    @property
    def decay(self) -> Tensor:
        """Σ exp(Δ A) of each token, in the shape of the energies; not told of the first one, which meets no state."""
        return self.total[1]

    def _accumulate(self, t: int, scan: Scan, decay: Tensor, energy: Tensor) -> None:
        super()._accumulate(t, scan, decay, energy)
        self.total[1, t] += decay.sum(0)

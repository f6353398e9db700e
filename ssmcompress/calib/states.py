"""What calibration remembers of a scan: how large its states are, how they are read, and how that goes by time."""

from typing import Any, Self

import torch
from torch import Tensor

from ssmcompress.arch.base import Scan
from ssmcompress.calib.stats import Statistic


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


class StatesInTime(Statistic):
    """Σ over windows and channels of A_log² h² before each token, float64 [tokens, states] (SparseSSM, thm. 1)."""

    def __init__(self, length: int, size: int) -> None:
        super().__init__(size, (length, size), torch.float64)

    @classmethod
    def of(cls, x: Any) -> Self:
        """An empty one for such a scan."""
        return cls(x.C.shape[1], x.C.shape[3])

    def add(self, x: Any) -> None:
        """Takes in a scan of whole windows, all of one length; what the last token leaves is read by none."""
        scan: Scan = x
        weight = scan.A.neg().log().square()[None, :, None]
        self.total = self.total.to(weight.device)
        for t, state in enumerate(scan.states(), start=1):
            if t < len(self.total):
                self.total[t] += (weight * state.square()).sum((0, 1, 2)).double()
        self.count += scan.C.shape[0] * scan.C.shape[1]

"""What calibration remembers of a scan: how large its states are, how they are read, and both at once."""

from typing import Any, Self

import torch
from torch import Tensor

from ssmcompress.arch.base import Scan
from ssmcompress.calib.stats import Moment


class States(Moment):
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

    def add(self, x: Any, mask: Tensor | None = None) -> None:
        """Takes in a scan of whole windows."""
        scan: Scan = x
        read = scan.C.double().square()
        self.total = self.total.to(read.device)
        for t, state in enumerate(scan.states()):
            energy = state.square().sum(2).unflatten(1, (read.shape[2], -1)).sum(2).double()  # [B, G, N]
            self.total += torch.stack([energy.sum(0), read[:, t].sum(0), (energy * read[:, t]).sum(0)])
        self.count += read.shape[0] * read.shape[1]

    def _accumulate(self, rows: Tensor) -> None:
        raise NotImplementedError("states are counted by scans")

"""Block by block: observe the dense block, let the caller edit it, send the tokens through the edited block, go on.

The residual stream is kept in float32 and passed on, so that every block sees what the pruned blocks before it make.
"""

import time
from collections.abc import Callable, Container, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssmcompress.arch.base import Arch
from ssmcompress.arch.mixer import Mixer
from ssmcompress.calib.stats import Statistic
from ssmcompress.calib.stream import Room, Stream
from ssmcompress.calib.taps import observe
from ssmcompress.errors import UnsupportedError
from ssmcompress.events import Emit, LayerDone, ignore

EditBlock = Callable[[int, nn.Module, Mapping[str, Statistic], Sequence[Tensor]], tuple[nn.Module, float | None]]


@dataclass(frozen=True)
class Walk:
    """One pass over the blocks: with what to observe which modules' inputs (or "scan"), and what to do then."""

    collect: Mapping[str, type[Statistic]]
    edit: EditBlock
    batch: int = 1  # windows at a time: on a CPU one is the fastest and takes the least memory
    known: Container[int] = ()  # layers that are not observed: their edits were found before, or there are none
    room: Room | None = None  # for the residual stream, where it may not be all in memory

    @torch.no_grad()
    def run(self, model: nn.Module, arch: Arch, windows: Tensor, emit: Emit = ignore) -> Sequence[Tensor]:
        """Walks windows [n, L] of token ids through the model; `edit` gives the block to go on with, and what it kept.

        It is told the layer, the block, the statistics of its modules, and the residual stream [b, L, d] that enters.

        Returns the residual stream after the last block, in batches [b, L, d].

        Raises UnsupportedError where a module's tap never fired: pruning blindly would be worse than not pruning.
        """
        embed = model.get_input_embeddings()
        hidden = Stream((embed(ids).float() for ids in windows.split(self.batch)), self.room)
        for layer, block in enumerate(arch.blocks(model)):
            started = time.perf_counter()
            lacking = set() if arch.has_scan(layer) else {"scan", *arch.prunable} - set(arch.modules(layer))
            statistics, dense = ({}, None) if layer in self.known else self._observe(layer, block, hidden, lacking)
            edited, kept = self.edit(layer, block, statistics, hidden)
            for i, rows in enumerate(hidden):
                hidden[i] = edited(rows)
            error = None if dense is None else float((hidden[0] - dense).norm() / dense.norm())
            emit(LayerDone(layer, arch.layers, time.perf_counter() - started, error, kept))
        return hidden

    def _observe(
        self, layer: int, block: nn.Module, hidden: Sequence[Tensor], lacking: Set[str]
    ) -> tuple[dict[str, Statistic], Tensor]:
        """What the dense block's modules take in, and the block's output of the first batch."""
        statistics: dict[str, Statistic] = {}

        def watch(module: str, x: Any) -> None:
            if module in self.collect:
                if module not in statistics:
                    statistics[module] = self.collect[module].of(x)
                statistics[module].add(x)

        with observe(cast(Mixer, block.mixer), watch):
            first = block(hidden[0])
            for i in range(1, len(hidden)) if self.collect else ():
                block(hidden[i])
        silent = [module for module in self.collect if module not in statistics and module not in lacking]
        if silent:
            raise UnsupportedError(
                f"No calibration input reached {', '.join(silent)} of layer {layer}.",
                hint="Pruning it would be blind; leave it out with --exclude.",
            )
        for module, statistic in statistics.items():
            statistic.gather()
            statistic.require_fired(f"{module} of layer {layer}")
        return statistics, first

"""The residual stream of calibration windows between two blocks: in memory as far as it has room, else in files."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Room:
    """Bytes of memory for the stream, and the folder where the rest of it lies while it is needed."""

    bytes: int
    folder: Path


class Stream(Sequence[Tensor]):
    """Batches [b, L, d] that are read and replaced one at a time; those that come last lie in a file without a name.

    Where there is a room for them the others lie in the memory of the host, wherever they are computed with.
    """

    def __init__(self, batches: Iterable[Tensor], room: Room | None = None) -> None:
        self._held: list[Tensor] = []
        self._spilled: list[tuple[int, torch.Size]] = []
        self._file: Any = None
        self._device = torch.device("cpu")
        self._hosted = room is not None
        left = 0 if room is None else room.bytes
        for rows in batches:
            self._device = rows.device
            if room is None or rows.nbytes <= left:
                self._held.append(self._home(rows))
                left -= rows.nbytes
                continue
            left = 0
            self._file = self._file or tempfile.TemporaryFile(dir=room.folder)  # noqa: SIM115 - it goes with the stream
            self._spilled.append((self._file.seek(0, os.SEEK_END), rows.shape))
            self._write(rows)

    def __len__(self) -> int:
        return len(self._held) + len(self._spilled)

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index] - len(self._held)
        if place < 0:
            return self._held[place].to(self._device)
        start, shape = self._spilled[place]
        self._file.seek(start)
        rows = torch.empty(shape)
        self._file.readinto(rows.numpy().data.cast("B"))
        return rows.to(self._device)

    def __setitem__(self, index: int, rows: Tensor) -> None:
        place = index - len(self._held)
        if place < 0:
            self._held[place] = self._home(rows)
            return
        self._file.seek(self._spilled[place][0])
        self._write(rows)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def _home(self, rows: Tensor) -> Tensor:
        return rows.cpu() if self._hosted else rows

    def _write(self, rows: Tensor) -> None:
        self._file.write(rows.cpu().contiguous().numpy().data.cast("B"))

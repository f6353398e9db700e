"""What edits make of the tensors of a checkpoint, each when it is asked for."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ssmcompress import edits as editing
from ssmcompress.arch.surgery import Surgery
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.edits import Edit


class Edited(Mapping[str, Tensor]):
    """The tensors by their names in the edited model, in the dtypes that they are stored in."""

    def __init__(self, stored: Shards, surgery: Surgery, edits: Sequence[Edit]) -> None:
        self._stored, self._surgery = stored, surgery
        self._edits, self._names = editing.by_tensor(edits), surgery.names(stored)

    def __getitem__(self, name: str) -> Tensor:
        old = self._names[name]
        added = self._surgery.added
        tensors = {old: added[old] if old in added else self._stored[old]}
        editing.apply(self._edits.get(old, ()), tensors)
        return self._surgery.cut(old, tensors[old])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def untouched(self, name: str) -> bool:
        """Whether a tensor is the source's as it was."""
        old = self._names[name]
        if old in self._edits or old in self._surgery.added:
            return False
        return not self._surgery.indices(old, self._stored.shape(old))

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is stored in, or one that is new will be."""
        old = self._names[name]
        added = self._surgery.added
        return added[old].dtype if old in added else self._stored.dtype(old)

    def meta(self) -> dict[str, Tensor]:
        """Every tensor's shape and dtype, as tensors on the meta device."""
        whole = self._surgery.shapes({name: self._stored.shape(name) for name in self._stored})
        shapes = {new: self._surgery.shape(old, whole[old]) for new, old in self._names.items()}
        return {name: torch.empty(shape, dtype=self.dtype(name), device="meta") for name, shape in shapes.items()}

"""A model of which one block is in memory at a time: the one that is used."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch, fill_buffers

MMAP_THRESHOLD, LARGE = -3, 2**20  # of mallopt: bytes that get pages of their own
Fetch = Callable[[str], Tensor]  # a tensor of the model by its name, in the dtype and where it is computed with


class Pages(nn.ModuleList):
    """Blocks that are read when they are asked for, and put away when another one is: what was changed in them is lost.

    Beside a GPU the block behind is read while one computes.
    """

    arch: Arch
    fetch: Fetch
    device: torch.device
    held: int | None
    wide: bool  # whether all of them are float32, whatever `fetch` gives
    ahead: tuple[int, "Future[dict[str, Tensor]]"] | None
    reader: ThreadPoolExecutor | None

    def turn_to(self, arch: Arch, fetch: Fetch, device: torch.device) -> None:
        """Where the blocks are read from; none is in memory yet."""
        if device.type == "cuda" and device.index is None:  # the thread that reads ahead knows no other than the first
            device = torch.device("cuda", torch.cuda.current_device())
        self.arch, self.fetch, self.device = arch, fetch, device
        self.held, self.wide, self.ahead = None, False, None
        _give_back()
        self.reader = ThreadPoolExecutor(1) if device.type == "cuda" else None

    def __getitem__(self, index: Any) -> Any:
        layer = range(len(self))[index]
        block = self._modules[str(layer)]
        if self.held != layer:
            self.put_away()
            block.load_state_dict(self._state(layer), assign=True)
            fill_buffers(block, self.device)
            self.held = layer
        return block

    def __iter__(self) -> Iterator[Any]:
        return (self[layer] for layer in range(len(self)))

    def widen(self, wide: bool) -> None:
        """From the next block on all are float32, or what `fetch` gives."""
        self.put_away()
        self.wide = wide

    def put_away(self) -> None:
        """Lets go of the block that is in memory."""
        if self.held is not None:
            self._modules[str(self.held)].to("meta")
            self.held = None

    def _state(self, layer: int) -> dict[str, Tensor]:
        ahead, self.ahead = self.ahead, None
        found = ahead[1].result() if ahead is not None and ahead[0] == layer else self._read(layer)
        if self.reader is not None and layer + 1 < len(self):
            self.ahead = layer + 1, self.reader.submit(self._read, layer + 1)
        return {name: tensor.float() for name, tensor in found.items()} if self.wide else found

    def _read(self, layer: int) -> dict[str, Tensor]:
        block, prefix = self._modules[str(layer)], self.arch.prefix(layer)
        return {name: self.fetch(prefix + name) for name in block.state_dict()}


def _give_back() -> None:
    """From now on the system has what is freed at once: glibc would keep the holes that every block and mask leaves."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(MMAP_THRESHOLD, LARGE)


def paged(arch: Arch, names: Mapping[str, Any], fetch: Fetch, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model in evaluation mode with these tensors, without a tied head; of its blocks each is fetched when used."""
    model = arch.build("meta")
    blocks = cast(Pages, arch.blocks(model))
    blocks.__class__ = Pages
    blocks.turn_to(arch, fetch, torch.device(device))
    inside = tuple(arch.prefix(layer) for layer in range(arch.layers))
    outside = {name: fetch(name) for name in names if not name.startswith(inside)}
    model.load_state_dict(outside, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def pages(model: nn.Module) -> Pages | None:
    """The blocks of a model that are read when they are asked for; None where they are in memory."""
    blocks = getattr(getattr(model, "backbone", None), "layers", None)
    return blocks if isinstance(blocks, Pages) else None

"""What is learned in state space: tensors in the ports of the mixers that change nothing at first, or weights."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmcompress.arch.base import Arch
from ssmcompress.errors import UnsupportedError

FORMS = ("full", "low-rank", "per-head")


class StateOffset(nn.Module):
    """C_t h' for every channel: a state that is read with every token and never decays (Kang et al., 2025).

    shape [D, N] (Mamba-1) or [H, P, N] (Mamba-2) of h'; with a rank h' = `state` [D or H, P, r] · `reading` [r, N], and
    shared by the channels of a head it is [H, 1, N].
    """

    def __init__(self, shape: tuple[int, ...], rank: int | None, shared: bool, device: torch.device) -> None:
        super().__init__()
        *units, states = shape
        units = [units[0], 1] if shared else units
        self.state = nn.Parameter(torch.zeros(*units, rank or states, device=device))
        self.reading = None
        if rank is not None:
            self.reading = nn.Parameter(torch.empty(rank, states, device=device))
            nn.init.kaiming_uniform_(self.reading, a=sqrt(5))

    def forward(self, C: Tensor) -> Tensor:
        """C [B, L, N] → [B, L, D], or [B, L, G, N] → [B, L, H, P or 1]."""
        read = C.to(torch.promote_types(C.dtype, self.state.dtype))
        read = read if self.reading is None else F.linear(read, self.reading)
        if read.dim() == 3:
            return F.linear(read, self.state).to(C.dtype)
        heads = self.state.view(read.shape[2], -1, read.shape[3])
        y = torch.einsum("blgn,gdn->blgd", read, heads)
        return y.reshape(*read.shape[:2], *self.state.shape[:-1]).to(C.dtype)


class OutputOffset(nn.Module):
    """A bias of the scan's output, before the gate (Kang et al., 2025): [D] or [H, P]."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self.output = nn.Parameter(torch.zeros(*shape[:-1], device=device))

    def forward(self, C: Tensor) -> Tensor:
        """The same for every token."""
        return self.output.to(C.dtype)


@dataclass(frozen=True)
class Tunable:
    """What a method learns in one block: it fills the ports of its mixer, or names weights that it has.

    `everywhere` where a block without a scan has it too; `whole` for all weights; `usual` is a learning rate.
    """

    usual: float
    fill: Callable[[Any, tuple[int, ...], str, int | None], None] | None = None
    weights: tuple[str, ...] = ()
    everywhere: bool = False
    whole: bool = False


def _state_offset(mixer: Any, shape: tuple[int, ...], form: str, rank: int | None) -> None:
    mixer.offset = StateOffset(shape, rank, form == "per-head", mixer.D.device)


def _output_offset(mixer: Any, shape: tuple[int, ...], form: str, rank: int | None) -> None:
    mixer.offset = OutputOffset(shape, mixer.D.device)


def _initial_state(mixer: Any, shape: tuple[int, ...], form: str, rank: int | None) -> None:
    mixer.initial_state = nn.Parameter(torch.zeros(*shape, device=mixer.D.device))


def _conv_state(mixer: Any, shape: tuple[int, ...], form: str, rank: int | None) -> None:
    channels, _, kernel = mixer.conv1d.weight.shape
    mixer.initial_inputs = nn.Parameter(torch.zeros(channels, kernel - 1, device=mixer.D.device))


TUNABLE = {
    "state-offset": Tunable(4e-4, _state_offset),
    "output-offset": Tunable(4e-3, _output_offset),
    "initial-state": Tunable(2e-3, _initial_state),
    "conv-state": Tunable(2e-3, _conv_state, everywhere=True),
    "bitfit": Tunable(2e-3, weights=("mixer.conv1d.bias", "mixer.dt_proj.bias", "mixer.dt_bias"), everywhere=True),
    "a-log": Tunable(2e-2, weights=("mixer.A_log",)),
    "full": Tunable(4e-4, whole=True),
}


PLACES = {
    "state-offset": "offset",
    "output-offset": "offset",
    "initial-state": "initial_state",
    "conv-state": "initial_inputs",
}


def install(
    model: nn.Module, arch: Arch, method: str, form: str = "full", rank: int | None = None
) -> dict[str, nn.Parameter]:
    """The tensors that a method learns, by their names in the model, where they now are; they change nothing yet.

    UnsupportedError for a form that the family has not, or a model that has nothing to learn so.
    """
    chosen, blocks = TUNABLE[method], arch.blocks(model)
    if form == "per-head" and len(arch.state(0)) == 2:
        raise UnsupportedError(
            f"{arch.model_type} has no heads whose channels could share an offset.", hint="Take full or low-rank."
        )
    if any(getattr(block.mixer, PLACES.get(method, ""), None) is not None for block in blocks):
        raise UnsupportedError(
            f"There is an adapter in this model where {method} belongs.", hint="Two cannot share a place: give one."
        )
    before = {name for name, _ in model.named_parameters()}
    wanted: set[str] = set()
    for layer in range(arch.layers):
        if not (chosen.everywhere or arch.has_scan(layer)):
            continue
        if chosen.fill is not None:
            chosen.fill(blocks[layer].mixer, arch.state(layer), form, rank)
        wanted |= {arch.prefix(layer) + name for name in chosen.weights}
    found = {n: p for n, p in model.named_parameters() if chosen.whole or n not in before or n in wanted}
    if not found:
        raise UnsupportedError(f"A model of this kind has nothing that {method} could learn.")
    return found

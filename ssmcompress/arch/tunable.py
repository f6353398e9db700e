"""What is learned in state space: tensors in the ports of the mixers that change nothing at first, or weights."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmcompress.arch.base import Arch
from ssmcompress.arch.mixer import decay
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

    def whole(self, shape: tuple[int, ...]) -> Tensor:
        """h' of this shape, [D, N] or [H, P, N], whatever its form."""
        state = self.state.detach()
        return (state if self.reading is None else state @ self.reading.detach()).expand(shape).clone()


class OutputOffset(nn.Module):
    """A bias of the scan's output, before the gate (Kang et al., 2025): [D] or [H, P]."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self.output = nn.Parameter(torch.zeros(*shape[:-1], device=device))

    def forward(self, C: Tensor) -> Tensor:
        """The same for every token."""
        return self.output.to(C.dtype)


class ExtraStates(nn.Module):
    """States beside a mixer's own, with a B and C that read the scan's input; C is zero (MambaPEFT, Yoshimura, 2025).

    D channels, n more states in each of G groups. In Mamba-1 the decays go on where the mixer's end, by ones as those
    of a fresh model do (the published code begins at -exp(16): forgotten at once, and without a gradient); in Mamba-2
    a head has one for all of its states.
    """

    def __init__(self, A_log: Tensor, channels: int, groups: int, states: int) -> None:
        super().__init__()
        device = A_log.device
        self.B = nn.Parameter(torch.empty(groups * states, channels, device=device))
        self.C = nn.Parameter(torch.zeros(groups * states, channels, device=device))
        nn.init.kaiming_uniform_(self.B, a=sqrt(5))
        self.A_log = None
        if A_log.dim() == 2:
            last = A_log.detach().float().exp().amax(1, keepdim=True)
            self.A_log = nn.Parameter((last + torch.arange(1, states + 1, device=device)).log())

    def decays(self, A: Tensor) -> Tensor:
        """A [D, N] → [D, N + n]."""
        return A if self.A_log is None else torch.cat([A, decay(self.A_log).to(A.dtype)], 1)

    def beside(self, x: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [B, L, D], B and C [B, L, …, N], a state that may know of the mixer's own alone → those of N + n."""
        more = (F.linear(x, weight.to(x.dtype)).view(*B.shape[:-1], -1) for weight in (self.B, self.C))
        B, C = (torch.cat([own, new], -1) for own, new in zip((B, C), more, strict=True))
        return B, C, None if state is None else F.pad(state, (0, B.shape[-1] - state.shape[-1]))


@dataclass(frozen=True)
class Tunable:
    """What a method learns in one block: it fills a port of its mixer, or names weights that it has.

    `everywhere` where a block without a scan has it too; `whole` for all weights; `usual` is a learning rate.
    """

    usual: float
    port: str = ""
    fill: Callable[[Any, tuple[int, ...], str, int | None], Any] | None = None
    weights: tuple[str, ...] = ()
    everywhere: bool = False
    whole: bool = False


def _state_offset(mixer: Any, shape: tuple[int, ...], form: str, size: int | None) -> nn.Module:
    return StateOffset(shape, size, form == "per-head", mixer.D.device)


def _output_offset(mixer: Any, shape: tuple[int, ...], form: str, size: int | None) -> nn.Module:
    return OutputOffset(shape, mixer.D.device)


def _initial_state(mixer: Any, shape: tuple[int, ...], form: str, size: int | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, device=mixer.D.device))


def _conv_state(mixer: Any, shape: tuple[int, ...], form: str, size: int | None) -> nn.Parameter:
    channels, _, kernel = mixer.conv1d.weight.shape
    return nn.Parameter(torch.zeros(channels, kernel - 1, device=mixer.D.device))


def _extra(mixer: Any, shape: tuple[int, ...], form: str, size: int | None) -> nn.Module:
    assert size is not None
    return ExtraStates(mixer.A_log, prod(shape[:-1]), getattr(mixer, "n_groups", 1), size)


def _prefix(mixer: Any, shape: tuple[int, ...], form: str, size: int | None) -> nn.Parameter:
    """Small vectors: zero ones would change the model too, for the convolution has a bias."""
    assert size is not None
    return nn.Parameter(0.02 * torch.randn(size, mixer.in_proj.in_features, device=mixer.D.device))


TUNABLE = {
    "state-offset": Tunable(4e-4, "offset", _state_offset),
    "output-offset": Tunable(4e-3, "offset", _output_offset),
    "initial-state": Tunable(2e-3, "initial_state", _initial_state),
    "conv-state": Tunable(2e-3, "initial_inputs", _conv_state, everywhere=True),
    "additional-scan": Tunable(4e-3, "extra", _extra),
    "prefix": Tunable(4e-3, "prefix", _prefix, everywhere=True),
    "prompt": Tunable(4e-3),
    "bitfit": Tunable(2e-3, weights=("mixer.conv1d.bias", "mixer.dt_proj.bias", "mixer.dt_bias"), everywhere=True),
    "a-log": Tunable(2e-2, weights=("mixer.A_log",)),
    "full": Tunable(4e-4, whole=True),
}
DRAWN = ("prefix", "prompt")  # methods that do not begin as the model: whatever they read leaves a trace


def install(
    model: Any, arch: Arch, method: str, form: str = "full", size: int | None = None
) -> dict[str, nn.Parameter]:
    """The tensors that a method learns, by their names in the model, where they now are; most change nothing yet.

    `size` is the rank of a low-rank form, the tokens of a prompt or prefix, the states of an additional scan.
    UnsupportedError for a form that the family has not, or a model that has nothing to learn so.
    """
    chosen = TUNABLE[method]
    if form == "per-head" and len(arch.state(0)) == 2:
        raise UnsupportedError(
            f"{arch.model_type} has no heads whose channels could share an offset.", hint="Take full or low-rank."
        )
    before = {name for name, _ in model.named_parameters()}
    wanted: set[str] = set()
    if method == "prompt":
        _put(model.backbone, "prompt", _prompt(model, size), method)
    for layer, block in enumerate(cast(Any, arch.blocks(model))):
        if not (chosen.everywhere or arch.has_scan(layer)):
            continue
        if chosen.fill is not None:
            _put(block.mixer, chosen.port, chosen.fill(block.mixer, arch.state(layer), form, size), method)
        wanted |= {arch.prefix(layer) + name for name in chosen.weights}
    found = {n: p for n, p in model.named_parameters() if chosen.whole or n not in before or n in wanted}
    if not found:
        raise UnsupportedError(f"A model of this kind has nothing that {method} could learn.")
    return found


def _prompt(model: Any, size: int | None) -> nn.Parameter:
    """What some words of the vocabulary, drawn at random, are embedded as (Lester et al., 2021)."""
    embeddings = model.backbone.embeddings.weight.detach()
    assert size is not None
    return nn.Parameter(embeddings[torch.randint(len(embeddings), (size,), device=embeddings.device)].float())


def _put(where: nn.Module, port: str, value: Any, method: str) -> None:
    if getattr(where, port) is not None:
        raise UnsupportedError(
            f"There is an adapter in this model where {method} belongs.", hint="Two cannot share a place: give one."
        )
    setattr(where, port, value)

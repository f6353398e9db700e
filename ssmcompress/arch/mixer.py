"""What a mixer has beside its stock parameters: ports for what is learned, taps for who watches, and its kernels."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ssmcompress import kernels
from ssmcompress.arch.padding import begun
from ssmcompress.arch.scan import Scan

Taps = Callable[[str, Any], None]
Offset = Callable[[Tensor], Tensor]
PORTS = ("offset", "initial_state", "initial_inputs", "prefix", "extra")  # of a mixer: what may be learned there


class Past(NamedTuple):
    """What a mixer has read before: convolution inputs [B or 1, C, K-1] and state, None where there is nothing."""

    inputs: Tensor | None = None
    state: Tensor | None = None
    begins: bool = True  # whether nothing of the rows at hand has been read yet


class Record:
    """Stands in for a cache where what one pass leaves behind is wanted, and its gradients."""

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}

    def has_previous_state(self, layer: int | None = None) -> bool:
        """Every mixer begins."""
        return False

    def update_conv_state(self, inputs: Tensor, layer: int, conv_kernel_size: int) -> None:
        """Keeps convolution inputs [1, C, K]."""
        self.inputs[layer] = inputs[..., 1:]

    def update_recurrent_state(self, state: Tensor, layer: int) -> None:
        """Keeps the state."""
        self.states[layer] = state

    def past(self, layer: int) -> Past:
        """What a layer left behind."""
        return Past(self.inputs[layer], self.states.get(layer))


class Mixer(nn.Module):
    """The ports of a mixer: unused they are None and cost nothing (see `adopt`)."""

    layer_idx: int
    activation: str
    act: nn.Module
    conv1d: nn.Conv1d
    A_log: nn.Parameter
    D: nn.Parameter
    backend: kernels.Backend = kernels.AUTO
    taps: Taps | None = None  # called with (module, its input) before each prunable module and a gated norm, and
    # with ("scan", Scan)
    offset: Offset | None  # C → what to add to the scan's output before the gate
    initial_state: Tensor | None  # the state before the first token, broadcast over the batch
    initial_inputs: Tensor | None  # [C, K-1]: what the convolution has read before it
    prefix: Tensor | None  # [k, d]: what the mixer reads before its input
    extra: Any  # states beside the mixer's own (`tunable.ExtraStates`)
    start: Past | None = None  # what a prompt of the whole model has left behind here (`Backbone.prompt`)

    def tap(self, module: str, seen: "Tensor | Scan") -> None:
        """Shows the input of a module, or of the scan, to whoever watches."""
        if self.taps is not None:
            self.taps(module, seen)

    def recall(self, cache: Cache | None, batch: int) -> Past:
        """What earlier tokens left behind, and where there were none, what a text begins with."""
        if cache is None or not cache.has_previous_state(self.layer_idx):
            begin = self.start or self._begin()
            state = None if begin.state is None else begin.state.expand(batch, *begin.state.shape[1:]).clone()
            return Past(begin.inputs, state)
        left = cast(Tensor, cache.get_conv_state(self.layer_idx))[..., 1 - self.conv1d.weight.shape[-1] :]
        state = cache.get_recurrent_state(self.layer_idx)
        if state is not None and torch.is_grad_enabled():  # the cache changes in place what the backward still needs
            state = state.clone()
        return Past(left, state, begins=False)

    def _begin(self) -> Past:
        """The initial state and inputs, or what the prefix, which is read after them, leaves behind."""
        inputs, state = (None if each is None else each[None] for each in (self.initial_inputs, self.initial_state))
        first = Past(inputs, state)
        if self.prefix is None:
            return first
        taps, self.taps, self.start = self.taps, None, first
        record = Record()
        try:
            self(self.prefix[None].to(self.conv1d.weight.dtype), cache_params=record)
        finally:
            self.taps, self.start = taps, None
        return record.past(self.layer_idx)

    @staticmethod
    def steps(state: Tensor | None, x: Tensor, cache: Cache | None) -> TypeGuard[Tensor]:
        """Whether this is one token of decoding: the state may then change in place."""
        return x.shape[1] == 1 and state is not None and cache is not None and not torch.is_grad_enabled()

    def convolve(self, x: Tensor, past: Past, cache: Cache | None, mask: Tensor | None) -> Tensor:
        """The short convolution and its activation: x [B, L, C] → [B, L, C]; the cache keeps the last inputs."""
        silu, left = self.activation in ("silu", "swish"), past.inputs
        if left is not None and past.begins:
            x, left = begun(x, left[0].to(x.dtype), mask)
        y = self.backend.conv(x, self.conv1d.weight[:, 0], self.conv1d.bias, left, silu)
        if cache is not None:  # only now: left is a view of what the cache holds
            self._remember(cache, x, left, mask)
        return y if silu else self.act(y)

    def _remember(self, cache: Cache, x: Tensor, left: Tensor | None, mask: Tensor | None) -> None:
        """Keeps each row's last K real convolution inputs of x [B, L, C], so that decoding goes on from them."""
        kernel = self.conv1d.weight.shape[-1]
        if x.shape[1] < kernel or mask is not None:
            past = x.new_zeros(x.shape[0], kernel, x.shape[2])
            if left is not None:
                past[:, 1:] = left.transpose(1, 2)
            x = torch.cat([past, x], dim=1)
        if mask is not None:
            real = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
            ends = real.amax(1)
            take = ends[:, None] + torch.arange(kernel, device=mask.device)
            x = x.gather(1, take[..., None].expand(-1, -1, x.shape[2]))
        cache.update_conv_state(x[:, -kernel:].transpose(1, 2), self.layer_idx, conv_kernel_size=kernel)


def decay(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 at least."""
    return -A_log.to(torch.promote_types(A_log.dtype, torch.float32)).exp()


def adopt(blocks: nn.ModuleList, *kinds: type[Mixer]) -> None:
    """Gives every block's mixer our forward, of the kind that it is of: the same parameters under the same names."""
    for block in blocks:
        block.mixer.__class__ = next(kind for kind in kinds if issubclass(kind, type(block.mixer)))
        for port in PORTS:  # of its own, for a class's None would hide the parameter or module that is put there
            setattr(block.mixer, port, getattr(block.mixer, port, None))


def mixers(model: nn.Module) -> Iterator[Mixer]:
    """Every mixer of a model, in order."""
    return (module for module in model.modules() if isinstance(module, Mixer))


def use_backend(model: nn.Module, backend: kernels.Backend) -> None:
    """Lets every mixer run on this backend."""
    for mixer in mixers(model):
        mixer.backend = backend

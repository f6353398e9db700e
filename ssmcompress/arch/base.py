"""What every family tells the rest of the house: its blocks, its prunable weights, its axes and what couples them."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Self, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ssmcompress import kernels
from ssmcompress.arch.axis import Axis, Slice
from ssmcompress.arch.padding import begun
from ssmcompress.arch.scan import Scan
from ssmcompress.errors import UnsupportedError
from ssmcompress.policy import KEY, WATCHING, TokenPolicy
from ssmcompress.steps import SSM, WIDTH

Taps = Callable[[str, Any], None]
Offset = Callable[[Tensor], Tensor]
BIAS = "mixer.out_proj.bias"
ROTATION = ("mixer.rotation.B", "mixer.rotation.C")
PORTS = ("offset", "initial_state", "initial_inputs")  # of a mixer: what may be learned there
DECAYS = "A_log"  # what makes states remember, named beside modules that have a weight


class Arch(ABC):
    """One family, for one config. Tensor names are relative to a block unless a layer is given."""

    model_type: str
    stock: bool = True  # whether its config is one of transformers
    stock_config: type[PreTrainedConfig]
    pruned_config: type[PreTrainedConfig] | None = None  # says the sizes of every block, where the stock one cannot
    prunable: tuple[str, ...]
    outer: tuple[str, ...] = ("embeddings", "lm_head")  # outside the blocks: pruned only when asked for by name
    hookless: tuple[str, ...]  # weights a forward hook on their module never sees, or that have no module
    fixed: tuple[str, ...]  # weights kept on purpose: a few values a channel or head that set the dynamics
    scan_axes: tuple[str, ...]  # those whose units are the scan's: without it there are none
    scan_only: tuple[str, ...]  # tensors of a block that serve its scan and nothing else

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    @classmethod
    def config_class(cls) -> type[PreTrainedConfig]:
        """The class of its config."""
        return cls.stock_config if cls.stock or cls.pruned_config is None else cls.pruned_config

    @property
    def projections(self) -> tuple[str, ...]:
        """The prunable modules that are matrices: everything but the short convolution."""
        return tuple(name for name in self.prunable if name != "conv1d")

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    @property
    @abstractmethod
    def model_class(self) -> type[PreTrainedModel]:
        """The stock causal language model with our mixer in every block."""

    @abstractmethod
    def state(self, layer: int) -> tuple[int, ...]:
        """The shape of one sequence's state in a block: [D, N], or [H, P, N] where channels have heads."""

    @property
    def width(self) -> int:
        """Residual dimensions."""
        return self.config.hidden_size

    def narrowed(self, width: int) -> Self:
        """This family with another number of residual dimensions: its config is to be `resized`, not to be built."""
        config = copy.copy(self.config)
        vars(config)["hidden_size"] = width  # past the checks, which hold the other sizes against it
        return type(self)(config)

    def residual(self) -> Axis:
        """The residual dimensions, and what runs along them in every block and, by whole names, outside the blocks."""
        slices = (
            Slice("backbone.embeddings.weight", 1),
            Slice("norm.weight", 0),
            Slice("mixer.in_proj.weight", 1),
            *self.rows("out_proj"),
            Slice("backbone.norm_f.weight", 0),
            Slice("lm_head.weight", 1),
        )
        return Axis(WIDTH, self.width, slices, "hidden_size")

    @abstractmethod
    def axes(self, layer: int = 0) -> dict[str, Axis]:
        """The axes of one block, by name."""

    def runs(self, axis: str, after: int) -> int:
        """Into how many runs of as many neighbours a block's units fall, where each keeps as many: `after` of all."""
        return 1

    def has_scan(self, layer: int) -> bool:
        """Whether a block has a scan: states."""
        return self.sizes[layer]["state"] > 0

    def scan(self, layer: int) -> Axis:
        """A block's scan as one unit, with what it owns of the tensors that it shares; `scan_only` goes whole."""
        return Axis(SSM, 1, (), None)

    def coupled(self, axis: str) -> set[str]:
        """The tensors that an axis runs along: of the blocks, and by whole names those outside."""
        along = [self.residual()] if axis == WIDTH else [self.axes(layer)[axis] for layer in range(self.layers)]
        return set().union(*(each.tensors for each in along))

    def modules(self, layer: int) -> tuple[str, ...]:
        """The prunable modules that a block has, and the decays where it has them."""
        gone = () if self.has_scan(layer) else self.scan_only
        known = (*self.prunable, DECAYS)
        return tuple(name for name in known if self.weight(layer, name).removeprefix(self.prefix(layer)) not in gone)

    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of recurrent state one sequence keeps between tokens: float32 states and convolution inputs."""

    @property
    def sizes(self) -> tuple[dict[str, int], ...]:
        """The size of every axis, a mapping a layer."""
        return (self.uniform(),) * self.layers

    @abstractmethod
    def uniform(self) -> dict[str, int]:
        """The size of every axis by a stock config: the same in all layers."""

    @property
    def out_proj_bias(self) -> bool:
        """Whether out_proj has a bias where in_proj has none."""
        return False

    @property
    def biased(self) -> bool:
        """Whether out_proj has a bias."""
        return self.config.use_bias or self.out_proj_bias

    @property
    def rotated(self) -> tuple[int | None, ...]:
        """How many states each layer's B and C have before they are taken to a basis of fewer; None: they are not."""
        return (None,) * self.layers

    @property
    def policy(self) -> TokenPolicy | None:
        """Which tokens of a prompt leave; ValueError for a policy that cannot be read, or not be followed here."""
        stored = getattr(self.config, KEY, None)
        if stored is None:
            return None
        policy = TokenPolicy.read(stored)
        try:
            self.require_anchors(policy.layers, policy.method)
        except UnsupportedError as error:
            raise ValueError(error.message.removesuffix(".")) from None
        return policy

    def require_anchors(self, layers: Sequence[int], method: str) -> None:
        """UnsupportedError where tokens cannot leave after these blocks, or leave too late to save anything."""
        if not layers:
            raise UnsupportedError("There is no block after which tokens could leave.", hint="Name --layers.")
        for layer in layers:
            if layer >= self.layers:
                raise UnsupportedError(
                    f"Tokens cannot leave after block {layer}: there are {self.layers}, counted from 0."
                )
            if layer == self.layers - 1:
                raise UnsupportedError(
                    f"Tokens that leave after block {layer}, the last, save nothing.", hint="Choose other --layers."
                )
            if method in WATCHING and not self.has_scan(layer):
                raise UnsupportedError(
                    f"{method} looks into the scan, and block {layer} has none.", hint="Choose other --layers."
                )

    def additions(self, layer: int) -> dict[str, tuple[int | str | None, ...]]:
        """The tensors that edits may add to a block, with their shapes: an axis has its size, None any."""
        if self.pruned_config is None or self.biased:
            return {}
        return {BIAS: (WIDTH,)}

    def resized(
        self,
        sizes: Sequence[Mapping[str, int]],
        *,
        out_proj_bias: bool = False,
        rotated: Sequence[int | None] = (),
        policy: TokenPolicy | None = None,
        stock: bool = False,
    ) -> PreTrainedConfig:
        """The config of this model with other sizes, a mapping a layer: a stock one where there is one that says them.

        `out_proj_bias` adds a bias to out_proj alone; `rotated` is as the property, for the layers that are left.
        Any config can hold a policy. UnsupportedError where no config says it, or with `stock` no stock one.
        """
        config = self._sized(sizes, out_proj_bias, rotated, stock)
        vars(config).pop(KEY, None)
        if policy is not None:
            setattr(config, KEY, policy.model_dump(mode="json"))
        return config

    def _sized(
        self, sizes: Sequence[Mapping[str, int]], out_proj_bias: bool, rotated: Sequence[int | None], stock: bool
    ) -> PreTrainedConfig:
        bias = self.out_proj_bias or (out_proj_bias and not self.config.use_bias)
        try:
            if bias:
                raise UnsupportedError(f"A stock {self.stock_config.model_type} config has no bias for out_proj alone.")
            if any(rotated):
                raise UnsupportedError(f"A stock {self.stock_config.model_type} config knows no rotated states.")
            return self._said(self.stock_config, self._shared(sizes))
        except UnsupportedError:
            if stock or self.pruned_config is None:
                raise
        blocks = [self.entry(block, before) for block, before in zip_longest(sizes, rotated)]
        fields = {"num_hidden_layers": len(blocks), "block_sizes": blocks, "out_proj_bias": bias}
        try:
            return self._said(self.pruned_config, fields)
        except ValueError as error:
            raise UnsupportedError(str(error)) from error

    def entry(self, sizes: Mapping[str, int], rotated: int | None) -> dict[str, int]:
        """What the pruned config says of one block."""
        found = {axis: sizes[axis] for axis in cast(Any, self.pruned_config).axes}
        return found if rotated is None else found | {"rotated_from": rotated}

    def _shared(self, sizes: Sequence[Mapping[str, int]]) -> dict[str, int]:
        """What a stock config says of these sizes; UnsupportedError where layers differ."""
        first = dict(sizes[0])
        if not all(block["state"] for block in sizes):
            raise UnsupportedError(f"A stock {self.stock_config.model_type} config has a scan in every block.")
        for layer, other in enumerate(sizes):
            for name, size in other.items():
                if size != first[name]:
                    raise UnsupportedError(
                        f"A stock {self.stock_config.model_type} config has one {name} size for all layers; layer"
                        f" {layer} would have {size}, layer 0 has {first[name]}."
                    )
        return self.fields(first) | {"num_hidden_layers": len(sizes)}

    def _said(self, kind: type[PreTrainedConfig], fields: Mapping[str, Any]) -> PreTrainedConfig:
        own = self.config.to_dict()
        for key in ("model_type", "block_sizes", "out_proj_bias"):
            own.pop(key, None)
        return kind(**own | dict(fields))

    @abstractmethod
    def fields(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """What a stock config says of these sizes; UnsupportedError where it cannot say them."""

    def build(self, device: str = "meta") -> PreTrainedModel:
        """The model with unset (meta) or freshly initialised weights."""
        with torch.device(device):
            return self.model_class(self.config)

    def assemble(self, state: Mapping[str, Tensor], device: str | torch.device = "cpu") -> PreTrainedModel:
        """The model in evaluation mode that holds these tensors themselves, a tied head left out."""
        model = self.build("meta")
        model.load_state_dict(dict(state), strict=False, assign=True)
        model.tie_weights()
        fill_buffers(model, device)
        return model.eval()

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The blocks of a model of this family, each with `norm` and `mixer`."""
        return cast(nn.ModuleList, model.get_submodule("backbone.layers"))

    def prefix(self, layer: int) -> str:
        """The start of every tensor name of a block."""
        return f"backbone.layers.{layer}."

    def weight(self, layer: int, module: str) -> str:
        """The tensor name of a prunable module's weight, or of the decays."""
        return f"{self.prefix(layer)}mixer.{module}" + ("" if module == DECAYS else ".weight")

    def rows(self, module: str, **where: int) -> tuple[Slice, ...]:
        """The same cut through the rows of a module's weight and, where the config gives it one, its bias."""
        biased = {"conv1d": self.config.use_conv_bias, "out_proj": self.biased}.get(module, self.config.use_bias)
        names = ("weight", "bias") if biased else ("weight",)
        return tuple(Slice(f"mixer.{module}.{name}", 0, **where) for name in names)

    def outer_weight(self, module: str) -> str:
        """The tensor name of the embeddings or the head, which is the embeddings' where the two are tied."""
        tied = module == "embeddings" or self.config.tie_word_embeddings
        return "backbone.embeddings.weight" if tied else "lm_head.weight"

    def final_norm(self, model: nn.Module) -> nn.Module:
        """The norm before the head."""
        return model.get_submodule("backbone.norm_f")

    def kept_on_purpose(self, name: str) -> bool:
        """Whether pruning leaves this tensor dense by design: biases, norms, embeddings and the state's dynamics."""
        parts = name.split(".")
        return parts[-1] == "bias" or any(part in self.fixed or part.startswith("norm") for part in parts)


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

    def tap(self, module: str, seen: "Tensor | Scan") -> None:
        """Shows the input of a module, or of the scan, to whoever watches."""
        if self.taps is not None:
            self.taps(module, seen)

    def recall(self, cache: Cache | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """What earlier tokens left behind: convolution inputs [B, C, K-1] and state, None where there were none."""
        left = state = None
        if cache is not None and cache.has_previous_state(self.layer_idx):
            left = cast(Tensor, cache.get_conv_state(self.layer_idx))[..., 1 - self.conv1d.weight.shape[-1] :]
            state = cache.get_recurrent_state(self.layer_idx)
            if torch.is_grad_enabled():  # the cache changes in place what the backward still needs
                state = state.clone()
        if state is None and self.initial_state is not None:
            state = self.initial_state.expand(batch, *self.initial_state.shape).clone()
        return left, state

    @staticmethod
    def steps(state: Tensor | None, x: Tensor, cache: Cache | None) -> TypeGuard[Tensor]:
        """Whether this is one token of decoding: the state may then change in place."""
        return x.shape[1] == 1 and state is not None and cache is not None and not torch.is_grad_enabled()

    def convolve(self, x: Tensor, left: Tensor | None, cache: Cache | None, mask: Tensor | None) -> Tensor:
        """The short convolution and its activation: x [B, L, C] → [B, L, C]; the cache keeps the last inputs."""
        silu = self.activation in ("silu", "swish")
        if left is None and self.initial_inputs is not None:
            x, left = begun(x, self.initial_inputs.to(x.dtype), mask)
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
            setattr(block.mixer, port, None)


def fill_buffers(model: nn.Module, device: str | torch.device) -> None:
    """Gives buffers that no file holds their values: the ones of the weightless norms of Falcon Mamba."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.ones_like(buffer, device=device))


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The shape of every parameter, by name."""
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def mixers(model: nn.Module) -> Iterator[Mixer]:
    """Every mixer of a model, in order."""
    return (module for module in model.modules() if isinstance(module, Mixer))


def use_backend(model: nn.Module, backend: kernels.Backend) -> None:
    """Lets every mixer run on this backend."""
    for mixer in mixers(model):
        mixer.backend = backend

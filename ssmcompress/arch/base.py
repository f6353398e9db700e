"""What every family tells the rest of the house: its blocks, its prunable weights, its axes and what couples them."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ssmcompress.arch.axis import Axis, Slice
from ssmcompress.errors import UnsupportedError
from ssmcompress.policy import KEY, WATCHING, TokenPolicy
from ssmcompress.steps import SSM, WIDTH

BIAS = "mixer.out_proj.bias"
ROTATION = ("mixer.rotation.B", "mixer.rotation.C")
OFFSET = "mixer.offset.state"
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
    state_axes: tuple[str, ...]  # along which its states lie
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
    def offset(self) -> bool:
        """Whether every scan reads a state that never changes."""
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
        if self.pruned_config is None:
            return {}
        found: dict[str, tuple[int | str | None, ...]] = {} if self.biased else {BIAS: (WIDTH,)}
        return found | ({OFFSET: self.state_axes} if self.has_scan(layer) and not self.offset else {})

    def resized(
        self,
        sizes: Sequence[Mapping[str, int]],
        *,
        out_proj_bias: bool = False,
        state_offset: bool = False,
        rotated: Sequence[int | None] = (),
        policy: TokenPolicy | None = None,
        stock: bool = False,
    ) -> PreTrainedConfig:
        """The config of this model with other sizes, a mapping a layer: a stock one where there is one that says them.

        `out_proj_bias` adds a bias to out_proj alone, `state_offset` a state that never changes; `rotated` is as the
        property, for the layers that are left. Any config can hold a policy. UnsupportedError where no config says it,
        or with `stock` no stock one.
        """
        bias = self.out_proj_bias or (out_proj_bias and not self.config.use_bias)
        config = self._sized(sizes, bias, self.offset or state_offset, rotated, stock)
        vars(config).pop(KEY, None)
        if policy is not None:
            setattr(config, KEY, policy.model_dump(mode="json"))
        return config

    def _sized(
        self, sizes: Sequence[Mapping[str, int]], bias: bool, offset: bool, rotated: Sequence[int | None], stock: bool
    ) -> PreTrainedConfig:
        try:
            if bias:
                raise UnsupportedError(f"A stock {self.stock_config.model_type} config has no bias for out_proj alone.")
            if offset:
                raise UnsupportedError(f"A stock {self.stock_config.model_type} config has no offset of states.")
            if any(rotated):
                raise UnsupportedError(f"A stock {self.stock_config.model_type} config knows no rotated states.")
            return self._said(self.stock_config, self._shared(sizes))
        except UnsupportedError:
            if stock or self.pruned_config is None:
                raise
        blocks = [self.entry(block, before) for block, before in zip_longest(sizes, rotated)]
        fields = {
            "num_hidden_layers": len(blocks),
            "block_sizes": blocks,
            "out_proj_bias": bias,
            "state_offset": offset,
        }
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
        for key in ("model_type", "block_sizes", "out_proj_bias", "state_offset"):
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


def fill_buffers(model: nn.Module, device: str | torch.device) -> None:
    """Gives buffers that no file holds their values: the ones of the weightless norms of Falcon Mamba."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.ones_like(buffer, device=device))


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The shape of every parameter, by name."""
    return {name: parameter.shape for name, parameter in module.named_parameters()}

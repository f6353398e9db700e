"""Mamba-2: the family's axes and its mixer on our kernels."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.mamba2 import modeling_mamba2 as stock

from ssmcompress.arch.axis import Axis, Slice
from ssmcompress.arch.backbone import Backbone, lead
from ssmcompress.arch.base import OFFSET, ROTATION, Arch
from ssmcompress.arch.mixer import Mixer, adopt, decay
from ssmcompress.arch.modeling_ssmcompress import PrunedMamba2Config
from ssmcompress.arch.padding import hold, real_positions, silence
from ssmcompress.arch.scan import Scan, stride
from ssmcompress.errors import UnsupportedError
from ssmcompress.steps import GROUP


class Mamba2Mixer(Mixer, stock.Mamba2Mixer):
    """The Mamba-2 forward, channels last (Mamba-2, fig. 6); ports and parameters are those of the stock mixer."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        padding: Tensor | None = None,
        strides: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [B, L, d] → [B, L, d]; the cache, where given, is read and brought up to date."""
        mask = real_positions(attention_mask if padding is None else padding, hidden_states.shape[1])
        past = self.recall(cache_params, hidden_states.shape[0])
        self.tap("in_proj", hidden_states)
        sizes = [self.intermediate_size, self.conv_dim, self.num_heads]
        z, xBC, dt = self.in_proj(hidden_states).split(sizes, dim=-1)
        xBC = silence(xBC, mask)
        self.tap("conv1d", xBC)
        xBC = silence(self.convolve(xBC, past, cache_params, mask), mask)
        y = self._scan(xBC, hold(dt, mask), past.state, cache_params, strides)
        if self.taps is not None:
            self.tap("norm", y * F.silu(z))
        y = self.norm(y, z)
        self.tap("out_proj", y)
        return self.out_proj(y)

    def _scan(
        self, xBC: Tensor, dt: Tensor, state: Tensor | None, cache: Cache | None, strides: Tensor | None
    ) -> Tensor:
        batch, length, _ = xBC.shape
        grouped = self.n_groups * self.ssm_state_size
        x, B, C = xBC.split([self.intermediate_size, grouped, grouped], dim=-1)
        x = x.view(batch, length, self.num_heads, self.head_dim)
        B, C = self._basis(*(t.view(batch, length, self.n_groups, self.ssm_state_size) for t in (B, C)))
        A, own = decay(self.A_log), C
        if self.extra is not None:
            B, C, state = self.extra.beside(x.flatten(2), B, C, state)
        dt, B, limit = stride(dt, B, strides, self.dt_bias, cast(tuple[float, float], tuple(self.time_step_limit)))
        self.tap("scan", Scan(x, dt, A[:, None], B, C, self.dt_bias, limit))
        if self.steps(state, x, cache):
            y = self.backend.ssd_step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D, self.dt_bias, limit)[
                :, None
            ]
        else:
            y, state = self.backend.ssd(x, dt, A, B, C, self.D, self.dt_bias, limit, state)
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        if self.offset is not None:
            y = y + self.offset(own)
        return y.reshape(batch, length, self.intermediate_size)

    def _basis(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """B and C [B, L, G, N] in the basis of the states."""
        return B, C


class Mamba2Model(Backbone, stock.Mamba2Model):
    """Stock `Mamba2Model` whose prompts may lose tokens, and whose single tokens may be padding."""

    output_type = stock.Mamba2Output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Every mixer is handed the mask as it came."""
        return super().forward(*args, **kwargs, padding=kwargs.get("attention_mask"))


class Mamba2ForCausalLM(stock.Mamba2ForCausalLM):
    """Stock `Mamba2ForCausalLM` with our mixer in every block."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        adopt(self.backbone.layers, Mamba2Mixer)
        lead(self, Mamba2Model)


class Mamba2(Arch):
    """Mamba-2 (Dao and Gu, 2024): heads that share B and C in groups, one decay a head, a gated norm."""

    model_type = "mamba2"
    stock_config = Mamba2Config
    pruned_config = PrunedMamba2Config
    model_class: type[PreTrainedModel] = Mamba2ForCausalLM
    prunable = ("in_proj", "conv1d", "out_proj")
    hookless = ("conv1d", "A_log", "D", "dt_bias")
    fixed = ("A_log", "D", "dt_bias", "offset", "rotation", "embeddings", "lm_head")
    scan_axes = (*PrunedMamba2Config.scan_axes, GROUP)
    state_axes = ("head", "head_channel", "state")
    scan_only = ("mixer.dt_bias", "mixer.A_log", OFFSET, *ROTATION)

    def axes(self, layer: int = 0) -> dict[str, Axis]:
        """Head, head_channel and state, the same index in every head or group, and group: what a run of heads reads.

        Heads stay in their order when groups go, and each that stays is read by the whole run.
        """
        heads, width, states, groups = (self.sizes[layer][axis] for axis in ("head", "head_channel", "state", GROUP))
        inner, size = heads * width, self._projected(layer)
        own = (
            *self.rows("in_proj", offset=2 * (inner + groups * size)),
            Slice("mixer.dt_bias", 0),
            Slice("mixer.A_log", 0),
            Slice("mixer.D", 0),
        )
        plain, whole = self._B_and_C(layer, period=size, repeats=groups), self._B_and_C(layer, width=size)
        if self.rotated[layer]:
            plain = tuple(Slice(name, 1) for name in ROTATION)
            whole += tuple(Slice(name, 0) for name in ROTATION)
        if not size:
            own, plain, whole = (Slice("mixer.D", 0),), (), ()
        inside = self._inner(inner, period=width, repeats=heads)
        if self.offset and size:
            own, inside, plain = ((*each, Slice(OFFSET, d)) for d, each in enumerate((own, inside, plain)))
        return {
            "head": Axis("head", heads, self._inner(inner, width=width) + own, None),
            "head_channel": Axis("head_channel", width, inside, None),
            "state": Axis("state", states, plain, "state_size"),
            GROUP: Axis(GROUP, groups, whole, None),
        }

    def _inner(self, inner: int, **where: int) -> tuple[Slice, ...]:
        """The same cut through z, x and all that has as many channels."""
        return (
            *self.rows("in_proj", **where),
            *self.rows("in_proj", **where, offset=inner),
            *self.rows("conv1d", **where),
            Slice("mixer.norm.weight", 0, **where),
            Slice("mixer.out_proj.weight", 1, **where),
        )

    def _B_and_C(self, layer: int, **where: int) -> tuple[Slice, ...]:
        """The same cut through B and C: in_proj has z and x before them, the convolution x."""
        inner = self.sizes[layer]["head"] * self.sizes[layer]["head_channel"]
        slices: tuple[Slice, ...] = ()
        for start in (inner, inner + self.sizes[layer][GROUP] * self._projected(layer)):
            slices += self.rows("in_proj", offset=inner + start, **where) + self.rows("conv1d", offset=start, **where)
        return slices

    def runs(self, axis: str, after: int) -> int:
        """Every group of the norm keeps as many heads; every run of groups that become one keeps one of them."""
        return {"head": self.config.n_groups, GROUP: max(1, after)}.get(axis, 1)

    def additions(self, layer: int) -> dict[str, tuple[int | str | None, ...]]:
        """A bias of out_proj, and the basis [groups, fewer, states] of B and of C."""
        found = super().additions(layer)
        if self.has_scan(layer) and self.rotated[layer] is None and not self.offset:
            found |= dict.fromkeys(ROTATION, (GROUP, None, "state"))
        return found

    def scan(self, layer: int) -> Axis:
        """A block's scan as one unit: B, C and dt in in_proj, behind z and x; B and C in the convolution."""
        heads, width, groups = (self.sizes[layer][axis] for axis in ("head", "head_channel", GROUP))
        inner, shared = heads * width, 2 * groups * self._projected(layer)
        slices = (
            *self.rows("in_proj", offset=2 * inner, width=shared + heads),
            *self.rows("conv1d", offset=inner, width=shared),
        )
        return replace(super().scan(layer), slices=slices)

    def _projected(self, layer: int) -> int:
        """How many states in_proj gives B and C, before they are rotated."""
        return self.rotated[layer] or self.sizes[layer]["state"]

    def state(self, layer: int) -> tuple[int, int, int]:
        """[H, P, N]."""
        block = self.sizes[layer]
        return block["head"], block["head_channel"], block["state"]

    def state_bytes(self) -> int:
        """Bytes of recurrent state one sequence keeps between tokens: float32 states and convolution inputs."""
        left, entries = self.config.conv_kernel - 1, 0
        for layer, block in enumerate(self.sizes):
            inner = block["head"] * block["head_channel"]
            entries += inner * block["state"] + (inner + 2 * block[GROUP] * self._projected(layer)) * left
        return 4 * entries

    def fields(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Heads and their channels must together be a multiple of the hidden size, which `expand` says."""
        inner = sizes["head"] * sizes["head_channel"]
        if sizes["head"] % self.config.n_groups:
            raise UnsupportedError(f"{sizes['head']} heads are no multiple of {self.config.n_groups} groups.")
        if (groups := sizes.get(GROUP, self.config.n_groups)) != self.config.n_groups:
            raise UnsupportedError(
                f"A stock mamba2 config has one number of groups, for B, C and the norm: not {groups} of"
                f" {self.config.n_groups}."
            )
        if inner % self.config.hidden_size:
            raise UnsupportedError(
                f"A stock mamba2 config cannot say {sizes['head']} heads of {sizes['head_channel']} channels: together"
                f" they are {inner}, no multiple of the hidden size {self.config.hidden_size}."
            )
        return {
            "num_heads": sizes["head"],
            "head_dim": sizes["head_channel"],
            "state_size": sizes["state"],
            "expand": inner // self.config.hidden_size,
        }

    def uniform(self) -> dict[str, int]:
        """Heads, their channels, states and groups."""
        config = self.config
        sizes = {"head": config.num_heads, "head_channel": config.head_dim, "state": config.state_size}
        return sizes | {GROUP: config.n_groups}

    def entry(self, sizes: Mapping[str, int], rotated: int | None) -> dict[str, int]:
        """With the number of groups where it is not that of the norm."""
        found, groups = super().entry(sizes, rotated), sizes.get(GROUP, self.config.n_groups)
        return found | ({GROUP: groups} if sizes["state"] and groups != self.config.n_groups else {})

"""Mamba-1: the family's axes and its mixer on our kernels (mamba, falcon_mamba)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import FalconMambaConfig, MambaConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.falcon_mamba import modeling_falcon_mamba as stock_falcon
from transformers.models.mamba import modeling_mamba as stock

from ssmcompress.arch.axis import Axis, Slice
from ssmcompress.arch.backbone import Backbone, lead
from ssmcompress.arch.base import OFFSET, Arch
from ssmcompress.arch.mixer import Mixer, adopt, decay
from ssmcompress.arch.modeling_ssmcompress import PrunedMambaConfig
from ssmcompress.arch.padding import hold, real_positions, silence
from ssmcompress.arch.scan import Scan, stride


class _SelectiveMixer(Mixer):
    """The Mamba-1 forward, channels last (Mamba, fig. 3); ports and parameters are those of the stock mixer."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        strides: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [B, L, d] → [B, L, d]; the cache, where given, is read and brought up to date."""
        mask = real_positions(attention_mask, hidden_states.shape[1])
        past = self.recall(cache_params, hidden_states.shape[0])
        self.tap("in_proj", hidden_states)
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = silence(x, mask)
        self.tap("conv1d", x)
        x = silence(self.convolve(x, past, cache_params, mask), mask)
        self.tap("x_proj", x)
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        dt, B, C = self._normalise(*self.x_proj(x).split(sizes, dim=-1))
        self.tap("dt_proj", dt)
        dt = hold(self._unbiased(dt), mask)
        y = self._scan(x, dt, B, C, z, past.state, cache_params, strides)
        self.tap("out_proj", y)
        return self.out_proj(y)

    def _unbiased(self, dt: Tensor) -> Tensor:
        """The step sizes without their bias, which the scan adds; a LoRA around dt_proj takes part."""
        if isinstance(self.dt_proj, nn.Linear):
            return F.linear(dt, self.dt_proj.weight)
        return self.dt_proj(dt) - self.dt_proj.bias

    def _normalise(self, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return dt, B, C

    def _scan(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor,
        state: Tensor | None,
        cache: Cache | None,
        strides: Tensor | None,
    ) -> Tensor:
        A, own = decay(self.A_log), C
        if self.extra is not None:
            A = self.extra.decays(A)
            B, C, state = self.extra.beside(x, B, C, state)
        dt, B, _ = stride(dt, B, strides, cast(Tensor, self.dt_proj.bias))
        self.tap("scan", Scan(x[..., None], dt, A, B[:, :, None], C[:, :, None], cast(Tensor, self.dt_proj.bias)))
        if self.steps(state, x, cache):
            y = self.backend.selective_step(
                state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D, z[:, 0], self.dt_proj.bias
            )[:, None]
        else:
            y, state = self.backend.selective_scan(x, dt, A, B, C, self.D, z, self.dt_proj.bias, state)
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        if self.offset is not None:
            y = y + self.offset(own) * F.silu(z)
        return y


class MambaMixer(_SelectiveMixer, stock.MambaMixer):
    """The mixer of `mamba`."""


class FalconMambaMixer(_SelectiveMixer, stock_falcon.FalconMambaMixer):
    """The mixer of `falcon_mamba`: dt, B and C each pass a weightless RMSNorm."""

    def _normalise(self, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)


class MambaModel(Backbone, stock.MambaModel):
    """Stock `MambaModel` whose prompts may lose tokens."""

    output_type = stock.MambaOutput


class FalconMambaModel(Backbone, stock_falcon.FalconMambaModel):
    """Stock `FalconMambaModel` whose prompts may lose tokens."""

    output_type = stock_falcon.FalconMambaOutput


class MambaForCausalLM(stock.MambaForCausalLM):
    """Stock `MambaForCausalLM` with our mixer in every block."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        adopt(self.backbone.layers, MambaMixer)
        lead(self, MambaModel)


class FalconMambaForCausalLM(stock_falcon.FalconMambaForCausalLM):
    """Stock `FalconMambaForCausalLM` with our mixer in every block."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        adopt(self.backbone.layers, FalconMambaMixer)
        lead(self, FalconMambaModel)


class Mamba(Arch):
    """Mamba-1 (Gu and Dao, 2023): inner channels, per-channel states and a low-rank step size."""

    model_type = "mamba"
    stock_config: type[PreTrainedConfig] = MambaConfig
    pruned_config: type[PreTrainedConfig] | None = PrunedMambaConfig
    model_class: type[PreTrainedModel] = MambaForCausalLM
    prunable = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    hookless = ("conv1d", "dt_proj", "A_log", "D")
    fixed = ("A_log", "D", "offset", "embeddings", "lm_head")
    scan_axes = PrunedMambaConfig.scan_axes
    state_axes = ("channel", "state")
    scan_only = ("mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias", "mixer.A_log", OFFSET)

    def axes(self, layer: int = 0) -> dict[str, Axis]:
        """Channel, state and dt_rank; the state's index is shared by all channels of a layer."""
        width, size, rank = (self.sizes[layer][axis] for axis in ("channel", "state", "dt_rank"))
        offset = (Slice(OFFSET, 0), Slice(OFFSET, 1)) if self.offset else ()
        channel = (
            *self.rows("in_proj"),
            *self.rows("in_proj", offset=width),
            *self.rows("conv1d"),
            Slice("mixer.x_proj.weight", 1),
            Slice("mixer.dt_proj.weight", 0),
            Slice("mixer.dt_proj.bias", 0),
            Slice("mixer.A_log", 0),
            Slice("mixer.D", 0),
            Slice("mixer.out_proj.weight", 1),
            *offset[:1],
        )
        state = (
            Slice("mixer.A_log", 1),
            Slice("mixer.x_proj.weight", 0, offset=rank),
            Slice("mixer.x_proj.weight", 0, offset=rank + size),
            *offset[1:],
        )
        dt_rank = (Slice("mixer.x_proj.weight", 0), Slice("mixer.dt_proj.weight", 1))
        axes = (
            Axis("channel", width, channel, "intermediate_size"),
            Axis("state", size, state, "state_size"),
            Axis("dt_rank", rank, dt_rank, "time_step_rank"),
        )
        gone = () if self.has_scan(layer) else self.scan_only
        return {
            axis.name: replace(axis, slices=tuple(part for part in axis.slices if part.tensor not in gone))
            for axis in axes
        }

    def state(self, layer: int) -> tuple[int, int]:
        """[D, N]."""
        return self.sizes[layer]["channel"], self.sizes[layer]["state"]

    def state_bytes(self) -> int:
        """Bytes of recurrent state one sequence keeps between tokens: float32 states and convolution inputs."""
        left = self.config.conv_kernel - 1
        return 4 * sum(block["channel"] * (block["state"] + left) for block in self.sizes)

    def fields(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Every axis has a field of its own."""
        keys = {name: axis.config_key for name, axis in self.axes().items() if axis.config_key}
        return {keys[name]: size for name, size in sizes.items()}

    def uniform(self) -> dict[str, int]:
        """Channels, states and dt ranks."""
        config = self.config
        return {"channel": config.intermediate_size, "state": config.state_size, "dt_rank": int(config.time_step_rank)}


class FalconMamba(Mamba):
    """Falcon Mamba: Mamba-1 with weightless norms on dt, B and C."""

    model_type = "falcon_mamba"
    stock_config = FalconMambaConfig
    pruned_config = None
    model_class = FalconMambaForCausalLM

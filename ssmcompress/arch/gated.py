"""Our mixers of blocks whose scan was removed, on our kernels."""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from ssmcompress.arch import modeling_ssmcompress as modeling
from ssmcompress.arch.mixer import Mixer
from ssmcompress.arch.padding import real_positions, silence


class _GatedMixer(Mixer):
    """The forward of a block without a scan, with its taps; there is no state to start from and nothing to offset."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        padding: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [B, L, d] → [B, L, d]; the cache, where given, is read and brought up to date."""
        mask = real_positions(attention_mask if padding is None else padding, hidden_states.shape[1])
        past = self.recall(cache_params, hidden_states.shape[0])
        self.tap("in_proj", hidden_states)
        x, z = self.halves(self.in_proj(hidden_states))
        x = silence(x, mask)
        self.tap("conv1d", x)
        y = self.skip(self.convolve(x, past, cache_params, mask))
        if self.taps is not None and hasattr(self, "norm"):
            self.tap("norm", y * F.silu(z))
        y = self.gated(y, z)
        self.tap("out_proj", y)
        return cast(Tensor, self.out_proj(y))


class GatedMixer(_GatedMixer, modeling.GatedConvolution):
    """What is left of a mixer of `mamba`."""


class GatedMixer2(_GatedMixer, modeling.GatedConvolution2):
    """What is left of a mixer of `mamba2`."""

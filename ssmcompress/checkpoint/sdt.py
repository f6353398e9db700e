"""An SDT adapter: entries of decays, B and C, and LoRA on out_proj, which all add to weights."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from ssmcompress.arch.base import DECAYS, Arch
from ssmcompress.checkpoint.fitting import CONFIG, PREFIX, made_for, read_config, require_layers, require_match
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.errors import InputError

DELTA = "delta"  # behind the name of a weight: what is added to its entries
ALPHA = 8.0
Index = Annotated[int, Field(ge=0)]


class Entries(BaseModel):
    """Which channels [c] of a layer's decays are learned, and of each which states [c, s]."""

    model_config = ConfigDict(extra="forbid")

    channels: list[Index]
    states: list[list[Index]]

    def within(self, channels: int, states: int) -> bool:
        """Whether there are such entries in A_log [D, N], as many of every channel."""
        alike = len(self.states) == len(self.channels) > 0 and len({len(row) for row in self.states}) == 1
        return alike and max(self.channels) < channels and max(max(row, default=0) for row in self.states) < states


class _Sdt(BaseModel):
    model_config = ConfigDict(extra="ignore")

    r: int = Field(gt=0)
    lora_alpha: float = Field(allow_inf_nan=False)
    entries: dict[str, Entries]


@torch.no_grad()
def merge(model: PreTrainedModel, arch: Arch, config: Mapping[str, Any], weights: Shards) -> None:
    """Adds an SDT adapter (Galim et al., 2024) to the weights, in place; InputError where it does not fit the model."""
    path, hint = weights.folder / CONFIG, made_for(config)
    said = read_config(_Sdt, config, path)
    require_layers(weights, arch, hint)
    layers = [layer for layer in range(arch.layers) if arch.has_scan(layer)]
    for layer in layers:
        name = arch.weight(layer, DECAYS)
        if len(arch.state(layer)) != 2 or name not in said.entries or not said.entries[name].within(*arch.state(layer)):
            raise InputError(f"{path} names no entries of {name} that the model has.", hint=hint)
    expected = {name: like for layer in layers for name, like in _shapes(arch, said, layer).items()}
    require_match(weights, expected, expected, hint)
    for layer in layers:
        decays, projection, out = (arch.weight(layer, module) for module in (DECAYS, "x_proj", "out_proj"))
        rows, columns = (torch.tensor(part) for part in (said.entries[decays].channels, said.entries[decays].states))
        rank = arch.sizes[layer]["dt_rank"]
        for name, where in ((decays, (rows[:, None], columns)), (projection, (slice(rank, None), rows))):
            weight = model.get_parameter(name)
            weight[where] = weight[where] + weights.finite(f"{PREFIX}{name}.{DELTA}").to(weight)
        down, up = (weights.finite(name) for name in _lora(arch, layer))
        weight = model.get_parameter(out)
        weight.add_((said.lora_alpha / said.r * up @ down).to(weight))


def _shapes(arch: Arch, said: _Sdt, layer: int) -> dict[str, Tensor]:
    """The tensors of a layer."""
    decays, projection = (arch.weight(layer, module) for module in (DECAYS, "x_proj"))
    channels, states = arch.state(layer)
    some, few = len(said.entries[decays].channels), len(said.entries[decays].states[0])
    down, up = _lora(arch, layer)
    sizes = {
        f"{PREFIX}{decays}.{DELTA}": (some, few),
        f"{PREFIX}{projection}.{DELTA}": (2 * states, some),
        down: (said.r, channels),
        up: (arch.width, said.r),
    }
    return {name: torch.empty(size, device="meta") for name, size in sizes.items()}


def _lora(arch: Arch, layer: int) -> tuple[str, str]:
    module = PREFIX + arch.weight(layer, "out_proj").removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

"""Mamba and Mamba-2 whose blocks have sizes of their own, on the classes of transformers.

ssmcompress writes this file beside weights that no config of transformers describes; it imports nothing but torch and
transformers. `block_sizes` in config.json holds the sizes of each block; the fields that are one number for all blocks
are those of the model that was cut. `out_proj_bias` gives out_proj, and nothing else, a bias.
"""

import copy
from typing import Any

from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaBlock
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block


def check(config: Any) -> None:
    """ValueError unless block_sizes gives every axis of every block a size."""
    sizes, layers = config.block_sizes, config.num_hidden_layers
    if not isinstance(sizes, list) or len(sizes) != layers:
        found = f"has {len(sizes)} entries" if isinstance(sizes, list) else f"is {sizes!r}"
        raise ValueError(f"block_sizes {found}; expected a list of {layers}, one for each layer.")
    for layer, block in enumerate(sizes):
        where = f"block_sizes[{layer}]"
        if not isinstance(block, dict) or set(block) != set(config.axes):
            found = ", ".join(map(str, block)) if isinstance(block, dict) else repr(block)
            raise ValueError(f"{where} holds {found or 'nothing'}; expected {', '.join(config.axes)}.")
        for axis, size in block.items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{where} gives {axis} as {size!r}; expected a whole number of at least 1.")
        if block.get("head", 0) % getattr(config, "n_groups", 1):
            raise ValueError(f"{where} gives head as {block['head']}; expected a multiple of {config.n_groups} groups.")
    if type(config.out_proj_bias) is not bool:
        raise ValueError(f"out_proj_bias is {config.out_proj_bias!r}; expected true or false.")


class PrunedMambaConfig(MambaConfig):
    """A `MambaConfig` with the sizes of every block."""

    model_type = "ssmcompress_mamba"
    axes = ("channel", "state", "dt_rank")
    block_sizes: list[dict[str, int]] | None = None
    out_proj_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.rescale_prenorm_residual = False  # it would divide loaded weights
        check(self)

    def fields(self, sizes: dict[str, int]) -> dict[str, Any]:
        """The sizes of a block under the names that its classes read."""
        return {
            "intermediate_size": sizes["channel"],
            "state_size": sizes["state"],
            "time_step_rank": sizes["dt_rank"],
        }


class PrunedMamba2Config(Mamba2Config):
    """A `Mamba2Config` with the sizes of every block."""

    model_type = "ssmcompress_mamba2"
    axes = ("head", "head_channel", "state")
    block_sizes: list[dict[str, int]] | None = None
    out_proj_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.rescale_prenorm_residual = False  # it would divide loaded weights
        check(self)

    def fields(self, sizes: dict[str, int]) -> dict[str, Any]:
        """The sizes of a block under the names that its classes read."""
        inner = sizes["head"] * sizes["head_channel"]
        return {
            "num_heads": sizes["head"],
            "head_dim": sizes["head_channel"],
            "state_size": sizes["state"],
            "expand": (inner + 0.5) / self.hidden_size,  # its mixer multiplies the two and rounds down
        }


def rebuild(model: Any, kind: Any) -> None:
    """Gives a model the blocks that its config describes."""
    blocks = []
    for layer, sizes in enumerate(model.config.block_sizes):
        config = copy.copy(model.config)
        vars(config).update(config.fields(sizes))  # past the checks, which want a whole expand
        blocks.append(block := kind(config, layer_idx=layer))
        if config.out_proj_bias:
            block.mixer.out_proj = nn.Linear(block.mixer.intermediate_size, config.hidden_size)
            block.mixer.use_bias = True  # the fused kernels ask this
    model.backbone.layers = nn.ModuleList(blocks)
    model.post_init()


class PrunedMambaForCausalLM(MambaForCausalLM):
    """`MambaForCausalLM` with the blocks of a `PrunedMambaConfig`."""

    config_class = PrunedMambaConfig

    def __init__(self, config: PrunedMambaConfig) -> None:
        super().__init__(config)
        rebuild(self, MambaBlock)


class PrunedMamba2ForCausalLM(Mamba2ForCausalLM):
    """`Mamba2ForCausalLM` with the blocks of a `PrunedMamba2Config`."""

    config_class = PrunedMamba2Config

    def __init__(self, config: PrunedMamba2Config) -> None:
        super().__init__(config)
        rebuild(self, Mamba2Block)

"""Mamba and Mamba-2 whose blocks have sizes of their own, on the classes of transformers.

ssmcompress writes this file beside weights that no config of transformers describes. It imports nothing but torch and
transformers. `block_sizes` in config.json holds the sizes of each block; the other fields are those of the model that
was cut. `out_proj_bias` gives the output projection of every block, and nothing else, a bias.
"""

import copy

from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block
from transformers.models.mamba.modeling_mamba import MambaBlock


class BlockSizes:
    """What both configs share: a mapping a block, from each of its axes to a size."""

    axes: tuple[str, ...] = ()

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.rescale_prenorm_residual = False  # transformers would divide loaded weights
        sizes, layers = self.block_sizes, self.num_hidden_layers
        if not isinstance(sizes, list):
            raise ValueError(f"block_sizes is {sizes!r}; expected a list of {layers} objects, one a layer.")
        if len(sizes) != layers:
            raise ValueError(f"block_sizes has {len(sizes)} entries; num_hidden_layers is {layers}.")
        for layer, block in enumerate(sizes):
            if not isinstance(block, dict) or set(block) != set(self.axes):
                raise ValueError(f"block_sizes[{layer}] is {block!r}; expected the keys {', '.join(self.axes)}.")
            for axis, size in block.items():
                if type(size) is not int or size < 1:
                    raise ValueError(f"block_sizes[{layer}] gives {axis} as {size!r}; expected at least 1.")
            if block.get("head", 0) % getattr(self, "n_groups", 1):
                raise ValueError(f"block_sizes[{layer}] has {block['head']} heads, no multiple of {self.n_groups} groups.")
        if type(self.out_proj_bias) is not bool:
            raise ValueError(f"out_proj_bias is {self.out_proj_bias!r}; expected true or false.")

    def of_block(self, layer):
        """The config of one block, as the classes of transformers read it."""
        config = copy.copy(self)
        vars(config).update(self.fields(self.block_sizes[layer]))  # past the checks, which take the whole for uniform
        return config


class PrunedMambaConfig(BlockSizes, MambaConfig):
    """A `MambaConfig` with the sizes of every block."""

    model_type = "ssmcompress_mamba"
    axes = ("channel", "state", "dt_rank")
    block_sizes: list[dict[str, int]] | None = None
    out_proj_bias: bool = False

    def fields(self, sizes):
        return {
            "intermediate_size": sizes["channel"],
            "state_size": sizes["state"],
            "time_step_rank": sizes["dt_rank"],
        }


class PrunedMamba2Config(BlockSizes, Mamba2Config):
    """A `Mamba2Config` with the sizes of every block."""

    model_type = "ssmcompress_mamba2"
    axes = ("head", "head_channel", "state")
    block_sizes: list[dict[str, int]] | None = None
    out_proj_bias: bool = False

    def fields(self, sizes):
        inner = sizes["head"] * sizes["head_channel"]
        return {
            "num_heads": sizes["head"],
            "head_dim": sizes["head_channel"],
            "state_size": sizes["state"],
            "expand": (inner + 0.5) / self.hidden_size,  # the mixer multiplies the two and rounds down
        }


def rebuild(model, kind):
    """Gives a model the blocks that its config describes."""
    config = model.config
    blocks = [kind(config.of_block(layer), layer_idx=layer) for layer in range(config.num_hidden_layers)]
    for block in blocks if config.out_proj_bias else ():
        block.mixer.out_proj = nn.Linear(block.mixer.intermediate_size, config.hidden_size)
        block.mixer.use_bias = True  # by this the fused kernels know of it
    model.backbone.layers = nn.ModuleList(blocks)
    model.post_init()


class PrunedMambaForCausalLM(MambaForCausalLM):
    """`MambaForCausalLM` with blocks of different sizes."""

    config_class = PrunedMambaConfig

    def __init__(self, config):
        super().__init__(config)
        rebuild(self, MambaBlock)


class PrunedMamba2ForCausalLM(Mamba2ForCausalLM):
    """`Mamba2ForCausalLM` with blocks of different sizes."""

    config_class = PrunedMamba2Config

    def __init__(self, config):
        super().__init__(config)
        rebuild(self, Mamba2Block)

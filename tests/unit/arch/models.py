"""Small random models of every family, and their stock twins with the same weights."""

import torch
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig, PreTrainedModel
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

from ssmcompress.arch import modeling_ssmcompress as modeling
from ssmcompress.arch.modeling_ssmcompress import PrunedMamba2Config, PrunedMambaConfig
from ssmcompress.arch.registry import arch_for

SHARED = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
STOCK = {
    "mamba": MambaForCausalLM,
    "falcon_mamba": FalconMambaForCausalLM,
    "mamba2": Mamba2ForCausalLM,
    "ssmcompress_mamba": modeling.PrunedMambaForCausalLM,
    "ssmcompress_mamba2": modeling.PrunedMamba2ForCausalLM,
}
CONFIGS = {
    "mamba": MambaConfig(**SHARED, state_size=5, initializer_range=0.02),
    "mamba-biased": MambaConfig(**SHARED, state_size=16, use_bias=True, time_step_rank=3, conv_kernel=3),
    "mamba-narrow": MambaConfig(**SHARED, state_size=8, intermediate_size=37, use_conv_bias=False),
    "falcon_mamba": FalconMambaConfig(**SHARED, state_size=6),
    "mamba2": Mamba2Config(**SHARED, num_heads=8, head_dim=8, n_groups=1, state_size=16, chunk_size=8),
    "mamba2-grouped": Mamba2Config(**SHARED, num_heads=4, head_dim=16, n_groups=2, state_size=8, chunk_size=16),
    "mamba2-limited": Mamba2Config(
        **SHARED, num_heads=8, head_dim=8, n_groups=8, state_size=4, time_step_limit=(0.01, 0.2), use_bias=True
    ),
}


def blocks(*sizes: tuple[int, int, int], names: tuple[str, str, str]) -> list[dict[str, int]]:
    """The sizes of each block."""
    return [dict(zip(names, each, strict=True)) for each in sizes]


CHANNELS, HEADS = ("channel", "state", "dt_rank"), ("head", "head_channel", "state")
PRUNED = {  # of which no stock config says the sizes
    "pruned-mamba": PrunedMambaConfig(
        **SHARED, state_size=5, block_sizes=blocks((24, 3, 1), (37, 5, 2), names=CHANNELS), out_proj_bias=True
    ),
    "pruned-mamba-biased": PrunedMambaConfig(
        **SHARED, use_bias=True, conv_kernel=3, block_sizes=blocks((64, 16, 2), (8, 1, 1), names=CHANNELS)
    ),
    "pruned-mamba2": PrunedMamba2Config(
        **SHARED,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        state_size=16,
        chunk_size=8,
        block_sizes=blocks((7, 8, 16), (3, 5, 9), names=HEADS),
    ),
    "pruned-mamba2-grouped": PrunedMamba2Config(
        **SHARED,
        num_heads=4,
        head_dim=16,
        n_groups=2,
        state_size=8,
        block_sizes=blocks((4, 11, 8), (2, 16, 3), names=HEADS),
        out_proj_bias=True,
    ),
    "pruned-mamba2-rotated": PrunedMamba2Config(
        **SHARED,
        num_heads=4,
        head_dim=16,
        n_groups=2,
        state_size=8,
        chunk_size=8,
        block_sizes=[
            {"head": 4, "head_channel": 16, "state": 3, "rotated_from": 8},
            {"head": 2, "head_channel": 8, "state": 5},
        ],
    ),
    "gated-mamba2-rotated": PrunedMamba2Config(
        **SHARED | {"hidden_size": 24},
        num_heads=4,
        head_dim=16,
        n_groups=2,
        state_size=8,
        block_sizes=[
            {"head": 4, "head_channel": 11, "state": 0},
            {"head": 2, "head_channel": 16, "state": 3, "rotated_from": 8},
        ],
        out_proj_bias=True,
    ),
    "merged-mamba2": PrunedMamba2Config(  # eight and four groups of the norm, fewer of B and C
        **SHARED,
        num_heads=8,
        head_dim=8,
        n_groups=8,
        state_size=4,
        chunk_size=8,
        time_step_limit=(0.01, 0.2),
        use_bias=True,
        block_sizes=[
            {"head": 8, "head_channel": 8, "state": 4, "group": 4},
            {"head": 8, "head_channel": 5, "state": 3, "group": 1},
        ],
    ),
    "merged-mamba2-rotated": PrunedMamba2Config(
        **SHARED,
        num_heads=8,
        head_dim=8,
        n_groups=4,
        state_size=8,
        chunk_size=8,
        block_sizes=[
            {"head": 4, "head_channel": 8, "state": 3, "rotated_from": 8, "group": 2},
            {"head": 8, "head_channel": 8, "state": 5},
        ],
    ),
    "gated-mamba": PrunedMambaConfig(  # the first block has no scan
        **SHARED, use_bias=True, state_size=5, block_sizes=blocks((24, 0, 0), (24, 5, 2), names=CHANNELS)
    ),
    "gated-mamba2": PrunedMamba2Config(  # nor here; and the heads fill no whole hidden size
        **SHARED | {"hidden_size": 24},
        num_heads=4,
        head_dim=16,
        n_groups=2,
        state_size=8,
        use_conv_bias=False,
        block_sizes=blocks((4, 11, 0), (2, 16, 3), names=HEADS),
        out_proj_bias=True,
    ),
}
ALL = CONFIGS | PRUNED


def ours(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of this configuration with our mixers, in evaluation mode; every parameter is random."""
    torch.manual_seed(seed)
    model = arch_for(ALL[name]).build("cpu").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            if key.endswith("A_log") or "rotation" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def stock(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model with the same weights."""
    twin = STOCK[model.config.model_type](model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids [B, L], none of them the padding token."""
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))

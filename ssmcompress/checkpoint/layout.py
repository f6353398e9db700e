"""The original mamba-ssm layout and the Hugging Face one: names and configs, both ways, for Mamba-1 and Mamba-2."""

import math
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ssmcompress.arch.registry import PRUNED
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.policy import KEY

EMBEDDING = {"mamba_ssm": "backbone.embedding.weight", "hf": "backbone.embeddings.weight"}
HEAD = "lm_head.weight"
NORM_EPSILON = 1e-5  # fixed in mamba-ssm: its config has no field for it
LAYERS = {"Mamba1": "mamba", "Mamba2": "mamba2"}
NO_LIMIT = (0.0, math.inf)

TOP: dict[str, Any] = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
SHARED: dict[str, Any] = {"d_conv": 4, "expand": 2, "bias": False, "conv_bias": True}
SSM: dict[str, dict[str, Any]] = {
    "Mamba1": SHARED | {"d_state": 16, "dt_rank": "auto"},
    "Mamba2": SHARED
    | {"d_state": 128, "headdim": 64, "ngroups": 1, "chunk_size": 256, "dt_limit": NO_LIMIT}
    | {"d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False},
}
# how fresh weights are drawn, or which kernel runs: nothing a trained checkpoint still depends on
IRRELEVANT = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path", "conv_init", "A_init_range"}
IRRELEVANT |= {"use_mem_eff_path", "sequence_parallel", "process_group"}


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is of the mamba-ssm layout."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def hf_name(name: str) -> str:
    """The Hugging Face name of a tensor of either layout."""
    return EMBEDDING["hf"] if name == EMBEDDING["mamba_ssm"] else name


def original_name(name: str) -> str:
    """The mamba-ssm name of a tensor of either layout."""
    return EMBEDDING["mamba_ssm"] if name == EMBEDDING["hf"] else name


def hf_config(config: dict[str, Any]) -> PreTrainedConfig:
    """The Hugging Face config of a mamba-ssm one; UnsupportedError names what it cannot express."""
    _check(config)
    top = TOP | config
    ssm = dict(top["ssm_cfg"] or {})
    layer = ssm.pop("layer", "Mamba1")
    if layer not in LAYERS:
        raise _inexpressible("ssm_cfg.layer", layer, " or ".join(LAYERS))
    unknown = sorted(set(ssm) - set(SSM[layer]) - IRRELEVANT)
    if unknown:
        raise _inexpressible(f"ssm_cfg.{unknown[0]}", ssm[unknown[0]], f"the fields of {layer}")
    ssm = SSM[layer] | ssm
    multiple = max(1, top["pad_vocab_size_multiple"])
    fields = {
        "vocab_size": math.ceil(top["vocab_size"] / multiple) * multiple,
        "hidden_size": top["d_model"],
        "num_hidden_layers": top["n_layer"],
        "state_size": ssm["d_state"],
        "conv_kernel": ssm["d_conv"],
        "use_bias": ssm["bias"],
        "use_conv_bias": ssm["conv_bias"],
        "residual_in_fp32": top["residual_in_fp32"],
        "tie_word_embeddings": top["tie_embeddings"],
        "layer_norm_epsilon": NORM_EPSILON,
        "bos_token_id": 0,  # <|endoftext|> of the GPT-NeoX tokenizer, which the published checkpoints share
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    widths = _mamba2_widths(top, ssm) if layer == "Mamba2" else _mamba_widths(top, ssm)
    return CONFIG_MAPPING[LAYERS[layer]](**fields, **widths)


def original_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The mamba-ssm config of a Hugging Face one; UnsupportedError names what it cannot express."""
    layer = next((layer for layer, model_type in LAYERS.items() if model_type == config.model_type), None)
    if layer is None:
        raise UnsupportedError(
            f"mamba-ssm has no layout for the model type {config.model_type!r}.",
            hint="Its blocks differ in size, or in more than mamba-ssm can say: leave it in the Hugging Face layout."
            if config.model_type in PRUNED
            else "",
        )
    if getattr(config, KEY, None) is not None:
        raise UnsupportedError(
            "mamba-ssm knows no token reduction: in its layout the policy would be lost.",
            hint="Leave it in the Hugging Face layout, or convert the model that the policy was put on.",
        )
    if config.layer_norm_epsilon != NORM_EPSILON:
        raise _inexpressible("layer_norm_epsilon", config.layer_norm_epsilon, str(NORM_EPSILON), "mamba-ssm")
    if config.hidden_act not in ("silu", "swish"):
        raise _inexpressible("hidden_act", config.hidden_act, "silu", "mamba-ssm")
    ssm = {
        "d_state": config.state_size,
        "d_conv": config.conv_kernel,
        "bias": config.use_bias,
        "conv_bias": config.use_conv_bias,
    }
    ssm |= _original_mamba2(config) if layer == "Mamba2" else _original_mamba(config)
    return TOP | {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": layer} | {key: value for key, value in ssm.items() if value != SSM[layer][key]},
        "residual_in_fp32": config.residual_in_fp32,
        "pad_vocab_size_multiple": 1,  # the vocabulary is padded already
        "tie_embeddings": config.tie_word_embeddings,
    }


def _check(config: dict[str, Any]) -> None:
    unknown = sorted(set(config) - set(TOP))
    if unknown:
        raise _inexpressible(unknown[0], config[unknown[0]], "the fields of a mamba-ssm config")
    for key in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
        value = config.get(key, TOP[key])
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"config.json gives {key} as {value!r}; expected a whole number of at least 1.")
    if not isinstance(config.get("ssm_cfg") or {}, dict):
        raise InputError(f"config.json gives ssm_cfg as {config['ssm_cfg']!r}; expected an object.")
    for key in ("attn_layer_idx", "d_intermediate", "rms_norm"):
        if bool(config.get(key, TOP[key])) != bool(TOP[key]):
            raise _inexpressible(key, config[key], repr(TOP[key]))


def _mamba_widths(top: dict[str, Any], ssm: dict[str, Any]) -> dict[str, Any]:
    expand = ssm["expand"]
    whole = int(expand) if expand == int(expand) else 2
    return {
        "expand": whole,
        "intermediate_size": int(expand * top["d_model"]),
        "time_step_rank": ssm["dt_rank"],
    }


def _mamba2_widths(top: dict[str, Any], ssm: dict[str, Any]) -> dict[str, Any]:
    inner = ssm["expand"] * top["d_model"]
    for key, value in {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}.items():
        if bool(ssm[key]) != value:
            raise _inexpressible(f"ssm_cfg.{key}", ssm[key], repr(value))
    if ssm["d_ssm"] not in (None, inner):
        raise _inexpressible("ssm_cfg.d_ssm", ssm["d_ssm"], str(inner))
    if ssm["expand"] != int(ssm["expand"]):
        raise _inexpressible("ssm_cfg.expand", ssm["expand"], "a whole number")
    if inner % ssm["headdim"]:
        raise InputError(
            f"config.json gives headdim {ssm['headdim']}, which does not divide expand * d_model = {inner}."
        )
    return {
        "expand": int(ssm["expand"]),
        "num_heads": int(inner) // ssm["headdim"],
        "head_dim": ssm["headdim"],
        "n_groups": ssm["ngroups"],
        "chunk_size": ssm["chunk_size"],
        "time_step_limit": tuple(ssm["dt_limit"]),
    }


def _original_mamba(config: PreTrainedConfig) -> dict[str, Any]:
    expand = config.intermediate_size / config.hidden_size
    if int(expand * config.hidden_size) != config.intermediate_size:
        expand = math.nextafter(expand, math.inf)  # the product is rounded down there
    rank = math.ceil(config.hidden_size / 16)
    return {
        "expand": int(expand) if expand == int(expand) else expand,
        "dt_rank": "auto" if config.time_step_rank == rank else config.time_step_rank,
    }


def _original_mamba2(config: PreTrainedConfig) -> dict[str, Any]:
    limit = tuple(config.time_step_limit)
    inner = config.num_heads * config.head_dim
    if inner % config.hidden_size:
        raise _inexpressible("num_heads * head_dim", inner, f"a multiple of {config.hidden_size}", "mamba-ssm")
    return {
        "expand": inner // config.hidden_size,
        "headdim": config.head_dim,
        "ngroups": config.n_groups,
        "chunk_size": config.chunk_size,
        "dt_limit": NO_LIMIT if limit == NO_LIMIT else list(limit),
    }


def _inexpressible(key: str, found: Any, expected: str, layout: str = "Hugging Face") -> UnsupportedError:
    return UnsupportedError(f"{key} is {found!r}, which the {layout} layout cannot express; expected {expected}.")

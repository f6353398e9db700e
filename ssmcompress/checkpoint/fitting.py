"""Whether the tensors of an adapter belong to the model at hand: what it says of them, and what the model asks for."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.errors import InputError

Config = TypeVar("Config", bound=BaseModel)
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every tensor name in a PEFT file
LAYER = re.compile(r"\.layers\.(\d+)\.")
OWN = re.compile(r"\.(lora_|base_layer\.)")  # where a tensor's name leaves the module that it adapts
GIVE = f"--adapter takes a folder with {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained writes it."


def made_for(config: Mapping[str, Any]) -> str:
    """Whom an adapter was made for, as a hint."""
    base = config.get("base_model_name_or_path")
    return f"The adapter was made for {base if base and isinstance(base, str) else 'another model'}."


def read_config(kind: type[Config], config: Mapping[str, Any], path: Path) -> Config:
    """What an adapter's config says, as it is written; InputError for a value that will not do."""
    try:
        return kind.model_validate(config, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {first['loc'][0]}: {first['msg']}.", hint=GIVE) from None


def require_layers(weights: Shards, arch: Arch, hint: str) -> None:
    """InputError for a tensor of a layer that the model does not have."""
    for name in weights:
        layer = LAYER.search(name)
        if layer and int(layer[1]) >= arch.layers:
            raise InputError(f"{weights.path(name)} adapts layer {layer[1]}; the model has {arch.layers}.", hint=hint)


def require_modules(weights: Shards, model: PreTrainedModel, arch: Arch, hint: str) -> None:
    """InputError for a tensor of a module that the model does not have."""
    modules = {name for name, _ in model.named_modules()}
    require_layers(weights, arch, hint)
    for name in weights:
        module = name.removeprefix(PREFIX)
        module = module[: found.start()] if (found := OWN.search(module)) else module.rpartition(".")[0]
        if not name.startswith(PREFIX) or module not in modules:
            last = module.rpartition(".")[2]
            near = get_close_matches(last, {each.rpartition(".")[2] for each in modules} - {last}, n=1)
            raise InputError(
                f"{weights.path(name)} adapts {module}, which a {model.config.model_type} model does not have.",
                hint=(f"Did you mean {near[0]!r}? " if near else "") + hint,
            )


def require_match(weights: Shards, expected: Mapping[str, Tensor], known: Mapping[str, Tensor], hint: str) -> None:
    """InputError where the tensors are not those that the config says, in the shapes of this model."""
    for name in expected:
        if name not in weights:
            raise InputError(
                f"{weights.folder / WEIGHTS} lacks {name}, which {CONFIG} and the model ask for.", hint=hint
            )
    for name in weights:
        like = known.get(name)
        if like is None:
            raise InputError(f"{weights.path(name)} holds {name}, of which {CONFIG} says nothing.", hint=hint)
        if weights.shape(name) != like.shape:
            raise InputError(
                f"{name} in {weights.path(name)} has shape {list(weights.shape(name))}; {CONFIG} and the model ask for"
                f" {list(like.shape)}.",
                hint=hint,
            )
        weights.dtype(name)

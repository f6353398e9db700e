"""Adapters as plain PEFT writes them, and as it might."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def made(model: PreTrainedModel, folder: Path, *targets: str, seed: int = 5, **options: Any) -> PeftModel:
    """Adapts a copy of a stock model by plain PEFT, with values as after training, saves and returns it."""
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": list(targets)} | options
    with warnings.catch_warnings(action="ignore"):  # of tied weights and of saved embeddings
        return _made(model, folder, LoraConfig(**settings), seed)


def _made(model: PreTrainedModel, folder: Path, config: LoraConfig, seed: int) -> PeftModel:
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    adapted.save_pretrained(folder)
    return adapted


def written(folder: Path, tensors: dict[str, Tensor], **config: Any) -> str:
    """Writes tensors, named without PEFT's prefix, and a config by hand; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 5} | config))
    return str(folder)


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors of an adapter; `__` stands for a dot, PEFT's prefix is left out."""
    state = load_file(folder / WEIGHTS)
    for key, tensor in tensors.items():
        name = f"base_model.model.{key.replace('__', '.')}"
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

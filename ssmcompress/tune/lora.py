"""LoRA through PEFT (Hu et al., 2021), on the projections that train in a state-space model."""

import warnings
from typing import Any

import torch
from torch import nn

from ssmcompress.arch.base import Arch
from ssmcompress.checkpoint.lora import package
from ssmcompress.errors import UnsupportedError
from ssmcompress.tuning import TuneState

NAME = ".default"  # of PEFT's one adapter, in the names of parameters and not in those of files


def wrap(model: nn.Module, arch: Arch, step: TuneState) -> tuple[dict[str, nn.Parameter], dict[str, Any]]:
    """Puts LoRA around projections, in place: what is learned, by its name in the model, and PEFT's config.

    UnsupportedError for a module that would not train: what PEFT wraps and the mixer does not call.
    """
    for target in step.targets:
        if target not in arch.projections:
            raise UnsupportedError(
                f"LoRA cannot be trained on {target} of a {arch.model_type} model.",
                hint=f"Choose among {', '.join(arch.projections)}.",
            )
    targets = [name for name in arch.projections if not step.targets or name in step.targets]
    rank = step.size
    config = {"r": rank, "lora_alpha": step.alpha or rank, "target_modules": targets, "lora_dropout": 0.0}
    peft = package()
    # without a config, for PEFT refuses out_proj of Mamba models, whose fused kernels read past a wrapper
    host = nn.ModuleDict(dict(model.named_children()))
    with warnings.catch_warnings(action="ignore"):  # of tied weights, which are not touched
        peft.get_peft_model(host, peft.LoraConfig(**config))
    found = {name.replace(NAME, ""): each for name, each in model.named_parameters() if each.requires_grad}
    for parameter in found.values():
        parameter.data = parameter.data.to(torch.float32)
    return found, config | {"peft_type": "LORA"}

"""Model type → family, looked up lazily."""

from difflib import get_close_matches
from importlib import import_module

from transformers import PreTrainedConfig

from ssmcompress.arch.base import Arch
from ssmcompress.errors import UnsupportedError

FAMILIES = {
    "mamba": "ssmcompress.arch.mamba:Mamba",
    "falcon_mamba": "ssmcompress.arch.mamba:FalconMamba",
    "mamba2": "ssmcompress.arch.mamba2:Mamba2",
}

PRUNED = {  # what this package writes where no stock config says the sizes
    "ssmcompress_mamba": "ssmcompress.arch.pruned:PrunedMamba",
    "ssmcompress_mamba2": "ssmcompress.arch.pruned:PrunedMamba2",
}


def family(model_type: str) -> type[Arch]:
    """The family of a model type; UnsupportedError names the nearest one there is."""
    known = FAMILIES | PRUNED
    if model_type not in known:
        near = get_close_matches(model_type, FAMILIES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Supported: {', '.join(FAMILIES)}."
        raise UnsupportedError(f"The model type {model_type!r} is not supported.", hint=hint)
    module, name = known[model_type].split(":")
    return getattr(import_module(module), name)


def arch_for(config: PreTrainedConfig) -> Arch:
    """The family of a loaded config, bound to it."""
    return family(config.model_type)(config)

"""LoRA as PEFT writes it: merged into the weights of a model, which then computes what PEFT's wrappers would."""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch
from ssmcompress.checkpoint import layout
from ssmcompress.checkpoint.fitting import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    made_for,
    read_config,
    require_match,
    require_modules,
)
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.errors import BackendError, InputError, UnsupportedError

UNMERGEABLE = (  # what makes of LoRA more than a sum to the weights
    *("layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "megatron_config"),
    *("kasa_config", "monteclora_config", "trainable_token_indices", "ensure_weight_tying"),
)
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin that change the model's own weights

Rank = Annotated[int, Field(gt=0)]
Scale = Annotated[float, Field(allow_inf_nan=False)]


class _Lora(BaseModel):
    """The keys of a LoRA config that say what it computes, and no others: nothing else reaches PEFT."""

    model_config = ConfigDict(extra="ignore")

    r: Rank
    target_modules: list[str] | str | None
    lora_alpha: Scale
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Scale] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False

    @classmethod
    def read(cls, config: Mapping[str, Any], path: Path) -> "_Lora":
        """The keys as they are written; InputError for values that will not do, UnsupportedError for other features."""
        for key in UNMERGEABLE:
            if config.get(key):
                raise UnsupportedError(f"{path} sets {key}, which is not supported.", hint="Train a plain LoRA.")
        begun = config.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(MOVES_BASE):
            raise UnsupportedError(
                f"{path} gives init_lora_weights as {begun!r}, which also changes the weights of the model.",
                hint="Save it as a plain LoRA: save_pretrained with path_initial_model_for_weight_conversion.",
            )
        return read_config(cls, config, path)

    def options(self) -> dict[str, Any]:
        """What `peft.LoraConfig` takes; the values come from the file, so none are drawn."""
        return self.model_dump(exclude_none=True) | {"init_lora_weights": False}


def merge(model: PreTrainedModel, arch: Arch, config: Mapping[str, Any], weights: Shards) -> None:
    """Adds LoRA (Hu et al., 2021) to the weights: W + alpha / r · B A.

    Merged, it is seen by all that reads weights, as mixers read conv1d and dt_proj; the sum has the weight's dtype.
    """
    path = weights.folder / CONFIG
    lora, hint = _Lora.read(config, path), made_for(config)
    require_modules(weights, model, arch, hint)
    peft = package()
    outer = tuple(PREFIX + name.removesuffix("weight") for name in (layout.EMBEDDING["hf"], layout.HEAD))
    if model.config.tie_word_embeddings and any(name.startswith(outer) for name in weights):
        _untie(model)
    # without a config, for PEFT refuses out_proj of Mamba models, whose fused kernels read past a wrapper
    host = nn.ModuleDict(dict(model.named_children()))
    with _told(path):
        made = peft.LoraConfig(**lora.options())
        adapted = peft.get_peft_model(host, made, low_cpu_mem_usage=True)
        expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    known = adapted.state_dict() | expected
    require_match(weights, expected, known, hint)
    state = {name: weights.finite(name).to(model.device, known[name].dtype) for name in weights}
    with _told(path):
        peft.set_peft_model_state_dict(adapted, state, low_cpu_mem_usage=True)
        adapted.merge_and_unload()
    for name, child in host.items():  # a head that the adapter holds whole is a new module
        setattr(model, name, child)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"{weights.folder / WEIGHTS} makes {name} too large for {weight.dtype}.", hint=hint)
    model.requires_grad_(True)


def _untie(model: PreTrainedModel) -> None:
    """Gives the head weights of its own: an adapter changes the embeddings or the head, not both."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def package() -> Any:
    """PEFT; BackendError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise BackendError(
            f"An adapter needs the package peft: {error}.", hint="Install it: pip install 'ssmcompress[tune]'."
        ) from error
    return peft


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Says in a sentence what PEFT cannot do, for which it raises almost anything, and none of its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, re.error) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UnsupportedError(
                f"PEFT cannot put the adapter of {path} into this model: {said}.", hint="Train it on other modules."
            ) from error

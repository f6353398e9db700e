"""An adapter in PEFT's file format: read without running anything of it, and put into the model it was made for."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch
from ssmcompress.checkpoint import layout
from ssmcompress.checkpoint.shards import Shards, read_json
from ssmcompress.errors import BackendError, InputError, UnsupportedError
from ssmcompress.paths import expanded

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every tensor name in a PEFT file
LAYER = re.compile(r"\.layers\.(\d+)\.")
OWN = re.compile(r"\.(lora_|base_layer\.)")  # where a tensor's name leaves the module that it adapts
UNMERGEABLE = (  # what makes of LoRA more than a sum to the weights
    *("layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "megatron_config"),
    *("kasa_config", "monteclora_config", "trainable_token_indices", "ensure_weight_tying"),
)
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin that change the model's own weights
GIVE = f"--adapter takes a folder with {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained writes it."

Rank = Annotated[int, Field(gt=0)]
Scale = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Adapter:
    """The folder of an adapter, in which both files are."""

    name: str
    folder: Path

    @property
    def label(self) -> str:
        """The name for records: without the path of this machine."""
        return self.folder.resolve().name

    @property
    def files(self) -> tuple[Path, Path]:
        """The files that decide what it does."""
        return self.folder / CONFIG, self.folder / WEIGHTS


def find(adapter: str | Path) -> Adapter:
    """The adapter in a folder; InputError where there is none, or only one that would run code on loading."""
    folder = expanded(adapter)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise InputError(f"The adapter {adapter} {what}.", hint=GIVE)
    if not (folder / CONFIG).exists():
        model = (folder / "config.json").exists()
        hint = "It is a model: give it as MODEL." if model else GIVE
        raise InputError(f"{folder} has no {CONFIG}.", hint=hint)
    if not (folder / WEIGHTS).exists():
        pickled = (folder / PICKLED).exists()
        raise InputError(
            f"{folder} has no {WEIGHTS}"
            + (f", only {PICKLED}, which may run code when it is read and is not." if pickled else "."),
            hint="Save the adapter again with PEFT, which writes safetensors, where you trust it." if pickled else GIVE,
        )
    return Adapter(str(adapter), folder)


def attach(model: PreTrainedModel, arch: Arch, adapter: Adapter) -> None:
    """Makes the adapted model of a model, in place.

    Raises InputError for an adapter that is damaged or was made for another model, UnsupportedError for a kind of
    adapter, or a feature of one, that there is not.
    """
    path = adapter.folder / CONFIG
    config = read_json(path)
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise InputError(f"{path} has no peft_type.", hint=GIVE)
    if kind not in KINDS:
        near = get_close_matches(kind.upper(), KINDS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Supported: {', '.join(KINDS)}."
        raise UnsupportedError(f"{path} gives peft_type as {kind!r}, which is not supported.", hint=hint)
    KINDS[kind](model, arch, config, Shards(adapter.folder, (WEIGHTS,)))


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
        try:
            return cls.model_validate(config, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{path}: {first['loc'][0]}: {first['msg']}.", hint=GIVE) from None

    def options(self) -> dict[str, Any]:
        """What `peft.LoraConfig` takes; the values come from the file, so none are drawn."""
        return self.model_dump(exclude_none=True) | {"init_lora_weights": False}


def _merge(model: PreTrainedModel, arch: Arch, config: Mapping[str, Any], weights: Shards) -> None:
    """Adds LoRA (Hu et al., 2021) to the weights: W + alpha / r · B A.

    Merged, it is seen by all that reads weights, as mixers read conv1d and dt_proj; the sum has the weight's dtype.
    """
    path = weights.folder / CONFIG
    lora, base = _Lora.read(config, path), config.get("base_model_name_or_path")
    hint = f"The adapter was made for {base if base and isinstance(base, str) else 'another model'}."
    _require_modules(weights, model, arch, hint)
    peft = _peft()
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
    _require_match(weights, expected, known, hint)
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


KINDS: dict[str, Callable[[PreTrainedModel, Arch, Mapping[str, Any], Shards], None]] = {"LORA": _merge}


def _untie(model: PreTrainedModel) -> None:
    """Gives the head weights of its own: an adapter changes the embeddings or the head, not both."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def _require_modules(weights: Shards, model: PreTrainedModel, arch: Arch, hint: str) -> None:
    """InputError for a tensor of a module that the model does not have."""
    modules = {name for name, _ in model.named_modules()}
    for name in weights:
        layer = LAYER.search(name)
        if layer and int(layer[1]) >= arch.layers:
            raise InputError(f"{weights.path(name)} adapts layer {layer[1]}; the model has {arch.layers}.", hint=hint)
        module = name.removeprefix(PREFIX)
        module = module[: found.start()] if (found := OWN.search(module)) else module.rpartition(".")[0]
        if not name.startswith(PREFIX) or module not in modules:
            last = module.rpartition(".")[2]
            near = get_close_matches(last, {each.rpartition(".")[2] for each in modules} - {last}, n=1)
            raise InputError(
                f"{weights.path(name)} adapts {module}, which a {model.config.model_type} model does not have.",
                hint=(f"Did you mean {near[0]!r}? " if near else "") + hint,
            )


def _require_match(weights: Shards, expected: Mapping[str, Tensor], known: Mapping[str, Tensor], hint: str) -> None:
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


def _peft() -> Any:
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

"""A model by name, brought into memory: `ref:NAME`, a hub id with its revision, or a folder of either layout."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN

from ssmcompress import kernels, reference
from ssmcompress.arch.base import Arch
from ssmcompress.arch.mixer import mixers, use_backend
from ssmcompress.arch.pages import paged
from ssmcompress.arch.registry import arch_for, family
from ssmcompress.arch.surgery import Surgery
from ssmcompress.checkpoint import hub, layout
from ssmcompress.checkpoint.adapter import Adapter, Given, attach, find_all
from ssmcompress.checkpoint.edited import Edited
from ssmcompress.checkpoint.shards import Shards, read_json
from ssmcompress.edits import Edit
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.paths import expanded
from ssmcompress.policy import KEY
from ssmcompress.tokens.selection import install

Layout = Literal["hf", "mamba_ssm"]
LAYER = re.compile(r"backbone\.layers\.(\d+)\.")
STATE_SPACE = ("A_log", "D", "dt_bias")  # small and stiff: a narrower compute dtype does not narrow them
SIZES: tuple[str, ...] = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "state_size", "expand")
SIZES += ("conv_kernel", "num_heads", "head_dim", "n_groups", "chunk_size", "time_step_rank")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Source:
    """Where a model comes from. `revision` is the commit hash of a hub id; `name` is what it was called."""

    name: str
    folder: Path
    layout: Layout
    revision: str | None = None

    @property
    def label(self) -> str:
        """The name for records: without the path of this machine."""
        return self.name if self.name.startswith("ref:") or self.revision else self.folder.resolve().name

    def config(self) -> PreTrainedConfig:
        """The Hugging Face config; InputError or UnsupportedError where it is no use.

        `rescale_prenorm_residual` is off: where it is true, stock `from_pretrained` divides every loaded out_proj by
        the square root of the number of layers.
        """
        path = self.folder / "config.json"
        raw = read_json(path)
        if raw.get("quantization_config"):
            raise UnsupportedError(f"{self.name} is quantised.", hint="Start from the original weights.")
        try:
            if self.layout == "mamba_ssm":
                config = layout.hf_config(raw)
            else:
                config = family(raw["model_type"]).config_class().from_pretrained(self.folder, local_files_only=True)
        except (StrictDataclassError, TypeError, ValueError, ArithmeticError) as error:
            cause = str(error.__cause__ or error).strip().splitlines()[-1].strip()
            raise InputError(f"{path} is not a valid config: {cause}") from error
        for key in SIZES:
            if getattr(config, key, 1) < 1:
                raise InputError(f"{path} gives {key} as {getattr(config, key)}; expected at least 1.")
        if config.hidden_act not in ACT2FN:
            near = get_close_matches(str(config.hidden_act), ACT2FN, n=1)
            raise InputError(
                f"{path} gives hidden_act as {config.hidden_act!r}, an activation there is not.",
                hint=f"Did you mean {near[0]!r}?" if near else "Mamba's is 'silu'.",
            )
        try:
            family(config.model_type)(config).policy  # noqa: B018
        except ValueError as error:
            raise InputError(
                f"{path} gives a {KEY} that this version cannot follow: {error}.",
                hint="Every token would be read, and its figures would not be this model's: take the key out for that.",
            ) from None
        config.rescale_prenorm_residual = False
        vars(config).pop("auto_map", None)  # code beside a checkpoint is never run, and never passed on
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer in the folder, or None where there is none."""
        if not any((self.folder / name).exists() for name in TOKENIZER_FILES):
            return None
        try:
            return AutoTokenizer.from_pretrained(
                self.folder, config=self._known_config(), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the tokenizers library raises bare Exceptions for a damaged file
            raise InputError(
                f"The tokenizer of {self.name} cannot be loaded: {str(error).strip().splitlines()[0]}",
                hint="Its files must be whole and need no code of their own.",
            ) from error

    def _known_config(self) -> PreTrainedConfig | None:
        """What `AutoTokenizer` should take the config to be where it cannot read it without running code."""
        found = None if self.layout == "mamba_ssm" else family(read_json(self.folder / "config.json")["model_type"])
        return None if found is None or found.stock else found.stock_config()


@dataclass
class Checkpoint:
    """A model in memory, in evaluation mode, with what belongs to it.

    `stored` reads its tensors from the files, where those of `adapters` are not yet among them; they are computed with
    in `dtype`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    arch: Arch
    source: Source
    stored: Shards
    adapters: tuple[Adapter, ...] = ()
    dtype: torch.dtype | Literal["auto"] = "auto"

    @property
    def name(self) -> str:
        """What it was called."""
        return " + ".join((self.source.name, *(adapter.name for adapter in self.adapters)))

    @property
    def label(self) -> str:
        """The name for records: without paths of this machine."""
        return " + ".join((self.source.label, *(adapter.label for adapter in self.adapters)))


def resolve(model: str) -> Source:
    """Finds a model, fetching it where it lies on the hub: InputError, or ResourceError when it cannot be fetched."""
    if model.startswith("ref:"):
        return _source(model, reference.folder(model.removeprefix("ref:")))
    folder = expanded(model)
    if folder.is_dir():
        return _source(model, folder)
    if folder.exists():
        raise InputError(f"{model} is a file.", hint="Give the folder that holds config.json and the weights.")
    if not hub.is_id(model):
        raise InputError(
            f"There is no folder {model}.",
            hint="MODEL is a folder, a hub id such as state-spaces/mamba-130m-hf, or a shipped one such as ref:mamba.",
        )
    name, _, revision = model.partition("@")
    folder = hub.fetch(name, revision or None)
    return _source(name, folder, revision=folder.name)


def load(
    model: str | Source,
    *,
    adapter: Given = (),
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: str | torch.device = "cpu",
    backend: str = "auto",
    in_pages: bool = False,
) -> Checkpoint:
    """Loads a model without running any code of its folder; every tensor must be there, fit and be finite.

    `adapter` is a folder in PEFT's format, or several: each is put into what the one before it made.
    `auto` keeps the stored dtypes; float32 converts all; a narrower dtype leaves A_log, D and dt_bias as they are. Read
    `in_pages`, one block at a time is in memory, which takes no adapters.
    Raises InputError for a checkpoint that is damaged or does not fit its config, or an adapter that does not fit the
    model, UnsupportedError for a foreign family, dtype or kind of adapter.
    """
    source = resolve(model) if isinstance(model, str) else model
    found = find_all(adapter)
    arch, weights = headers(source)
    config, tokenizer = arch.config, source.tokenizer()
    if source.layout == "mamba_ssm" and tokenizer is not None:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id

    def fetch(name: str) -> Tensor:
        return _cast(name, weights.finite(name), dtype).to(device)

    config.dtype = weights.dtype(layout.EMBEDDING["hf"]) if dtype == "auto" else dtype
    if in_pages:
        loaded = paged(arch, weights, fetch, device)
    else:
        loaded = arch.assemble({name: fetch(name) for name in weights}, device)
    if (generation := _generation(source.folder)) is not None:
        loaded.generation_config = generation
    for each in found:
        attach(loaded, arch, each)
    use_backend(loaded, kernels.choose(backend))
    install(loaded, arch.policy)
    return Checkpoint(loaded, tokenizer, arch, source, weights, found, dtype)


def _generation(folder: Path) -> GenerationConfig | None:
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any kind, by what stands there
        told = str(error).strip().partition("\n")[0]
        raise InputError(f"{path} cannot be read: {told}.", hint="Fetch or write the file again.") from error


def edited_pages(checkpoint: Checkpoint, edits: Sequence[Edit]) -> Checkpoint:
    """What edits make of a checkpoint that is read in pages, read in pages."""
    surgery, model = Surgery(checkpoint.arch, edits), checkpoint.model
    made = Edited(checkpoint.stored, surgery, edits)
    outside = dict(model.named_parameters())

    def fetch(name: str) -> Tensor:
        if not LAYER.match(name) and made.untouched(name):
            return outside[name].data
        return _cast(name, made[name], checkpoint.dtype).to(model.device)

    edited = paged(surgery.arch, made, fetch, model.device)
    edited.generation_config = model.generation_config
    use_backend(edited, next(mixers(model)).backend)
    install(edited, surgery.policy and surgery.arch.policy)
    return replace(checkpoint, model=edited, arch=surgery.arch)


def headers(source: Source) -> tuple[Arch, Shards]:
    """The family of a source and its weights under the model's names: all is checked but their values.

    Raises InputError for a checkpoint that is damaged or does not fit its config, UnsupportedError for a foreign family
    or dtype.
    """
    weights = Shards(source.folder)
    arch = arch_for(source.config())
    _check_layers(weights, arch.layers)
    return arch, _match(weights, arch.build("meta"))


def require_embedded(checkpoint: Checkpoint, ids: Iterable[int] = ()) -> None:
    """InputError where ids, or those that the tokenizer gives to plain text, have no row in the embedding."""
    tokenizer, rows = checkpoint.tokenizer, checkpoint.model.config.vocab_size
    assert tokenizer is not None
    plain = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    largest = max(plain | ends | {*ids}, default=0)
    if largest >= rows:
        raise InputError(
            f"The tokenizer of {checkpoint.source.name} gives the token {largest}; the model knows {rows}, from 0 on.",
            hint="It is the tokenizer of another model: put the right one's files into the folder.",
        )


def special_ids(checkpoint: Checkpoint) -> set[int]:
    """Ids of tokens that stand for no text: the tokenizer's, or where there is none those that the config names."""
    if checkpoint.tokenizer is not None:
        return {*checkpoint.tokenizer.all_special_ids}
    config = checkpoint.model.config
    named = (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    return {index for index in named if index is not None}


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors as they are stored: a tied head once, under the name of the embedding."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:  # type: ignore[union-attr]
        state.pop(layout.HEAD)
    return state


def _source(name: str, folder: Path, revision: str | None = None) -> Source:
    if not (folder / "config.json").exists():
        adapter = (folder / "adapter_config.json").exists()
        raise InputError(
            f"{folder} has no config.json.",
            hint="It is an adapter: give the model it belongs to, and the adapter with --adapter."
            if adapter
            else "Give the folder of a checkpoint, with config.json beside its weights.",
        )
    config = read_json(folder / "config.json")
    if layout.is_original(config):
        return Source(name, folder, "mamba_ssm", revision)
    if not isinstance(config.get("model_type"), str):
        raise InputError(
            f"{folder / 'config.json'} has no model_type, and no d_model and n_layer as mamba-ssm writes them.",
            hint="Give a checkpoint in the Hugging Face or the mamba-ssm layout.",
        )
    family(config["model_type"])
    return Source(name, folder, "hf", revision)


def _match(weights: Shards, model: PreTrainedModel) -> Shards:
    """The weights under the model's names; InputError where one is missing, too many or misshapen."""
    found = {layout.hf_name(name): name for name in weights}
    expected: Mapping[str, Any] = state_dict(model)
    embedding = layout.EMBEDDING["hf"]
    if model.config.tie_word_embeddings and layout.HEAD in found:
        head = found.pop(layout.HEAD)
        stored = found.setdefault(embedding, head)
        if weights.shape(stored) != weights.shape(head) or not torch.equal(weights[stored], weights[head]):
            raise InputError(
                f"{head} in {weights.path(head)} differs from {stored}, though config.json ties them.",
                hint="Set tie_word_embeddings to false in config.json if the head was trained by itself.",
            )
    missing = [name for name in expected if name not in found]
    if missing:
        raise InputError(
            f"{weights.folder} lacks {missing[0]}{_others(missing)}; expected a shape of"
            f" {list(expected[missing[0]].shape)}.",
            hint="The weights do not belong to this config.json, or the download is incomplete.",
        )
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        stored = found[unexpected[0]]
        raise InputError(
            f"{weights.path(stored)} holds {stored}{_others(unexpected)}, which a {model.config.model_type} model of"
            " this config.json does not have.",
            hint="The weights do not belong to this config.json.",
        )
    for name, tensor in expected.items():
        if weights.shape(found[name]) != tensor.shape:
            raise InputError(
                f"{found[name]} in {weights.path(found[name])} has shape {list(weights.shape(found[name]))};"
                f" config.json expects {list(tensor.shape)}.",
                hint="The weights do not belong to this config.json.",
            )
        weights.dtype(found[name])
    return weights.select({name: found[name] for name in expected})


def _check_layers(weights: Shards, expected: int) -> None:
    found = {int(match[1]) for match in map(LAYER.match, weights) if match}
    if len(found) != expected:
        raise InputError(
            f"{weights.folder} holds the weights of {len(found)} layers; its config.json says {expected}.",
            hint="The weights do not belong to this config.json, or the download is incomplete.",
        )


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | Literal["auto"]) -> Tensor:
    if dtype == "auto":
        return tensor
    narrower = torch.finfo(dtype).bits < torch.finfo(tensor.dtype).bits
    return tensor if narrower and name.rsplit(".", 1)[-1] in STATE_SPACE else tensor.to(dtype)


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} other tensor{'s' * (len(names) > 2)}" if len(names) > 1 else ""

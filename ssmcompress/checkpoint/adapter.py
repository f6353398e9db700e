"""An adapter in PEFT's file format: read without running anything of it, and put into the model it was made for."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch
from ssmcompress.checkpoint import learned, lora, sdt
from ssmcompress.checkpoint.fitting import CONFIG, GIVE, PICKLED, PREFIX, WEIGHTS
from ssmcompress.checkpoint.shards import Shards, read_json
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.paths import expanded

Given = str | Path | Sequence[str | Path]  # one adapter, or several (or none) that are put in one after another


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


def find_all(given: Given) -> tuple[Adapter, ...]:
    """The adapters of one folder or of several; InputError as of `find`."""
    return tuple(map(find, [given] if isinstance(given, str | Path) else given))


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
        near = get_close_matches(kind.upper(), KINDS, n=1, cutoff=0.7)
        hint = f"Did you mean {near[0]!r}?" if near else f"Supported: {', '.join(KINDS)}."
        raise UnsupportedError(f"{path} gives peft_type as {kind!r}, which is not supported.", hint=hint)
    KINDS[kind](model, arch, config, Shards(adapter.folder, (WEIGHTS,)))


KINDS: dict[str, Callable[[PreTrainedModel, Arch, Mapping[str, Any], Shards], None]] = {
    "LORA": lora.merge,
    "SDT": sdt.merge,
    **dict.fromkeys(learned.METHODS, learned.put),
}


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes an adapter: its config, and tensors by their names in the model."""
    told = {"task_type": "CAUSAL_LM", "inference_mode": True} | dict(config)
    (folder / CONFIG).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    stored = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})

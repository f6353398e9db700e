"""A checkpoint from the mamba-ssm layout to the Hugging Face one, and back."""

import json
from pathlib import Path
from typing import Literal, get_args

import torch

from ssmcompress.checkpoint import card, manifest
from ssmcompress.checkpoint.layout import EMBEDDING, HEAD, original_config, original_name
from ssmcompress.checkpoint.output import carry, output, write
from ssmcompress.checkpoint.shards import BIN, require_space
from ssmcompress.checkpoint.source import Checkpoint, load
from ssmcompress.checkpoint.verify import verify
from ssmcompress.errors import InputError, ResourceError
from ssmcompress.events import Emit, Finished, Metric, ignore

To = Literal["hf", "mamba-ssm"]
LAYOUTS = {"hf": "Hugging Face", "mamba-ssm": "mamba-ssm"}


def convert(model: str, *, to: To, out: str | Path, overwrite: bool = False, emit: Emit = ignore) -> Path:
    """Writes a model in the other layout, every tensor bit for bit the same, and checks that it loads again.

    Raises InputError for bad input or an output that exists, UnsupportedError for what the other layout cannot express.
    """
    if to not in get_args(To):
        raise InputError(f"There is no layout {to!r}.", hint=f"Choose {' or '.join(get_args(To))}.")
    checkpoint = load(model)
    with output(out, overwrite=overwrite, source=checkpoint.source) as folder:
        if to == "hf":
            write(checkpoint, folder)
        else:
            write_original(checkpoint, folder)
        verified = verify(folder, checkpoint.model, stock=to == "hf")
        for loader in verified.loaders:
            emit(Metric(f"logit difference, {loader}", getattr(verified, loader)))
        source = checkpoint.source
        made = manifest.write(
            folder,
            verb="convert",
            source=source,
            earlier=manifest.history(source),
            tensors=manifest.carried(source),
            verification=verified,
        )
        card.write(
            folder,
            title=f"{source.label}, in the {LAYOUTS[to]} layout",
            summary="Every tensor is bit for bit that of the source; only names and files differ.",
            manifest=made,
            license=card.license_of(source),
        )
    emit(Finished(str(out)))
    return Path(out)


def write_original(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes config.json and pytorch_model.bin as `MambaLMHeadModel.from_pretrained` reads them.

    It reads no safetensors and wants the tied head under both names, so `torch.save` it is; a second copy of them in
    another format would only double the folder. UnsupportedError for what mamba-ssm cannot express.
    """
    config = original_config(checkpoint.model.config)
    state = {original_name(name): checkpoint.stored[name] for name in checkpoint.stored}
    if config["tie_embeddings"]:
        state[HEAD] = state[EMBEDDING["mamba_ssm"]]
    require_space(folder, sum(tensor.nbytes for tensor in state.values()))
    try:
        torch.save(state, folder / BIN)
    except RuntimeError as error:  # its OSError, without the cause
        raise ResourceError(f"Cannot write {folder / BIN}: {error}.", hint="Free some space.") from error
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    carry(checkpoint.source, folder)

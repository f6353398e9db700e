"""An adapter becomes part of the weights, where it only adds to them or takes their place, or where it is one more."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from ssmcompress.arch.base import OFFSET
from ssmcompress.arch.mixer import PORTS, mixers
from ssmcompress.arch.modeling_ssmcompress import StateOffset
from ssmcompress.arch.surgery import Surgery
from ssmcompress.arch.tunable import StateOffset as Learned
from ssmcompress.checkpoint import card, manifest
from ssmcompress.checkpoint.adapter import Adapter, find
from ssmcompress.checkpoint.fitting import CONFIG
from ssmcompress.checkpoint.layout import EMBEDDING
from ssmcompress.checkpoint.manifest import TensorRecord
from ssmcompress.checkpoint.output import output, write
from ssmcompress.checkpoint.shards import require_space
from ssmcompress.checkpoint.source import Checkpoint, load, resolve, state_dict
from ssmcompress.checkpoint.verify import verify
from ssmcompress.edits import Add, Edit
from ssmcompress.errors import UnsupportedError
from ssmcompress.events import Emit, Finished, Metric, Note, ignore


def fold(
    adapter: str | Path,
    model: str,
    *,
    out: str | Path,
    own_config: bool = False,
    overwrite: bool = False,
    backend: str = "auto",
    emit: Emit = ignore,
) -> Path:
    """Writes the model with an adapter folded into its weights, in the dtypes that they are stored in.

    An offset of the state changes no weight; with `own_config` it is one more, of a config of our own. Raises
    InputError for an adapter of another model, UnsupportedError for one that is more than weights.
    """
    chosen, source = find(adapter), resolve(model)
    with output(out, overwrite=overwrite, source=source) as folder:
        before = load(source, dtype=torch.float32, backend=backend)
        adapted = load(source, adapter=chosen.folder, dtype=torch.float32, backend=backend)
        if own_config:
            adapted = _offset(adapted)
        _require_weights(adapted, chosen)
        _round(adapted)
        state = {name: tensor.to(_stored(adapted, name)) for name, tensor in state_dict(adapted.model).items()}
        require_space(folder, sum(tensor.nbytes for tensor in state.values()))
        write(adapted, folder, state)
        verified = verify(folder, adapted.model)
        for loader in verified.loaders:
            emit(Metric(f"logit difference, {loader}", getattr(verified, loader)))
        made = manifest.write(
            folder,
            verb="apply",
            source=manifest.describe(source, [chosen]),
            earlier=manifest.history(source),
            tensors=_records(before, state, emit),
            verification=verified,
        )
        card.write(
            folder,
            title=f"{source.label}, with {chosen.label} in its weights",
            summary=f"The adapter {chosen.label} was folded into the weights by ssmcompress.",
            manifest=made,
            license=card.license_of(source),
        )
    emit(Finished(str(out)))
    return Path(out)


def _require_weights(adapted: Checkpoint, adapter: Adapter) -> None:
    """UnsupportedError where the adapter left something beside the weights."""
    filled = [getattr(mixer, port) for mixer in mixers(adapted.model) for port in PORTS]
    filled.append(cast(Any, adapted.model).backbone.prompt)
    if all(port is None or isinstance(port, StateOffset) for port in filled):  # which is a weight of the model
        return
    offset = any(isinstance(port, Learned) for port in filled)
    kind = json.loads((adapter.folder / CONFIG).read_text(encoding="utf-8"))["peft_type"]
    raise UnsupportedError(
        f"{adapter.name} ({kind}) does not fold into the weights: no weight of the model computes what it adds.",
        hint="Keep it beside the model: ssmcompress.load(model, adapter=…), eval --adapter."
        + " Or let it be a weight of a config of our own: --own-config." * offset,
    )


def _offset(adapted: Checkpoint) -> Checkpoint:
    """The checkpoint whose learned offset of the state is a tensor of the model, [D, N] or [H, P, N]."""
    added: list[Edit] = []
    for layer, mixer in enumerate(mixers(adapted.model)):
        if isinstance(learned := mixer.offset, Learned):
            mixer.offset = None
            added.append(Add(adapted.arch.prefix(layer) + OFFSET, learned.whole(adapted.arch.state(layer))))
    if not added:
        return adapted
    if adapted.arch.pruned_config is None:
        raise UnsupportedError(f"{adapted.arch.model_type} has no config of our own.", hint="Keep the adapter.")
    surgery = Surgery(adapted.arch, added)
    return replace(adapted, model=surgery.operate(adapted.model), arch=surgery.arch)


def _stored(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """What a tensor is stored in; a new one as the decays beside it, or as the embeddings where it was tied to them."""
    known = checkpoint.stored
    like = name.removesuffix(OFFSET) + "mixer.A_log" if name.endswith(OFFSET) else EMBEDDING["hf"]
    return known.dtype(name if name in known else like)


@torch.no_grad()
def _round(checkpoint: Checkpoint) -> None:
    """Gives every weight the value that its stored dtype can hold."""
    for name, parameter in checkpoint.model.named_parameters():
        parameter.copy_(parameter.to(_stored(checkpoint, name)))


def _records(before: Checkpoint, state: dict[str, torch.Tensor], emit: Emit) -> tuple[TensorRecord, ...]:
    """What became of the tensors: zeros that were there may be filled."""
    zeros = {name: tensor.numel() - int(tensor.count_nonzero()) for name, tensor in state.items()}
    filled = [
        record.name
        for record in manifest.carried(before.source)
        if record.status == "pruned" and record.zeros and zeros.get(record.name, 0) < record.zeros
    ]
    if filled:
        emit(Note(f"The adapter fills zeros of {len(filled)} pruned tensors: they are sparse no more.", "warning"))
    return tuple(
        record.model_copy(update={"zeros": zeros.get(record.name, record.zeros)})
        for record in manifest.carried(before.source)
    )

"""What edits that remove units make of an adapter: it loses the same units, and fits the smaller model."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ssmcompress import edits as editing
from ssmcompress.arch.base import ROTATION
from ssmcompress.arch.surgery import BLOCK, Surgery
from ssmcompress.checkpoint import adapter as adapters
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.fitting import CONFIG, PREFIX, WEIGHTS, require_layers
from ssmcompress.checkpoint.output import TUNING, output
from ssmcompress.checkpoint.sdt import DELTA
from ssmcompress.checkpoint.shards import Shards, read_json
from ssmcompress.checkpoint.source import headers, load, resolve
from ssmcompress.errors import UnsupportedError
from ssmcompress.events import Emit, Finished, Note, ignore
from ssmcompress.steps import GROUP, WIDTH

Dim = tuple[str, int] | str | None  # a dimension of a weight of the block, an axis, or one that no unit runs along
PLACES: dict[str, tuple[Dim, ...]] = {  # of the families alike; those of the states are in `_states`
    "mixer.offset.reading": (None, "state"),
    "mixer.initial_inputs": (("mixer.conv1d.weight", 0), None),
    "mixer.prefix": (None, WIDTH),
    "mixer.extra.A_log": ("channel", None),
    "mixer.extra.B": (None, ("mixer.out_proj.weight", 1)),
    "mixer.extra.C": (None, ("mixer.out_proj.weight", 1)),
    "backbone.prompt": (None, WIDTH),
}
STATES = ("mixer.offset.state", "mixer.offset.output", "mixer.initial_state")
LORA = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?")


def reshape(
    edits: str | Path, adapter: str | Path, *, out: str | Path, overwrite: bool = False, emit: Emit = ignore
) -> Path:
    """Writes the adapter of a model for what edits make of that model, which its config names.

    Raises InputError for edits of another model, UnsupportedError for an adapter that they have no form for.
    """
    loaded, given = editing.load(Path(edits)), adapters.find(adapter)
    config = read_json(given.folder / CONFIG)
    source = resolve(str(config.get("base_model_name_or_path") or "").partition(" + ")[0])
    surgery = Surgery(headers(source)[0], loaded.items)
    smaller = Path(edits).parent
    with output(out, marked=TUNING, overwrite=overwrite, source=source) as folder:
        tensors = cut(surgery, Shards(given.folder, (WEIGHTS,)))
        if not tensors:
            raise UnsupportedError(f"Nothing of the adapter {given.name} is left.", hint="Its layers are all removed.")
        adapters.save(folder, config | {"base_model_name_or_path": smaller.resolve().name}, tensors)
        if (smaller / "config.json").is_file():
            load(str(smaller), adapter=folder)
        told = {"schema_version": 1, "adapter": manifest.describe(source, [given]).model_dump()}
        told["edits_sha256"] = manifest.sha256(Path(edits))
        (folder / TUNING).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        emit(Note(f"{len(tensors)} tensors of the adapter are left."))
    emit(Finished(str(out)))
    return Path(out)


def cut(surgery: Surgery, weights: Shards) -> dict[str, Tensor]:
    """What stays of an adapter's tensors, by their names in the smaller model."""
    require_layers(weights, surgery.source, "Are these the edits of another model?")
    _require_form(surgery, [name.removeprefix(PREFIX) for name in weights])
    found, whole = {}, dict(surgery.source.build("meta").named_parameters())
    ranked = any(name.endswith("offset.reading") for name in weights)
    for name in weights:
        old, tensor = name.removeprefix(PREFIX), weights.finite(name)
        inside = BLOCK.fullmatch(old)
        layer = int(inside[1]) if inside else -1
        if inside and (layer not in surgery.layers or _went(surgery, layer, inside[2])):
            continue
        for dim, place in enumerate(_places(surgery, layer, inside[2] if inside else old, tensor.dim(), ranked)):
            if (keep := _indices(surgery, layer, place, whole, tensor.shape[dim])) is not None:
                tensor = tensor.index_select(dim, keep)
        new = surgery.source.prefix(surgery.layers.index(layer)) + inside[2] if inside else old
        found[new] = tensor.contiguous()
    return found


def _went(surgery: Surgery, layer: int, name: str) -> bool:
    """Whether a tensor belongs to a scan that went."""
    lora = LORA.fullmatch(name)
    weight = f"{lora[1]}.weight" if lora else name
    served = name in (*STATES, "mixer.offset.reading") or name.startswith("mixer.extra.")
    return layer in surgery.silent and (served or weight in surgery.source.scan_only)


def _places(surgery: Surgery, layer: int, name: str, dims: int, ranked: bool) -> tuple[Dim, ...]:
    """What runs along each dimension of an adapter's tensor."""
    if (lora := LORA.fullmatch(name)) is not None:
        weight = f"{lora[1]}.weight"
        return (None, (weight, 1)) if lora[2] == "A" else ((weight, 0),)
    if name in STATES:
        units = ("head", "head_channel") if "head" in surgery.source.axes(layer) else ("channel",)
        return units if ranked or name.endswith("output") else (*units, "state")
    return PLACES.get(name) or tuple((name, dim) for dim in range(dims))  # else a weight of the model itself


def _indices(surgery: Surgery, layer: int, place: Dim, whole: Mapping[str, Tensor], size: int) -> Tensor | None:
    """The indices that stay along a place; None for all of them."""
    if isinstance(place, tuple):
        name = surgery.source.prefix(layer) + place[0] if layer >= 0 else place[0]
        return surgery.indices(name, whole[name].shape).get(place[1])
    for edit in surgery.keeps:
        if edit.axis == place and edit.layer in (layer, None) and len(edit.keep) == size:
            return edit.keep.nonzero().flatten()
    return None


def _require_form(surgery: Surgery, names: Sequence[str]) -> None:
    """UnsupportedError for edits that an adapter cannot follow."""
    own = [
        name for name in names if any(part in name for part in (".offset.state", ".offset.reading", ".initial_state"))
    ]
    if own and any(name.endswith(ROTATION) for name in surgery.added):
        raise UnsupportedError(
            "The edits take the states to another basis, in which the adapter's are not.",
            hint="Tune the smaller model anew: ssmcompress tune-state.",
        )
    if any(name.endswith(f".{DELTA}") for name in names):
        raise UnsupportedError(
            "An SDT adapter names the entries of weights that it changes, and the edits move those.",
            hint="Fold it in first (ssmcompress apply ADAPTER MODEL), and apply the edits to that.",
        )
    if any(".extra." in name for name in names) and any(edit.axis == GROUP for edit in surgery.keeps):
        raise UnsupportedError(
            "The edits remove groups, each of which has states of the adapter.",
            hint="Tune the smaller model anew: ssmcompress tune-state.",
        )

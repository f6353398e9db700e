"""What a run leaves beside the weights: recipe, measured figures, manifest and card."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmcompress import kernels
from ssmcompress.arch.base import Arch
from ssmcompress.arch.mixer import mixers
from ssmcompress.arch.surgery import Surgery
from ssmcompress.calib.data import Windows
from ssmcompress.checkpoint import card, manifest
from ssmcompress.checkpoint.manifest import ShapeRecord, SizeRecord, SourceRecord, TensorRecord, TokenRecord
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.checkpoint.source import Checkpoint
from ssmcompress.checkpoint.verify import Verification
from ssmcompress.edits import Edit, Forget, Mask, Reduce, Replace, reshaping
from ssmcompress.measure.glance import CONTEXT, ON, Glance
from ssmcompress.measure.perplexity import paired_difference
from ssmcompress.prune.sizes import Weights, figures, weigh
from ssmcompress.recipe import Recipe

RECIPE, MEASURED = "recipe.yaml", "measured.json"


def write(
    folder: Path,
    verb: str,
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    source: SourceRecord,
    edits: Sequence[Edit],
    tensors: Sequence[TensorRecord],
    tokens: TokenRecord | None,
    calibration: dict[str, Any] | None,
    verification: Verification,
    before: Glance | None = None,
    after: Glance | None = None,
) -> None:
    """Writes everything but weights, edits and events into a folder that holds those; the recipe is portable."""
    (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    measures: list[card.Measure] = []
    if before is not None and after is not None:
        old, new = before.likelihood, after.likelihood
        change, low, high = paired_difference(old.documents, new.documents)
        kept = {"before": before.to_dict(), "after": after.to_dict(), "change": change, "interval": (low, high)}
        (folder / MEASURED).write_text(json.dumps(kept) + "\n", encoding="utf-8")
        told = f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"
        measures.append(card.Measure("bits per byte", old.bits_per_byte, new.bits_per_byte, told))
    sizes = shape(checkpoint.arch, checkpoint.stored, edits)
    made = manifest.write(
        folder,
        verb=verb,
        source=source,
        earlier=manifest.history(checkpoint.source),
        seed=recipe.seed,
        recipe_sha256=recipe.sha256(),
        verification=verification,
        backend=backends(checkpoint),
        calibration=calibration,
        tensors=tuple(tensors),
        shape=sizes,
        tokens=tokens,
    )
    shrunk = any(not isinstance(edit, Reduce) for edit in edits)
    summary = [_summary(edits, checkpoint.stored, sizes, tensors)] if shrunk or tokens is None else []
    card.write(
        folder,
        title=f"{checkpoint.source.label}, pruned" if shrunk else f"{checkpoint.source.label}, with fewer tokens",
        summary=" ".join([*summary, tokens.told] if tokens else summary),
        manifest=made,
        recipe=recipe.to_yaml(),
        measures=measures,
        measured_on=ON if tokens is None else f"{ON}, of which the first {CONTEXT} are read and the others scored",
        license=card.license_of(checkpoint.source),
    )


def backends(checkpoint: Checkpoint) -> dict[str, str]:
    """The implementation of every kernel that the model runs on."""
    backend: kernels.Backend = next(mixers(checkpoint.model)).backend
    return backend.names(checkpoint.model.device, checkpoint.model.dtype)


def described(windows: Windows | None) -> dict[str, Any] | None:
    """The calibration tokens for records, which hold no paths."""
    if windows is None:
        return None
    count, length = windows.ids.shape
    source = Path(windows.source).name if Path(windows.source).exists() else windows.source
    return {"source": source, "sha256": windows.sha256, "windows": count, "length": length}


def fingerprint(edits: Sequence[Edit], weights: Mapping[str, Tensor]) -> str:
    """A hash of the tensors that edits change, as they are before: the edits belong to them and to no others.

    Units run through every tensor of a block, and a new tensor is made for all, so that with them all tensors count.
    """
    found = hashlib.sha256()
    for name in sorted(weights if reshaping(edits) else {edit.tensor for edit in edits} & set(weights)):
        tensor = weights[name].contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def shape(arch: Arch, stored: Shards, edits: Sequence[Edit]) -> ShapeRecord | None:
    """What became of the sizes; None where nothing was removed or added."""
    if all(isinstance(edit, Reduce) for edit in reshaping(edits)):
        return None
    weights, surgery = weigh(stored), Surgery(arch, edits)
    before, after = (_size(each, weights) for each in (Surgery(arch, ()), surgery))
    return ShapeRecord(before=before, after=after, layers=tuple(surgery.layers))


def _size(surgery: Surgery, weights: Weights) -> SizeRecord:
    sizes = surgery.arch.sizes
    axes = {axis: tuple(each[axis] for each in sizes) for axis in sizes[0]}
    return SizeRecord(**asdict(figures(surgery, weights)), axes=axes, width=surgery.arch.width)


def _summary(
    found: Sequence[Edit], before: Mapping[str, Tensor], sizes: ShapeRecord | None, tensors: Sequence[TensorRecord]
) -> str:
    changes = {} if sizes is None else sizes.changes()
    told = ", ".join(f"{after} of {there} {axis}s" for axis, (there, after) in changes.items())
    parts = [f"Units were removed by ssmcompress: {told} are left."] if told else []
    masks = [edit for edit in found if isinstance(edit, Mask) and not isinstance(edit, Forget)]
    forgetful = [tensor for tensor in tensors if tensor.status == "memoryless"]
    if masks or not (parts or forgetful):
        parts.append(_zeroed(masks, found, before))
    if forgetful:
        share = 1 - sum(each.size * each.kept for each in forgetful) / sum(each.size for each in forgetful)
        parts.append(
            f"{share:.1%} of the entries of A_log in {len(forgetful)} layers were made memoryless by ssmcompress."
        )
    return " ".join(parts)


def _zeroed(masks: Sequence[Mask], found: Sequence[Edit], before: Mapping[str, Tensor]) -> str:
    """How much was set to zero, apart from what was zero before; new values may have filled some of that."""
    filled = {edit.tensor: edit.values for edit in found if isinstance(edit, Replace)}
    entries, new, total = 0, 0, 0
    for mask in masks:
        old = before[mask.tensor] != 0
        left = mask.keep & (filled[mask.tensor] != 0 if mask.tensor in filled else old)
        entries += left.numel()
        new += int((old & ~left).sum())
        total += left.numel() - int(left.sum())
    size = max(1, entries)
    told = f"{new / size:.1%} of the entries of {len(masks)} weight tensors were set to zero by ssmcompress"
    return f"{told}." if new == total else f"{told}; with those that were zero before, {total / size:.1%} are."

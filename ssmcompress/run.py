"""Runs a recipe from model to verified folder: load, calibrate, find edits, write, load again, measure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssmcompress import edits as editing
from ssmcompress.arch.base import mixers
from ssmcompress.arch.registry import arch_for
from ssmcompress.calib import data
from ssmcompress.checkpoint import card, manifest
from ssmcompress.checkpoint.output import output, write
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.checkpoint.source import Checkpoint, Source, load, resolve
from ssmcompress.checkpoint.verify import Verification, verify
from ssmcompress.edits import Edit, Mask
from ssmcompress.errors import InputError
from ssmcompress.evaluate.evaluation import compute_dtype
from ssmcompress.events import Emit, Finished, JsonLines, Metric, Note, Table, fan, ignore
from ssmcompress.measure import exercises, text
from ssmcompress.measure.perplexity import Perplexity, paired_difference, perplexity
from ssmcompress.plan import coverage, tell_coverage
from ssmcompress.prune.apply import find_edits
from ssmcompress.prune.targets import targets
from ssmcompress.recipe import PruneOptions, Recipe, parse, pruning

EDITS, RECIPE, MEASURED, EVENTS = "edits.safetensors", "recipe.yaml", "measured.json", "events.jsonl"
EXERCISE_TOKENS = 30  # of the shorter ones on average
MIX_SHARE = 0.25  # of the calibration windows, where memory exercises are mixed in


@dataclass(frozen=True)
class Result:
    """What a run wrote, and the figures before and after where it measured them."""

    folder: Path
    edits: tuple[Edit, ...]
    before: Perplexity | None
    after: Perplexity | None


def prune(
    model: str,
    *,
    out: str | Path,
    no_eval: bool = False,
    overwrite: bool = False,
    emit: Emit = ignore,
    **options: Unpack[PruneOptions],
) -> Result:
    """Sets weights to zero, writes the checkpoint, loads it again and measures it; the options are those of a recipe.

    Raises RecipeError or InputError for what was given, UnsupportedError for a model or module it cannot prune so.
    """
    return run(pruning(model, options), out, overwrite=overwrite, measure=not no_eval, emit=emit)


def run(
    recipe: Recipe, out: str | Path, *, overwrite: bool = False, measure: bool = True, emit: Emit = ignore
) -> Result:
    """Does what a recipe says and writes the folder `out`."""
    source = resolve(recipe.model)
    arch = arch_for(source.config())
    for step in recipe.steps:
        targets(arch, step)
    with output(out, overwrite=overwrite, recipe_hash=recipe.sha256(), source=source) as folder:
        with JsonLines(folder / EVENTS) as journal:
            tell = fan(emit, journal)
            checkpoint = _load(source, recipe, tell)
            windows = _calibration(checkpoint, recipe)
            before = _measure(checkpoint, tell, "before") if measure else None
            found, calibration = _edit(checkpoint, recipe, windows, tell), _described(windows)
            editing.save(found, folder / EDITS, {"recipe": recipe.to_yaml(), "calibration": json.dumps(calibration)})
            verification = _write(checkpoint, found, folder)
            after = _measure(_reload(folder, recipe), tell, "after") if measure else None
            _compare(before, after, tell)
        _record(folder, "prune", checkpoint, found, recipe, calibration, verification, (before, after))
    tell_coverage(coverage(checkpoint.arch, checkpoint.stored, found), emit)
    emit(Finished(str(out)))
    return Result(Path(out), tuple(found), before, after)


def apply(
    edits: str | Path,
    model: str,
    *,
    out: str | Path,
    overwrite: bool = False,
    backend: str = "auto",
    emit: Emit = ignore,
) -> Path:
    """Applies the edits of an earlier run to a model: the same bytes as that run wrote, without calibration.

    Raises InputError where the edits are damaged or do not fit the model.
    """
    loaded = editing.load(Path(edits))
    source = resolve(model)
    recipe = parse(loaded.metadata.get("recipe", ""))
    calibration = _told(loaded.metadata.get("calibration", "null"))
    with output(out, overwrite=overwrite, source=source) as folder:
        with JsonLines(folder / EVENTS) as journal:
            tell = fan(emit, journal)
            checkpoint = load(source, dtype=torch.float32, backend=backend)
            with torch.no_grad():
                editing.apply(loaded.items, dict(checkpoint.model.named_parameters()))
            editing.save(loaded.items, folder / EDITS, loaded.metadata)
            verification = _write(checkpoint, loaded.items, folder)
            tell(Note(f"Applied {len(loaded.items)} edits."))
        _record(folder, "apply", checkpoint, loaded.items, recipe, calibration, verification)
    emit(Finished(str(out)))
    return Path(out)


def _told(text: str) -> dict[str, Any] | None:
    try:
        return json.loads(text)
    except ValueError:
        raise InputError("The edits say nothing readable of their calibration.", hint="Make them again.") from None


def _load(source: Source, recipe: Recipe, tell: Emit) -> Checkpoint:
    checkpoint = load(
        source, dtype=compute_dtype(recipe.dtype, recipe.device), device=recipe.device, backend=recipe.backend
    )
    kernels = _kernels(checkpoint.model, recipe.device)
    tell(Note("Kernels: " + ", ".join(f"{kernel} {name}" for kernel, name in kernels.items()) + "."))
    return checkpoint


def _reload(folder: Path, recipe: Recipe) -> Checkpoint:
    return load(
        str(folder), dtype=compute_dtype(recipe.dtype, recipe.device), device=recipe.device, backend=recipe.backend
    )


def _edit(checkpoint: Checkpoint, recipe: Recipe, windows: data.Windows | None, tell: Emit) -> list[Edit]:
    dtypes = {name: checkpoint.stored.dtype(name) for name in checkpoint.stored}
    ids = None if windows is None else windows.ids.to(recipe.device)
    made = [find_edits(checkpoint.model, checkpoint.arch, step, ids, dtypes, tell) for step in recipe.steps]
    return editing.compose(*made)


def _described(windows: data.Windows | None) -> dict[str, Any] | None:
    """The calibration tokens for records, which hold no paths."""
    if windows is None:
        return None
    count, length = windows.ids.shape
    source = Path(windows.source).name if Path(windows.source).exists() else windows.source
    return {"source": source, "sha256": windows.sha256, "windows": count, "length": length}


def _calibration(checkpoint: Checkpoint, recipe: Recipe) -> data.Windows | None:
    """The tokens that statistics are taken from; None where no step needs them."""
    if all(step.method == "magnitude" for step in recipe.steps):
        return None
    wanted, seed = recipe.calibrate, recipe.seed
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise InputError(
            f"{checkpoint.source.name} has no tokenizer, so there is no calibration.",
            hint="Put its tokenizer files into the folder, or use --method magnitude.",
        )
    share = MIX_SHARE if wanted.mix else 0.0
    count = int(share * wanted.windows * wanted.length / EXERCISE_TOKENS) + 1
    extra = exercises.exercise_documents(tokenizer, count, seed) if share else ()
    return data.windows(
        wanted.text,
        tokenizer,
        count=wanted.windows,
        length=wanted.length,
        seed=seed,
        split=wanted.split,
        column=wanted.column,
        extra=extra,
        share=share,
    )


def _write(checkpoint: Checkpoint, found: Sequence[Edit], folder: Path) -> Verification:
    """Writes the source's own bytes with the edits on them, one tensor at a time, and proves that they load."""
    weights: Shards = checkpoint.stored
    by_name = editing.by_tensor(found)

    def value(name: str) -> Tensor:
        tensors = {name: weights[name]}
        editing.apply(by_name.get(name, ()), tensors)
        return tensors[name]

    shapes = {name: torch.empty(weights.shape(name), dtype=weights.dtype(name), device="meta") for name in weights}
    write(checkpoint, folder, shapes, value=value)
    return verify(folder, _exact(checkpoint, found))


def _exact(checkpoint: Checkpoint, found: Sequence[Edit]) -> PreTrainedModel:
    """The edited model as it must load again: the one at hand, unless it computes in less than what is stored."""
    model, stored = checkpoint.model, checkpoint.stored
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if name in stored}
    if all(torch.promote_types(stored.dtype(name), dtype) == dtype for name, dtype in dtypes.items()):
        return model
    backend = next(mixers(model)).backend.name
    exact = load(checkpoint.source, dtype=torch.float32, device=model.device, backend=backend).model
    editing.apply(found, dict(exact.named_parameters()))
    return exact


def _measure(checkpoint: Checkpoint, tell: Emit, when: str) -> Perplexity | None:
    if checkpoint.tokenizer is None:
        tell(Note("Without a tokenizer nothing is measured.", "warning"))
        return None
    found = perplexity(checkpoint.model, checkpoint.tokenizer, text.documents(), windows=1, emit=tell)
    tell(Metric(f"bits per byte {when}", found.bits_per_byte, *found.bits_per_byte_interval))
    return found


def _compare(before: Perplexity | None, after: Perplexity | None, tell: Emit) -> None:
    if before is None or after is None:
        return
    change, low, high = paired_difference(before.documents, after.documents)
    rows = (
        ("bits per byte", f"{before.bits_per_byte:.4f}", f"{after.bits_per_byte:.4f}", f"{change:+.4f}"),
        ("token perplexity", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}", ""),
    )
    tell(Table("before and after", ("", "before", "after", "change"), rows))
    tell(Note(f"Paired 95 % interval of the change in bits per byte: {low:+.4f} to {high:+.4f}."))


def _record(
    folder: Path,
    verb: str,
    checkpoint: Checkpoint,
    found: Sequence[Edit],
    recipe: Recipe,
    calibration: dict[str, Any] | None,
    verification: Verification,
    measured: tuple[Perplexity | None, Perplexity | None] = (None, None),
) -> None:
    (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    before, after = measured
    measures: list[card.Measure] = []
    if before is not None and after is not None:
        change, low, high = paired_difference(before.documents, after.documents)
        kept = {"before": before.to_dict(), "after": after.to_dict(), "change": change, "interval": (low, high)}
        (folder / MEASURED).write_text(json.dumps(kept) + "\n", encoding="utf-8")
        told = f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"
        measures.append(card.Measure("bits per byte", before.bits_per_byte, after.bits_per_byte, told))
    record = manifest.write(
        folder,
        verb=verb,
        source=checkpoint.source,
        seed=recipe.seed,
        recipe_sha256=recipe.sha256(),
        verification=verification,
        backend=_kernels(checkpoint.model, checkpoint.model.device),
        calibration=calibration,
        tensors=coverage(checkpoint.arch, checkpoint.stored, found),
    )
    card.write(
        folder,
        title=f"{checkpoint.source.label}, pruned",
        summary=_summary(found),
        manifest=record,
        recipe=recipe.to_yaml(),
        measures=measures,
        measured_on="the first 512 tokens of each of 62 Wikipedia pages (the test split of WikiText-2)",
        license=card.license_of(checkpoint.source),
    )


def _summary(found: Sequence[Edit]) -> str:
    masks = [edit for edit in found if isinstance(edit, Mask)]
    kept = sum(int(mask.keep.sum()) for mask in masks) / max(1, sum(mask.keep.numel() for mask in masks))
    return f"{1 - kept:.1%} of the entries of {len(masks)} weight tensors were set to zero by ssmcompress."


def _kernels(model: nn.Module, device: str | torch.device) -> dict[str, str]:
    mixer = next(module for module in model.modules() if hasattr(module, "backend"))
    return mixer.backend.names(device, model.dtype)  # type: ignore[operator, union-attr]

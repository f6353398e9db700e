"""Runs a recipe from model to verified folder: load, calibrate, find edits, write, load again, measure."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssmcompress import edits as editing
from ssmcompress import parallel, record
from ssmcompress.arch.mixer import mixers
from ssmcompress.arch.pages import pages
from ssmcompress.arch.surgery import Surgery
from ssmcompress.assess import assess, foresee, made_by
from ssmcompress.budget import budget, room, within
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.edited import Edited
from ssmcompress.checkpoint.fitting import CONFIG as ADAPTER
from ssmcompress.checkpoint.fold import fold
from ssmcompress.checkpoint.layout import EMBEDDING
from ssmcompress.checkpoint.output import output, write
from ssmcompress.checkpoint.reshape import reshape
from ssmcompress.checkpoint.shards import Shards, require_space
from ssmcompress.checkpoint.source import Checkpoint, Source, edited_pages, headers, load, require_embedded, resolve
from ssmcompress.checkpoint.verify import Verification, require_finite, verify
from ssmcompress.edits import Edit, Replace
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.evaluate.evaluation import compute_dtype
from ssmcompress.events import Emit, Finished, Note, ignore
from ssmcompress.journal import Journal, listener
from ssmcompress.making import calibrating, edit, edited_by
from ssmcompress.measure.glance import CONTEXT, Glance, glance, tell_change
from ssmcompress.paths import expanded
from ssmcompress.plan import coverage, forecast, tell_coverage, tell_format, tell_size, tell_tokens, tokens_record
from ssmcompress.prune.sizes import weigh
from ssmcompress.prune.targets import written_out
from ssmcompress.recipe import PruneOptions, Recipe, ReduceOptions, pruning, reducing
from ssmcompress.recipes import parse, read
from ssmcompress.steps import ReduceTokens
from ssmcompress.tune.plan import planned

EDITS = "edits.safetensors"


@dataclass(frozen=True)
class Result:
    """What a run wrote, and the figures before and after where it measured them."""

    folder: Path
    edits: tuple[Edit, ...]
    before: Glance | None
    after: Glance | None
    adapters: tuple[Path, ...] = ()  # that the recipe had learned for it


def prune(
    model: str,
    *,
    out: str | Path,
    no_eval: bool = False,
    overwrite: bool = False,
    max_memory: str | None = None,
    emit: Emit = ignore,
    **options: Unpack[PruneOptions],
) -> Result:
    """Sets weights to zero, writes the checkpoint, loads it again and measures it.

    Options, with the defaults of a recipe: method "wanda" | "magnitude" | "sparsegpt" | "sparsessm" | "sparsessm_v2";
    sparsity 0.5, or pattern "N:M"; scope "row" | "tensor"; include, exclude: module names; modules: ratios by module;
    calib, calib_split, calib_column, calib_mix "recall", windows 64, length 512: the calibration text; seed, device,
    dtype, backend. With an axis: keep or target, correct, scope "layer" | "model", any_size, stock_only.

    With `max_memory`, such as "3GB", a block of the model at a time is in memory, and calibration spills to the disk of
    `out`. Raises RecipeError or InputError for what was given, UnsupportedError for a model or module it cannot prune
    so, ResourceError where that much memory does not do.
    """
    how: dict[str, Any] = {"overwrite": overwrite, "measure": not no_eval, "max_memory": max_memory}
    return _compress(pruning(model, options), out, emit=emit, **how)


def reduce_tokens(
    model: str,
    *,
    out: str | Path,
    no_eval: bool = False,
    overwrite: bool = False,
    emit: Emit = ignore,
    **options: Unpack[ReduceOptions],
) -> Result:
    """Writes the checkpoint with a policy by which tokens of a prompt leave, loads it again and measures it.

    Options, with the defaults of a recipe: method; flops 0.2, or keep; layers, else the paper's; pruned, importance,
    merge, match_window, decay "drop" | "carry"; seed, device, dtype, backend.

    Raises RecipeError or InputError for what was given, UnsupportedError for blocks the model does not have or a share
    that cannot be saved.
    """
    return _compress(reducing(model, options), out, overwrite=overwrite, measure=not no_eval, emit=emit)


def run(
    recipe: Recipe | str,
    overrides: Sequence[str] = (),
    *,
    out: str | Path,
    no_eval: bool = False,
    overwrite: bool = False,
    max_memory: str | None = None,
    emit: Emit = ignore,
) -> Result:
    """Does what a recipe says, given as such, by its shipped name or by its path, with `key=value` overrides.

    Adapters that its last steps learn lie below `out`/adapters. Where the model that its steps make lies in `out`
    already, only what is left to be learned and measured is done, and the gate is told anew. `max_memory` is that of
    :func:`prune`. Raises RecipeError for a recipe that will not do, UnsupportedError for one that learns or evaluates
    within `max_memory`, GateError where more was lost than its gate lets through.
    """
    if isinstance(recipe, str):
        recipe = read(recipe, overrides)
    measured = recipe.eval is not None and not no_eval
    if not (measured or recipe.tuned):
        return _compress(recipe, out, overwrite=overwrite, measure=not no_eval, max_memory=max_memory, emit=emit)
    if max_memory is not None:
        raise UnsupportedError(
            f"What the recipe {'learns' if recipe.tuned else 'evaluates'} needs the whole model at once.",
            hint="Leave out --max-memory." if recipe.tuned else "Give --no-eval, and evaluate where it has room.",
        )
    if measured:
        foresee(recipe)
    folder = expanded(out)
    if not overwrite and made_by(recipe, folder):
        emit(Note(f"{out} holds this model already: only what is left of learning and measuring it is done."))
        result = Result(folder, editing.load(folder / EDITS).items, None, None)
    else:
        result = _compress(recipe, out, overwrite=overwrite, measure=not (measured or no_eval), emit=emit)
    adapters = _tune(recipe, folder, emit) if recipe.tuned else ()
    if measured:
        assess(recipe, folder, adapters, emit)
    return replace(result, adapters=adapters)


def _tune(recipe: Recipe, folder: Path, emit: Emit) -> tuple[Path, ...]:
    """The adapters that the last steps of a recipe learn, each on those before it; those that are there stay."""
    from ssmcompress.tune_state import tune_state, tuned_so  # the trainer behind it takes a second to import

    found: tuple[Path, ...] = ()
    how: dict[str, Any] = recipe.model_dump(include={"seed", "device", "dtype", "backend"})
    for number, step in enumerate(recipe.tuned, 1):
        place = folder / manifest.ADAPTERS / f"{number}-{step.method}"
        if step.objective == "distill" and step.teacher is None:
            step = step.model_copy(update={"teacher": recipe.model})
        if not tuned_so(place, step, str(folder), found, **how):
            options: Any = step.model_dump(exclude={"step"})
            tune_state(str(folder), out=place, adapter=found, overwrite=True, emit=emit, **how, **options)
        found += (place,)
    return found


def _compress(
    recipe: Recipe, out: str | Path, *, overwrite: bool, measure: bool, max_memory: str | None = None, emit: Emit
) -> Result:
    """Makes the model of a recipe and writes the folder `out`."""
    parallel.join(recipe.device)
    most = None if max_memory is None else budget(max_memory)
    shard_size = recipe.save.shard_size if most is None else within(recipe, most)
    in_pages = most is not None
    source = resolve(recipe.model)
    arch, stored = headers(source)
    expected = forecast(arch, recipe.made, weigh(stored))
    for step in recipe.tuned:
        planned(step, expected.surgery.arch)
    reduced = expected.surgery.policy is not None
    origin = manifest.describe(source)
    told, key = written_out(arch, recipe.portable(source.label)), _key(recipe, origin, measure)
    writing: dict[str, Any] = {"overwrite": overwrite, "recipe_hash": key, "source": source}
    with output(out, resumable=True, together=True, emit=emit, **writing) as folder:
        journal = Journal(folder)
        with journal.kept():
            with listener(folder, emit) as tell:
                require_space(folder, sum(tensor.nbytes for tensor in Shards(source.folder).meta().values()))
                if not expected.stock:
                    tell_format(stock=False, emit=tell)
                checkpoint = _load(source, recipe, tell, in_pages=in_pages)
                windows = calibrating(checkpoint, recipe, tell)
                if most is not None:
                    room(checkpoint, recipe, most, journal.folder)  # too little is said before anything is measured
                before = _look(checkpoint, recipe, tell, reduced=reduced) if measure else None
                place = None if most is None else room(checkpoint, recipe, most, journal.folder)
                found, edited = edit(checkpoint, recipe, windows, tell, journal, place)
                calibration = record.described(windows)
                if parallel.first():
                    editing.save(found, folder / EDITS, _said(told, checkpoint, found, calibration))
                    zeros, verification = _write(checkpoint, edited, found, folder, shard_size)
                parallel.wait()
                after = (
                    _look(_reload(folder, recipe, in_pages=in_pages), recipe, tell, reduced=reduced)
                    if before is not None
                    else None
                )
                if not parallel.first():
                    return Result(Path(out), tuple(found), before, after)
                if before is not None and after is not None:
                    tell_change(before, after, tell)
                tensors = coverage(checkpoint.arch, checkpoint.stored, found, recipe.made, zeros)
                if (sizes := record.shape(checkpoint.arch, checkpoint.stored, found)) is not None:
                    tell_size(sizes.before, sizes.after, tell)
                tokens = tokens_record(edited.arch)
                tell_tokens(tokens, tell)
                tell_coverage(tensors, tell)
            made: dict[str, Any] = {"calibration": calibration, "verification": verification}
            made |= {"source": origin, "edits": found, "tensors": tensors, "tokens": tokens}
            verb = "reduce-tokens" if all(isinstance(step, ReduceTokens) for step in recipe.made) else "prune"
            record.write(folder, verb, checkpoint, told, before=before, after=after, **made)
    emit(Finished(str(out)))
    return Result(Path(out), tuple(found), before, after)


def _key(recipe: Recipe, origin: manifest.SourceRecord, measure: bool) -> str:
    """What an unfinished folder must share with a run that goes on with it."""
    said = [recipe.making().sha256(), origin.model_dump(), manifest.versions(), measure]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def apply(
    edits: str | Path,
    model: str,
    *,
    out: str | Path,
    own_config: bool = False,
    overwrite: bool = False,
    backend: str = "auto",
    emit: Emit = ignore,
) -> Path:
    """Applies the edits of an earlier run to a model: the same bytes as that run wrote, without calibration.

    Given the folder of an adapter instead of the edits, folds it into the weights, where it can be (:func:`fold`);
    instead of the model, makes it that of the edited model (:func:`reshape`). Raises InputError where the edits are
    damaged, do not fit the model, or hold new values made for other weights.
    """
    if (expanded(edits) / ADAPTER).is_file():
        return fold(edits, model, out=out, own_config=own_config, overwrite=overwrite, backend=backend, emit=emit)
    if own_config:
        raise InputError("An own config is for an adapter.", hint="Give the folder of one in place of the edits.")
    if (expanded(model) / ADAPTER).is_file():
        return reshape(edits, model, out=out, overwrite=overwrite, emit=emit)
    loaded = editing.load(Path(edits))
    source = resolve(model)
    recipe = parse(loaded.metadata.get("recipe", ""), "the recipe in the edits")
    calibration = _told(loaded.metadata.get("calibration", "null"))
    with output(out, overwrite=overwrite, source=source) as folder:
        with listener(folder, emit) as tell:
            checkpoint = load(source, dtype=torch.float32, backend=backend)
            require_finite(checkpoint)
            _require_same(loaded, checkpoint, tell)
            edited = edited_by(checkpoint, loaded.items)
            editing.save(loaded.items, folder / EDITS, loaded.metadata)
            zeros, verification = _write(checkpoint, edited, loaded.items, folder, recipe.save.shard_size)
            tell(Note(f"Applied {len(loaded.items)} edits."))
            tensors = coverage(checkpoint.arch, checkpoint.stored, loaded.items, recipe.made, zeros)
        made: dict[str, Any] = {"calibration": calibration, "verification": verification}
        made |= {"source": manifest.describe(source), "edits": loaded.items, "tensors": tensors}
        made["tokens"] = tokens_record(edited.arch)
        record.write(folder, "apply", checkpoint, recipe, **made)
    emit(Finished(str(out)))
    return Path(out)


def _require_same(loaded: editing.Edits, checkpoint: Checkpoint, tell: Emit) -> None:
    """Masks may go to a later state of the same model; new values belong to the weights they were computed from."""
    expected = loaded.metadata.get("weights")
    if expected in (None, record.fingerprint(loaded.items, checkpoint.stored)):
        return
    if any(isinstance(edit, Replace) for edit in loaded.items):
        raise InputError(
            f"The edits hold new values made for other weights than those of {checkpoint.source.name}.",
            hint="Give the model they were made from, or prune this one anew.",
        )
    tell(Note("The weights are not those that the masks were chosen for.", "warning"))


def _said(
    recipe: Recipe, checkpoint: Checkpoint, found: Sequence[Edit], calibration: dict[str, Any] | None
) -> dict[str, str]:
    """What stands beside edits: how they were found, on what text, and for which weights."""
    return {
        "recipe": recipe.to_yaml(),
        "calibration": json.dumps(calibration),
        "weights": record.fingerprint(found, checkpoint.stored),
    }


def _told(text: str) -> dict[str, Any] | None:
    try:
        return json.loads(text)
    except ValueError:
        raise InputError("The edits say nothing readable of their calibration.", hint="Make them again.") from None


def _load(source: Source, recipe: Recipe, tell: Emit, *, in_pages: bool) -> Checkpoint:
    dtype = compute_dtype(recipe.dtype, recipe.device)
    checkpoint = load(source, dtype=dtype, device=recipe.device, backend=recipe.backend, in_pages=in_pages)
    require_finite(checkpoint)
    stored = checkpoint.stored.dtype(EMBEDDING["hf"])
    if any(step.new_values for step in recipe.made) and not _holds(checkpoint.model.dtype, stored):
        raise UnsupportedError(
            f"New values computed in {checkpoint.model.dtype} are coarser than the stored {stored}.",
            hint="Leave out --dtype."
            if recipe.dtype != "auto"
            else "Prune by wanda, or without a correction: neither sets new values.",
        )
    tell(
        Note("Kernels: " + ", ".join(f"{kernel} {name}" for kernel, name in record.backends(checkpoint).items()) + ".")
    )
    return checkpoint


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    return torch.promote_types(wide, narrow) == wide


def _reload(folder: Path, recipe: Recipe, *, in_pages: bool) -> Checkpoint:
    dtype = compute_dtype(recipe.dtype, recipe.device)
    return load(str(folder), dtype=dtype, device=recipe.device, backend=recipe.backend, in_pages=in_pages)


def _look(checkpoint: Checkpoint, recipe: Recipe, tell: Emit, *, reduced: bool) -> Glance | None:
    tokenizer = checkpoint.tokenizer
    if tokenizer is None or tokenizer.eos_token_id is None:  # what every window and probe begins with
        lacking = "a tokenizer" if tokenizer is None else "an end-of-text token in the tokenizer"
        tell(Note(f"Without {lacking} nothing is measured.", "warning"))
        return None
    require_embedded(checkpoint)
    return glance(checkpoint.model, tokenizer, recipe.seed, tell, context=CONTEXT if reduced else 0)


def _write(
    checkpoint: Checkpoint, edited: Checkpoint, found: Sequence[Edit], folder: Path, shard_size: int | str
) -> tuple[dict[str, int], Verification]:
    """Writes the source's own bytes with the edits on them, one tensor at a time, and proves that they load.

    Returns the number of zeros in every tensor as written, too.
    """
    made = Edited(checkpoint.stored, Surgery(checkpoint.arch, found), found)
    zeros: dict[str, int] = {}

    def value(name: str) -> Tensor:
        tensor = made[name]
        zeros[name] = tensor.numel() - int(tensor.count_nonzero())
        return tensor

    write(edited, folder, made.meta(), value=value, shard_size=shard_size)
    return zeros, verify(folder, _exact(checkpoint, edited, found))


def _exact(checkpoint: Checkpoint, edited: Checkpoint, found: Sequence[Edit]) -> PreTrainedModel:
    """The edited model as it must load again: the one at hand, unless it computes in less than what is stored."""
    model, stored, in_pages = checkpoint.model, checkpoint.stored, pages(checkpoint.model) is not None
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if name in stored}
    if all(_holds(dtype, stored.dtype(name)) for name, dtype in dtypes.items()):
        return edited.model
    how: dict[str, Any] = {"device": model.device, "backend": next(mixers(model)).backend.name, "in_pages": in_pages}
    wide = load(checkpoint.source, dtype=torch.float32, **how)
    return (edited_pages(wide, found) if in_pages else edited_by(wide, found)).model

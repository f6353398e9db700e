"""The verb `tune-state`: an adapter is learned from examples, written, loaded again and measured on others."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssmcompress import parallel
from ssmcompress.arch.base import DECAYS
from ssmcompress.arch.tunable import TUNABLE, install
from ssmcompress.checkpoint import adapter as adapters
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.fitting import LAYER
from ssmcompress.checkpoint.learned import Learned
from ssmcompress.checkpoint.output import TUNING, kept, output
from ssmcompress.checkpoint.source import Checkpoint, load, resolve
from ssmcompress.checkpoint.verify import agree, require_finite
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.evaluate.evaluation import compute_dtype, require_seed, required_tokenizer
from ssmcompress.events import Emit, Finished, Metric, Note, Table, ignore
from ssmcompress.journal import EVENTS, FOLDER, listener
from ssmcompress.recipe import TuneOptions, tuning
from ssmcompress.record import RECIPE
from ssmcompress.tune import examples, record, sdt
from ssmcompress.tune.examples import Example, Examples
from ssmcompress.tune.fit import RUNS, fit, require_shares, require_tracker, score
from ssmcompress.tune.judge import judged
from ssmcompress.tune.lora import wrap
from ssmcompress.tune.objective import Objective
from ssmcompress.tuning import TuneState

LORA_LR = 2e-3  # to begin with, as those of `arch.tunable`


@dataclass(frozen=True)
class Tuned:
    """The folder of the adapter, what it is, and what it changed."""

    folder: Path
    tuning: record.Tuning
    change: record.Change


@dataclass(frozen=True)
class _Splits:
    """Examples to learn from, to choose the best state by, and to report on."""

    train: Examples
    valid: Examples
    test: Examples | None

    @property
    def reported(self) -> tuple[str, Examples]:
        """What figures are of: the test examples where there are any."""
        return ("validation", self.valid) if self.test is None else ("test", self.test)

    def counts(self) -> dict[str, int]:
        """How many examples of each, and how many did not fit."""
        sides = {"train": self.train, "valid": self.valid, "test": self.test}
        found = {name: len(side) for name, side in sides.items() if side is not None}
        return found | {"skipped": sum(side.skipped for side in sides.values() if side is not None)}


def tune_state(
    model: str,
    *,
    out: str | Path,
    adapter: adapters.Given = (),
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    backend: str = "auto",
    tracker: str | None = None,
    overwrite: bool = False,
    emit: Emit = ignore,
    **options: Unpack[TuneOptions],
) -> Tuned:
    """Learns an adapter from examples, keeps what is best on validation examples, and measures it on the test ones.

    Options, with the defaults of the schema: method "state-offset"; form, rank; states (additional-scan); tokens
    (prefix, prompt); sdt_channels, sdt_states, warm_up; alpha, targets (lora); data, the shipped calibration text,
    valid, test, split, prompt, completion, length 512; steps 300, lr, batch_size 8, accumulate 1, every; objective
    "ce" | "distill" with teacher and hidden; checkpointing.

    With `adapter`, one or several, what is learned belongs on top of it. A `tracker` of experiments is one that the
    Trainer knows. Asked for again, an interrupted run goes on from its last look at the validation examples. Of several
    processes each reads its share of every batch. Raises RecipeError or InputError for what was given,
    UnsupportedError for a model that has nothing to learn so, BackendError for a tracker that is not installed.
    """
    require_seed(seed)
    step = tuning(options)
    require_tracker(tracker)
    require_shares(step)
    parallel.join(device)
    source = resolve(model)
    below = adapters.find_all(adapter)
    base = manifest.describe(source, below)
    how = {"seed": seed, "device": device, "dtype": dtype, "backend": backend}
    label = " + ".join((source.label, *(each.label for each in below)))
    told = record.said(step.portable(), model=label, **how)
    key = _key(told, base, step)
    writing: dict[str, Any] = {"overwrite": overwrite, "recipe_hash": key, "source": source}
    with output(out, marked=TUNING, resumable=True, together=True, emit=emit, **writing) as folder:
        store = folder / FOLDER
        store.mkdir(exist_ok=True)
        with kept(store, EVENTS), listener(folder, emit) as tell:
            loading: dict[str, Any] = {"dtype": compute_dtype(dtype, device), "device": device, "backend": backend}
            checkpoint = load(source, adapter=[each.folder for each in below], **loading)
            require_finite(checkpoint)
            splits = _read(required_tokenizer(checkpoint), step, seed, tell)
            teacher = _teacher(checkpoint, step, loading)
            split, reported = splits.reported
            before = _score(checkpoint, reported.items, step, seed)
            rate = step.lr or (TUNABLE[step.method].usual if step.method in TUNABLE else LORA_LR)
            fitting: dict[str, Any] = {"lr": rate, "seed": seed, "tracker": tracker, "emit": tell}
            fitting |= {"train": splits.train.items, "valid": splits.valid.items}
            choice: sdt.Choice = {}
            if step.method == "sdt":
                again = partial(load, source, adapter=[each.folder for each in below], **loading)
                choice = _chosen(again, step, teacher, store, fitting)
            torch.manual_seed(seed)
            learned = _learned(checkpoint, step, choice)
            _tell_learned(checkpoint, step, learned.pack(), tell)
            objective = Objective(checkpoint.model, teacher, step.hidden or 0.0)
            course = fit(objective, learned.tensors, step=step, store=store, **fitting)
            stored = learned.pack()
            if parallel.first():
                if (store / RUNS).is_dir():
                    (store / RUNS).rename(folder / RUNS)
                adapters.save(folder, learned.config | {"base_model_name_or_path": label}, stored)
            parallel.wait()
            reread = load(source, adapter=[*(each.folder for each in below), folder], **loading)
            difference = agree(reread.model, checkpoint.model)
            change = record.Change(
                split, before, _score(reread, reported.items, step, seed), judged(reread, step, tell)
            )
            made = record.Tuning(
                base=base,
                method=step.method,
                trainable=_count(stored),
                parameters=sum(tensor.numel() for tensor in checkpoint.stored.meta().values()),
                layers=_layers(stored),
                tensors={name: tuple(each.shape) for name, each in sorted(stored.items())},
                examples=splits.counts(),
                recipe_sha256=_sha256(told),
                seed=seed,
                difference=difference,
                best_step=course.best,
                versions=manifest.versions(),
            )
            _tell_change(change, course.best, tell)
        if parallel.first():
            recipe = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
            (folder / RECIPE).write_text(recipe, encoding="utf-8")
            record.write(folder, made, course, change, recipe)
    emit(Finished(str(out)))
    return Tuned(Path(out), made, change)


def tuned_so(folder: Path, step: TuneState, model: str, adapter: Sequence[str | Path] = (), **how: Any) -> bool:
    """Whether a folder holds the adapter that `tune_state` would learn: by the same step, for the same weights."""
    made = record.read(folder)
    source, below = resolve(model), adapters.find_all(adapter)
    label = " + ".join((source.label, *(each.label for each in below)))
    told = record.said(step.portable(), model=label, **how)
    return made is not None and (made.recipe_sha256, made.base) == (_sha256(told), manifest.describe(source, below))


def _sha256(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _key(told: dict[str, Any], base: manifest.SourceRecord, step: TuneState) -> str:
    """What an unfinished folder must share with a run that goes on with it: the data as well."""
    files = [
        manifest.sha256(Path(each)) for each in (step.data, step.valid, step.test) if each and Path(each).is_file()
    ]
    said = [told, base.model_dump(), manifest.versions(), files]
    return _sha256(said)


def _read(tokenizer: Any, step: TuneState, seed: int, tell: Emit) -> _Splits:
    """The examples of every split; a warning where some do not fit, or stand in two of them."""
    data = examples.read(step.data, tokenizer, step)
    test = examples.read(step.test, tokenizer, step, step.limit) if step.test else None
    if step.valid:
        splits = _Splits(data, examples.drawn(examples.read(step.valid, tokenizer, step), seed), test)
    else:
        splits = _Splits(*examples.held_out(data, seed), test)
    counts = splits.counts()
    sizes = ", ".join(f"{count:,} {name}" for name, count in counts.items() if name != "skipped")
    padded = examples.padding(splits.train, step, seed)
    tell(Note(f"Examples: {sizes}; {padded:.1%} of what is read to learn is padding."))
    if counts["skipped"]:
        tell(Note(f"{counts['skipped']:,} examples are longer than {step.length} tokens and are left out.", "warning"))
    for name, other in (("validation", splits.valid), ("test", test)):
        if other is not None and (count := examples.shared(splits.train, other)):
            tell(Note(f"{count:,} {name} examples are among those that are learned from.", "warning"))
    return splits


@dataclass(frozen=True)
class _Learnable:
    """What is learned, by its name in the model, in float32; what the adapter's config says, and what it stores."""

    tensors: dict[str, nn.Parameter]
    config: dict[str, Any]
    pack: Callable[[], Mapping[str, Tensor]]


def _learned(checkpoint: Checkpoint, step: TuneState, choice: sdt.Choice) -> _Learnable:
    """What a method learns: SDT of what it has chosen."""
    if step.method == "sdt":
        found, pack = sdt.install(checkpoint.model, checkpoint.arch, step, choice)
        return _Learnable(found, sdt.config(step, choice), pack)
    if step.method == "lora":
        found, config = wrap(checkpoint.model, checkpoint.arch, step)
        return _Learnable(found, config, lambda: found)
    form = step.form or "full"
    found = install(checkpoint.model, checkpoint.arch, step.method, form, step.size)
    _require_fine(step, found, checkpoint)
    if step.method == "full":
        _hold_zeros(found)
    return _Learnable(found, Learned.of(step.method, form, step.size), lambda: found)


def _chosen(
    again: Callable[[], Checkpoint], step: TuneState, teacher: nn.Module | None, store: Path, fitting: dict[str, Any]
) -> sdt.Choice:
    """The entries that SDT learns, by a first run; a run that goes on has chosen already."""
    kept_at = store / "choice.safetensors"
    if not kept_at.exists():
        checkpoint = again()
        torch.manual_seed(fitting["seed"])
        found = sdt.warm_up(checkpoint.model, checkpoint.arch, step)
        _require_fine(step, found, checkpoint)
        before = {name: each.detach().clone() for name, each in found.items() if name.endswith(DECAYS)}
        first = step.model_copy(update={"steps": step.warm_up or step.steps})
        place = store / "warm-up"
        place.mkdir(exist_ok=True)
        fit(Objective(checkpoint.model, teacher, step.hidden or 0.0), found, step=first, store=place, **fitting)
        choice = sdt.choose(before, {name: found[name].detach() for name in before}, step)
        if parallel.first():
            save_file(choice, kept_at.with_suffix(".partial"))
            kept_at.with_suffix(".partial").rename(kept_at)
        parallel.wait()
    return load_file(kept_at)


def _require_fine(step: TuneState, found: Mapping[str, nn.Parameter], checkpoint: Checkpoint) -> None:
    """UnsupportedError where weights would be learned in less than float32."""
    if any(parameter.dtype != torch.float32 for parameter in found.values()):
        raise UnsupportedError(
            f"{step.method} learns weights of the model, here in {checkpoint.model.dtype}: too coarse.",
            hint="Give --dtype float32.",
        )


def _hold_zeros(learned: dict[str, nn.Parameter]) -> None:
    """Lets pruned entries of matrices stay zero."""
    for parameter in learned.values():
        if parameter.dim() > 1 and not bool(parameter.all()):
            parameter.register_hook(lambda gradient, there=parameter.detach() != 0: gradient * there)


def _teacher(checkpoint: Checkpoint, step: TuneState, loading: dict[str, Any]) -> nn.Module | None:
    """The dense model whose distribution is learned: the one named, else the one that this was made from."""
    if step.objective != "distill":
        return None
    earlier = manifest.history(checkpoint.source)
    name = step.teacher or (earlier[0].source.name if earlier else checkpoint.source.name)
    try:
        found = load(name, **loading)
    except InputError as error:
        raise InputError(f"The teacher cannot be loaded: {error.message}", hint="Name it: --teacher MODEL.") from None
    ours, theirs = (each.model.config.vocab_size for each in (checkpoint, found))
    if ours != theirs:
        raise InputError(
            f"The teacher {name} knows {theirs} tokens and the model {ours}.", hint="A teacher shares the tokenizer."
        )
    if step.hidden and found.arch.width != checkpoint.arch.width:
        raise UnsupportedError(
            f"The teacher has {found.arch.width} residual dimensions and the model {checkpoint.arch.width}: their"
            " hidden states have no distance.",
            hint="Leave out --hidden.",
        )
    return found.model.requires_grad_(False)


def _score(checkpoint: Checkpoint, items: Sequence[Example], step: TuneState, seed: int) -> record.Scored:
    return record.Scored.of(items, score(checkpoint.model, items, step.batch_size), step.length, seed)


def _count(stored: Mapping[str, Tensor]) -> int:
    return sum(each.numel() for each in stored.values())


def _layers(learned: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tuple(sorted({int(found[1]) for found in map(LAYER.search, learned) if found}))


def _tell_learned(checkpoint: Checkpoint, step: TuneState, learned: Mapping[str, Tensor], tell: Emit) -> None:
    count, whole = _count(learned), checkpoint.stored.meta().values()
    share = count / sum(tensor.numel() for tensor in whole)
    layers = len(_layers(learned))
    where = f"in {layers} of {checkpoint.arch.layers} layers" if layers else "before the first layer"
    tell(Note(f"{step.method}: {count:,} parameters, {share:.3%}, {where}."))


def _tell_change(change: record.Change, best: int, tell: Emit) -> None:
    title = f"{len(change.before.right):,} {change.split} examples, step {best}"
    tell(Table(title, ("", "before", "after", "change"), change.rows()))
    for figure in change.figures:
        tell(Metric(figure.name, figure.value, figure.low, figure.high))
    if change.difference[1] > 0:
        tell(Note("The adapter makes these examples less likely than they were: a lower --lr may help.", "warning"))

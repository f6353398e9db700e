"""What a run would change, before it costs anything: shapes are read from the files' headers, no tensor is."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Unpack

import torch

from ssmcompress import edits as editing
from ssmcompress.arch.base import Arch
from ssmcompress.arch.surgery import Surgery
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.card import MASKS
from ssmcompress.checkpoint.card import coverage as coverage_rows
from ssmcompress.checkpoint.manifest import SizeRecord, TensorRecord
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.checkpoint.source import Source, headers, resolve
from ssmcompress.edits import Edit, Mask
from ssmcompress.errors import InputError, RecipeError, ResourceError, UnsupportedError
from ssmcompress.events import Emit, Note, Table, ignore
from ssmcompress.prune.apply import BLOCK
from ssmcompress.prune.sizes import Figures, Size, Weights, alike, figures, first, size, weigh
from ssmcompress.prune.targets import Target, formless, targets
from ssmcompress.recipe import PruneOptions, Recipe, pruning
from ssmcompress.recipes import read, shipped
from ssmcompress.steps import Cut, Step


@dataclass(frozen=True)
class Plan:
    """The size of the model before and after, entries that would be zero at least, and what becomes of each tensor."""

    before: Figures
    after: Figures
    sizes: tuple[Size, ...]  # of each step that removes units
    zeros_before: int | None  # None where nothing has counted them
    zeros: int
    tensors: tuple[TensorRecord, ...]
    stock: bool = True  # whether a config of transformers says the sizes


def plan(
    model: str | Recipe, overrides: Sequence[str] = (), *, emit: Emit = ignore, **options: Unpack[PruneOptions]
) -> Plan:
    """Says what `prune` of a model with these options, or `run` of a recipe with these overrides, would do.

    It refuses what they would refuse, and reads no weight. Where steps meet in one tensor the smallest share is told.
    """
    recipe = _recipe(model, overrides, options)
    source = _resolve(recipe.model)
    arch, stored = headers(source)
    weights = weigh(stored)
    expected = forecast(arch, recipe.steps, weights)
    counted = manifest.zeros(source.folder)
    least = expected.zeros(weights.shapes, counted or {})
    found = Plan(
        before=figures(Surgery(arch, ()), weights),
        after=figures(expected.surgery, weights),
        sizes=expected.sizes,
        stock=expected.surgery.arch.stock,
        zeros_before=None if counted is None else sum(counted.values()),
        zeros=sum(least.values()),
        tensors=records_of(
            expected.surgery, weights.shapes, expected.kept, formless(recipe.steps), None if counted is None else least
        ),
    )
    _tell(found, emit)
    if not expected.exact:
        emit(Note("The blocks differ in size: it depends on those that are chosen how much is left.", "warning"))
    return found


@dataclass(frozen=True)
class Forecast:
    """What steps would leave: which shapes, and the share of each tensor's entries that is not set to zero."""

    surgery: Surgery
    kept: dict[str, float]
    sizes: tuple[Size, ...]
    anew: frozenset[str] = frozenset()  # tensors whose new values fill zeros that were there
    exact: bool = True  # whether all choices of units leave the same sizes: not so of blocks that differ

    def zeros(self, shapes: Mapping[str, torch.Size], before: Mapping[str, int]) -> dict[str, int]:
        """The zeros of every tensor, by new name, at least: those there, which masks may choose again, or theirs."""
        least = {}
        for name, old in self.surgery.names(shapes).items():
            shape = self.surgery.shape(old, shapes[old])
            there = 0 if old in self.anew or shape != shapes[old] else before.get(old, 0)
            least[name] = max(there, round((1 - self.kept.get(old, 1.0)) * shape.numel()))
        return least


def forecast(arch: Arch, steps: Sequence[Step], weights: Weights) -> Forecast:
    """Goes through the steps without a model; it refuses what they would refuse.

    Which units go is not known yet: the shapes are those that any would leave.
    """
    units: list[Edit] = []
    kept: dict[str, float] = {}
    sizes: list[Size] = []
    anew: set[str] = set()
    exact = True
    for step in steps:
        surgery = Surgery(arch, units)
        left, names = weights.after(surgery), surgery.names(weights.shapes)
        if isinstance(step, Cut):
            sizes.append(size(surgery.arch, step, left))
            exact &= alike(surgery.arch, step.axis)
            cut = first(surgery.arch, step.axis, sizes[-1].after)
            units = editing.compose(units, [surgery.lift(edit, weights.shapes) for edit in cut])
            continue
        for module, target in targets(surgery.arch, step).items():
            for name in names_of(surgery.arch, module):
                share = expected_kept(left.shapes[name], module, target, step.method)
                kept[names[name]] = min(share, kept.get(names[name], 1.0))
                anew |= {names[name]} if step.method == "sparsegpt" and share < 1 else set()
    surgery = Surgery(arch, units)
    if any(isinstance(step, Cut) and step.stock_only for step in steps) and not surgery.arch.stock:
        hint = "Without --stock-only the output brings a modeling file that says them."
        raise UnsupportedError("No config of transformers says the sizes that would be left.", hint=hint)
    return Forecast(surgery, kept, tuple(sizes), frozenset(anew), exact)


def _recipe(model: str | Recipe, overrides: Sequence[str], options: PruneOptions) -> Recipe:
    if isinstance(model, Recipe):
        return model
    if not (model in shipped() or model.endswith((".yaml", ".yml"))):
        if overrides:
            raise RecipeError(
                f"{model} is no recipe, and only a recipe has overrides.", hint="Use options: --sparsity."
            )
        return pruning(model, options)
    if pruning(model, options) != pruning(model, {}):
        raise RecipeError("A recipe says by itself what is pruned.", hint="Change it by overrides: sparsity=0.6")
    return read(model, overrides)


def _resolve(model: str) -> Source:
    """The source of a model; where there is none, a recipe whose name is nearly the same may be meant."""
    try:
        return resolve(model)
    except (InputError, ResourceError) as error:
        near = get_close_matches(model, shipped(), n=1, cutoff=0.8)
        if not near:
            raise
        raise type(error)(error.message, hint=f"Did you mean the recipe {near[0]!r}?") from error


def names_of(arch: Arch, module: str) -> list[str]:
    """The tensor names of one kind of module."""
    if module in arch.outer:
        return [arch.outer_weight(module)]
    return [arch.weight(layer, module) for layer in range(arch.layers) if module in arch.modules(layer)]


def expected_kept(shape: torch.Size, module: str, target: Target, method: str) -> float:
    """The share of a weight that its target leaves, exactly."""
    rows = shape.numel() // shape[0] if module == "conv1d" else shape[-1]
    if target.pattern is not None:
        n, m = target.pattern
        rest = rows % m
        return (rows // m * n + -(-rest * n // m)) / rows
    if method == "sparsegpt":
        blocks = (min(BLOCK, rows - start) for start in range(0, rows, BLOCK))
        return 1 - sum(int(shape[0] * width * target.sparsity) for width in blocks) / shape.numel()
    size = shape.numel() if target.scope == "tensor" else rows
    return 1 - int(size * target.sparsity) / size


def coverage(
    arch: Arch, weights: Shards, edits: Sequence[Edit], steps: Sequence[Step], zeros: Mapping[str, int]
) -> tuple[TensorRecord, ...]:
    """What became of every tensor, from the edits that steps made and the zeros that were counted."""
    surgery = Surgery(arch, edits)
    masks = [edit for edit in edits if isinstance(edit, Mask)]
    kept = {edit.tensor: float(surgery.cut(edit.tensor, edit.keep).double().mean()) for edit in masks}
    return records_of(surgery, {name: weights.shape(name) for name in weights}, kept, formless(steps), zeros)


def records_of(
    surgery: Surgery,
    shapes: Mapping[str, torch.Size],
    kept: Mapping[str, float],
    unsupported: Container[str] = (),
    zeros: Mapping[str, int] | None = None,
) -> tuple[TensorRecord, ...]:
    """A record for every tensor that stays: pruned, cut, kept on purpose, unsupported by the method, or not chosen.

    `kept` speaks of the source's tensors, `zeros` of those that are left, under their new names.
    """
    records = []
    for name, old in surgery.names(shapes).items():
        shape = surgery.shape(old, shapes[old])
        reason = "" if shape == shapes[old] else f"cut from {_times(shapes[old])} to {_times(shape)}"
        fields: dict[str, Any] = {"name": name, "shape": tuple(shape), "zeros": (zeros or {}).get(name)}
        if old in kept:
            records.append(TensorRecord(**fields, status="pruned", kept=kept[old], reason=reason))
        elif reason:
            records.append(TensorRecord(**fields, status="cut", reason=reason.removeprefix("cut ")))
        elif surgery.source.kept_on_purpose(name):
            records.append(TensorRecord(**fields, status="kept", reason="on purpose"))
        elif any(part in unsupported for part in name.split(".")):
            records.append(TensorRecord(**fields, status="unsupported", reason="the method has no form for it"))
        else:
            records.append(TensorRecord(**fields, status="kept", reason="not chosen"))
    return tuple(records)


def _times(shape: torch.Size) -> str:
    return " × ".join(map(str, shape))


def tell_coverage(records: Sequence[TensorRecord], emit: Emit, share: str = "not zero") -> None:
    """The coverage table: every kind of tensor once."""
    emit(Table("coverage", ("weight", "tensors", "what happened", share), tuple(coverage_rows(records))))
    if any(record.status == "pruned" for record in records):
        emit(Note(MASKS))


def tell_size(before: Figures | SizeRecord, after: Figures | SizeRecord, emit: Emit) -> None:
    """How large the model was, and is."""
    emit(Table("size", ("", "before", "after"), size_rows(before, after)))


def tell_format(stock: bool, emit: Emit) -> None:
    """What the output loads in, and what that asks of whoever loads it."""
    if stock:
        emit(Note("The output loads in transformers and ssmcompress."))
    else:
        told = "No config of transformers says the sizes that are left: the output brings a modeling file of its own,"
        emit(Note(f"{told} and loads in ssmcompress, and in transformers with trust_remote_code=True.", "warning"))


def size_rows(before: Figures | SizeRecord, after: Figures | SizeRecord) -> tuple[tuple[str, str, str], ...]:
    """Parameters and bytes, with the share that is left where it is not all."""
    names = {"params": "parameters", "weight_bytes": "weight bytes", "state_bytes": "state bytes a sequence"}
    rows = []
    for key, name in names.items():
        old, new = getattr(before, key), getattr(after, key)
        rows.append((name, f"{old:,}", f"{new:,}" + (f" ({new / old:.1%})" if new != old else "")))
    return tuple(rows)


def _tell(found: Plan, emit: Emit) -> None:
    for change in found.sizes:
        emit(Note(change.note or f"{change.after} of {change.before} {change.axis}s stay."))
    params, *others = size_rows(found.before, found.after)
    before = "not counted" if found.zeros_before is None else f"{found.zeros_before:,}"
    after = f"at least {found.zeros:,}" if found.zeros_before else f"{found.zeros:,}"
    rows = (params, ("of them zero", before, after), *others)
    emit(Table("plan", ("", "before", "after"), rows))
    tell_format(found.stock, emit)
    tell_coverage(found.tensors, emit, "not zero, at most" if found.zeros_before else "not zero")

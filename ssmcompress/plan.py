"""What a run would change, before it costs anything: shapes are read from the files' headers, no tensor is."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Unpack

import torch

from ssmcompress.arch.base import Arch
from ssmcompress.arch.registry import arch_for
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.card import MASKS
from ssmcompress.checkpoint.card import coverage as coverage_rows
from ssmcompress.checkpoint.manifest import TensorRecord
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.checkpoint.source import Source, resolve
from ssmcompress.edits import Edit, Mask
from ssmcompress.errors import InputError, RecipeError, ResourceError
from ssmcompress.events import Emit, Note, Table, ignore
from ssmcompress.prune.apply import BLOCK
from ssmcompress.prune.targets import Target, formless, targets
from ssmcompress.recipe import Prune, PruneOptions, Recipe, pruning
from ssmcompress.recipes import read, shipped


@dataclass(frozen=True)
class Plan:
    """Entries and bytes of the weights, entries that would be zero at least, and what becomes of each tensor."""

    params: int
    weight_bytes: int
    state_bytes: int
    zeros_before: int | None  # None where nothing has counted them
    zeros: int
    tensors: tuple[TensorRecord, ...]
    loads_in: tuple[str, ...] = ("transformers", "ssmcompress")


def plan(
    model: str | Recipe, overrides: Sequence[str] = (), *, emit: Emit = ignore, **options: Unpack[PruneOptions]
) -> Plan:
    """Says what `prune` of a model with these options, or `run` of a recipe with these overrides, would do.

    It refuses what they would refuse, and reads no weight. Where steps meet in one tensor the smallest share is told.
    """
    recipe = _recipe(model, overrides, options)
    source = _resolve(recipe.model)
    arch, weights = arch_for(source.config()), Shards(source.folder)
    shapes = {name: weights.shape(name) for name in weights}
    expected: dict[str, float] = {}
    anew: set[str] = set()  # new values fill zeros that were there
    for step in recipe.steps:
        for module, target in targets(arch, step).items():
            for name in names(arch, module):
                kept = expected_kept(shapes[name], module, target, step.method)
                expected[name] = min(kept, expected.get(name, 1.0))
                anew |= {name} if step.method == "sparsegpt" and kept < 1 else set()
    counted = manifest.zeros(source.folder)
    least = at_least(shapes, expected, {name: count for name, count in (counted or {}).items() if name not in anew})
    records = records_of(arch, shapes, expected, formless(recipe.steps), counted and least)
    found = Plan(
        params=sum(shape.numel() for shape in shapes.values()),
        weight_bytes=sum(shapes[name].numel() * weights.dtype(name).itemsize for name in weights),
        state_bytes=arch.state_bytes(),
        zeros_before=None if counted is None else sum(counted.values()),
        zeros=sum(least.values()),
        tensors=tuple(records),
    )
    _tell(found, emit)
    return found


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


def names(arch: Arch, module: str) -> list[str]:
    """The tensor names of one kind of module."""
    if module in arch.outer:
        return [arch.outer_weight(module)]
    return [arch.weight(layer, module) for layer in range(arch.layers)]


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


def at_least(shapes: Mapping[str, torch.Size], kept: Mapping[str, float], before: Mapping[str, int]) -> dict[str, int]:
    """The zeros that every tensor will hold at least: those there are, which masks may choose again, or the masks'."""
    made = {name: round((1 - kept.get(name, 1.0)) * shape.numel()) for name, shape in shapes.items()}
    return {name: max(count, before.get(name, 0)) for name, count in made.items()}


def coverage(
    arch: Arch, weights: Shards, edits: Iterable[Edit], steps: Sequence[Prune], zeros: Mapping[str, int]
) -> tuple[TensorRecord, ...]:
    """What became of every tensor, from the edits that steps made and the zeros that were counted."""
    kept = {edit.tensor: float(edit.keep.double().mean()) for edit in edits if isinstance(edit, Mask)}
    return records_of(arch, {name: weights.shape(name) for name in weights}, kept, formless(steps), zeros)


def records_of(
    arch: Arch,
    shapes: Mapping[str, torch.Size],
    kept: Mapping[str, float],
    unsupported: Container[str] = (),
    zeros: Mapping[str, int] | None = None,
) -> tuple[TensorRecord, ...]:
    """A record for every tensor: pruned, kept on purpose, unsupported by the method, or not chosen."""
    records = []
    for name, shape in shapes.items():
        fields: dict[str, Any] = {"name": name, "shape": tuple(shape), "zeros": (zeros or {}).get(name)}
        if name in kept:
            records.append(TensorRecord(**fields, status="pruned", kept=kept[name]))
        elif arch.kept_on_purpose(name):
            records.append(TensorRecord(**fields, status="kept", reason="on purpose"))
        elif any(part in unsupported for part in name.split(".")):
            records.append(TensorRecord(**fields, status="unsupported", reason="the method has no form for it"))
        else:
            records.append(TensorRecord(**fields, status="kept", reason="not chosen"))
    return tuple(records)


def tell_coverage(records: Sequence[TensorRecord], emit: Emit, share: str = "not zero") -> None:
    """The coverage table: every kind of tensor once."""
    emit(Table("coverage", ("weight", "tensors", "what happened", share), tuple(coverage_rows(records))))
    if any(record.status == "pruned" for record in records):
        emit(Note(MASKS))


def _tell(found: Plan, emit: Emit) -> None:
    rows = (
        ("parameters", f"{found.params:,}", f"{found.params:,}"),
        (
            "of them zero",
            "not counted" if found.zeros_before is None else f"{found.zeros_before:,}",
            f"at least {found.zeros:,}" if found.zeros_before else f"{found.zeros:,}",
        ),
        ("weight bytes", f"{found.weight_bytes:,}", f"{found.weight_bytes:,}"),
        ("state bytes a sequence", f"{found.state_bytes:,}", f"{found.state_bytes:,}"),
    )
    emit(Table("plan", ("", "before", "after"), rows))
    emit(Note(f"The output loads in {' and '.join(found.loads_in)}."))
    tell_coverage(found.tensors, emit, "not zero, at most" if found.zeros_before else "not zero")

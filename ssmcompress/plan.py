"""What a run would change, before it costs anything: shapes are read from the files' headers, no tensor is."""

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Unpack

import torch

from ssmcompress import edits as editing
from ssmcompress.arch.base import DECAYS, Arch
from ssmcompress.arch.surgery import Surgery
from ssmcompress.assess import foresee
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.card import IGNORED, MASKS, MEMORYLESS
from ssmcompress.checkpoint.card import coverage as coverage_rows
from ssmcompress.checkpoint.manifest import SizeRecord, TensorRecord, TokenRecord
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.checkpoint.source import Source, headers, resolve
from ssmcompress.edits import Edit, Forget, Mask, Reduce
from ssmcompress.errors import InputError, RecipeError, ResourceError, UnsupportedError
from ssmcompress.events import Emit, Note, Table, ignore
from ssmcompress.prune.apply import BLOCK
from ssmcompress.prune.shares import sized
from ssmcompress.prune.sizes import Figures, Size, Weights, figures, outline, renewed, unlike, weigh
from ssmcompress.prune.targets import Target, formless, targets
from ssmcompress.recipe import PruneOptions, Recipe, pruning
from ssmcompress.recipes import read, shipped
from ssmcompress.steps import SSM, Cut, ReduceTokens, Step
from ssmcompress.tokens.schedule import LONG, lengths, resolved, saved
from ssmcompress.tune.plan import planned


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
    tokens: TokenRecord | None = None  # how tokens leave, where they do


def plan(
    model: str | Recipe, overrides: Sequence[str] = (), *, emit: Emit = ignore, **options: Unpack[PruneOptions]
) -> Plan:
    """Says what `prune` of a model with these options, or `run` of a recipe with these overrides, would do.

    It refuses what they would refuse, and reads no weight. Where steps meet in one tensor the smallest share is told.
    """
    recipe = _recipe(model, overrides, options)
    source = _resolve(recipe.model)
    if recipe.eval is not None:
        foresee(recipe)
    arch, stored = headers(source)
    weights = weigh(stored)
    expected = forecast(arch, recipe.made, weights)
    counted = manifest.zeros(source.folder)
    least = expected.zeros(weights.shapes, counted or {})
    found = Plan(
        before=figures(Surgery(arch, ()), weights),
        after=figures(expected.surgery, weights),
        sizes=expected.sizes,
        stock=expected.stock,
        tokens=tokens_record(expected.surgery.arch),
        zeros_before=None if counted is None else sum(counted.values()),
        zeros=sum(least.values()),
        tensors=records_of(
            expected.surgery,
            weights.shapes,
            expected.kept,
            formless(arch, recipe.made),
            None if counted is None else least,
            expected.memory,
            expected.apart,
        ),
    )
    _tell(found, expected.exact, emit)
    for step in recipe.tuned:
        emit(Note(f"Then {step.method} is learned: {planned(step, expected.surgery.arch):,} parameters."))
    return found


@dataclass(frozen=True)
class Forecast:
    """What steps would leave: which shapes, and the share of each tensor's entries that is not set to zero.

    `memory` is the share of the entries of each A_log that is not made memoryless. Layers will differ on the axes
    `apart`, nothing says yet how: there the shapes are as even as can be, or those of the first layers. `alike` says
    whether a unit weighs the same in every layer of the source.
    """

    surgery: Surgery
    kept: dict[str, float]
    sizes: tuple[Size, ...]
    anew: frozenset[str] = frozenset()  # tensors whose new values fill zeros that were there
    memory: dict[str, float] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()
    alike: bool = True

    @property
    def stock(self) -> bool:
        """Whether a config of transformers says the sizes."""
        return self.surgery.arch.stock and not self.apart

    @property
    def exact(self) -> bool:
        """Whether any choice of units leaves as much: a single step that shares out units counts them all."""
        return not self.apart or (self.alike and len(self.sizes) == 1 and self.sizes[0].open)

    def zeros(self, shapes: Mapping[str, torch.Size], before: Mapping[str, int]) -> dict[str, int]:
        """The zeros of every tensor, by new name, at least: those there, which masks may choose again, or theirs."""
        least = {}
        whole = self.surgery.shapes(shapes)
        for name, old in self.surgery.names(shapes).items():
            shape = self.surgery.shape(old, whole[old])
            there = 0 if old in self.anew or shape != whole[old] else before.get(old, 0)
            least[name] = max(there, round((1 - self.kept.get(old, 1.0)) * shape.numel()))
        return least


def forecast(arch: Arch, steps: Sequence[Step], weights: Weights) -> Forecast:
    """Goes through the steps without a model; it refuses what they would refuse.

    Which units go is not known yet: the shapes are those that any would leave.
    """
    units: list[Edit] = []
    kept: dict[str, float] = {}
    memory: dict[str, float] = {}
    sizes: list[Size] = []
    anew, apart = set[str](), set[str]()
    for step in steps:
        surgery = Surgery(arch, units)
        if isinstance(step, ReduceTokens):
            units = editing.compose(units, [surgery.lift(Reduce(resolved(step, surgery.arch)), weights.shapes)])
            continue
        left, names = weights.after(surgery), surgery.names(weights.shapes)
        if isinstance(step, Cut):
            sizes.append(change := sized(surgery.arch, step, left, apart))
            if change.after == change.before:
                continue
            apart |= {step.axis} if change.open else unlike(surgery.arch, step.axis)
            cut = outline(surgery.arch, step, change.layers or change.after, left)
            units = editing.compose(units, [surgery.lift(edit, weights.shapes) for edit in cut])
            for name in renewed(surgery.arch, step):
                kept.pop(names[name], None)
                anew.add(names[name])
            continue
        for module, target in targets(surgery.arch, step).items():
            told = memory if module == DECAYS else kept
            for name in names_of(surgery.arch, module):
                share = expected_kept(left.shapes[name], module, target, step.method)
                told[names[name]] = min(share, told.get(names[name], 1.0))
                filled = step.method == "sparsegpt" or module == DECAYS
                anew |= {names[name]} if filled and share < 1 else set()
    alike = all(sizes == arch.sizes[0] for sizes in arch.sizes)
    found = Forecast(Surgery(arch, units), kept, tuple(sizes), frozenset(anew), memory, frozenset(apart), alike)
    if any(isinstance(step, Cut) and step.stock_only for step in steps) and not found.stock:
        hint = "Without --stock-only the output brings a modeling file that says them."
        raise UnsupportedError("No config of transformers says the sizes that would be left.", hint=hint)
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
    kept: dict[str, float] = {}
    memory: dict[str, float] = {}
    for edit in edits:
        if isinstance(edit, Mask):
            share = float(surgery.cut(edit.tensor, edit.keep).double().mean())
            (memory if isinstance(edit, Forget) else kept)[edit.tensor] = share
    shapes = {name: weights.shape(name) for name in weights}
    return records_of(surgery, shapes, kept, formless(arch, steps), zeros, memory)


def records_of(
    surgery: Surgery,
    shapes: Mapping[str, torch.Size],
    kept: Mapping[str, float],
    unsupported: Container[str] = (),
    zeros: Mapping[str, int] | None = None,
    memory: Mapping[str, float] = MappingProxyType({}),
    apart: Collection[str] = (),
) -> tuple[TensorRecord, ...]:
    """A record for every tensor that stays: pruned, memoryless, cut, kept on purpose, unsupported, or not chosen.

    `kept` and `memory` speak of the source's tensors, `zeros` of those that are left, under their new names. What the
    axes `apart` leave of a tensor differs by layer, and is not known yet.
    """
    records, arch, whole = [], surgery.source, surgery.shapes(shapes)
    cuts = ((layer, (arch.axes(layer) | {SSM: arch.scan(layer)})[axis]) for layer in surgery.layers for axis in apart)
    unknown = {arch.prefix(layer) + tensor for layer, axis in cuts for tensor in axis.tensors}
    for name, old in surgery.names(shapes).items():
        shape = surgery.shape(old, whole[old])
        left = "a size of its layer's own" if old in unknown else _times(shape)
        reason = "" if shape == whole[old] else f"cut from {_times(whole[old])} to {left}"
        fields: dict[str, Any] = {"name": name, "shape": tuple(shape), "zeros": (zeros or {}).get(name)}
        if old in surgery.added:
            records.append(TensorRecord(**fields, status="added", reason=_times(shape)))
        elif old in kept:
            records.append(TensorRecord(**fields, status="pruned", kept=kept[old], reason=reason))
        elif old in memory:
            told = f"{1 - memory[old]:.1%} of the entries" + (f", {reason}" if reason else "")
            records.append(TensorRecord(**fields, status="memoryless", kept=memory[old], reason=told))
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
    if any(record.status == "memoryless" for record in records):
        emit(Note(MEMORYLESS))


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


def tokens_record(arch: Arch) -> TokenRecord | None:
    """How tokens of a prompt leave, for the manifest; None where all stay."""
    policy = arch.policy
    if policy is None:
        return None
    read = tuple(lengths(LONG, arch.layers, policy))
    return TokenRecord(policy=policy, flops_reduction=saved(arch.layers, policy.layers, policy.keep), per_layer=read)


def tell_tokens(tokens: TokenRecord | None, emit: Emit) -> None:
    """After which blocks tokens leave, and who lets them."""
    if tokens is not None:
        emit(Note(tokens.table))
        emit(Note(f"{tokens.told} {IGNORED}", "warning"))


def size_rows(before: Figures | SizeRecord, after: Figures | SizeRecord) -> tuple[tuple[str, str, str], ...]:
    """Parameters and bytes, with the share that is left where it is not all."""
    names = {"params": "parameters", "weight_bytes": "weight bytes", "state_bytes": "state bytes a sequence"}
    rows = []
    for key, name in names.items():
        old, new = getattr(before, key), getattr(after, key)
        rows.append((name, f"{old:,}", f"{new:,}" + (f" ({new / old:.1%})" if new != old else "")))
    return tuple(rows)


def _tell(found: Plan, exact: bool, emit: Emit) -> None:
    for change in found.sizes:
        emit(Note(change.note or f"{change.after} of {change.before} {change.axis}s stay."))
        if change.layers:
            each = "for the scores to say" if change.open else ", ".join(map(str, change.layers))
            emit(Note(f"These are the {change.axis}s of all layers; how many each keeps: {each}."))
    if not exact:
        emit(Note("What is left after is an estimate: layers differ, and it depends on what each keeps."))
    params, *others = size_rows(found.before, found.after)
    before = "not counted" if found.zeros_before is None else f"{found.zeros_before:,}"
    after = f"at least {found.zeros:,}" if found.zeros_before else f"{found.zeros:,}"
    rows = (params, ("of them zero", before, after), *others)
    emit(Table("plan", ("", "before", "after"), rows))
    tell_format(found.stock, emit)
    tell_tokens(found.tokens, emit)
    tell_coverage(found.tensors, emit, "not zero, at most" if found.zeros_before else "not zero")

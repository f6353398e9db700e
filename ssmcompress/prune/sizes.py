"""How many units of an axis stay: a share, a number or a budget, rounded to what kernels and configs can take."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ssmcompress.arch.base import BIAS, ROTATION, Arch
from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.edits import Add, Edit, Keep
from ssmcompress.errors import UnsupportedError
from ssmcompress.prune.blocks import fewest, strongest, units
from ssmcompress.steps import GROUP, LAYER, SSM, WIDTH, Cut, budget

CHANNELS = 8  # the kernels read channels by so many
APART = 0.1  # of all units: a share that no size comes nearer to is refused rather than rounded
WHY = {
    "channel": f"the kernels read channels by {CHANNELS}",
    "head_channel": f"the kernels read channels by {CHANNELS}",
    "head": "every group keeps as many heads",
    "group": "as many are merged into each that stays",
    "width": f"the kernels read dimensions by {CHANNELS}",
    "ssm": "a stock config has a scan in every block",
    "state": "the scan pads the states of Mamba-2 to a power of two, and gains nothing between",
}
NEEDED = {
    "layer": "tokens leave after one block, and another must follow",
    "ssm": "tokens leave by what more scans hold",
}


@dataclass(frozen=True)
class Size:
    """How many units of an axis stay of those there are, and why not exactly as many as asked for.

    They are those of the model, or of every layer that has any, alike, unless `layers` says how many each keeps: then
    of all together. Where `open`, that is for the scores to say, and `layers` are as even as can be.
    """

    axis: str
    before: int
    after: int
    note: str = ""
    layers: tuple[int, ...] = ()
    open: bool = False


@dataclass(frozen=True)
class Weights:
    """What is known of a model's tensors without reading them: shapes, and bytes an entry."""

    shapes: Mapping[str, torch.Size]
    itemsize: Mapping[str, int]

    def after(self, surgery: Surgery) -> "Weights":
        """Those that a surgery leaves, under their new names."""
        names, before = surgery.names(self.shapes), surgery.shapes(self.shapes)
        itemsize = {name: values.itemsize for name, values in surgery.added.items()} | dict(self.itemsize)
        shapes = {new: surgery.shape(old, before[old]) for new, old in names.items()}
        return Weights(shapes, {new: itemsize[old] for new, old in names.items()})

    def block(self, prefix: str, alone: str) -> "Weights":
        """Those of one block, under the prefix that it has alone."""
        names = {name: alone + name.removeprefix(prefix) for name in self.shapes if name.startswith(prefix)}
        shapes = {new: self.shapes[name] for name, new in names.items()}
        return Weights(shapes, {new: self.itemsize[name] for name, new in names.items()})


class Stored(Protocol):
    """Tensors in files, of which shapes and dtypes can be read without them."""

    def __iter__(self) -> Iterator[str]: ...
    def shape(self, name: str) -> torch.Size: ...
    def dtype(self, name: str) -> torch.dtype: ...


def weigh(stored: Stored) -> Weights:
    """What the headers of weight files tell."""
    return Weights(
        {name: stored.shape(name) for name in stored}, {name: stored.dtype(name).itemsize for name in stored}
    )


@dataclass(frozen=True)
class Figures:
    """The size of a model: entries and bytes of its weights, bytes of its state for one sequence."""

    params: int
    weight_bytes: int
    state_bytes: int

    def of(self, kind: str) -> int:
        """What a budget bounds: params, state, or memory, which is weights and state together."""
        amounts = {"params": self.params, "state": self.state_bytes, "memory": self.weight_bytes + self.state_bytes}
        return amounts[kind]


def figures(surgery: Surgery, weights: Weights) -> Figures:
    """The size of what a surgery leaves."""
    left = weights.after(surgery)
    entries = {name: shape.numel() for name, shape in left.shapes.items()}
    stored = sum(count * left.itemsize[name] for name, count in entries.items())
    return Figures(sum(entries.values()), stored, surgery.arch.state_bytes())


def size(arch: Arch, step: Cut, weights: Weights) -> Size:
    """The size of every layer that a step leads to.

    Raises UnsupportedError for an axis the family does not have, and for a size that cannot be, naming the nearest.
    """
    before = count(arch, step.axis)
    sizes = possible(arch, step, before)
    if step.target is not None:
        return Size(step.axis, before, _within(arch, step, sizes, weights))
    keep = step.keep or 0.0
    wanted = keep * before if keep <= 1 else keep
    near = min(sizes, key=lambda each: (abs(each - wanted), each))
    if wanted == near:
        return Size(step.axis, before, near)
    if keep > 1 or near == before or wanted < 0.5 or abs(near - wanted) > max(1, APART * before):
        raise _impossible(arch, step, before, wanted, sizes)
    cause = _cause(arch, step, wanted, sizes)
    return Size(step.axis, before, near, f"{near} of {before} {step.axis}s stay, not {wanted:g}: {cause}.")


def count(arch: Arch, axis: str) -> int:
    """How many units the model has of an axis of its own, or the fullest of its blocks; UnsupportedError for none."""
    known = {name: max(each[name] for each in arch.sizes) for name in arch.sizes[0]}
    known |= {WIDTH: arch.width, SSM: int(units(arch, SSM).sum()), LAYER: arch.layers}
    if axis not in known:
        hint = f"Its axes are {', '.join(known)}."
        raise UnsupportedError(f"{arch.model_type} has no axis {axis!r}.", hint=hint)
    if not known[axis]:
        raise UnsupportedError(f"No block has a scan, and without one there are no {axis}s.")
    return known[axis]


def unlike(arch: Arch, axis: str) -> set[str]:
    """The axes on which blocks differ, where scores choose which of them go or lose their scan."""
    if axis not in (LAYER, SSM):
        return set()
    blocks = [arch.sizes[layer] for layer in units(arch, axis).nonzero().flatten().tolist()]
    found = {name for name in blocks[0] if len({block[name] for block in blocks} - {0}) > 1}
    return found | ({SSM} if len({block["state"] > 0 for block in blocks}) > 1 else set())


def possible(arch: Arch, step: Cut, before: int) -> list[int]:
    """The sizes that an axis can have, ascending, with the present one."""
    sizes = list(range(fewest(arch, step.axis), before))
    if step.axis == "head":
        sizes = [each for each in sizes if each % arch.config.n_groups == 0]
    elif step.axis == GROUP:
        sizes = [each for each in sizes if before % each == 0]
    elif not step.any_size and step.axis in ("channel", "head_channel", WIDTH):
        sizes = [each for each in sizes if each % CHANNELS == 0]
    elif not step.any_size and step.axis == "state" and "head" in arch.axes():
        sizes = [each for each in sizes if each.bit_count() == 1]
    if step.axis != LAYER and stock_only(arch, step):
        sizes = [each for each in sizes if expressible(arch, step.axis, each)]
    return [*sizes, before]


def stock_only(arch: Arch, step: Cut) -> bool:
    """Whether only a config of transformers may say the sizes."""
    return step.stock_only or arch.pruned_config is None


def expressible(arch: Arch, axis: str, size: int) -> bool:
    """Whether a config of transformers says this size of an axis, of which there are more."""
    if axis in (SSM, GROUP):
        return False
    sizes = [block if axis == WIDTH else block | {axis: size} for block in arch.sizes]
    try:
        (arch.narrowed(size) if axis == WIDTH else arch).resized(sizes, stock=True)
    except UnsupportedError:
        return False
    return True


def why(arch: Arch, step: Cut, *possible: Sequence[int]) -> str:
    """What keeps an axis from having any size, where these are possible, of one layer after the other."""
    if all(len(sizes) == sizes[-1] - fewest(arch, step.axis) + 1 for sizes in possible if sizes[-1]):
        return "units are whole"
    if step.axis == GROUP and stock_only(arch, step):
        return "a stock config has as many groups of B and C as of the norm"
    heads = step.axis in ("head", "head_channel", WIDTH) and "head" in arch.axes() and stock_only(arch, step)
    return WHY[step.axis] + (", and a stock config has the channels of heads fill whole hidden sizes" if heads else "")


def require_form(arch: Arch, step: Cut) -> None:
    """UnsupportedError for an axis that a model has not, and for what a family or its format has no form of."""
    count(arch, step.axis)
    if step.axis == "state" and any(arch.rotated):
        hint = "Start from the model as it was, and cut to the number you want."
        raise UnsupportedError("The states have been rotated: a second cut would mix the two bases.", hint=hint)
    if step.axis == GROUP and count(arch, GROUP) == 1:
        hint = "B and C shrink along the axis state."
        raise UnsupportedError("All heads read one group of B and C: there are none to merge.", hint=hint)
    if step.merges and any(arch.rotated):
        hint = "Merge the groups first, or keep the best of each run (--method taylor)."
        raise UnsupportedError("The states have been rotated: each group has a basis of its own.", hint=hint)
    places = {place for layer in range(arch.layers) for place in arch.additions(layer)}
    if step.rotates and arch.offset:
        hint = "Take another method, or rotate the model as it was before its offset became a weight."
        raise UnsupportedError("The model has an offset of its states, in the basis that they are in.", hint=hint)
    if step.rotates and ROTATION[0] not in places:
        raise UnsupportedError(
            f"{arch.model_type} has no form for rotated states.",
            hint="In Mamba-2 all states of a head decay alike, so that any basis will do; elsewhere use ghost.",
        )
    if step.correction == "bias" and BIAS not in places and not arch.biased:
        raise UnsupportedError(f"{arch.model_type} has no form for a bias of out_proj.", hint="Use --correct refit.")
    if step.stock_only and (step.rotates or (step.correction == "bias" and not arch.biased)):
        hint = "Without --stock-only the output brings a modeling file that does."
        raise UnsupportedError("No config of transformers says what the step would add.", hint=hint)


def outline(arch: Arch, step: Cut, after: int | Sequence[int], weights: Weights | None = None) -> list[Edit]:
    """Edits of the shapes that any choice of units has: they keep the first of each layer, of every group alike.

    Of blocks and scans, which may differ, they keep the first that may stay without the others.

    With the weights, what is added has as many bytes an entry as it will be stored in.
    """
    if step.axis in (LAYER, SSM):
        assert isinstance(after, int)
        return [Keep(step.axis, None, strongest(arch, step.axis, torch.zeros(arch.layers), after))]
    if step.axis == WIDTH:
        return [Keep(WIDTH, None, torch.arange(arch.width) < after)]
    found: list[Edit] = []
    layers = each_layer(arch, step.axis, after)
    fewer = layers != [sizes[step.axis] for sizes in arch.sizes]
    news = (ROTATION if step.rotates else ()) + ((BIAS,) if step.correction == "bias" and fewer else ())
    for layer, size in enumerate(layers):
        sizes, places = arch.sizes[layer] | {WIDTH: arch.width}, arch.additions(layer)
        if size and not step.rotates:
            runs = arch.runs(step.axis, size)
            there = torch.arange(sizes[step.axis] // runs) < size // runs
            found.append(Keep(step.axis, layer, there.repeat(runs)))
        for name in (name for name in news if name in places):
            shape = [size if dim is None else dim if isinstance(dim, int) else sizes[dim] for dim in places[name]]
            like = arch.prefix(layer) + "mixer.out_proj.weight"  # whose dtype a bias has
            wide = weights is None or name != BIAS or weights.itemsize[like] == torch.float32.itemsize
            dtype = torch.float32 if wide else torch.bfloat16
            found.append(Add(arch.prefix(layer) + name, torch.empty(shape, device="meta", dtype=dtype)))
    return found


def renewed(arch: Arch, step: Cut) -> set[str]:
    """The weights that a step gives new values, which may fill zeros that were there."""
    found: set[str] = set()
    for layer in (layer for layer, sizes in enumerate(arch.sizes) if sizes.get(step.axis)):
        some = {"mixer.out_proj.weight"} if step.correction == "refit" else set[str]()
        some |= arch.axes(layer)[step.axis].tensors if step.merges else set()
        found |= {arch.prefix(layer) + name for name in some}
    return found


def each_layer(arch: Arch, axis: str, after: int | Sequence[int]) -> list[int]:
    """The size of each layer, where one number stands for all that have such units."""
    return [min(after, sizes[axis]) for sizes in arch.sizes] if isinstance(after, int) else list(after)


def best(score: Tensor, after: int, runs: int = 1) -> Tensor:
    """The `after` highest of scores [units], as many of each of `runs` alike, of equals the first: bool [units]."""
    parts = score.view(runs, -1)
    order = parts.argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros_like(parts, dtype=torch.bool).scatter(1, order[:, : after // runs], True)
    return keep.flatten()


def _within(arch: Arch, step: Cut, sizes: list[int], weights: Weights) -> int:
    """The largest possible size whose model is within the budget, whichever units stay."""
    kind, bound, share = budget(step.target or "")
    whole = figures(Surgery(arch, ()), weights).of(kind)  # before the step adds anything
    blocks = step.axis in (LAYER, SSM)
    light = lightest(arch, step.axis, kind, weights) if blocks and len(sizes) > 1 else []

    def amount(after: int) -> int:
        if blocks:
            return whole - sum(light[: sizes[-1] - after])
        return figures(Surgery(arch, outline(arch, step, after, weights)), weights).of(kind)

    index = bisect_right(sizes, bound * whole if share else bound, key=amount)
    if not index:
        least, verb = amount(sizes[0]), "may leave" if unlike(arch, step.axis) else "leave"
        raise UnsupportedError(
            f"{step.target} is out of reach of the axis {step.axis}: {sizes[0]} of {sizes[-1]} {verb} {least:,}.",
            hint=f"The least is {kind}={-(-least * 100 // whole)}%.",
        )
    return sizes[index - 1]


def lightest(arch: Arch, axis: str, kind: str, weights: Weights) -> list[int]:
    """What each block, or its scan, has of what a budget bounds, the least first."""
    found = []
    for layer in units(arch, axis).nonzero().flatten().tolist():
        alone = arch_for(arch.resized([arch.sizes[layer]], rotated=[arch.rotated[layer]]))
        own = weights.block(arch.prefix(layer), alone.prefix(0))
        left = 0
        if axis == SSM:
            left = figures(Surgery(alone, [Keep(SSM, None, torch.tensor([False]))]), own).of(kind)
        found.append(figures(Surgery(alone, ()), own).of(kind) - left)
    return sorted(found)


def _cause(arch: Arch, step: Cut, wanted: float, sizes: list[int]) -> str:
    """What keeps so many units from staying, where these sizes are possible."""
    least = fewest(arch, step.axis)
    if wanted >= least:
        return why(arch, step, sizes)
    return "at least one must" if least == 1 else NEEDED[step.axis]


def _impossible(arch: Arch, step: Cut, before: int, wanted: float, sizes: list[int]) -> UnsupportedError:
    below = max((each for each in sizes if each < wanted), default=sizes[0])
    above = min((each for each in sizes if each > wanted), default=sizes[-1])
    near = " or ".join(f"{each} (--keep {each / before:.4g})" for each in sorted({below, above}))
    freer = possible(arch, step.model_copy(update={"any_size": True}), before)
    if wanted > before:
        reason = f"there are {before}"
    elif wanted != int(wanted) and wanted == step.keep:
        reason = "units are whole"
    else:
        reason = _cause(arch, step, wanted, sizes)
    forced = " Or say --any-size." if wanted in freer else ""
    return UnsupportedError(
        f"{wanted:g} of {before} {step.axis}s cannot stay: {reason}.", hint=f"The nearest possible: {near}.{forced}"
    )

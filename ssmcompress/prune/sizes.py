"""How many units of an axis stay: a share, a number or a budget, rounded to what kernels and configs can take."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ssmcompress.arch.base import Arch, Axis
from ssmcompress.arch.surgery import LAYER, SSM, WHOLE, WIDTH, Surgery
from ssmcompress.edits import Keep
from ssmcompress.errors import UnsupportedError
from ssmcompress.steps import Cut, budget

CHANNELS = 8  # the kernels read channels by so many
APART = 0.1  # of all units: a share that no size comes nearer to is refused rather than rounded
WHY = {
    "channel": f"the kernels read channels by {CHANNELS}",
    "head_channel": f"the kernels read channels by {CHANNELS}",
    "head": "every group keeps as many heads",
    "width": f"the kernels read dimensions by {CHANNELS}",
    "ssm": "a stock config has a scan in every block",
    "state": "the scan pads the states of Mamba-2 to a power of two, and gains nothing between",
}


@dataclass(frozen=True)
class Size:
    """How many units of an axis stay of those there are, and why not exactly as many as asked for."""

    axis: str
    before: int
    after: int
    note: str = ""


@dataclass(frozen=True)
class Weights:
    """What is known of a model's tensors without reading them: shapes, and bytes an entry."""

    shapes: Mapping[str, torch.Size]
    itemsize: Mapping[str, int]

    def after(self, surgery: Surgery) -> "Weights":
        """Those that a surgery leaves, under their new names."""
        names = surgery.names(self.shapes)
        shapes = {new: surgery.shape(old, self.shapes[old]) for new, old in names.items()}
        return Weights(shapes, {new: self.itemsize[old] for new, old in names.items()})


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
    """The size that a step leads to.

    Raises UnsupportedError for an axis the family does not have, and for a size that cannot be, naming the nearest.
    """
    scans = sum(map(arch.has_scan, range(arch.layers)))
    known = {axis: max(each[axis] for each in arch.sizes) for axis in arch.sizes[0]}
    known |= {WIDTH: arch.width, SSM: scans, LAYER: arch.layers}
    if step.axis not in known:
        hint = f"Its axes are {', '.join(known)}."
        raise UnsupportedError(f"{arch.model_type} has no axis {step.axis!r}.", hint=hint)
    before = known[step.axis]
    if not before:
        raise UnsupportedError(f"No block has a scan, and without one there are no {step.axis}s.")
    if step.axis not in WHOLE and len(found := {each[step.axis] for each in arch.sizes} - {0}) > 1:
        raise UnsupportedError(
            f"The layers have {min(found)} to {max(found)} {step.axis}s; one size for all is not chosen among those.",
            hint="Cut another axis, or start from the model of which units were removed.",
        )
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
    why = _why(arch, step, sizes)
    return Size(step.axis, before, near, f"{near} of {before} {step.axis}s stay, not {wanted:g}: {why}.")


def possible(arch: Arch, step: Cut, before: int) -> list[int]:
    """The sizes that an axis can have, ascending, with the present one."""
    sizes = list(range(1, before))
    if step.axis == "head":
        sizes = [each for each in sizes if each % arch.config.n_groups == 0]
    elif not step.any_size and step.axis in ("channel", "head_channel", WIDTH):
        sizes = [each for each in sizes if each % CHANNELS == 0]
    elif not step.any_size and step.axis == "state" and "head" in arch.axes():
        sizes = [each for each in sizes if each.bit_count() == 1]
    if step.axis != LAYER and _stock(arch, step):
        sizes = [each for each in sizes if expressible(arch, step.axis, each)]
    return [*sizes, before]


def _stock(arch: Arch, step: Cut) -> bool:
    """Whether only a config of transformers may say the sizes."""
    return step.stock_only or arch.pruned_config is None


def expressible(arch: Arch, axis: str, size: int) -> bool:
    """Whether a config of transformers says this size of an axis, of which there are more."""
    if axis == SSM:
        return False
    sizes = [block if axis == WIDTH else block | {axis: min(size, block[axis])} for block in arch.sizes]
    try:
        (arch.narrowed(size) if axis == WIDTH else arch).resized(sizes, stock=True)
    except UnsupportedError:
        return False
    return True


def _why(arch: Arch, step: Cut, sizes: list[int]) -> str:
    """What keeps an axis from having any size."""
    if len(sizes) == sizes[-1]:
        return "units are whole"
    heads = step.axis in ("head", "head_channel", WIDTH) and "head" in arch.axes() and _stock(arch, step)
    return WHY[step.axis] + (", and a stock config has the channels of heads fill whole hidden sizes" if heads else "")


def first(arch: Arch, axis: str, after: int) -> list[Keep]:
    """Edits that keep the first units of every layer, of every group alike: their shapes are those of any others."""
    if axis in (LAYER, SSM):
        there = units(arch, axis)
        return [Keep(axis, None, there & (there.cumsum(0) <= after))]
    if axis == WIDTH:
        return [Keep(WIDTH, None, torch.arange(arch.width) < after)]
    groups = arch.config.n_groups if axis == "head" else 1
    each = fullest(arch, axis).size // groups
    keep = (torch.arange(each) < after // groups).repeat(groups)
    return [Keep(axis, layer, keep) for layer, sizes in enumerate(arch.sizes) if sizes[axis]]


def units(arch: Arch, axis: str) -> Tensor:
    """The layers [layers] (bool) that are units of the axis of whole blocks, or of that of their scans."""
    return torch.tensor([axis == LAYER or arch.has_scan(layer) for layer in range(arch.layers)])


def alike(arch: Arch, axis: str) -> bool:
    """Whether it makes no difference to the sizes which units go: the blocks that go, or whose scan goes, are alike."""
    there = units(arch, axis).tolist() if axis in (LAYER, SSM) else []
    return len({tuple(sizes.values()) for sizes, unit in zip(arch.sizes, there, strict=False) if unit}) <= 1


def fullest(arch: Arch, axis: str) -> Axis:
    """An axis as a block has it that has a scan, where one does."""
    return max((arch.axes(layer)[axis] for layer in range(arch.layers)), key=lambda each: len(each.slices))


def best(score: Tensor, after: int, groups: int = 1) -> Tensor:
    """The `after` highest of scores [units], as many of each of `groups` alike, of equals the first: bool [units]."""
    parts = score.view(groups, -1)
    order = parts.argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros_like(parts, dtype=torch.bool).scatter(1, order[:, : after // groups], True)
    return keep.flatten()


def _within(arch: Arch, step: Cut, sizes: list[int], weights: Weights) -> int:
    """The largest possible size whose model is within the budget."""
    kind, bound, share = budget(step.target or "")

    def amount(after: int) -> int:
        return figures(Surgery(arch, first(arch, step.axis, after)), weights).of(kind)

    most = bound * amount(sizes[-1]) if share else bound
    index = bisect_right(sizes, most, key=amount)
    if not index:
        least, whole = amount(sizes[0]), amount(sizes[-1])
        raise UnsupportedError(
            f"{step.target} is out of reach of the axis {step.axis}: {sizes[0]} of {sizes[-1]} leave {least:,}.",
            hint=f"The least is {kind}={-(-least * 100 // whole)}%.",
        )
    return sizes[index - 1]


def _impossible(arch: Arch, step: Cut, before: int, wanted: float, sizes: list[int]) -> UnsupportedError:
    below = max((each for each in sizes if each < wanted), default=sizes[0])
    above = min((each for each in sizes if each > wanted), default=sizes[-1])
    near = " or ".join(f"{each} (--keep {each / before:.4g})" for each in sorted({below, above}))
    outside = wanted > before or wanted < 1
    reason = (
        f"there are {before}" if wanted > before else "at least one must" if wanted < 1 else _why(arch, step, sizes)
    )
    forced = "" if outside or step.axis in ("head", SSM, LAYER) else " Or say --any-size."
    return UnsupportedError(
        f"{wanted:g} of {before} {step.axis}s cannot stay: {reason}.", hint=f"The nearest possible: {near}.{forced}"
    )

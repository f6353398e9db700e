"""How many units each layer keeps where layers may differ: of one budget for the whole model, or of its own."""

from collections.abc import Container, Sequence
from functools import partial

import torch
from torch import Tensor

from ssmcompress.arch.base import Arch
from ssmcompress.arch.surgery import Surgery
from ssmcompress.errors import UnsupportedError
from ssmcompress.prune.allocation import allocate
from ssmcompress.prune.sizes import (
    APART,
    Size,
    Weights,
    figures,
    outline,
    possible,
    require_form,
    size,
    stock_only,
    why,
)
from ssmcompress.steps import Cut, budget


def sized(arch: Arch, step: Cut, weights: Weights, apart: Container[str] = ()) -> Size:
    """The size that a step leads to, be it that of every layer or not.

    On the axes `apart` layers will differ, though nothing says yet how. Raises UnsupportedError for an axis the family
    does not have, and for a size that cannot be, naming the nearest.
    """
    require_form(arch, step)
    if step.reach == "model":
        found = _of_model(arch, step, weights)
    elif step.reach and (step.axis in apart or len({*_before(arch, step)} - {0}) > 1):
        found = _of_each(arch, step)
    else:
        found = size(arch, step, weights)
    if step.rotates and found.after == found.before:
        raise UnsupportedError(
            "All states stay: rotated, they would only need two more matrices.", hint="Keep fewer (--keep 0.5)."
        )
    return found


def shared_out(arch: Arch, step: Cut, weights: Weights, scores: Sequence[Tensor] | None = None) -> list[int]:
    """The size of each layer where units compete by scores, [units] a layer; without any, sizes as even as can be.

    Raises UnsupportedError where even the least sizes are beyond the budget.
    """
    before, sizes = _before(arch, step), _possible(arch, step)
    if scores is None:
        scores = [-torch.arange(units) / units for units in before]
    share = partial(allocate, scores, sizes, runs=partial(arch.runs, step.axis))
    least = [each[0] for each in sizes]
    if step.target is None:
        wanted = _wanted(step, sum(before))
        if not sum(least) <= wanted <= sum(before):
            few = wanted < sum(least)
            reason = "every layer keeps some" if few else f"there are {sum(before)}"
            raise _beyond(step, sum(before), wanted, reason, sum(least if few else before))
        return share(wanted)
    kind, bound, relative = budget(step.target)

    def amount(after: list[int]) -> int:
        return figures(Surgery(arch, outline(arch, step, after, weights)), weights).of(kind)

    whole, smallest = figures(Surgery(arch, ()), weights).of(kind), amount(least)
    if smallest > (most := bound * whole if relative else bound):
        raise UnsupportedError(
            f"{step.target} is out of reach of the axis {step.axis}: {max(least)} a layer leave {smallest:,}.",
            hint=f"The least is {kind}={-(-smallest * 100 // whole)}%.",
        )
    return share(most, amount=amount)


def _of_model(arch: Arch, step: Cut, weights: Weights) -> Size:
    """The size of all layers together, whose units compete."""
    if stock_only(arch, step):
        reason = "" if step.stock_only else f", and ssmcompress has none of its own for {arch.model_type}"
        raise UnsupportedError(
            f"Over the whole model, layers keep different numbers of {step.axis}s: no config of transformers says"
            f" that{reason}.",
            hint="Leave out --stock-only, or --scope model." if step.stock_only else "Leave out --scope model.",
        )
    before, layers = _before(arch, step), shared_out(arch, step, weights)
    whole, after, note = sum(before), sum(layers), ""
    if step.target is None and after != (wanted := _wanted(step, whole)):
        if (step.keep or 0) > 1 or wanted - after > max(1, APART * whole):
            raise _beyond(step, whole, wanted, _why(arch, step), after)
        note = f"{after} of {whole} {step.axis}s stay, not {wanted:g}: {_why(arch, step)}."
    least = sum(each[0] for each in _possible(arch, step))
    return Size(step.axis, whole, after, note, tuple(layers), open=max(before) < whole and least < after < whole)


def _of_each(arch: Arch, step: Cut) -> Size:
    """The same share of every layer, of layers that differ, to the nearest size that each can have."""
    sizes, keep = _possible(arch, step), step.keep or 0.0
    before = [each[-1] for each in sizes]
    if step.target is not None or keep > 1:
        some = [units for units in before if units]
        spread = f"{min(some)} to {max(some)}" if min(some) < max(some) else "different numbers of"
        near = _near(sizes, keep / max(some) if 1 < keep < max(some) else 0.5)
        raise UnsupportedError(
            f"The layers have {spread} {step.axis}s; one size for all is not chosen among those.",
            hint=f"Say a share of each (--keep {near:g}), or --scope model.",
        )
    layers, whole = _even(sizes, keep), sum(before)
    after, wanted = sum(layers), keep * whole
    if not layers:
        reason, near = why(arch, step, *sizes) if keep else "every layer keeps some", _near(sizes, keep)
        raise _impossible(step, whole, wanted, reason, sum(_even(sizes, near)), near)
    note = "" if after == wanted else f"{after} of {whole} {step.axis}s stay, not {wanted:g}: {_why(arch, step)}."
    return Size(step.axis, whole, after, note, tuple(layers))


def _even(sizes: Sequence[Sequence[int]], keep: float) -> list[int]:
    """Of the possible sizes of each layer those nearest to a share of it; none where they are no such share of all."""
    layers = [min(each, key=lambda size: (abs(size - keep * each[-1]), size)) for each in sizes]
    whole, after = sum(each[-1] for each in sizes), sum(layers)
    far = abs(after - keep * whole) > max(1, APART * whole)
    return [] if not keep or (keep < 1 and after == whole) or far else layers


def _near(sizes: Sequence[Sequence[int]], keep: float) -> float:
    """The nearest share, in hundredths, that all layers can keep."""
    possible = (percent / 100 for percent in range(1, 101) if _even(sizes, percent / 100))
    return min(possible, key=lambda share: abs(share - keep))


def _before(arch: Arch, step: Cut) -> list[int]:
    """How many units each layer has: none without a scan, if they are its."""
    return [each[step.axis] for each in arch.sizes]


def _possible(arch: Arch, step: Cut) -> list[list[int]]:
    return [possible(arch, step, units) for units in _before(arch, step)]


def _wanted(step: Cut, whole: int) -> float:
    """How many units of the whole model are to stay."""
    keep = step.keep or 0.0
    return round(keep * whole, 9) if keep <= 1 else keep


def _why(arch: Arch, step: Cut) -> str:
    return why(arch, step, *_possible(arch, step))


def _beyond(step: Cut, whole: int, wanted: float, reason: str, near: int) -> UnsupportedError:
    # a rounded share may fall short of the least; but 1 is a share, not a number
    return _impossible(step, whole, wanted, reason, near, near if near > 1 else 1 / whole)


def _impossible(step: Cut, whole: int, wanted: float, reason: str, near: int, keep: float) -> UnsupportedError:
    return UnsupportedError(
        f"{wanted:g} of the {whole} {step.axis}s of all layers cannot stay: {reason}.",
        hint=f"Possible: {near} (--keep {keep:.10g}).",
    )

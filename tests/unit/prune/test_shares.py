"""Sizes of layers that differ: one budget for the model, a share of each layer, and what is refused."""

import itertools
import re

import pytest
import torch

from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.errors import UnsupportedError
from ssmcompress.prune.shares import shared_out, sized
from ssmcompress.prune.sizes import Weights, figures, outline, possible
from ssmcompress.steps import Cut
from tests.unit.arch.models import ALL, CONFIGS
from tests.unit.prune.test_sizes import weights


def found(name, **step):
    return sized(arch_for(ALL[name]), Cut(**step), weights(name))


@pytest.mark.parametrize(
    ("name", "step", "before", "after"),
    [
        ("mamba", {"axis": "state", "keep": 0.5}, 10, 5),
        ("mamba", {"axis": "state", "keep": 7}, 10, 7),
        ("mamba", {"axis": "channel", "keep": 0.5}, 128, 64),
        ("mamba2", {"axis": "state", "keep": 0.75}, 32, 24),
        ("mamba2-grouped", {"axis": "head", "keep": 0.75}, 8, 6),
        ("pruned-mamba", {"axis": "state", "keep": 0.5}, 8, 4),
        ("pruned-mamba2-grouped", {"axis": "head", "keep": 4}, 6, 4),
        ("mamba", {"axis": "state", "keep": 2}, 10, 2),
        ("gated-mamba", {"axis": "channel", "keep": 0.5}, 48, 24),
        ("mamba", {"axis": "state", "keep": 1}, 10, 10),
        ("mamba2-limited", {"axis": "group", "keep": 5, "method": "taylor"}, 16, 5),
    ],
)
def test_units_of_all_layers_are_counted_together(name, step, before, after):
    told = found(name, scope="model", **step)
    assert (told.before, told.after, told.note) == (before, after, "") and sum(told.layers) == after
    least = {"pruned-mamba2-grouped": 4, "mamba": 2}.get(name, 0)
    assert told.open == (least < after < before)  # else there is only one way


def test_a_share_that_no_sizes_make_up_stays_within_and_says_why():
    told = found("mamba", axis="channel", keep=0.7, scope="model")
    assert told.after == 88 and told.note == "88 of 128 channels stay, not 89.6: the kernels read channels by 8."
    assert "units are whole" in found("mamba", axis="state", keep=0.55, scope="model").note
    assert found("mamba", axis="channel", keep=0.7, scope="model", any_size=True).after == 89


@pytest.mark.parametrize(("name", "axis"), [("mamba", "channel"), ("mamba2", "head"), ("pruned-mamba", "state")])
@pytest.mark.parametrize("kind", ["params", "state", "memory"])
def test_a_budget_of_the_model_holds_whatever_the_scores_say(name, axis, kind):
    arch, known = arch_for(ALL[name]), weights(name)
    before = [sizes[axis] for sizes in arch.sizes]
    options = [possible(arch, Cut(axis=axis, keep=1, scope="model"), units) for units in before]
    low, high = ([each[i] for each in options] for i in (0, -1))
    least, whole = (
        figures(Surgery(arch, outline(arch, Cut(axis=axis, keep=1), each)), known).of(kind) for each in (low, high)
    )
    torch.manual_seed(0)
    for most in (whole, (least + whole) // 2, least):
        step = Cut(axis=axis, target=f"{kind}={most}", scope="model")
        for scores in (None, [torch.rand(units) for units in before]):
            layers = shared_out(arch, step, known, scores)
            assert figures(Surgery(arch, outline(arch, Cut(axis=axis, keep=1), layers)), known).of(kind) <= most
            assert all(size in each for size, each in zip(layers, options, strict=True))
    assert found(name, axis=axis, target=f"{kind}={whole}", scope="model").after == sum(before)


@pytest.mark.parametrize(
    ("name", "step", "message", "hint"),
    [
        ("mamba", {"axis": "head", "keep": 0.5}, "mamba has no axis 'head'", "channel, state"),
        ("mamba", {"axis": "state", "keep": 0}, "0 of the 10 states of all layers cannot", "2 (--keep 2)"),
        ("mamba", {"axis": "channel", "keep": 0.05}, "every layer keeps some", "16 (--keep 16)"),
        ("mamba", {"axis": "state", "keep": 11}, "there are 10", "10 (--keep 10)"),
        ("mamba", {"axis": "channel", "keep": 100}, "read channels by 8", "96 (--keep 96)"),
        ("mamba2", {"axis": "state", "keep": 0.95}, "power of two", "24 (--keep 24)"),
        ("mamba2-limited", {"axis": "group", "keep": 7, "method": "taylor"}, "as many are merged into", "6 (--keep 6)"),
        ("mamba", {"axis": "state", "target": "params=10%"}, "out of reach of the axis state", "The least is params="),
        ("mamba", {"axis": "channel", "keep": 0.5, "stock_only": True}, "no config of transformers", "--stock-only"),
        ("falcon_mamba", {"axis": "channel", "keep": 0.5}, "none of its own for falcon_mamba", "Leave out --scope"),
    ],
)
def test_what_cannot_be_over_the_model_is_refused(name, step, message, hint):
    with pytest.raises(UnsupportedError) as refused:
        found(name, scope="model", **step)
    assert message in refused.value.message and hint in refused.value.hint


ASKED = (0, 0.01, 0.05, 0.1, 0.33, 0.45, 0.55, 0.66, 0.77, 0.95, 0.99, 1.5, 2, 3, 7, 20, 100, 1000)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("name", ALL)
def test_what_a_hint_says_is_not_refused_again(name, scope):
    arch, known, followed = arch_for(ALL[name]), weights(name), 0
    for axis, keep in itertools.product(arch.axes(), ASKED):
        step = {"axis": axis, "scope": scope} | ({"method": "taylor"} if axis == "group" else {})
        try:
            sized(arch, Cut(keep=keep, **step), known)
        except UnsupportedError as refused:
            for number, share in re.findall(r"(?:(\d+) \()?--keep (\d[\d.e-]*\d|\d)", refused.hint):
                told = sized(arch, Cut(keep=float(share), **step), known)
                assert told.after == int(number or told.after), refused.hint
                followed += 1
    assert followed or name == "falcon_mamba"


def test_a_hint_of_one_unit_of_many_is_a_share():
    """As a number 1 would be all of them."""
    arch = arch_for(ALL["gated-mamba"])
    first, last = arch.sizes
    arch = arch_for(arch.resized([first, last | {"state": 7}]))
    shapes = {name: tensor.shape for name, tensor in arch.build().named_parameters()}
    known = Weights(shapes, dict.fromkeys(shapes, 2))
    with pytest.raises(UnsupportedError, match="every layer keeps some") as refused:
        sized(arch, Cut(axis="state", keep=0.01, scope="model"), known)
    (share,) = re.findall(r"1 \(--keep (.+)\)", refused.value.hint)
    assert sized(arch, Cut(axis="state", keep=float(share), scope="model"), known).after == 1


def test_one_group_is_not_merged_and_rotated_ones_have_no_mean():
    for name, step, message, hint in (
        ("mamba2", {}, "All heads read one group of B and C", "the axis state"),
        ("merged-mamba2-rotated", {}, "each group has a basis of its own", "Merge the groups first"),
    ):
        with pytest.raises(UnsupportedError, match=message) as refused:
            found(name, axis="group", keep=0.5, **step)
        assert hint in refused.value.hint and refused.value.exit_code == 3
    assert found("merged-mamba2-rotated", axis="group", keep=0.5, method="magnitude").layers == (1, 2)


def test_layers_that_differ_keep_the_same_share_each():
    told = found("pruned-mamba-biased", axis="state", keep=0.5)
    assert (told.before, told.after, told.layers, told.open) == (17, 9, (8, 1), False)
    assert told.note == "9 of 17 states stay, not 8.5: units are whole."
    arch = arch_for(ALL["pruned-mamba2"])
    even = arch_for(arch.resized([sizes | {"state": 8} for sizes in arch.sizes]))
    assert not even.stock and sized(even, Cut(axis="state", keep=0.5), weights("pruned-mamba2")).layers == ()


def test_zeros_of_blocks_without_a_scan_are_no_sizes():
    """Of 5, none and 3 states."""
    arch = arch_for(ALL["pruned-mamba"])
    first, last = arch.sizes
    arch = arch_for(arch.resized([first, first | {"state": 0, "dt_rank": 0}, last]))
    shapes = {name: tensor.shape for name, tensor in arch.build().named_parameters()}
    known = Weights(shapes, dict.fromkeys(shapes, 2))

    def of(**step):
        return sized(arch, Cut(axis="state", **step), known)

    assert (of(keep=0.5).before, of(keep=0.5).layers) == (8, (1, 0, 2)) and not of(keep=0.5).open
    whole = of(keep=0.5, scope="model")
    assert whole.open and whole.after == 4 == sum(whole.layers) and whole.layers[1] == 0 < min(whole.layers[::2])
    assert of(target="params=99%", scope="model").layers[1] == 0
    with pytest.raises(UnsupportedError, match="The layers have 3 to 5 states"):
        of(keep=2)
    with pytest.raises(UnsupportedError, match="1 of the 8 states of all layers cannot stay: every layer keeps some"):
        of(keep=0.125, scope="model")
    with pytest.raises(UnsupportedError, match="of the axis state: 1 a layer leave"):
        of(target="params=1%", scope="model")


@pytest.mark.parametrize(("step", "near"), [({"keep": 2}, "--keep 0.4"), ({"target": "params=90%"}, "--keep 0.5")])
def test_one_size_for_layers_that_differ_is_refused(step, near):
    with pytest.raises(UnsupportedError, match="The layers have 3 to 5 states") as refused:
        found("pruned-mamba", axis="state", **step)
    assert near in refused.value.hint
    with pytest.raises(UnsupportedError, match="different numbers of states"):
        sized(arch_for(CONFIGS["mamba"]), Cut(axis="state", **step), weights("mamba"), apart={"state"})


@pytest.mark.parametrize(("keep", "reason"), [(0, "every layer keeps some"), (0.95, "power of two")])
def test_a_share_that_layers_cannot_keep_is_refused(keep, reason):
    with pytest.raises(UnsupportedError, match=reason):
        found("pruned-mamba2", axis="state", keep=keep)

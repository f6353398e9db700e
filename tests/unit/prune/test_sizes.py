"""How many units stay: shares, numbers, budgets, and what is refused with the nearest size."""

import itertools
import re

import pytest
import torch

from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.edits import Keep
from ssmcompress.errors import UnsupportedError
from ssmcompress.policy import TokenPolicy
from ssmcompress.prune.blocks import units, unreduced
from ssmcompress.prune.shares import sized
from ssmcompress.prune.sizes import Weights, best, figures, outline, possible, size
from ssmcompress.steps import Cut
from tests.unit.arch.models import ALL, CONFIGS


def weights(name):
    shapes = {key: parameter.shape for key, parameter in arch_for(ALL[name]).build().named_parameters()}
    return Weights(shapes, {key: 4 if key.endswith("A_log") else 2 for key in shapes})


def found(name, **step):
    return size(arch_for(ALL[name]), Cut(**step), weights(name))


@pytest.mark.parametrize(
    ("name", "step", "after"),
    [
        ("mamba-biased", {"axis": "state", "keep": 0.75}, 12),
        ("mamba-biased", {"axis": "state", "keep": 12}, 12),
        ("mamba-biased", {"axis": "state", "keep": 1}, 16),
        ("mamba", {"axis": "channel", "keep": 0.5}, 32),
        ("mamba-biased", {"axis": "dt_rank", "keep": 0.67}, 2),
        ("mamba", {"axis": "layer", "keep": 0.5}, 1),
        ("mamba2", {"axis": "state", "keep": 0.5}, 8),
        ("mamba2", {"axis": "state", "keep": 12, "any_size": True}, 12),
        ("mamba2-grouped", {"axis": "head", "keep": 0.5}, 2),
        ("mamba2-grouped", {"axis": "head_channel", "keep": 0.5}, 8),
        ("pruned-mamba2-grouped", {"axis": "layer", "keep": 0.5}, 1),
        ("mamba2", {"axis": "ssm", "keep": 0.5}, 1),
        ("mamba", {"axis": "width", "keep": 0.75}, 24),
        ("falcon_mamba", {"axis": "width", "keep": 24, "stock_only": True}, 24),
        ("mamba2", {"axis": "width", "keep": 16, "stock_only": True}, 16),
        ("mamba2", {"axis": "width", "keep": 24}, 24),
        ("mamba", {"axis": "width", "keep": 30, "any_size": True}, 30),
        ("gated-mamba", {"axis": "ssm", "keep": 1}, 1),
        ("gated-mamba", {"axis": "state", "keep": 3}, 3),
        ("mamba2-grouped", {"axis": "group", "keep": 0.5}, 1),
        ("mamba2-limited", {"axis": "group", "keep": 4}, 4),
        ("mamba2-limited", {"axis": "group", "keep": 0.125}, 1),
        ("merged-mamba2-rotated", {"axis": "group", "keep": 0.5, "method": "taylor"}, 2),
        ("mamba2-limited", {"axis": "group", "target": "state=85%"}, 4),
    ],
)
def test_a_share_or_a_number(name, step, after):
    assert found(name, **step).after == after and not (step.get("keep") in (0.5, 12) and found(name, **step).note)


def test_a_share_between_sizes_goes_to_the_nearest_and_says_why():
    near = found("mamba", axis="channel", keep=0.7)
    assert near.after == 48 and near.note == "48 of 64 channels stay, not 44.8: the kernels read channels by 8."
    assert found("mamba", axis="channel", keep=0.7, any_size=True).after == 45
    near = found("mamba2-limited", axis="group", keep=0.6)
    assert near.note == "4 of 8 groups stay, not 4.8: as many are merged into each that stays."
    assert "units are whole" in found("mamba-biased", axis="dt_rank", keep=0.5).note


@pytest.mark.parametrize(
    ("name", "step", "message", "hint"),
    [
        (
            "mamba",
            {"axis": "head", "keep": 0.5},
            "mamba has no axis 'head'",
            "channel, state, dt_rank, width, ssm, layer",
        ),
        (
            "mamba2",
            {"axis": "channel", "keep": 0.5},
            "no axis 'channel'",
            "head, head_channel, state, group, width, ssm, layer",
        ),
        ("mamba", {"axis": "state", "keep": 0}, "0 of 5 states cannot stay: at least one must", "1 (--keep 0.2)"),
        ("mamba", {"axis": "state", "keep": 6}, "6 of 5 states cannot stay: there are 5", "5 (--keep 1)"),
        ("mamba2", {"axis": "state", "keep": 0.75}, "12 of 16 states", "8 (--keep 0.5) or 16 (--keep 1). Or say --any"),
        ("mamba2", {"axis": "state", "keep": 12}, "power of two", "8 (--keep 0.5) or 16"),
        ("mamba2-grouped", {"axis": "head", "keep": 3}, "every group keeps as many", "2 (--keep 0.5) or 4 (--keep 1)."),
        (
            "mamba2",
            {"axis": "head", "stock_only": True, "keep": 0.75},
            "fill whole hidden sizes",
            "4 (--keep 0.5) or 8 (--keep 1).",
        ),
        ("mamba", {"axis": "channel", "keep": 20}, "read channels by 8", "16 (--keep 0.25) or 24"),
        ("mamba", {"axis": "channel", "keep": 0.01}, "0.64 of 64 channels", "8 (--keep 0.125)"),
        ("falcon_mamba", {"axis": "ssm", "keep": 0.5}, "a stock config has a scan in every", "2 (--keep 1)."),
        ("mamba", {"axis": "ssm", "keep": 0.5, "stock_only": True}, "a scan in every block", "2 (--keep 1)."),
        ("mamba", {"axis": "width", "keep": 20}, "read dimensions by 8", "16 (--keep 0.5) or 24 (--keep 0.75). Or say"),
        (
            "mamba2",
            {"axis": "width", "keep": 24, "stock_only": True},
            "a stock config has the channels of heads fill whole hidden sizes",
            "16 (--keep 0.5) or 32 (--keep 1).",
        ),
        ("mamba", {"axis": "layer", "keep": 1.5}, "units are whole", "1 (--keep 0.5) or 2 (--keep 1)."),
        ("mamba", {"axis": "group", "keep": 0.5}, "mamba has no axis 'group'", "channel, state, dt_rank"),
        (
            "mamba2-limited",
            {"axis": "group", "keep": 3},
            "3 of 8 groups cannot stay: as many are merged into each",
            "2 (--",
        ),
        (
            "mamba2-limited",
            {"axis": "group", "keep": 6},
            "as many are merged into each",
            "4 (--keep 0.5) or 8 (--keep 1).",
        ),
        ("mamba2-limited", {"axis": "group", "keep": 0}, "at least one must", "1 (--keep 0.125)."),
        ("mamba2-limited", {"axis": "group", "keep": 9}, "there are 8", "8 (--keep 1)."),
        (
            "mamba2-limited",
            {"axis": "group", "keep": 0.5, "stock_only": True},
            "a stock config has as many groups of B and C as of the norm",
            "8 (--keep 1).",
        ),
        ("mamba", {"axis": "state", "target": "params=10%"}, "out of reach of the axis state", "The least is params="),
        ("mamba", {"axis": "channel", "keep": 1.5}, "units are whole", "8 (--keep 0.125)."),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest(name, step, message, hint):
    with pytest.raises(UnsupportedError) as refused:
        found(name, **step)
    assert message in refused.value.message and hint in refused.value.hint


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize(
    "step", [{"axis": "head", "correct": "bias"}, {"axis": "state", "method": "rotate"}], ids=["bias", "rotation"]
)
def test_a_share_is_one_of_the_model_as_it_was(step, scope):
    """What a step adds counts against it."""
    arch, known = arch_for(CONFIGS["mamba2"]), weights("mamba2")
    whole = figures(Surgery(arch, ()), known).params
    for share in (70, 85, 100, 101, 110):
        asked = Cut(**step, scope=scope, target=f"params={share}%")
        try:
            made = sized(arch, asked, known)
        except UnsupportedError as error:
            reason = f"{error.message} {error.hint}"
            assert "out of reach" in reason or "All states stay" in reason
            continue
        left = figures(Surgery(arch, outline(arch, asked, made.layers or made.after, known)), known).params
        assert left <= whole * share / 100


def test_nothing_more_is_said_of_sizes_that_would_not_do_anyway():
    for name, step in (
        ("mamba", {"axis": "state", "keep": 1.5, "any_size": True}),
        ("mamba2", {"axis": "head_channel", "keep": 0.5, "stock_only": True, "any_size": True}),
    ):
        try:
            found(name, **step)
        except UnsupportedError as error:
            assert "--any-size" not in error.hint
    with pytest.raises(UnsupportedError, match="All states stay"):
        sized(arch_for(CONFIGS["mamba2"]), Cut(axis="state", method="rotate", keep=1), weights("mamba2"))


def test_an_added_bias_has_the_bytes_of_the_weight_it_belongs_to():
    arch, known = arch_for(CONFIGS["mamba2"]), weights("mamba2")
    step = Cut(axis="head", correct="bias", keep=0.5)
    with_bias, without = (
        figures(Surgery(arch, outline(arch, each, 4, known)), known).weight_bytes
        for each in (step, Cut(axis="head", correct="none", keep=0.5))
    )
    assert with_bias - without == 2 * arch.width * known.itemsize["backbone.layers.0.mixer.out_proj.weight"]


def test_what_no_block_has_cannot_be_cut():
    arch = arch_for(ALL["gated-mamba2"])
    bare = arch_for(arch.resized([sizes | {"state": 0} for sizes in arch.sizes]))
    for axis in ("state", "group", "ssm"):
        with pytest.raises(UnsupportedError, match=f"No block has a scan, .*no {axis}s"):
            size(bare, Cut(axis=axis, keep=0.5), weights("gated-mamba2"))


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("mamba", "channel"),
        ("mamba", "state"),
        ("mamba2", "state"),
        ("mamba2", "ssm"),
        ("mamba", "width"),
        ("mamba2-limited", "group"),
    ],
)
@pytest.mark.parametrize("kind", ["params", "state", "memory"])
def test_a_budget_takes_the_largest_size_within(name, axis, kind):
    arch, known = arch_for(CONFIGS[name]), weights(name)

    def amount(after):
        return figures(Surgery(arch, outline(arch, Cut(axis=axis, keep=1), after)), known).of(kind)

    before = {"ssm": 2, "width": 32}.get(axis) or arch.axes()[axis].size
    sizes = possible(arch, Cut(axis=axis, keep=1), before)
    for most in (amount(sizes[-1]), (amount(sizes[0]) + amount(sizes[-1])) // 2, amount(sizes[0])):
        within = found(name, axis=axis, target=f"{kind}={most}").after
        assert amount(within) <= most
        larger = [each for each in sizes if each > within]
        assert not larger or amount(larger[0]) > most


def mixed():
    """Four blocks of sizes of their own, one of them without a scan, and what is known of their tensors."""
    arch = arch_for(ALL["pruned-mamba"])
    first, last = arch.sizes
    bare = first | {"state": 0, "dt_rank": 0, "channel": 30}
    arch = arch_for(arch.resized([first, bare, last, last | {"channel": 8}]))
    shapes = {name: parameter.shape for name, parameter in arch.build().named_parameters()}
    return arch, Weights(shapes, {name: 4 if name.endswith("A_log") else 2 for name in shapes})


def choices(arch, axis, known, kind, after):
    """What is left of every choice of so many blocks, or scans."""
    for kept in itertools.combinations(units(arch, axis).nonzero().flatten().tolist(), after):
        keep = torch.zeros(arch.layers, dtype=torch.bool)
        keep[list(kept)] = True
        yield figures(Surgery(arch, [Keep(axis, None, keep)]), known).of(kind)


@pytest.mark.parametrize("axis", ["layer", "ssm"])
@pytest.mark.parametrize("kind", ["params", "state", "memory"])
def test_a_budget_holds_whichever_blocks_stay(axis, kind):
    arch, known = mixed()
    whole = int(units(arch, axis).sum())
    most = {after: max(choices(arch, axis, known, kind, after)) for after in range(1, whole + 1)}
    for after, amount in most.items():
        assert size(arch, Cut(axis=axis, target=f"{kind}={amount}"), known).after == after
        if after > 1:
            assert size(arch, Cut(axis=axis, target=f"{kind}={amount - 1}"), known).after == after - 1
    with pytest.raises(UnsupportedError, match=f"1 of {whole} may leave {most[1]:,}") as refused:
        size(arch, Cut(axis=axis, target=f"{kind}={most[1] - 1}"), known)
    assert size(arch, Cut(axis=axis, target=refused.value.hint.split()[-1].rstrip(".")), known).after >= 1


def reduced(layers=6, method="utrc", anchors=(1, 2, 3, 4)):
    """A model of six blocks of which tokens leave, and what is known of its tensors."""
    arch = arch_for(CONFIGS["mamba"])
    policy = TokenPolicy(method=method, layers=anchors, keep=0.8)
    arch = arch_for(arch.resized([arch.sizes[0]] * layers, policy=policy))
    shapes = {name: parameter.shape for name, parameter in arch.build().named_parameters()}
    return arch, Weights(shapes, dict.fromkeys(shapes, 2))


def test_where_tokens_leave_two_blocks_are_the_least():
    arch, known = reduced()
    step = Cut(axis="layer", keep=2)
    assert size(arch, step, known).after == 2
    (first,) = outline(arch, step, 2)
    assert Surgery(arch, [first]).arch.policy.layers == (0,)
    two, three = (max(choices(unreduced(arch), "layer", known, "params", after)) for after in (2, 3))
    for bound, after in ((two, 2), (three - 1, 2), (three, 3)):
        assert size(arch, Cut(axis="layer", target=f"params={bound}"), known).after == after
    with pytest.raises(UnsupportedError, match=f"2 of 6 leave {two:,}"):
        size(arch, Cut(axis="layer", target=f"params={two - 1}"), known)


@pytest.mark.parametrize(
    ("layers", "method", "anchors", "step", "message", "hint"),
    [
        (2, "utrc", (0,), {"axis": "layer", "keep": 0.5}, "1 of 2 layers cannot stay: tokens leave after", "2 (--ke"),
        (6, "utrc", (1, 3), {"axis": "layer", "keep": 0.05}, "tokens leave after one block, and another", "2 (--keep"),
        (6, "simba", (0, 1, 2), {"axis": "ssm", "keep": 2}, "2 of 6 ssms cannot stay: tokens leave by", "3 (--keep"),
        (6, "simba", (0, 1, 2), {"axis": "ssm", "keep": 2.5}, "2.5 of 6 ssms cannot stay: units are whole", "3 (--ke"),
    ],
)
def test_too_few_blocks_for_tokens_to_leave_are_refused_with_a_way_out(layers, method, anchors, step, message, hint):
    arch, known = reduced(layers, method, anchors)
    with pytest.raises(UnsupportedError) as refused:
        size(arch, Cut(**step), known)
    assert message in refused.value.message and hint in refused.value.hint
    for keep in re.findall(r"--keep ([\d.]+\d|\d)", refused.value.hint):
        assert size(arch, Cut(**step | {"keep": float(keep)}), known).after >= 2


def test_a_share_below_the_least_says_what_needs_more():
    arch, known = reduced()
    told = size(arch, Cut(axis="layer", keep=0.17), known)
    assert told.after == 2 and told.note.endswith("not 1.02: tokens leave after one block, and another must follow.")
    assert size(arch, Cut(axis="layer", keep=0.4), known).note.endswith("not 2.4: units are whole.")


def test_nothing_is_added_where_nothing_goes():
    arch, known = arch_for(CONFIGS["mamba"]), weights("mamba")
    step = Cut(axis="channel", keep=1, correct="bias")
    assert all(isinstance(edit, Keep) and bool(edit.keep.all()) for edit in outline(arch, step, 64, known))
    for scope, whole in (("layer", 64), ("model", 128)):
        step = Cut(axis="channel", target="params=100%", correct="bias", scope=scope)
        assert sized(arch, step, known).after == whole


def test_figures_count_every_entry_and_its_bytes():
    arch, known = arch_for(CONFIGS["mamba"]), weights("mamba")
    whole = figures(Surgery(arch, ()), known)
    assert whole.params == sum(shape.numel() for shape in known.shapes.values())
    assert whole.weight_bytes == 2 * whole.params + 2 * 2 * 64 * 5 and whole.state_bytes == arch.state_bytes()
    less = figures(Surgery(arch, outline(arch, Cut(axis="state", keep=1), 3)), known)
    assert whole.params - less.params == 2 * 2 * 3 * 64  # layers, states, A_log and the rows of B and C
    assert less.of("memory") == less.weight_bytes + less.state_bytes


def test_the_best_of_every_group_stay_and_of_equals_the_first():
    score = torch.tensor([1.0, 3.0, 2.0, 5.0, 0.0, 0.0])
    assert best(score, 3).tolist() == [False, True, True, True, False, False]
    assert best(score, 4, runs=2).tolist() == [False, True, True, True, True, False]
    assert best(torch.zeros(4), 2).tolist() == [True, True, False, False]


def test_a_model_of_our_own_config_takes_sizes_that_no_stock_one_says():
    arch = arch_for(ALL["pruned-mamba2"])
    even = arch_for(arch.resized([sizes | {"state": 8} for sizes in arch.sizes]))
    assert not even.stock and possible(even, Cut(axis="state", keep=1), 8) == [1, 2, 4, 8]


def test_each_layer_may_keep_its_own_number():
    arch = arch_for(ALL["pruned-mamba2-grouped"])
    kept = [edit.keep.tolist() for edit in outline(arch, Cut(axis="head", keep=1), [2, 2])]
    assert kept == [[True, False, True, False], [True, True]]
    arch = arch_for(ALL["merged-mamba2"])
    kept = [edit.keep.tolist() for edit in outline(arch, Cut(axis="group", keep=1), [2, 1])]
    assert kept == [[True, False, True, False], [True]]
    arch = arch_for(ALL["pruned-mamba2-grouped"])
    assert [int(edit.keep.sum()) for edit in outline(arch, Cut(axis="state", keep=1), [5, 3])] == [5, 3]

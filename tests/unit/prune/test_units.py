"""Scores of units against loops over what they own, and the walk that goes on with the cut blocks."""

import pytest
import torch
import torch.nn.functional as F

from ssmcompress.arch.masked import mask
from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.calib.stats import Activity, Spread
from ssmcompress.calib.taps import observe
from ssmcompress.edits import Keep
from ssmcompress.prune import scores
from ssmcompress.prune.sizes import best
from ssmcompress.prune.units import Scorer, find_units, squared_gradients
from ssmcompress.steps import METHODS, Cut
from tests.unit.arch import models
from tests.unit.arch.models import ALL, CONFIGS

EVERY = [
    (name, axis, method)
    for name, config in CONFIGS.items()
    for axis in arch_for(config).axes()
    for method in METHODS[axis]
    if (name, axis) not in (("mamba2-limited", "head"), ("mamba2", "group"))  # one head a group, one group: none can go
    and method not in ("rotate", "merge")  # which choose no units
]
GATED = [  # whose first block has no scan
    (name, axis, method)
    for name, axis in (("gated-mamba", "channel"), ("gated-mamba", "state"), ("gated-mamba2", "state"))
    for method in METHODS[axis]
    if method != "rotate"
]


def half(arch, axis):
    """Half of the units, in whole groups, of a size that a stock config can say."""
    groups = arch.config.n_groups if axis == "head" else 1
    return max(1, arch.axes()[axis].size // groups // 2) * groups


@pytest.mark.parametrize(("name", "axis", "method"), EVERY)
def test_every_method_keeps_as_many_of_every_layer(name, axis, method):
    model, arch = models.ours(name), arch_for(CONFIGS[name])
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    ids, after = models.tokens(3, 12), half(arch, axis)
    found = find_units(model, arch, Cut(axis=axis, method=method, keep=after, correct="none"), after, ids)
    assert [(keep.axis, keep.layer, int(keep.keep.sum())) for keep in found] == [(axis, 0, after), (axis, 1, after)]
    assert all(torch.equal(parameter, before[key]) for key, parameter in model.named_parameters())
    again = find_units(model, arch, Cut(axis=axis, method=method, keep=after, correct="none"), after, ids)
    assert all(torch.equal(one.keep, two.keep) for one, two in zip(found, again, strict=True))
    if axis == "head":
        assert all(len(set(keep.keep.view(arch.config.n_groups, -1).sum(1).tolist())) == 1 for keep in found)


@pytest.mark.parametrize(("name", "axis", "method"), GATED)
def test_a_block_without_a_scan_has_no_states_but_channels(name, axis, method):
    model, arch, ids = models.ours(name), arch_for(ALL[name]), models.tokens(3, 12)
    correct = "refit" if axis == "channel" else "none"
    found = find_units(model, arch, Cut(axis=axis, method=method, keep=2, correct=correct), 2, ids)
    layers = [(each.layer, int(each.keep.sum())) for each in found if isinstance(each, Keep)]
    assert layers == ([(0, 2), (1, 2)] if axis == "channel" else [(1, 2)])


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_each_block_is_scored_on_what_the_cut_blocks_before_it_make(name):
    model, arch, ids = models.ours(name), arch_for(CONFIGS[name]), models.tokens(3, 12)
    axis, module = ("channel", "conv1d") if name == "mamba" else ("head", "conv1d")
    found = find_units(
        model, arch, Cut(axis=axis, method="minitron", keep=half(arch, axis), correct="none"), half(arch, axis), ids
    )
    twin = models.ours(name)
    mask(twin, arch, found[:1])
    block, seen = arch.blocks(twin)[1], Activity(64 if name == "mamba" else 96)
    with observe(block.mixer, lambda tap, x: seen.add(x) if tap == module else None), torch.no_grad():
        for row in ids.split(1):
            twin(row)
    scorer = Scorer(arch, arch.axes()[axis], 1, block, {"conv1d": seen})
    assert torch.equal(best(scorer.score("minitron"), half(arch, axis)), found[1].keep)


def test_what_an_earlier_run_found_is_not_searched_again():
    model, arch, ids = models.ours("mamba"), arch_for(CONFIGS["mamba"]), models.tokens(3, 12)
    step = Cut(axis="state", keep=3)
    whole, finished = find_units(model, arch, step, 3, ids), {}
    find_units(model, arch, step, 3, ids, finished=finished)
    del finished[1]
    gone_on = find_units(model, arch, step, 3, ids, finished=finished)
    assert set(finished) == {0, 1}
    assert all(torch.equal(one.keep, two.keep) for one, two in zip(whole, gone_on, strict=True))


def scorer(name, axis, **known):
    model, arch = models.ours(name), arch_for(CONFIGS[name])
    return Scorer(arch, arch.axes()[axis], 1, arch.blocks(model)[1], **known), model


def test_magnitude_is_the_norm_of_the_matrices_a_unit_owns():
    one, model = scorer("mamba2-grouped", "head")
    found, mixer = one.score("magnitude"), model.backbone.layers[1].mixer
    for h in range(4):
        rows = range(16 * h, 16 * h + 16)
        own = [mixer.in_proj.weight[i] for i in rows]
        own += [mixer.in_proj.weight[64 + i] for i in rows] + [mixer.in_proj.weight[64 + 96 + h]]
        own += [mixer.conv1d.weight[i] for i in rows] + [mixer.out_proj.weight[:, i] for i in rows]
        assert torch.allclose(found[h], sum(part.square().sum() for part in own))


def test_taylor_weighs_every_entry_a_unit_owns_by_its_mean_squared_gradient():
    ids = models.tokens(3, 12)
    _, model = scorer("mamba-biased", "state")
    arch = arch_for(model.config)
    fisher = squared_gradients(model, ids, arch.coupled("state"))
    names = {"backbone.layers.1.mixer.A_log", "backbone.layers.1.mixer.x_proj.weight"}
    assert {name for name in fisher if ".1." in name} == names
    expected = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for row in ids:
        model.zero_grad()
        logits = model(row[None]).logits[0]
        F.cross_entropy(logits[:-1], row[1:]).backward()
        for name in names:
            expected[name] += model.get_parameter(name).grad.square() / 3
    for name in names:
        assert torch.allclose(fisher[name], expected[name], rtol=1e-4, atol=1e-12)
    one = Scorer(arch, arch.axes()["state"], 1, arch.blocks(model)[1], fisher=fisher)
    A, x = (model.get_parameter(name).square() * expected[name] for name in sorted(names))
    rank, size = model.config.time_step_rank, model.config.state_size
    wanted = [A[:, n].sum() + x[rank + n].sum() + x[rank + size + n].sum() for n in range(size)]
    assert torch.allclose(one.score("taylor"), torch.stack(wanted), rtol=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_flap_is_fluctuation_times_the_column_it_meets():
    spread = Spread(64)
    x = torch.randn(5, 9, 64)
    spread.add(x)
    one, model = scorer("mamba2", "head", statistics={"out_proj": spread})
    found, weight = one.score("flap"), model.backbone.layers[1].mixer.out_proj.weight
    for h in range(8):
        own = [x.flatten(0, 1)[:, j].var() * weight[:, j].square().sum() for j in range(8 * h, 8 * h + 8)]
        assert torch.allclose(found[h], sum(own), rtol=1e-4)


def test_last_is_the_gain_of_each_state_alone():
    one, model = scorer("mamba", "state")
    found, mixer = one.score("last"), model.backbone.layers[1].mixer
    delta = F.softplus(mixer.dt_proj.bias)
    for n in range(5):
        decay = torch.exp(-delta * mixer.A_log[:, n].exp())
        reach = mixer.x_proj.weight[2 + n].norm() * mixer.x_proj.weight[2 + 5 + n].norm()
        assert torch.allclose(found[n], (delta / (1 - decay) * reach).square().sum(), rtol=1e-4)
    one, model = scorer("mamba2-grouped", "state")
    found, weight = one.score("last"), model.backbone.layers[1].mixer.in_proj.weight
    for n in range(8):
        rows = [(128 + 8 * g + n, 128 + 16 + 8 * g + n) for g in range(2)]
        assert torch.allclose(found[n], sum((weight[b].norm() * weight[c].norm()) ** 2 for b, c in rows), rtol=1e-4)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba2-grouped"])
def test_joint_is_what_the_scan_loses_without_a_state(name):
    """The score of a state, over all tokens, is the squared change of the scan's output when it alone goes."""
    model, arch, ids = models.ours(name), arch_for(CONFIGS[name]), models.tokens(1, 12)
    step = Cut(axis="state", method="joint", keep=1)
    mixer, scans = arch.blocks(model)[0].mixer, []
    with observe(mixer, lambda tap, x: scans.append(x) if tap == "scan" else None), torch.no_grad():
        model(ids)
    scan = scans[0]
    heads = scan.x.shape[2] // scan.C.shape[2]
    lost = torch.zeros(scan.C.shape[-1])
    for t, state in enumerate(scan.states()):
        lost += (state * scan.C[:, t].repeat_interleave(heads, 1)[:, :, None]).square().sum((0, 1, 2))
    (first, *_) = find_units(model, arch, step, 1, ids)
    assert first.keep.nonzero().item() == int(lost.argmax())


def test_a_block_that_turns_nothing_has_no_distance():
    x = torch.randn(7, 5)
    assert scores.cosine_distance(x, 3 * x).abs() < 1e-12
    assert torch.isclose(scores.cosine_distance(x, -x), torch.tensor(2.0, dtype=torch.float64))


def test_the_walk_ends_where_the_smaller_model_does():
    model, arch, ids = models.ours("mamba2"), arch_for(CONFIGS["mamba2"]), models.tokens(1, 12)
    found = find_units(model, arch, Cut(axis="head", keep=4, correct="none"), 4, ids)
    small, twin = Surgery(arch, found).operate(model), models.ours("mamba2")
    mask(twin, arch, found)
    with torch.no_grad():
        assert torch.allclose(small(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)

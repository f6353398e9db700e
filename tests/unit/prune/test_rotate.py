"""Bases for rotated states: optimal, exact at full rank, and found by the walk."""

import pytest
import torch

from ssmcompress.arch.base import ROTATION
from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.scan import Scan
from ssmcompress.arch.surgery import Surgery
from ssmcompress.calib.states import Gramians
from ssmcompress.calib.taps import observe
from ssmcompress.edits import Add, Keep, compose
from ssmcompress.errors import UnsupportedError
from ssmcompress.prune.allocation import allocate
from ssmcompress.prune.cut import cut
from ssmcompress.prune.rotate import bases, worths
from ssmcompress.prune.shares import sized
from ssmcompress.prune.sizes import outline
from ssmcompress.prune.units import find_units
from ssmcompress.steps import SSM, Cut
from tests.unit.arch import models
from tests.unit.arch.models import ALL, CONFIGS
from tests.unit.prune.test_sizes import weights

GROUPS, STATES = 2, 6


def moments(rank=STATES, seed=0):
    rows = torch.randn(2, GROUPS, 40, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mix = torch.randn(2, GROUPS, rank, STATES, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    x = rows @ mix
    return x.mT @ x / 40


def lost(held, read, B, C):
    """tr[(1 - P) E[h h] (1 - P) E[C C]] of each group, with the projector P that the bases make."""
    rest = torch.eye(STATES, dtype=torch.float64) - C.double().mT @ B.double()
    return (rest @ held @ rest.mT @ read).diagonal(dim1=-2, dim2=-1).sum(-1)


@pytest.mark.parametrize("fewer", [1, 3, 5])
def test_the_loss_is_the_sum_of_the_squares_that_were_left_out(fewer):
    held, read = moments()
    B, C = bases(held, read, fewer)
    assert B.shape == C.shape == (GROUPS, fewer, STATES) and B.dtype == torch.float32
    assert torch.allclose(B @ C.mT, torch.eye(fewer).expand(GROUPS, -1, -1), atol=1e-4)
    squares = torch.linalg.eigvals(held @ read).real.sort(dim=-1).values
    assert torch.allclose(lost(held, read, B, C), squares[:, : STATES - fewer].sum(-1), rtol=1e-4)
    assert torch.allclose(worths(held, read)[fewer:].sum(), lost(held, read, B, C).sum().float(), rtol=1e-4)
    for kept in torch.combinations(torch.arange(STATES), fewer):  # coordinates are one choice of basis
        plain = torch.eye(STATES)[kept].expand(GROUPS, -1, -1)
        assert bool((lost(held, read, B, C) <= lost(held, read, plain, plain) * (1 + 1e-5)).all())


def test_states_that_are_never_held_cost_nothing():
    held, read = moments(rank=3)
    B, C = bases(held, read, 3)
    assert bool((lost(held, read, B, C) < 1e-6 * (held @ read).diagonal(dim1=-2, dim2=-1).sum(-1)).all())
    assert all(basis.isfinite().all() for basis in bases(held, read, 5))


@pytest.mark.parametrize(("held", "read"), [(0, 0), (0, 1), (1, 0)])
def test_a_scan_that_holds_or_reads_nothing_has_finite_bases(held, read):
    """Beside one that does, and in the dtype that is stored."""
    moment, (one, two) = moments(), (torch.tensor([scale, 1.0])[:, None, None] for scale in (held, read))
    B, C = bases(one * moment[0], two * moment[1], 3)
    whole = bases(*moment, 3)
    for basis, as_before in zip((B, C), whole, strict=True):
        assert not basis[0].any() and torch.equal(basis[1], as_before[1])
    assert not worths(*torch.zeros(2, 1, STATES, STATES)).any()


@torch.no_grad()
def test_the_moments_are_those_of_every_token():
    model, scans = models.ours("mamba2-grouped"), []
    with observe(model.backbone.layers[0].mixer, lambda tap, x: scans.append(x) if tap == "scan" else None):
        model(models.tokens(2, 7))
    scan: Scan = scans[0]
    seen = Gramians.of(scan)
    seen.add(scan)
    held, read = torch.zeros(2, 2, 8, 8, dtype=torch.float64)
    for t, state in enumerate(scan.states()):
        for b in range(2):
            for head in range(4):
                held[head // 2] += (state[b, head].T @ state[b, head]).double()
            for group in range(2):
                read[group] += torch.outer(scan.C[b, t, group], scan.C[b, t, group]).double()
    assert seen.count == 14 and torch.allclose(seen.total, torch.stack([held, read]), rtol=1e-5, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba2", "mamba2-grouped"])
def test_all_states_in_another_basis_are_the_model_itself(name):
    model, ids = models.ours(name), models.tokens(3, 20)
    arch = arch_for(CONFIGS[name])
    found = find_units(model, arch, Cut(axis="state", method="rotate", keep=1), arch.sizes[0]["state"], ids)
    assert [edit.tensor for edit in found] == [arch.prefix(layer) + name for layer in range(2) for name in ROTATION]
    assert all(isinstance(edit, Add) for edit in found)
    again = Surgery(arch, found).operate(model)(ids).logits
    assert (again - model(ids).logits).abs().max() < 1e-3 * again.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba2", "mamba2-grouped"])
def test_fewer_states_lose_less_than_coordinates_do(name):
    model, ids = models.ours(name), models.tokens(6, 40)
    arch, dense, errors = arch_for(CONFIGS[name]), model(ids).logits, {}
    for method in ("rotate", "ghost", "joint"):
        found = find_units(model, arch, Cut(axis="state", method=method, keep=4), 4, ids)
        small = Surgery(arch, found)
        assert small.arch.sizes[0]["state"] == 4 and small.arch.stock == (method != "rotate")
        errors[method] = float((small.operate(model)(ids).logits - dense).norm())
    assert errors["rotate"] < min(errors["ghost"], errors["joint"])


@torch.no_grad()
def test_a_block_without_a_scan_is_not_rotated():
    model, ids = models.ours("mamba2"), models.tokens(3, 20)
    arch = arch_for(CONFIGS["mamba2"])
    one = Surgery(arch, [Keep(SSM, None, torch.tensor([False, True]))])
    step = Cut(axis="state", method="rotate", keep=4)
    found = find_units(one.operate(model), one.arch, step, 4, ids)
    two = Surgery(one.arch, found)
    assert two.arch.rotated == (None, 16) and [each["state"] for each in two.arch.sizes] == [0, 4]
    assert Surgery(one.arch, outline(one.arch, step, 4)).arch.config.block_sizes == two.arch.config.block_sizes
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    both = Surgery(arch, compose(one.keeps, [one.lift(edit, shapes) for edit in found]))
    steps, once = two.operate(one.operate(model)).state_dict(), both.operate(model).state_dict()
    assert steps.keys() == once.keys() and all(torch.equal(steps[key], once[key]) for key in steps)


@torch.no_grad()
def test_over_the_whole_model_layers_keep_as_many_as_the_best_are_worth():
    model, ids = models.ours("mamba2"), models.tokens(6, 40)
    arch, step = arch_for(CONFIGS["mamba2"]), Cut(axis="state", method="rotate", keep=0.5, scope="model", any_size=True)
    found = cut(model, arch, step, weights("mamba2"), ids)
    sizes = [layer["state"] for layer in Surgery(arch, found).arch.sizes]
    shares = []
    for block in model.backbone.layers:
        seen = Gramians(1, 16)
        with observe(block.mixer, lambda tap, x, seen=seen: seen.add(x) if tap == "scan" else None):
            model(ids)
        shares.append(worths(*seen.moments) / worths(*seen.moments).sum())
    assert sizes == allocate(shares, [range(1, 17)] * 2, 16) and sum(sizes) == 16
    assert [edit.values.shape[1] for edit in found] == [sizes[0], sizes[0], sizes[1], sizes[1]]


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [
        ("mamba", {}, "mamba has no form for rotated states"),
        ("falcon_mamba", {}, "falcon_mamba has no form for rotated states"),
        ("pruned-mamba2-rotated", {}, "have been rotated"),
        ("pruned-mamba2-rotated", {"method": "ghost"}, "have been rotated"),
        ("mamba2", {"stock_only": True}, "No config of transformers says"),
        ("falcon_mamba", {"axis": "channel", "method": "flap", "correct": "bias"}, "no form for a bias"),
    ],
)
def test_what_has_no_form_is_refused(name, step, message):
    with pytest.raises(UnsupportedError, match=message):
        sized(arch_for(ALL[name]), Cut(**{"axis": "state", "method": "rotate", "keep": 0.5} | step), weights(name))

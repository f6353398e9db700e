"""The sums over a scan's states against loops over the recurrence."""

import pytest
import torch

from ssmcompress.arch.mixer import mixers
from ssmcompress.calib.states import DecaysInTime, EntriesInTime, States, StatesInTime
from ssmcompress.calib.taps import observe
from tests.unit.arch import models


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba2-grouped", "mamba2-limited"])
def test_the_sums_are_those_of_the_recurrence(name):
    model, ids = models.ours(name), models.tokens(3, 7)
    mixer, seen = next(mixers(model)), []
    with observe(mixer, lambda module, x: seen.append(x) if module == "scan" else None), torch.no_grad():
        model(ids)
    scan = seen[0]
    found = States.of(scan)
    for row in range(3):
        found.add(type(scan)(*(part[row : row + 1] if i in (0, 1, 3, 4) else part for i, part in enumerate(scan))))
    groups, size = scan.B.shape[2:]
    per_group = scan.x.shape[2] // groups
    delta = torch.nn.functional.softplus(scan.dt + scan.dt_bias).clamp(*scan.limit)
    sums = torch.zeros(3, groups, size, dtype=torch.float64)
    for b in range(3):
        for h in range(scan.x.shape[2]):
            state, g = torch.zeros(scan.x.shape[3], size), h // per_group
            for t in range(7):
                state = torch.exp(delta[b, t, h] * scan.A[h]) * state
                state = state + torch.outer(delta[b, t, h] * scan.x[b, t, h], scan.B[b, t, g])
                sums[0, g] += state.square().sum(0).double()
                sums[1, g] += scan.C[b, t, g].square().double() / per_group
                sums[2, g] += (scan.C[b, t, g].square() * state.square().sum(0)).double()
    assert found.count == 21
    for figure, total in zip((found.energy, found.readout, found.joint), sums, strict=True):
        assert torch.allclose(figure.double(), total / 21, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2-grouped"])
def test_entries_in_time_are_sums_over_windows_of_what_each_token_meets(name):
    model, ids = models.ours(name), models.tokens(3, 7)
    mixer, scans = next(mixers(model)), []
    with observe(mixer, lambda module, x: scans.append(x) if module == "scan" else None), torch.no_grad():
        for row in ids.split(1):
            model(row)
    found, lone = DecaysInTime.of(scans[0]), EntriesInTime.of(scans[0])
    for scan in scans:
        found.add(scan)
        lone.add(scan)
    energy, decay = (torch.zeros(7, *scans[0].A.shape, dtype=torch.float64) for _ in range(2))
    for scan in scans:
        delta = torch.nn.functional.softplus(scan.dt[0] + scan.dt_bias).double()
        states = list(scan.states())
        for t in range(1, 7):
            decay[t] += torch.exp(delta[t][:, None] * scan.A)
            for h, state in enumerate(states[t - 1][0].double()):  # [P, N]
                squares = state.square().sum(0)
                energy[t, h] += squares if scan.A.shape[1] > 1 else squares.sum()
    assert found.count == 21 and not found.total[:, 0].any() and found.total.dtype == torch.float32
    assert torch.equal(found.energy, lone.energy) and lone.total.numel() == 7 * mixer.A_log.numel()
    assert torch.allclose(found.energy.double(), energy, rtol=1e-5)
    assert torch.allclose(found.decay.double(), decay, rtol=1e-5)


def test_saliency_in_time_weighs_the_state_before_each_token():
    model, ids = models.ours("mamba"), models.tokens(3, 7)
    mixer, scans = next(mixers(model)), []
    with observe(mixer, lambda module, x: scans.append(x) if module == "scan" else None), torch.no_grad():
        for row in ids.split(1):
            model(row)
    found = StatesInTime.of(scans[0])
    for scan in scans:
        found.add(scan)
    expected = torch.zeros(7, 5)
    for scan in scans:
        states = [torch.zeros(1, 64, 1, 5), *scan.states()]
        for t in range(7):
            expected[t] += (mixer.A_log.square()[None, :, None] * states[t].square()).sum((0, 1, 2))
    assert found.count == 21 and not found.total[0].any()
    assert torch.allclose(found.total.float(), expected.detach(), rtol=1e-4)


def test_memoryless_entries_have_no_saliency():
    model, ids = models.ours("mamba"), models.tokens(1, 7)
    mixer, scans = next(mixers(model)), []
    mixer.A_log.data[:, 2] = 20
    with observe(mixer, lambda module, x: scans.append(x) if module == "scan" else None), torch.no_grad():
        model(ids)
    found = StatesInTime.of(scans[0])
    found.add(scans[0])
    assert found.total[1:, [0, 1, 3, 4]].all() and not found.total[:, 2].any()

"""Which entries of A_log stay, against loops over samples, tokens and entries of the recurrence."""

import math

import pytest
import torch

from ssmcompress.arch.mixer import mixers
from ssmcompress.arch.registry import arch_for
from ssmcompress.calib.states import DecaysInTime
from ssmcompress.calib.taps import observe
from ssmcompress.edits import Forget
from ssmcompress.prune.apply import find_edits
from ssmcompress.prune.sparsessm import remembering
from ssmcompress.prune.targets import Target
from ssmcompress.steps import Prune
from tests.unit.arch import models
from tests.unit.arch.models import ALL
from tests.unit.prune import brute

IDS = models.tokens(3, 6)


@torch.no_grad()
def sums(name):
    """A_log of the first layer as a list, and by token Σ h² and Σ exp(Δ A) of each entry, by plain loops."""
    model, scans = models.ours(name), []
    with observe(next(mixers(model)), lambda tap, x: scans.append(x) if tap == "scan" else None):
        for row in IDS.split(1):
            model(row)
    A_log = next(mixers(model)).A_log.detach()
    entries = A_log.numel() // len(A_log)
    energy, decay = ([[0.0] * A_log.numel() for _ in range(6)] for _ in range(2))
    for scan in scans:
        heads, width, size = scan.x.shape[2], scan.x.shape[3], scan.B.shape[3]
        for h in range(heads):
            group = h // (heads // scan.B.shape[2])
            for n in range(size):
                entry = h * entries + (n if entries > 1 else 0)
                rate = -math.exp(float(A_log.flatten()[entry]))
                for p in range(width):
                    state = 0.0
                    for t in range(6):
                        delta = math.log1p(math.exp(float(scan.dt[0, t, h] + scan.dt_bias[h])))
                        energy[t][entry] += state**2
                        if p == 0 and (n == 0 or entries > 1):
                            decay[t][entry] += math.exp(delta * rate)
                        into = delta * float(scan.x[0, t, h, p]) * float(scan.B[0, t, group, n])
                        state = math.exp(delta * rate) * state + into
    return A_log, energy, decay


def keep_by_votes(A_log, energy, pick):
    """The entries that are voted out at the fewest tokens."""
    flat, count = A_log.flatten().tolist(), [0] * A_log.numel()
    for row in energy[1:]:
        kept = pick([a * a * e for a, e in zip(flat, row, strict=True)])
        count = [c + (not k) for c, k in zip(count, kept, strict=True)]
    return pick([-c for c in count])


def keep_by_sum(energy, decay, pick):
    """The entries whose weighted sum over time is highest."""
    columns = zip(zip(*energy, strict=True), zip(*decay, strict=True), strict=True)
    return pick([sum(d * d * e / (t + 1) for t, (e, d) in enumerate(zip(es, ds, strict=True))) for es, ds in columns])


CASES = [(name, None) for name in ("mamba", "falcon_mamba", "mamba2", "mamba2-grouped")] + [("mamba", "2:3")]


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_both_scores_are_those_of_plain_loops(name, pattern):
    A_log, energy, decay = sums(name)

    def pick(scores):
        if pattern:
            return brute.n_of_m(torch.tensor(scores).view(A_log.shape), 2, 3).flatten().tolist()
        return brute.drop_lowest(scores, int(len(scores) * 0.4))

    expected = {
        "sparsessm": keep_by_votes(A_log, energy, pick),
        "sparsessm_v2": keep_by_sum(energy, decay, pick),
        "magnitude": pick(A_log.abs().flatten().tolist()),
    }
    assert len({tuple(kept) for kept in expected.values()}) > 1
    for method, kept in expected.items():
        share = {"pattern": pattern} if pattern else {"sparsity": 0.4}
        step = Prune(method=method, include=("A_log",), **share)
        model = models.ours(name)
        found = find_edits(model, arch_for(model.config), step, IDS)
        assert [(type(edit), edit.tensor) for edit in found] == [
            (Forget, f"backbone.layers.{layer}.mixer.A_log") for layer in (0, 1)
        ]
        assert found[0].keep.flatten().tolist() == kept, method
        after = next(mixers(model)).A_log.detach()
        assert torch.equal(after, torch.where(found[0].keep, A_log, 20.0))


@pytest.mark.parametrize("method", ["sparsessm", "sparsessm_v2", "magnitude"])
def test_what_forgets_already_goes_first_and_what_is_zero_is_not_taken_for_it(method):
    torch.manual_seed(0)
    A_log, statistic = torch.rand(4, 6) + 0.5, DecaysInTime(5, 4, 6)
    A_log[1] = 20.0
    A_log[2, 0] = 0.0
    statistic.total = torch.rand_like(statistic.total)
    statistic.total[0, :, 1] = 9.0
    kept = remembering(A_log, method, Target(0.25, None, "tensor"), statistic)
    assert kept.tolist() == [[True] * 6, [False] * 6, [True] * 6, [True] * 6]
    more = remembering(A_log, method, Target(0.5, None, "tensor"), statistic)
    assert int(more.sum()) == 12 and not more[1].any()
    assert remembering(A_log, method, Target(0.0, None, "tensor"), statistic).all()


def test_every_window_counts_the_same():
    """The released code weighs later samples more; here their order changes nothing but the rounding."""
    arch = arch_for(models.CONFIGS["mamba"])
    found = [
        find_edits(models.ours("mamba"), arch, Prune(method="sparsessm_v2"), ids)[0].keep for ids in (IDS, IDS.flip(0))
    ]
    assert torch.equal(*found) and int(found[0].sum()) == 64 * 5 // 2


@torch.no_grad()
@pytest.mark.parametrize("method", ["sparsessm", "sparsessm_v2", "magnitude"])
@pytest.mark.parametrize("name", ["gated-mamba", "gated-mamba2", "gated-mamba2-rotated"])
def test_blocks_without_a_scan_have_nothing_to_forget(name, method):
    arch, finished = arch_for(ALL[name]), {}
    step = Prune(method=method, sparsity=0.5, include=("A_log",))
    found = find_edits(models.ours(name), arch, step, IDS, finished=finished)
    assert [(type(edit), edit.tensor) for edit in found] == [(Forget, arch.weight(1, "A_log"))]
    assert finished[0] == [] and int(found[0].keep.sum()) == -(-found[0].keep.numel() // 2)

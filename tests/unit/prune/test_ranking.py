"""Units of all layers on one scale and in one list, scored on the dense model, chosen once, then cut layer by layer."""

import pytest
import torch

from ssmcompress import edits
from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.calib.stats import Activity, Spread
from ssmcompress.calib.taps import observe
from ssmcompress.edits import Keep, Replace
from ssmcompress.events import LayerDone
from ssmcompress.prune import ranking
from ssmcompress.prune.correct import refitted
from ssmcompress.prune.cut import cut
from ssmcompress.prune.ranking import rank
from ssmcompress.prune.sizes import Weights
from ssmcompress.prune.units import Scorer, squared_gradients
from ssmcompress.steps import METHODS, Cut
from tests.unit.arch import models
from tests.unit.arch.models import ALL
from tests.unit.prune.test_sizes import weights
from tests.unit.prune.test_units import EVERY

IDS = models.tokens(3, 12)


def scorer(name, axis, layer=1, **known):
    model, arch = models.ours(name), arch_for(ALL[name])
    return Scorer(arch, arch.axes(layer)[axis], layer, arch.blocks(model)[layer], **known)


@pytest.mark.parametrize(
    ("name", "axis"), [("mamba", "channel"), ("mamba2-grouped", "head"), ("mamba2", "head_channel")]
)
def test_flap_is_the_mean_z_score_of_what_a_unit_owns(name, axis):
    spread = Spread(64)
    spread.add(torch.randn(5, 9, 64) * torch.rand(64))
    one = scorer(name, axis, statistics={"out_proj": spread})
    metric = spread.variance * one.block.mixer.out_proj.weight.square().sum(0)
    z = (metric - metric.mean()) / metric.std()
    part = next(part for part in one.axis.slices if part.tensor == "mixer.out_proj.weight")
    wanted = [z[part.indices(unit)].mean() for unit in range(one.axis.size)]
    assert torch.allclose(one.comparable("flap"), torch.stack(wanted), atol=1e-4)


def test_last_is_the_share_of_the_states_that_count_at_least_as_much():
    one = scorer("mamba", "state")
    plain = one.score("last").tolist()
    wanted = [each / sum(other for other in plain if other >= each) for each in plain]
    assert torch.allclose(one.comparable("last"), torch.tensor(wanted)) and max(wanted) == 1


def test_other_scores_are_shares_of_the_layer():
    one = scorer("mamba2", "head")
    assert torch.allclose(one.comparable("magnitude"), one.score("magnitude") / one.score("magnitude").sum())
    assert torch.equal(one.comparable("random"), one.score("random"))


@pytest.mark.parametrize(("name", "axis", "method"), EVERY)
def test_the_order_within_a_layer_stays(monkeypatch, name, axis, method):
    model, arch, plain = models.ours(name), arch_for(ALL[name]), []
    true = Scorer.comparable
    monkeypatch.setattr(Scorer, "comparable", lambda self, by: (plain.append(self.score(by)), true(self, by))[1])
    even = [arch.axes()[axis].size // 2] * 2
    found = rank(model, arch, Cut(axis=axis, method=method, keep=0.5, scope="model"), even, IDS)
    for own, shared in zip(plain, found, strict=True):
        assert len(shared) == arch.axes()[axis].size and shared.isfinite().all()
        assert not ((own[:, None] > own) & (shared[:, None] < shared)).any()


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_every_layer_is_scored_in_the_dense_model(name):
    model, arch, axis = models.ours(name), arch_for(ALL[name]), "channel" if name == "mamba" else "head"
    block, seen, told = arch.blocks(model)[1], Activity(64 if name == "mamba" else 96), []
    with observe(block.mixer, lambda tap, x: seen.add(x) if tap == "conv1d" else None), torch.no_grad():
        for row in IDS.split(1):
            model(row)
    wanted = Scorer(arch, arch.axes(1)[axis], 1, block, {"conv1d": seen}).comparable("minitron")
    step = Cut(axis=axis, method="minitron", keep=0.5, scope="model")
    assert torch.equal(rank(model, arch, step, (4, 4), IDS, emit=told.append)[1], wanted)
    assert [event.error for event in told if isinstance(event, LayerDone)] == [None, None]


@pytest.mark.parametrize("method", ["last", "ghost", "taylor"])
def test_the_best_of_the_whole_model_stay(method):
    model, arch = models.ours("mamba"), arch_for(ALL["mamba"])
    step = Cut(axis="state", method=method, keep=0.5, scope="model")
    scores = torch.stack(rank(model, arch, step, (3, 2), IDS))
    found = cut(model, arch, step, weights("mamba"), IDS)
    kept = torch.stack([edit.keep for edit in found])
    assert int(kept.sum()) == 5 and kept.any(1).all()
    floor = scores.amax(1).argmin()  # a layer keeps its best, whatever the others have
    others = kept.clone()
    others[floor, scores[floor].argmax()] = False
    assert scores[~kept].max() <= scores[others].min()


@torch.no_grad()
def test_the_cut_blocks_are_refitted_one_after_the_other():
    model, arch = models.ours("mamba"), arch_for(ALL["mamba"])
    step = Cut(axis="channel", keep=0.5, method="magnitude", correct="refit", scope="model", any_size=True)
    found = cut(model, arch, step, weights("mamba"), IDS)
    assert [type(edit) for edit in found] == [Keep, Replace] * 2
    sizes = [int(edit.keep.sum()) for edit in found[::2]]
    assert sum(sizes) == 64 and sizes[0] != sizes[1]
    small = models.ours("mamba")
    edits.apply(found, dict(small.named_parameters()))
    small = Surgery(arch, found).operate(small)
    entering = arch.blocks(small)[0](small.get_input_embeddings()(IDS))
    plain = Surgery(arch, found[::2]).operate(models.ours("mamba"))
    wanted = refitted(arch.blocks(model)[1], arch.blocks(plain)[1], [entering])
    assert torch.allclose(arch.blocks(small)[1].mixer.out_proj.weight, wanted, atol=1e-4)


def test_what_an_earlier_run_chose_is_not_chosen_again(monkeypatch):
    model, arch, finished = models.ours("mamba"), arch_for(ALL["mamba"]), {}
    step = Cut(axis="channel", keep=0.5, method="flap", scope="model")
    whole = cut(model, arch, step, weights("mamba"), IDS, finished=finished)
    assert set(finished) == {0, 1, arch.layers}
    del finished[1]
    monkeypatch.setattr(ranking, "rank", None)
    again = cut(model, arch, step, weights("mamba"), IDS, finished=finished)
    assert [type(edit) for edit in again] == [Keep, Replace] * 2
    assert all(torch.equal(one.pack(), two.pack()) for one, two in zip(whole, again, strict=True))


def test_layers_that_differ_are_cut_by_what_their_own_units_own():
    """Taylor's score of a head lies in other rows of in_proj where a layer has other states."""
    model, arch = models.ours("pruned-mamba2"), arch_for(ALL["pruned-mamba2"])
    found = cut(model, arch, Cut(axis="head", keep=0.5, correct="none"), weights("pruned-mamba2"), IDS)
    assert [int(edit.keep.sum()) for edit in found] == [3, 1]
    assert Surgery(arch, found).operate(model)(IDS).logits.isfinite().all()
    axis = arch.axes(1)["head"]
    fisher = squared_gradients(model, IDS, axis.tensors)
    wanted = Scorer(arch, axis, 1, arch.blocks(model)[1], fisher=fisher).score("taylor")
    assert torch.equal(rank(model, arch, Cut(axis="head", keep=0.5, scope="model"), (3, 1), IDS)[1], wanted)


@pytest.mark.parametrize("method", METHODS["state"])
def test_blocks_without_a_scan_take_no_part(method):
    arch = arch_for(ALL["gated-mamba2"])
    arch = arch_for(arch.resized([*arch.sizes, arch.sizes[1]]))
    torch.manual_seed(0)
    model, known = arch.build("cpu").eval(), {key: tensor.shape for key, tensor in arch.build().named_parameters()}
    step = Cut(axis="state", keep=4, scope="model", method=method, any_size=True)
    found = cut(model, arch, step, Weights(known, dict.fromkeys(known, 4)), IDS)
    small = Surgery(arch, found).arch
    sizes = [layer["state"] for layer in small.sizes]
    assert sizes[0] == 0 < min(sizes[1:]) and sum(sizes) == 4
    assert not any(edit.tensor.startswith((arch.prefix(0), "state:0")) for edit in found)

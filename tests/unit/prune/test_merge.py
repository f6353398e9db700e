"""Groups of B and C merged, against means by hand and the model in which every group of a run has them."""

import pytest
import torch

from ssmcompress import edits
from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.edits import Keep, Replace
from ssmcompress.prune.merge import merged
from ssmcompress.prune.units import find_units
from ssmcompress.steps import Cut
from tests.unit.arch import models
from tests.unit.arch.models import ALL

IDS = models.tokens(3, 21)


def merge(model, arch, after, dtypes=None, **step):
    return find_units(model, arch, Cut(axis="group", keep=0.5, **step), after, IDS, dtypes)


def alike(mixer, run):
    """Gives every run of the eight groups the rows of its first."""
    with torch.no_grad():
        for tensor, before in (
            *((each, 64) for each in mixer.in_proj.parameters()),
            *((each, 0) for each in mixer.conv1d.parameters()),
        ):
            for start in (64 + before, 64 + before + 32):
                for group in range(8):
                    first = start + 4 * (group - group % run)
                    tensor[start + 4 * group : start + 4 * group + 4] = tensor[first : first + 4].clone()


@pytest.mark.parametrize("after", [1, 2, 4, 8])
def test_every_row_of_a_run_is_the_mean_of_its_rows(after):
    model = models.ours("mamba2-limited")
    axis, block = arch_for(model.config).axes()["group"], model.backbone.layers[0]
    run = 8 // after
    for name, before in (("in_proj.weight", 64), ("in_proj.bias", 64), ("conv1d.weight", 0), ("conv1d.bias", 0)):
        tensor = block.get_parameter(f"mixer.{name}").detach()
        wanted = tensor.clone()
        for start in (64 + before, 64 + before + 32):  # B, then C: eight groups of four states
            for group in range(8):
                first = group - group % run
                for n in range(4):
                    rows = [tensor[start + 4 * other + n] for other in range(first, first + run)]
                    wanted[start + 4 * group + n] = sum(rows) / run
        found = merged(axis, f"mixer.{name}", tensor, after)
        assert torch.allclose(found, wanted, atol=1e-6) and (after < 8 or torch.equal(found, tensor)), name
        half = tensor.bfloat16()
        assert torch.equal(
            merged(axis, f"mixer.{name}", half, after), merged(axis, f"mixer.{name}", half.float(), after)
        )


@torch.no_grad()
@pytest.mark.parametrize(("name", "after"), [("mamba2-grouped", 1), ("mamba2-limited", 2)])
def test_what_is_left_is_the_model_with_the_means_in_every_group(name, after):
    model = models.ours(name)
    arch, before = arch_for(model.config), {key: tensor.clone() for key, tensor in model.named_parameters()}
    dtypes = {key: torch.bfloat16 for key in before if "in_proj" in key}
    found = merge(model, arch, after, dtypes)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.named_parameters())
    keeps = [edit for edit in found if isinstance(edit, Keep)]
    news = [edit for edit in found if isinstance(edit, Replace)]
    every = [True] + [False] * (arch.config.n_groups // after - 1)
    assert [(keep.layer, keep.keep.tolist()) for keep in keeps] == [(0, every * after), (1, every * after)]
    wanted = [key for key in before if "in_proj" in key or "conv1d" in key]
    assert sorted(edit.tensor for edit in news) == sorted(wanted)
    assert all(edit.values.dtype == (torch.bfloat16 if "in_proj" in edit.tensor else torch.float32) for edit in news)
    edits.apply(news, dict(model.named_parameters()))
    small = Surgery(arch, keeps).operate(model)
    wanted, logits = model(IDS).logits, small(IDS).logits
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    dense = models.ours(name)(IDS).logits
    assert (dense - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize(("run", "after", "lossless"), [(2, 4, True), (4, 4, True), (8, 1, True), (2, 2, False)])
def test_groups_that_are_alike_merge_without_a_loss(run, after, lossless):
    model = models.ours("mamba2-limited")
    for block in model.backbone.layers:
        alike(block.mixer, run)
    wanted, arch = model(IDS).logits, arch_for(model.config)
    found = merge(model, arch, after)
    edits.apply(found, dict(model.named_parameters()))
    logits = Surgery(arch, found).operate(model)(IDS).logits
    assert ((logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()) == lossless


@torch.no_grad()
def test_a_refit_makes_up_for_what_merging_changed():
    model = models.ours("mamba2-limited")
    arch = arch_for(model.config)
    inputs, dense = model.get_input_embeddings()(IDS), arch.blocks(model)[0]
    wanted, lost = dense(inputs), []
    for correct in ("none", "refit"):
        found = merge(model, arch, 1, correct=correct)
        assert len(found) == (10 if correct == "none" else 12)
        twin = models.ours("mamba2-limited")
        edits.apply(found, dict(twin.named_parameters()))
        lost.append(float((arch.blocks(Surgery(arch, found).operate(twin))[0](inputs) - wanted).square().sum()))
    assert lost[1] < 0.9 * lost[0]


@torch.no_grad()
def test_half_and_half_again_is_a_quarter_and_layers_may_differ():
    """The lifted edits of both steps; runs are of one length, so that means of means are means."""
    model, shapes = models.ours("mamba2-limited"), {}
    arch = arch_for(model.config)
    shapes = {key: tensor.shape for key, tensor in model.named_parameters()}
    at_once, one = merge(model, arch, [2, 1]), merge(model, arch, [4, 1])
    surgery, middle = Surgery(arch, one), models.ours("mamba2-limited")
    edits.apply(one, dict(middle.named_parameters()))
    middle = surgery.operate(middle)
    two = merge(middle, surgery.arch, [2, 1])
    both = edits.compose(one, [surgery.lift(edit, shapes) for edit in two])
    smalls = []
    for found in (at_once, both):
        twin = models.ours("mamba2-limited")
        edits.apply(found, dict(twin.named_parameters()))
        smalls.append(Surgery(arch, found).operate(twin))
    assert [sizes["group"] for sizes in smalls[1].config.block_sizes] == [2, 1]
    assert smalls[0].config.block_sizes == smalls[1].config.block_sizes
    for (key, first), second in zip(smalls[0].named_parameters(), smalls[1].parameters(), strict=True):
        assert torch.allclose(first, second, atol=1e-6), key


@pytest.mark.parametrize("method", ["taylor", "magnitude", "random"])
def test_other_methods_keep_the_best_group_of_each_run(method):
    model = models.ours("mamba2-limited")
    arch = arch_for(model.config)
    found = merge(model, arch, 4, method=method)
    assert [type(edit) for edit in found] == [Keep, Keep]
    assert all(edit.keep.view(4, 2).sum(1).tolist() == [1] * 4 for edit in found)
    if method == "magnitude":
        mixer = model.backbone.layers[0].mixer
        norms = []
        for group in range(8):
            rows = [*range(64 + 4 * group, 68 + 4 * group), *range(96 + 4 * group, 100 + 4 * group)]
            norms.append(mixer.in_proj.weight[[64 + row for row in rows]].square().sum())
            norms[-1] = norms[-1] + mixer.conv1d.weight[rows].square().sum()
        best = torch.stack(norms).view(4, 2).argmax(1) + torch.arange(0, 8, 2)
        assert found[0].keep.nonzero().flatten().tolist() == best.tolist()


def test_blocks_without_a_scan_take_no_part():
    model, arch = models.ours("gated-mamba2"), arch_for(ALL["gated-mamba2"])
    assert {edit.tensor.removeprefix("backbone.").split(".")[1] for edit in merge(model, arch, 1)} == {"1"}

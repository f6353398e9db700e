"""Corrections against their definitions: the norm's scale, the least squares of out_proj, and what they leave alone."""

import pytest
import torch

from ssmcompress import edits
from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.calib.taps import observe
from ssmcompress.edits import Add, Keep, Replace
from ssmcompress.prune.correct import compensated, refitted, rescaled
from ssmcompress.prune.units import find_units
from ssmcompress.steps import Cut
from tests.unit.arch import models
from tests.unit.arch.models import CONFIGS

IDS = models.tokens(6, 40)


def inputs(block, hidden):
    seen = []
    with observe(block.mixer, lambda tap, x: seen.append(x.flatten(0, 1)) if tap == "out_proj" else None):
        block(hidden)
    return seen[0]


@pytest.mark.parametrize("name", ["mamba2", "mamba2-grouped"])
def test_the_norm_is_scaled_by_the_energy_that_stays(name):
    model, config = models.ours(name), CONFIGS[name]
    norm, width = model.backbone.layers[0].mixer.norm, 64
    alive, energy = torch.rand(width) < 0.6, torch.rand(width)
    found = rescaled(norm, alive, energy)
    size = width // config.n_groups
    for group in range(config.n_groups):
        part = slice(group * size, (group + 1) * size)
        kept = energy[part][alive[part]].mean()
        assert torch.allclose(found[part], norm.weight[part] * (kept / energy[part].mean()).sqrt())
    assert torch.allclose(rescaled(norm, torch.ones(width).bool(), energy), norm.weight)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba-biased"])
def test_the_refit_is_the_best_projection_of_what_is_left(name):
    model = models.ours(name)
    arch = arch_for(model.config)
    axis = "channel" if "channel" in arch.axes() else "head"
    step = Cut(axis=axis, keep=0.5, method="magnitude")
    after = arch.axes()[axis].size // 2
    keep = find_units(model, arch, step, after)
    dense, cut = arch.blocks(model)[0], arch.blocks(Surgery(arch, keep).operate(model))[0]
    hidden = [model.get_input_embeddings()(IDS[:3]), model.get_input_embeddings()(IDS[3:])]
    found = refitted(dense, cut, hidden)
    x = torch.cat([inputs(cut, rows) for rows in hidden])
    y = torch.cat([inputs(dense, rows) for rows in hidden]) @ dense.mixer.out_proj.weight.T
    old = (x @ cut.mixer.out_proj.weight.T - y).square().sum()
    new = (x @ found.T - y).square().sum()
    least = (x @ torch.linalg.lstsq(x.double(), y.double()).solution.float() - y).square().sum()
    assert least <= new * (1 + 1e-4) and new < old
    assert new < least + 0.2 * (old - least)


@torch.no_grad()
def test_without_a_loss_the_refit_changes_nothing():
    model = models.ours("mamba2")
    block = arch_for(model.config).blocks(model)[0]
    found = refitted(block, block, [model.get_input_embeddings()(IDS)])
    assert torch.allclose(found, block.mixer.out_proj.weight, atol=1e-5)


@torch.no_grad()
def test_the_bias_stands_in_for_the_mean_of_what_went():
    """Inputs of out_proj that are constant go without any error."""
    projection, x, gone = torch.nn.Linear(9, 4, bias=False), torch.randn(50, 9), torch.tensor([1, 4, 8])
    x[:, gone] = torch.tensor([0.5, -2.0, 7.0])
    left = torch.ones(9).index_fill(0, gone, 0.0)
    bias = compensated(projection, gone, x.mean(0))
    assert torch.allclose((x * left) @ projection.weight.T + bias, projection(x), atol=1e-5)
    biased = torch.nn.Linear(9, 4)
    assert torch.allclose((x * left) @ biased.weight.T + compensated(biased, gone, x.mean(0)), biased(x), atol=1e-5)


@torch.no_grad()
def test_the_walk_adds_a_bias_or_changes_the_one_there_is():
    for name, kind in (("mamba", Add), ("mamba-biased", Replace), ("mamba2", Add)):
        model = models.ours(name)
        arch = arch_for(model.config)
        axis = "channel" if "channel" in arch.axes() else "head"
        dtypes = {key: torch.bfloat16 for key, _ in model.named_parameters()}
        step, after = Cut(axis=axis, keep=0.5, method="flap", correct="bias"), arch.axes()[axis].size // 2
        found = find_units(model, arch, step, after, IDS, dtypes)
        assert [type(edit) for edit in found] == [Keep, kind] * 2 and found[1].values.dtype == torch.bfloat16
        mixer, (kept, bias, *_) = model.backbone.layers[0].mixer, found
        x = torch.cat([inputs(model.backbone.layers[0], model.get_input_embeddings()(row[None])) for row in IDS])
        gone = (~kept.keep).repeat_interleave(x.shape[1] // len(kept.keep))
        wanted = (mixer.out_proj.weight[:, gone] @ x.mean(0)[gone]) + (mixer.out_proj.bias if kind is Replace else 0.0)
        assert torch.allclose(bias.values.float(), wanted, rtol=2e-2, atol=1e-4)
        edits.apply(found, dict(model.named_parameters()))
        small = Surgery(arch, found).operate(model)
        assert torch.equal(small.backbone.layers[1].mixer.out_proj.bias, found[3].values.float())


@pytest.mark.parametrize(
    ("name", "axis", "correct", "tensor"),
    [
        ("mamba", "channel", "refit", "mixer.out_proj.weight"),
        ("mamba", "state", "refit", "mixer.out_proj.weight"),
        ("mamba2-grouped", "head", "refit", "mixer.out_proj.weight"),
        ("mamba2-grouped", "head", "rescale", "mixer.norm.weight"),
        ("mamba2", "head_channel", "rescale", "mixer.norm.weight"),
    ],
)
def test_a_corrected_cut_is_a_keep_and_new_values_of_the_stored_dtype(name, axis, correct, tensor):
    model = models.ours(name)
    arch = arch_for(model.config)
    after = arch.axes()[axis].size // 2
    step = Cut(axis=axis, keep=0.5, correct=correct)
    dtypes = {key: torch.bfloat16 for key, _ in model.named_parameters()}
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    found = find_units(model, arch, step, after, IDS, dtypes)
    assert [type(edit) for edit in found] == [Keep, Replace] * 2
    assert [edit.tensor for edit in found[1::2]] == [arch.prefix(layer) + tensor for layer in range(2)]
    assert all(edit.values.dtype == torch.bfloat16 for edit in found[1::2])
    assert all(edit.shape == before[edit.tensor].shape for edit in found[1::2])
    assert all(torch.equal(parameter, before[key]) for key, parameter in model.named_parameters())
    edits.apply(found, dict(model.named_parameters()))
    assert Surgery(arch, found).operate(model)(IDS).logits.isfinite().all()


@torch.no_grad()
def test_the_walk_goes_on_from_the_corrected_block():
    """What the second block is refitted on is what the corrected first block makes."""
    model = models.ours("mamba")
    arch, step = arch_for(model.config), Cut(axis="channel", keep=0.5, method="magnitude", correct="refit")
    found = find_units(model, arch, step, 32, IDS)
    small = models.ours("mamba")
    edits.apply(found, dict(small.named_parameters()))
    small = Surgery(arch, found).operate(small)
    hidden = small.get_input_embeddings()(IDS)
    entering = arch.blocks(small)[0](hidden)
    plain = Surgery(arch, [edit for edit in found if isinstance(edit, Keep)]).operate(models.ours("mamba"))
    wanted = refitted(arch.blocks(model)[1], arch.blocks(plain)[1], [entering])
    assert torch.allclose(arch.blocks(small)[1].mixer.out_proj.weight, wanted, atol=1e-4)

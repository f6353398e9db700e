"""A step becomes edits that are already made to the model, and would make it again."""

import copy

import pytest
import torch

from ssmcompress import edits
from ssmcompress.arch.registry import arch_for
from ssmcompress.calib.stats import Hessian, SquaredSum
from ssmcompress.edits import Mask, Replace
from ssmcompress.events import LayerDone, Phase
from ssmcompress.prune.apply import BLOCK, find_edits, prune_weight
from ssmcompress.prune.sparsegpt import sparsegpt
from ssmcompress.prune.targets import Target
from ssmcompress.steps import Prune
from tests.unit.arch import models
from tests.unit.prune import brute

IDS = models.tokens(6, 16)
STEPS = {
    "wanda": Prune(sparsity=0.5),
    "magnitude": Prune(method="magnitude", sparsity=0.3),
    "sparsegpt": Prune(method="sparsegpt", sparsity=0.5),
    "2:4": Prune(pattern="2:4"),
    "conv1d": Prune(include=("conv1d",), sparsity=0.25),
}


def found(model, step, **kwargs):
    return find_edits(model, arch_for(model.config), step, IDS, **kwargs)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2-grouped", "gated-mamba", "gated-mamba2"])
def test_the_edits_make_of_the_dense_model_what_the_model_now_is(name, step):
    model = models.ours(name)
    dense = copy.deepcopy(model)
    made = found(model, STEPS[step])
    assert made and not all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    edits.apply(made, dict(dense.named_parameters()))
    for (key, now), again in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(now, again), key


def test_new_values_are_rounded_to_what_is_stored():
    model = models.ours("mamba")
    names = [f"backbone.layers.{layer}.mixer.{module}.weight" for layer in (0, 1) for module in ("in_proj", "out_proj")]
    step = Prune(method="sparsegpt", include=("in_proj", "out_proj"))
    made = found(model, step, dtypes=dict.fromkeys(names, torch.bfloat16))
    values = {edit.tensor: edit.values for edit in made if isinstance(edit, Replace)}
    assert set(values) == set(names)
    for name in names:
        assert values[name].dtype == torch.bfloat16
        keep = next(edit.keep for edit in made if isinstance(edit, Mask) and edit.tensor == name)
        assert torch.equal(model.get_parameter(name)[keep], values[name].float()[keep])


def test_only_sparsegpt_moves_values():
    for name, step in STEPS.items():
        kinds = {type(edit) for edit in found(models.ours("mamba"), step)}
        assert kinds == ({Mask, Replace} if name == "sparsegpt" else {Mask})


def test_magnitude_reads_no_tokens():
    model = models.ours("mamba")
    made = find_edits(model, arch_for(model.config), STEPS["magnitude"])
    for edit in made:
        dense = models.ours("mamba").get_parameter(edit.tensor)
        assert torch.equal(edit.keep, brute.unstructured(dense.detach().abs().flatten(1), 0.3, "tensor"))


def test_layers_are_told_in_order_with_what_is_kept():
    events = []
    found(models.ours("mamba2"), STEPS["2:4"], emit=events.append)
    assert events[0] == Phase("pruning by wanda", 2)
    layers = [event for event in events if isinstance(event, LayerDone)]
    assert [event.layer for event in layers] == [0, 1] and all(event.kept == 0.5 for event in layers)


def test_a_tied_head_is_pruned_once_as_the_embeddings():
    model = models.ours("mamba")
    dense = copy.deepcopy(model)
    made = found(model, Prune(include=("lm_head",)))
    assert [edit.tensor for edit in made] == ["backbone.embeddings.weight"]
    hidden = model.backbone(IDS, use_cache=False).last_hidden_state.detach()  # of the pruned model
    assert hidden.isfinite().all()
    inputs = dense.backbone(IDS, use_cache=False).last_hidden_state.detach().flatten(0, 1)
    score = dense.backbone.embeddings.weight.detach().abs() * inputs.double().square().sum(0).sqrt().float()
    assert torch.equal(made[0].keep, brute.unstructured(score, 0.5, "row"))
    assert model.lm_head.weight is model.backbone.embeddings.weight


def weight_and(kind):
    torch.manual_seed(0)
    weight, statistic = torch.randn(6, 300), kind(300)
    statistic.add(torch.randn(50, 300) * torch.linspace(0.1, 3, 300))
    return weight, statistic


def test_a_weight_by_wanda():
    weight, statistic = weight_and(SquaredSum)
    values, keep = prune_weight(weight, "wanda", Target(0.5, None, "row"), statistic)
    assert values is weight
    assert torch.equal(keep, brute.unstructured(weight.abs() * statistic.norm, 0.5, "row"))
    _, keep = prune_weight(weight, "wanda", Target(0.5, (1, 4), "row"), statistic)
    assert torch.equal(keep, brute.n_of_m(weight.abs() * statistic.norm, 1, 4))


def test_a_weight_by_sparsegpt_goes_block_by_block():
    weight, statistic = weight_and(Hessian)
    values, keep = prune_weight(weight, "sparsegpt", Target(0.37, None, "row"), statistic)
    for start in range(0, 300, BLOCK):
        block = keep[:, start : start + BLOCK]
        assert int((~block).sum()) == int(block.numel() * 0.37)
    expected = sparsegpt(weight, statistic.value, sparsity=0.37)
    assert torch.equal(values, expected[0]) and torch.equal(keep, expected[1])


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
def test_sparsity_zero_keeps_all_and_moves_nothing(method):
    weight, statistic = weight_and(Hessian if method == "sparsegpt" else SquaredSum)
    values, keep = prune_weight(weight, method, Target(0.0, None, "row"), statistic)
    assert values is weight and keep.all()


def test_a_convolution_is_ranked_as_a_whole_by_channel_norm():
    torch.manual_seed(0)
    weight, statistic = torch.randn(12, 1, 4), SquaredSum(12)
    statistic.add(torch.randn(50, 12) * torch.linspace(0.1, 3, 12))
    _, keep = prune_weight(weight, "wanda", Target(0.4, None, "tensor"), statistic)
    score = weight.abs() * statistic.norm[:, None, None]
    assert keep.shape == weight.shape
    assert torch.equal(keep.flatten(), brute.unstructured(score.flatten(), 0.4, "tensor"))

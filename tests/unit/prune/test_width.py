"""Residual dimensions: their scores against loops, and the norms' new weights against the energy that went."""

import pytest
import torch
import torch.nn.functional as F

from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.edits import Keep, Replace, apply
from ssmcompress.prune.width import find_width
from ssmcompress.steps import METHODS, Cut
from tests.unit.arch import models
from tests.unit.arch.models import ALL

NAMES = ("mamba", "falcon_mamba", "mamba2-limited", "gated-mamba", "gated-mamba2")
IDS = models.tokens(3, 12)


def found(model, **said):
    step = Cut(axis="width", keep=16, **said)
    return find_width(model, arch_for(model.config), step, 16, IDS if step.calibrated else None)


def kept(score):
    return set(score.argsort(descending=True)[:16].tolist())


def chosen(edits):
    return set(edits[0].keep.nonzero().flatten().tolist())


@pytest.mark.parametrize("method", METHODS["width"])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_keeps_as_many_of_the_whole_model(name, method):
    model = models.ours(name)
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    (keep,) = found(model, method=method, correct="none")
    assert (keep.axis, keep.layer, int(keep.keep.sum()), len(keep.keep)) == (
        "width",
        None,
        16,
        model.config.hidden_size,
    )
    assert all(torch.equal(parameter, before[key]) for key, parameter in model.named_parameters())
    assert torch.equal(found(model, method=method, correct="none")[0].keep, keep.keep)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_minitron_sums_what_the_norms_of_all_blocks_give_out(name):
    model, score = models.ours(name), torch.zeros(32)
    for layer, block in enumerate(model.backbone.layers):
        per_window = []
        for row in IDS:
            stream = model.backbone.embeddings(row[None])
            for earlier in model.backbone.layers[:layer]:
                stream = earlier(stream)
            per_window.append(block.norm(stream)[0].abs().mean(0))
        score += torch.stack(per_window).square().sum(0).sqrt()
    assert chosen(found(model, method="minitron", correct="none")) == kept(score)


def test_magnitude_is_the_norm_of_the_matrices_that_run_along_a_dimension():
    model = models.ours("mamba2")
    score = model.backbone.embeddings.weight.square().sum(0) + model.lm_head.weight.square().sum(0)
    for block in model.backbone.layers:
        score = score + block.mixer.in_proj.weight.square().sum(0) + block.mixer.out_proj.weight.square().sum(1)
    assert not model.config.tie_word_embeddings
    assert chosen(found(model, method="magnitude", correct="none")) == kept(score)


def test_taylor_weighs_all_that_runs_along_a_dimension_by_its_mean_squared_gradient():
    model = models.ours("mamba")
    assert model.config.tie_word_embeddings
    tensors = [(model.backbone.embeddings.weight, 1), (model.backbone.norm_f.weight, 0)]
    for block in model.backbone.layers:
        tensors += [(block.norm.weight, 0), (block.mixer.in_proj.weight, 1), (block.mixer.out_proj.weight, 0)]
    score = torch.zeros(32)
    for row in IDS:
        model.zero_grad()
        logits = model(row[None]).logits[0]
        F.cross_entropy(logits[:-1], row[1:]).backward()
        for tensor, dim in tensors:
            each = tensor.detach().square() * tensor.grad.square() / len(IDS)
            score += each.movedim(dim, 0).reshape(32, -1).sum(1)
    assert chosen(found(model, method="taylor", correct="none")) == kept(score)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_rescaled_norms_give_out_on_average_what_they_did(name):
    """In the dense model, a norm over what stays alone, with its new weight, scales it as the whole norm did."""
    model = models.ours(name)
    keep, *new = found(model, method="random", correct="rescale")
    assert isinstance(keep, Keep) and [edit.tensor for edit in new] == [
        "backbone.layers.0.norm.weight",
        "backbone.layers.1.norm.weight",
        "backbone.norm_f.weight",
    ]
    stream = model.backbone.embeddings(IDS)
    norms = [block.norm for block in model.backbone.layers] + [model.backbone.norm_f]
    for norm, edit, block in zip(norms, new, [*model.backbone.layers, None], strict=True):
        assert isinstance(edit, Replace)
        energy = stream.square().mean((0, 1))
        scale = (energy[keep.keep].mean() / energy.mean()).sqrt()
        assert torch.allclose(edit.values, norm.weight * scale, rtol=1e-4)
        stream = stream if block is None else block(stream)


@torch.no_grad()
def test_norms_of_a_stream_whose_dimensions_are_alike_stay_as_they_are():
    model = models.ours("mamba")
    model.backbone.embeddings.weight.copy_(model.backbone.embeddings.weight.sign())
    for block in model.backbone.layers:
        block.mixer.out_proj.weight.zero_()
    edits = found(model, method="magnitude", correct="rescale")
    small = Surgery(arch_for(ALL["mamba"]), edits[:1]).operate(model)
    apply(edits[1:], dict(model.named_parameters()))
    again = Surgery(arch_for(ALL["mamba"]), edits).operate(model)
    assert torch.allclose(small(IDS).logits, again(IDS).logits, rtol=1e-4)

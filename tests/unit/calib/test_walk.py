"""Block by block: what is observed, what is passed on, and when the walk refuses."""

import copy

import pytest
import torch

from ssmcompress.arch.mixer import mixers
from ssmcompress.arch.registry import arch_for
from ssmcompress.calib.stats import Hessian, SquaredSum
from ssmcompress.calib.walk import Walk
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.events import LayerDone
from tests.unit.arch import models

FAMILIES = ("mamba", "falcon_mamba", "mamba2", "mamba2-grouped")


def walk(model, edit=None, modules=None, collect=SquaredSum, batch=2, ids=None, emit=None):
    """The statistics of every layer, the residual stream at the end, and the events."""
    arch, seen, events = arch_for(model.config), {}, []

    def gather(layer, block, statistics, hidden):
        seen[layer] = dict(statistics)
        return block, 1.0 if edit is None else edit(layer, block)

    given = models.tokens(5, 11) if ids is None else ids
    watched = dict.fromkeys(modules or arch.prunable, collect)
    hidden = Walk(watched, gather, batch).run(model, arch, given, emit or events.append)
    return seen, hidden, events


@torch.no_grad()
def streams(model, ids):
    """The residual stream before each block and the model's last hidden state, in one pass."""
    given = []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        for block in arch_for(model.config).blocks(model)
    ]
    last = model.backbone(ids, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return given, last


@pytest.mark.parametrize("name", FAMILIES)
def test_the_walk_sees_what_the_model_computes(name):
    model, ids = models.ours(name), models.tokens(5, 11)
    seen, hidden, _ = walk(model, ids=ids)
    arch = arch_for(model.config)
    given, last = streams(model, ids)
    assert [tuple(rows.shape) for rows in hidden] == [(2, 11, 32), (2, 11, 32), (1, 11, 32)]
    assert torch.allclose(arch.final_norm(model)(torch.cat(list(hidden))), last, rtol=1e-5, atol=1e-6)
    for layer, block in enumerate(arch.blocks(model)):
        inputs = block.norm(given[layer]).detach()
        assert seen[layer]["in_proj"].count == 55
        expected = inputs.double().flatten(0, 1).norm(dim=0).float()
        assert torch.allclose(seen[layer]["in_proj"].norm, expected, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch", [1, 5])
def test_batches_change_nothing(name, batch):
    model = models.ours(name)
    some, other = walk(model)[0], walk(model, batch=batch)[0]
    for layer in some:
        for module, statistic in some[layer].items():
            assert torch.allclose(statistic.norm, other[layer][module].norm, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_later_blocks_see_what_the_edited_ones_make(name):
    """The second block's statistics are those of a model whose first block was edited beforehand."""
    model = models.ours(name)
    dense = walk(copy.deepcopy(model))[0]

    def halve(layer, block):
        if layer == 0:
            block.mixer.out_proj.weight.data[:, ::2] = 0
        return 0.5

    walked = walk(copy.deepcopy(model), halve)[0]
    arch = arch_for(model.config)
    arch.blocks(model)[0].mixer.out_proj.weight.data[:, ::2] = 0
    edited = walk(model)[0]
    for module in arch.prunable:
        # out_proj's own input does not depend on its weight, so the first block saw the same
        assert torch.equal(walked[0][module].total, dense[0][module].total)
        assert torch.equal(walked[1][module].total, edited[1][module].total)
        assert not torch.allclose(walked[1][module].norm, dense[1][module].norm, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_residual_stream_is_float32(name, dtype):
    model = models.ours(name)
    for key, parameter in model.named_parameters():
        if not key.endswith(("A_log", "D", "dt_bias")):
            parameter.data = parameter.data.to(dtype)
    given = []
    for block in arch_for(model.config).blocks(model):
        block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].dtype))
    _, hidden, _ = walk(model)
    assert given and set(given) == {torch.float32}
    assert {rows.dtype for rows in hidden} == {torch.float32}


def test_a_tap_that_never_fires_is_refused():
    model = models.ours("mamba")
    silent = list(mixers(model))[1]
    silent.tap = lambda module, x: None if module == "dt_proj" else type(silent).tap(silent, module, x)
    edited = []
    with pytest.raises(UnsupportedError, match="dt_proj of layer 1") as refused:
        walk(model, lambda layer, block: edited.append(layer) or 1.0)
    assert edited == [0] and "--exclude" in refused.value.hint
    assert all(mixer.taps is None for mixer in mixers(model))


def test_a_module_there_is_not_is_refused():
    with pytest.raises(UnsupportedError, match="x_proj of layer 0"):
        walk(models.ours("mamba2"), modules=("in_proj", "x_proj"))


def test_inputs_that_are_not_finite_are_refused():
    model = models.ours("mamba")
    model.backbone.layers[0].mixer.dt_proj.bias.data[0] = torch.inf
    model.backbone.layers[0].mixer.in_proj.weight.data[0] = torch.inf
    with pytest.raises(InputError, match="not finite"):
        walk(model)


def test_the_ports_are_closed_when_an_edit_fails():
    model = models.ours("mamba2")

    def fail(layer, block):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        walk(model, fail)
    assert all(mixer.taps is None for mixer in mixers(model))


def test_each_layer_is_told_with_its_error_and_kept_share():
    model = models.ours("mamba")

    def edit(layer, block):
        if layer == 1:
            block.mixer.out_proj.weight.data.zero_()
        return (1.0, 0.25)[layer]

    _, _, events = walk(model, edit)
    assert all(isinstance(event, LayerDone) for event in events)
    assert [(event.layer, event.layers, event.kept) for event in events] == [(0, 2, 1.0), (1, 2, 0.25)]
    assert events[0].error == 0 and events[1].error > 1e-3


def test_only_what_is_asked_for_is_collected():
    seen, _, _ = walk(models.ours("mamba"), modules=("x_proj", "out_proj"), collect=Hessian)
    for statistics in seen.values():
        assert set(statistics) == {"x_proj", "out_proj"}
        assert statistics["out_proj"].value.shape == (64, 64)


def test_nothing_is_followed_by_gradients():
    _, hidden, _ = walk(models.ours("mamba"))
    assert not any(rows.requires_grad for rows in hidden)

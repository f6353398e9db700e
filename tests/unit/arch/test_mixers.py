import copy
from functools import partial

import pytest
import torch

from ssmcompress import kernels
from ssmcompress.arch.base import DECAYS
from ssmcompress.arch.mixer import Past, mixers, use_backend
from tests.unit.arch import models

ALL = list(models.ALL)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ALL)
def test_forward_equals_stock(name):
    model, ids = models.ours(name), models.tokens(2, 29)
    assert relative(logits(model, ids), logits(models.stock(model), ids)) < 2e-5


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", ALL)
def test_forward_equals_the_float64_reference(name, backend):
    model, ids = models.ours(name), models.tokens(2, 29)
    truth = copy.deepcopy(model).double()
    use_backend(truth, kernels.choose("reference"))
    use_backend(model, kernels.choose(backend))
    assert relative(logits(model, ids).double(), logits(truth, ids).double()) < 5e-6


@pytest.mark.parametrize("name", ALL)
def test_backward_equals_the_reference(name):
    model, ids = models.ours(name), models.tokens(2, 19)
    truth = copy.deepcopy(model)
    use_backend(truth, kernels.choose("reference"))
    for each in (model, truth):
        each.train()
        each(ids, labels=ids).loss.backward()
    for (key, found), expected in zip(model.named_parameters(), truth.parameters(), strict=True):
        assert found.grad is not None and relative(found.grad, expected.grad) < 1e-3, key


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("parts", [(29,), (10, 19), (1, 2, 26), (25, 1, 1, 1, 1), (2, 1, 1, 20, 1, 4)])
def test_prefill_in_parts_equals_one_pass(name, parts):
    model, ids = models.ours(name), models.tokens(2, 29)
    cache, pieces = None, []
    for piece in ids.split(parts, dim=1):
        out = model(piece, cache_params=cache, use_cache=True)
        cache = out.cache_params
        pieces.append(out.logits)
    assert relative(torch.cat(pieces, 1), logits(model, ids)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_padding_does_not_leak(name, side):
    model, ids = models.ours(name), models.tokens(2, 12)
    pad, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
    order = (pad, ids) if side == "left" else (ids, pad)
    marks = (pad, mask) if side == "left" else (mask, pad)
    padded = model(torch.cat(order, 1), attention_mask=torch.cat(marks, 1), use_cache=True)
    real = padded.logits[:, 5:] if side == "left" else padded.logits[:, :12]
    alone = model(ids, use_cache=True)
    assert relative(real, alone.logits) < 1e-5
    following = models.tokens(2, 1, seed=3)
    after = [model(following, cache_params=out.cache_params, use_cache=True).logits for out in (padded, alone)]
    assert relative(*after) < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_generation_with_cache_equals_without(name):
    model, ids = models.ours(name), models.tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    with_cache = model.generate(ids, use_cache=True, **settings)
    without = model.generate(ids, use_cache=False, **settings)
    assert with_cache.shape == (2, 19)
    assert torch.equal(with_cache, without)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_initial_state_equals_going_on_from_there(name):
    model, ids = models.ours(name), models.tokens(1, 20)
    cache = model(ids[:, :8], use_cache=True).cache_params
    expected = model(ids[:, 8:], cache_params=cache, use_cache=True).logits
    fresh = model(ids[:, :8], use_cache=True).cache_params
    for layer, mixer in enumerate(mixers(model)):
        if (state := fresh.layers[layer].recurrent_states[0]) is not None:
            mixer.initial_state = state[0].clone()
            state.zero_()
    # only the state is given, so the convolution must see the same inputs: keep those of the cache
    for mixer in mixers(model):
        mixer.recall = _with_convolution(fresh, mixer)
    assert relative(logits(model, ids[:, 8:]), expected) < 1e-5


def _with_convolution(cache, mixer):
    def recall(_cache, batch):
        state = mixer.initial_state
        inputs = cache.layers[mixer.layer_idx].conv_states[0][..., 1:]
        return Past(inputs, None if state is None else state[None], begins=False)

    return recall


def _keep_input(seen, name, module, inputs):
    seen[name] = inputs[0]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ALL)
def test_taps_show_the_input_of_every_prunable_module(name, layer):
    model, ids = models.ours(name), models.tokens(2, 9)
    arch = models.arch_for(model.config)
    mixer = arch.blocks(model)[layer].mixer
    seen = {}
    mixer.taps = seen.setdefault
    hooked = {}
    for module in ("in_proj", "out_proj"):
        watch = partial(_keep_input, hooked, module)
        getattr(mixer, module).register_forward_pre_hook(watch)
    logits(model, ids)
    assert set(seen) - {"norm"} == {"scan" if name == DECAYS else name for name in arch.modules(layer)}
    assert ("norm" in seen) == hasattr(mixer, "norm")
    for module, tensor in hooked.items():
        assert torch.equal(seen[module], tensor)
    for module in {*arch.modules(layer)} - {DECAYS}:
        weight = getattr(mixer, module).weight
        assert seen[module].shape == (2, 9, weight.shape[0] if module == "conv1d" else weight.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_the_states_of_a_scan_read_out_what_the_mixer_computes(name):
    """y = C h + D x, gated (Mamba-1) or normed with the gate (Mamba-2), is what out_proj takes in."""
    model, ids = models.ours(name), models.tokens(2, 9)
    mixer = models.arch_for(model.config).blocks(model)[1].mixer
    seen = {}
    mixer.taps = seen.setdefault
    logits(model, ids)
    scan = seen["scan"]
    heads = scan.x.shape[2] // scan.C.shape[2]
    read = [(h * scan.C[:, t].repeat_interleave(heads, 1)[:, :, None]).sum(-1) for t, h in enumerate(scan.states())]
    y = (torch.stack(read, 1) + mixer.D[:, None] * scan.x).flatten(2)
    z = mixer.in_proj(seen["in_proj"])
    z = z[..., y.shape[-1] :][..., : y.shape[-1]] if hasattr(mixer, "dt_proj") else z[..., : y.shape[-1]]
    wanted = y * torch.nn.functional.silu(z)
    if "norm" in seen:
        assert relative(seen["norm"], wanted) < 1e-5
        wanted = mixer.norm(y, z)
    assert relative(seen["out_proj"], wanted) < 1e-5

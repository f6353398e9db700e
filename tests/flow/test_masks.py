"""The masks of a whole run beside those of a plain loop over the layers with torch hooks."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import ssmcompress
from ssmcompress.calib import data
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.edits import Mask
from tests.flow.conftest import FAMILIES, MODELS

BATCH = 8


def record(seen, name, module, inputs, output):
    """A forward hook that keeps what went in and what came out."""
    seen.setdefault(name, []).append((inputs[0], output))


@torch.no_grad()
def layer_inputs(checkpoint, layer, ids):
    """The inputs [tokens, width] of every prunable module of a layer, rebuilt from what hooks on modules can see."""
    mixer = checkpoint.arch.blocks(checkpoint.model)[layer].mixer
    seen = {}
    hooks = [
        getattr(mixer, name).register_forward_hook(partial(record, seen, name))
        for name in ("in_proj", "x_proj", "out_proj")
        if hasattr(mixer, name)
    ]
    for rows in ids.split(BATCH):
        checkpoint.model(rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = {name: torch.cat([given.flatten(0, 1) for given, _ in calls]) for name, calls in seen.items()}
    made = torch.cat([output.flatten(0, 1) for _, output in seen["in_proj"]])
    if "x_proj" in seen:
        found["conv1d"] = made[:, : mixer.intermediate_size]
        steps = torch.cat([output for _, output in seen["x_proj"]])[..., : mixer.time_step_rank]
        found["dt_proj"] = (mixer.dt_layernorm(steps) if hasattr(mixer, "dt_layernorm") else steps).flatten(0, 1)
    else:
        found["conv1d"] = made[:, mixer.intermediate_size : mixer.intermediate_size + mixer.conv_dim]
    return found


def keep_highest(scores, drop):
    """Row by row: all but the `drop` lowest, of equal ones the first go."""
    order = scores.sort(dim=-1, stable=True).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter(-1, order[:, :drop], False)


def brute_mask(weight, inputs, module, sparsity, pattern, scope):
    """WANDA's mask of one weight, written once more."""
    norm = inputs.double().square().sum(0).sqrt().float()
    score = weight.abs() * (norm[:, None, None] if module == "conv1d" else norm)
    if pattern is None and (scope == "tensor" or module == "conv1d"):
        return keep_highest(score.reshape(1, -1), int(score.numel() * sparsity)).view(weight.shape)
    if pattern is None:
        return keep_highest(score, int(score.shape[1] * sparsity))
    n, m = pattern
    groups = [keep_highest(part, part.shape[1] - -(-part.shape[1] * n // m)) for part in score.split(m, dim=1)]
    return torch.cat(groups, dim=1)


@pytest.mark.parametrize(
    ("pattern", "scope"), [(None, None), (None, "row"), ((2, 4), None)], ids=["half", "half of each row", "2:4"]
)
@pytest.mark.parametrize("name", MODELS)
def test_masks_of_a_whole_run_equal_the_plain_loop(models, small, tmp_path, name, pattern, scope):
    checkpoint = ssmcompress.load(models[name], dtype=torch.float32)
    arch = checkpoint.arch
    modules = arch.prunable if pattern is None else arch.projections
    result = ssmcompress.prune(
        models[name],
        out=tmp_path / "out",
        include=modules,
        pattern=pattern and "{}:{}".format(*pattern),
        scope=scope,
        **small,
    )
    ids = data.windows(small["calib"], checkpoint.tokenizer, count=10, length=48, seed=0).ids
    assert ids.shape == (10, 48)
    masks = {edit.tensor: edit.keep for edit in result.edits if isinstance(edit, Mask)}
    assert len(masks) == arch.layers * len(modules)
    for layer in range(arch.layers):
        inputs = layer_inputs(checkpoint, layer, ids)
        assert set(inputs) == set(arch.prunable)
        for module in modules:
            name = arch.weight(layer, module)
            weight = checkpoint.model.get_parameter(name).data
            keep = brute_mask(weight, inputs[module], module, 0.5, pattern, scope or "tensor")
            assert torch.equal(masks[name], keep), name
            weight.mul_(keep)  # the layers behind see what this one now makes


def reconstruction(inputs, dense, pruned):
    """Squared error of a linear layer's output on its calibration inputs."""
    return float(F.linear(inputs, dense - pruned).double().square().sum())


@pytest.mark.parametrize("name", MODELS)
def test_sparsegpt_reconstructs_a_layer_better_than_wanda(models, small, tmp_path, name):
    checkpoint = ssmcompress.load(models[name], dtype=torch.float32)
    ids = data.windows(small["calib"], checkpoint.tokenizer, count=10, length=48, seed=0).ids
    inputs = layer_inputs(checkpoint, 0, ids)
    error = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        ssmcompress.prune(models[name], out=tmp_path / method, method=method, **small)
        pruned = Shards(tmp_path / method)
        for module in checkpoint.arch.projections:
            tensor = checkpoint.arch.weight(0, module)
            dense = checkpoint.stored[tensor].float()
            error[method, module] = reconstruction(inputs[module], dense, pruned[tensor].float())
    for module in ("in_proj", "out_proj"):
        assert error["sparsegpt", module] < 0.95 * error["wanda", module], module
        assert error["wanda", module] < error["magnitude", module], module


@pytest.mark.parametrize("name", FAMILIES)
def test_later_layers_are_scored_on_what_the_pruned_ones_make(models, small, tmp_path, name):
    """Masks of the last layer differ from those found while the first layers stay dense."""
    checkpoint = ssmcompress.load(models[name], dtype=torch.float32)
    ids = data.windows(small["calib"], checkpoint.tokenizer, count=10, length=48, seed=0).ids
    result = ssmcompress.prune(models[name], out=tmp_path / "out", sparsity=0.7, **small)
    masks = {edit.tensor: edit.keep for edit in result.edits}
    dense = layer_inputs(checkpoint, 1, ids)
    differ = {
        module: not torch.equal(
            masks[checkpoint.arch.weight(1, module)],
            brute_mask(
                checkpoint.model.get_parameter(checkpoint.arch.weight(1, module)).data,
                dense[module],
                module,
                0.7,
                None,
                "tensor",
            ),
        )
        for module in ("in_proj", "out_proj")
    }
    assert all(differ.values()), differ

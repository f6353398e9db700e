"""Sizes that no config of transformers says, from the plan to a folder that both loaders take."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import ssmcompress
from ssmcompress.arch.masked import mask
from ssmcompress.checkpoint import manifest
from ssmcompress.edits import Keep
from ssmcompress.errors import UnsupportedError
from ssmcompress.recipe import recipe
from tests.flow.test_axes import WORDS
from tests.flow.test_bytes import lasting

BARE = """
import sys, torch
sys.modules["ssmcompress"] = None  # whoever imports it fails
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
ids = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[2])
"""
BLOCKS = [{"axis": "ssm", "keep": 2}, {"axis": "layer", "keep": 3, "method": "similarity"}]
ZEROS = [{"method": "sparsessm", "sparsity": 0.5}, {"method": "wanda", "sparsity": 0.25}]
ROTATED, WIDTH = {"axis": "state", "method": "rotate", "keep": 4}, {"axis": "width", "keep": 24}
HEADS = {"axis": "head", "keep": 0.5, "method": "flap", "correct": "bias"}
CHANNELS = {"axis": "channel", "keep": 0.5, "method": "flap", "correct": "bias", "scope": "model"}
COMPOSED = {
    "rotated first": ("mamba2", [ROTATED, HEADS, WIDTH, *BLOCKS, *ZEROS]),
    "scans first": ("mamba2", [*BLOCKS, ROTATED, WIDTH, *ZEROS, HEADS]),
    "width first": ("mamba2-grouped", [WIDTH, HEADS, BLOCKS[0], ROTATED | {"scope": "model", "keep": 9}, *ZEROS]),
    "over the model": ("mamba", [CHANNELS, *BLOCKS, WIDTH, {"axis": "state", "keep": 0.5, "scope": "model"}, *ZEROS]),
}


def test_a_plan_says_beforehand_that_the_output_brings_code():
    told = []
    assert not ssmcompress.plan("ref:mamba2", axis="head", keep=0.75, emit=told.append).stock
    assert any("trust_remote_code=True" in repr(event) for event in told)
    assert ssmcompress.plan("ref:mamba2", axis="head", keep=0.5).stock


def test_stock_only_refuses_them_and_names_the_nearest():
    with pytest.raises(UnsupportedError) as refused:
        ssmcompress.plan("ref:mamba2", axis="head", keep=0.75, stock_only=True)
    assert "nearest" in f"{refused.value.message} {refused.value.hint}".lower()
    assert ssmcompress.plan("ref:mamba2", axis="head", keep=0.5, stock_only=True).stock


def test_heads_between_leave_a_folder_that_replays_and_computes_what_was_written(tmp_path):
    told = []
    options = {"axis": "head", "keep": 0.75, "windows": 2, "length": 64, "no_eval": True}
    ssmcompress.prune("ref:mamba2", out=tmp_path / "cut", emit=told.append, **options)
    assert any("trust_remote_code=True" in repr(event) for event in told)
    assert "trust_remote_code=True" in (tmp_path / "cut/README.md").read_text(encoding="utf-8")
    ssmcompress.apply(tmp_path / "cut/edits.safetensors", "ref:mamba2", out=tmp_path / "again")
    for name in ("model.safetensors", "config.json", "modeling_ssmcompress.py"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    model = ssmcompress.load(str(tmp_path / "cut"), dtype=torch.float32).model
    dense = ssmcompress.load("ref:mamba2", dtype=torch.float32).model
    heads = [block.mixer.num_heads for block in model.backbone.layers]
    assert heads == [block.mixer.num_heads * 3 // 4 for block in dense.backbone.layers]


@pytest.mark.parametrize(
    ("name", "axis", "keep", "before", "after"),
    [("mamba", "ssm", 0.5, 2, 1), ("mamba2-grouped", "ssm", 0.5, 2, 1), ("mamba2", "width", 0.75, 32, 24)],
)
def test_what_is_written_is_the_dense_model_with_those_units_silent(
    models, small, tmp_path, name, axis, keep, before, after
):
    result = ssmcompress.prune(models[name], out=tmp_path / "cut", axis=axis, keep=keep, correct="none", **small)
    dense = ssmcompress.load(models[name], dtype=torch.float32)
    mask(dense.model, dense.arch, [edit for edit in result.edits if isinstance(edit, Keep)])
    cut = ssmcompress.load(str(tmp_path / "cut"), dtype=torch.float32)
    with torch.no_grad():
        wanted = dense.model(WORDS).logits
        assert (cut.model(WORDS).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    told, planned = manifest.read(tmp_path / "cut"), ssmcompress.plan(models[name], axis=axis, keep=keep)
    assert told.shape.after.params == planned.after.params == sum(p.numel() for p in cut.model.parameters())
    assert told.shape.after.state_bytes == planned.after.state_bytes == cut.arch.state_bytes()
    assert told.shape.changes() == {axis: (str(before), str(after))} and told.verification.trust_remote_code
    assert f"| {axis}s | {before} | {after} |" in (tmp_path / "cut/README.md").read_text(encoding="utf-8")
    ssmcompress.apply(tmp_path / "cut/edits.safetensors", models[name], out=tmp_path / "again")
    assert lasting(tmp_path / "again") == lasting(tmp_path / "cut")


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_scans_go_before_and_after_other_steps(models, text, tmp_path, name):
    steps = [
        {"step": "prune", "axis": "ssm", "keep": 3},
        {"step": "prune", "axis": "state", "keep": 2},
        {"step": "prune", "axis": "layer", "keep": 3},
        {"step": "prune", "axis": "width", "keep": 24, "correct": "rescale"},
        {"step": "prune", "method": "wanda", "sparsity": 0.25},
        {"step": "prune", "axis": "ssm", "keep": 0.5, "method": "random"},
        {"step": "prune", "axis": "head" if name == "mamba2" else "channel", "keep": 0.5},
    ]
    four = deepened(models[name], tmp_path / "four")
    made = recipe(model=four, steps=steps, calibrate={"text": text, "windows": 4, "length": 32})
    ssmcompress.run(made, out=tmp_path / "out", no_eval=True)
    ssmcompress.apply(tmp_path / "out/edits.safetensors", four, out=tmp_path / "again")
    assert lasting(tmp_path / "again") == lasting(tmp_path / "out")
    sizes = ssmcompress.load(str(tmp_path / "out")).arch.sizes
    assert sorted(each["state"] for each in sizes) == [0, 0, 2]
    changed = manifest.read(tmp_path / "out").shape.changes()
    assert changed["ssm"] == ("4", "1") and changed["layer"] == ("4", "3") and changed["state"][1] == "2"


@pytest.mark.parametrize("order", COMPOSED)
def test_all_that_steps_remove_and_add_composes(models, text, tmp_path, order):
    """Scans, layers, dimensions and units gone, bases and biases added, then zeros: one pass over the source again."""
    name, steps = COMPOSED[order]
    four = deepened(models[name], tmp_path / "four")
    made = recipe(model=four, steps=steps, calibrate={"text": text, "windows": 4, "length": 32})
    ssmcompress.plan(made)
    ssmcompress.run(made, out=tmp_path / "out", no_eval=True)
    ssmcompress.apply(tmp_path / "out/edits.safetensors", four, out=tmp_path / "again")
    assert lasting(tmp_path / "again") == lasting(tmp_path / "out")
    ours, told = ssmcompress.load(str(tmp_path / "out"), dtype=torch.float32), manifest.read(tmp_path / "out")
    scans = [sizes["state"] > 0 for sizes in ours.arch.sizes]
    assert not all(scans) and any(scans) and ours.arch.width == 24 and ours.arch.out_proj_bias
    assert [before is not None for before in ours.arch.rotated] == (scans if name != "mamba" else [False] * len(scans))
    assert sum(record.status == "memoryless" for record in told.tensors) == sum(scans)
    torch.save(WORDS, tmp_path / "words.pt")
    command = [sys.executable, "-c", BARE, str(tmp_path / "out"), str(tmp_path / "words.pt")]
    bare = {"PATH": "", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        logits = ours.model(WORDS).logits
    assert (torch.load(tmp_path / "words.pt") - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_sizes_that_a_stock_config_says_are_told_as_the_source_has_them_where_a_later_step_needs_our_own(
    models, small, tmp_path
):
    steps = [{"step": "prune", "axis": "head", "keep": 0.5, "method": "magnitude"}]
    steps.append({"step": "prune", "axis": "state", "method": "rotate", "keep": 4})
    calibrate = {"text": small["calib"], "windows": 2, "length": 32}
    made = recipe(model=models["mamba2"], steps=steps, calibrate=calibrate)
    ssmcompress.run(made, out=tmp_path / "out", no_eval=True)
    ssmcompress.apply(tmp_path / "out/edits.safetensors", models["mamba2"], out=tmp_path / "again")
    assert lasting(tmp_path / "again") == lasting(tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["num_heads"] == 8 and [sizes["head"] for sizes in said["block_sizes"]] == [4, 4]


def deepened(model, folder):
    """A model of four blocks: those of another twice."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    state = load_file(folder / "model.safetensors")
    for layer in (0, 1):
        start = f"backbone.layers.{layer}."
        more = f"backbone.layers.{layer + 2}."
        state |= {key.replace(start, more): tensor.clone() for key, tensor in state.items() if start in key}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_folder_with_sizes_of_its_own_is_pruned_again(tmp_path):
    options = {"windows": 2, "length": 64, "no_eval": True}
    ssmcompress.prune("ref:mamba2", out=tmp_path / "cut", axis="head", keep=0.75, method="magnitude", **options)
    ssmcompress.prune(str(tmp_path / "cut"), out=tmp_path / "zeros", method="wanda", sparsity=0.5, **options)
    masked = ssmcompress.load(str(tmp_path / "zeros"), dtype=torch.float32).model
    weight = masked.backbone.layers[0].mixer.in_proj.weight
    assert float((weight == 0).double().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("model", "options", "added"),
    [
        ("ref:mamba2", {"axis": "state", "method": "rotate"}, ["mixer.rotation.B", "mixer.rotation.C"]),
        ("ref:mamba", {"axis": "channel", "method": "flap", "correct": "bias"}, ["mixer.out_proj.bias"]),
    ],
)
def test_what_a_step_adds_is_planned_written_replayed_and_pruned_again(model, options, added, tmp_path):
    planned = ssmcompress.plan(model, keep=0.5, **options)
    short = {"windows": 2, "length": 64, "no_eval": True}
    ssmcompress.prune(model, out=tmp_path / "cut", keep=0.5, **options, **short)
    ssmcompress.apply(tmp_path / "cut/edits.safetensors", model, out=tmp_path / "again")
    for name in ("model.safetensors", "config.json", "modeling_ssmcompress.py"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    written = ssmcompress.load(str(tmp_path / "cut"))
    assert planned.after.params == sum(written.stored.shape(name).numel() for name in written.stored)
    assert planned.after.state_bytes == written.arch.state_bytes()
    names = {name for name in written.stored if any(name.endswith(each) for each in added)}
    assert len(names) == 6 * len(added)
    assert names == {record.name for record in planned.tensors if record.status == "added"}
    assert "added: " in (tmp_path / "cut/README.md").read_text(encoding="utf-8")
    with torch.no_grad():  # in the dtypes that are stored, too
        assert written.model(torch.arange(1, 40)[None]).logits.isfinite().all()
    ssmcompress.prune(str(tmp_path / "cut"), out=tmp_path / "zeros", sparsity=0.5, **short)
    again = ssmcompress.load(str(tmp_path / "zeros"))
    assert all(torch.equal(again.stored[name], written.stored[name]) for name in names)


def test_steps_that_add_compose_in_one_recipe(tmp_path):
    """States rotated, heads cut with a bias, a layer gone, then zeros: the edits do the same in one pass."""
    steps = [
        {"step": "prune", "axis": "state", "method": "rotate", "keep": 0.5},
        {"step": "prune", "axis": "head", "keep": 0.75, "correct": "bias", "method": "flap"},
        {"step": "prune", "axis": "layer", "keep": 5, "method": "similarity"},
        {"step": "prune", "method": "wanda", "sparsity": 0.5},
    ]
    made = recipe(model="ref:mamba2", steps=steps, calibrate={"windows": 2, "length": 64})
    ssmcompress.run(made, out=tmp_path / "all", no_eval=True)
    ssmcompress.apply(tmp_path / "all/edits.safetensors", "ref:mamba2", out=tmp_path / "again")
    assert (tmp_path / "all/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    arch = ssmcompress.load(str(tmp_path / "all")).arch
    assert arch.layers == 5 and arch.rotated == (64,) * 5 and arch.out_proj_bias
    assert arch.sizes == ({"head": 6, "head_channel": 64, "state": 32, "group": 1},) * 5

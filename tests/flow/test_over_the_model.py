"""Units that compete over the whole model, from the plan to a folder whose layers differ, and what follows on it."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ssmcompress
from ssmcompress import report
from ssmcompress.arch.masked import mask
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.source import load
from ssmcompress.edits import Keep
from ssmcompress.errors import UnsupportedError
from ssmcompress.events import Note
from ssmcompress.recipe import recipe
from tests.flow.test_axes import WORDS
from tests.flow.test_bytes import contents, lasting

CUTS = [
    ("mamba", "state", {"keep": 0.5}),
    ("mamba", "channel", {"target": "params=85%"}),
    ("mamba", "dt_rank", {"keep": 3, "method": "magnitude"}),
    ("mamba2", "state", {"keep": 0.75, "method": "last"}),
    ("mamba2", "head", {"target": "state=60%", "method": "flap"}),
    ("mamba2-grouped", "head", {"keep": 0.75}),
]


@pytest.mark.parametrize(("name", "axis", "much"), CUTS)
def test_what_is_written_is_the_dense_model_with_those_units_silent(models, small, tmp_path, name, axis, much):
    out, options = tmp_path / "out", {"axis": axis, "scope": "model"} | much
    result = ssmcompress.prune(models[name], out=out, correct="none", **options, **small)
    dense = load(models[name], dtype=torch.float32)
    mask(dense.model, dense.arch, [edit for edit in result.edits if isinstance(edit, Keep)])
    ours = load(str(out), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad():
        wanted = dense.model(WORDS).logits
        for model in (ours.model, theirs):
            assert (model(WORDS).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    told, planned = manifest.read(out), ssmcompress.plan(models[name], **options)
    (expected,) = planned.sizes
    assert sum(told.shape.after.axes[axis]) == expected.after < expected.before == sum(told.shape.before.axes[axis])
    assert told.shape.after.params == planned.after.params == sum(p.numel() for p in ours.model.parameters())
    assert told.shape.after.state_bytes == planned.after.state_bytes == ours.arch.state_bytes()
    kind, _, bound = options.get("target", "params=100%").rstrip("%").partition("=")
    amounts = [
        getattr(each, {"params": "params", "state": "state_bytes"}[kind]) for each in (planned.after, planned.before)
    ]
    assert amounts[0] <= float(bound) / 100 * amounts[1]


@pytest.mark.parametrize("axis", ["state", "channel"])
def test_it_replays_to_the_same_bytes_and_is_the_same_every_time(models, small, tmp_path, axis):
    options = {"axis": axis, "keep": 0.5, "scope": "model"} | small
    ssmcompress.prune(models["mamba"], out=tmp_path / "first", **options)
    again = ssmcompress.apply(tmp_path / "first" / "edits.safetensors", models["mamba"], out=tmp_path / "again")
    assert lasting(again) == lasting(tmp_path / "first")
    ssmcompress.prune(models["mamba"], out=tmp_path / "second", **options)
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


@pytest.mark.parametrize(("moment", "done"), [("shared_out", None), ("find_units", 0), ("refitted", 1)])
def test_a_run_that_was_stopped_goes_on(run, models, text, tmp_path, monkeypatch, moment, done):
    options = ("--axis", "channel", "--keep", 0.5, "--scope", "model", "--calib", text, "--windows", 3, "--length", 32)
    assert run("prune", models["mamba"], *options, "--no-eval", "--out", tmp_path / "whole")[0] == 0
    module = {"shared_out": "ranking", "find_units": "cut", "refitted": "units"}[moment]
    true, calls = getattr(sys.modules[f"ssmcompress.prune.{module}"], moment), []

    def stopping(*arguments, **named):
        calls.append(None)
        if len(calls) > (done or 0):
            raise KeyboardInterrupt
        return true(*arguments, **named)

    monkeypatch.setattr(sys.modules[f"ssmcompress.prune.{module}"], moment, stopping)
    assert run("prune", models["mamba"], *options, "--no-eval", "--out", tmp_path / "out")[0] == 130
    monkeypatch.undo()
    code, out, err = run("prune", models["mamba"], *options, "--no-eval", "--out", tmp_path / "out", "--json")
    assert code == 0, err
    assert ("scoring channels" in out) == (done is None)
    assert done is None or f"Going on from an earlier run: {done} of 2 layers" in out
    assert lasting(tmp_path / "out") == lasting(tmp_path / "whole")


def test_the_plan_says_that_layers_will_differ_and_names_no_size_of_theirs(models):
    told = []
    found = ssmcompress.plan(models["mamba2"], axis="state", keep=0.75, scope="model", emit=told.append)
    assert not found.stock and (found.sizes[0].before, found.sizes[0].after) == (32, 24)
    said = " ".join(event.text for event in told if isinstance(event, Note))
    assert "24 of 32 states stay" in said and "how many each keeps" in said and "trust_remote_code=True" in said
    reasons = {record.name.split(".")[-2]: record.reason for record in found.tensors if record.status == "cut"}
    assert set(reasons) == {"in_proj", "conv1d"} and all(
        "a size of its layer's own" in each for each in reasons.values()
    )
    whole = ssmcompress.plan(models["mamba2"], axis="state", keep=1, scope="model")
    assert whole.stock and whole.after == whole.before


def test_blocks_of_different_sizes_keep_to_a_budget_whichever_stay(models, small, tmp_path):
    channels = {"axis": "channel", "method": "magnitude", "keep": 40, "scope": "model", "correct": "none"}
    first = ssmcompress.prune(models["mamba"], out=tmp_path / "first", **channels, **small).folder
    assert len({*manifest.read(first).shape.after.axes["channel"]}) == 2
    sizes = {key: tensor.numel() for key, tensor in load_file(first / "model.safetensors").items()}
    dear = sum(sizes.values()) - min(sum(sizes[key] for key in sizes if f"layers.{layer}." in key) for layer in (0, 1))
    budget = {"axis": "layer", "method": "random", "target": f"params={dear}"}
    for seed in range(4):
        out = ssmcompress.prune(str(first), out=tmp_path / f"{seed}", seed=seed, **budget, **small).folder
        assert manifest.read(out).shape.after.params <= dear
    with pytest.raises(UnsupportedError, match=f"1 of 2 may leave {dear:,}"):
        ssmcompress.plan(str(first), axis="layer", method="random", target=f"params={dear - 1}")


def test_sizes_that_come_out_alike_leave_a_stock_model(models, small, tmp_path):
    out = tmp_path / "out"
    ssmcompress.prune(models["mamba"], out=out, axis="state", keep=2, scope="model", method="random", **small)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["state_size"]) == ("mamba", 1)
    assert not (out / "modeling_ssmcompress.py").exists()


def test_steps_follow_on_layers_that_differ(models, text, tmp_path):
    state, channel = {"axis": "state", "keep": 0.5, "scope": "model", "method": "last"}, {"axis": "channel"}
    steps = [
        state,
        channel | {"target": "params=90%", "scope": "model"},
        channel | {"keep": 0.5},
        {"method": "wanda", "sparsity": 0.25},
    ]
    made = recipe(model=models["mamba"], steps=steps, calibrate={"text": text, "windows": 4, "length": 32})
    told = []
    planned = ssmcompress.plan(made, emit=told.append)
    assert not planned.stock and any("an estimate" in event.text for event in told if isinstance(event, Note))
    folder = ssmcompress.run(made, out=tmp_path / "out", no_eval=True).folder
    again = ssmcompress.apply(folder / "edits.safetensors", models["mamba"], out=tmp_path / "again")
    assert lasting(again) == lasting(folder)
    axes = manifest.read(folder).shape.after.axes
    assert sum(axes["state"]) == 6 and all(size % 8 == 0 for size in axes["channel"])
    more = ssmcompress.prune(str(folder), out=tmp_path / "more", axis="state", keep=4, scope="model", method="last")
    assert sum(manifest.read(more.folder).shape.after.axes["state"]) == 4
    report(folder, more.folder, out=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "over the whole model" in page


def test_what_later_steps_cannot_do_is_told_by_the_plan(models):
    first = {"axis": "state", "keep": 0.5, "scope": "model"}
    for second in ({"keep": 2}, {"target": "state=80%"}):
        made = recipe(model=models["mamba"], steps=[first, {"axis": "state"} | second])
        with pytest.raises(UnsupportedError, match="one size for all is not chosen among those"):
            ssmcompress.plan(made)
    made = recipe(model=models["mamba"], steps=[first, {"axis": "channel", "keep": 0.5, "stock_only": True}])
    with pytest.raises(UnsupportedError, match="No config of transformers"):
        ssmcompress.plan(made)

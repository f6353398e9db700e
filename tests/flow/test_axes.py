"""Units removed, end to end: what is written is smaller, loads anywhere, replays, resumes, and follows other steps."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ssmcompress
from ssmcompress.arch.masked import mask
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.source import load
from ssmcompress.edits import Keep, Mask
from ssmcompress.errors import InputError
from ssmcompress.recipe import recipe
from tests.flow.test_bytes import contents, lasting

CUTS = [
    ("mamba", "state", 0.5),
    ("mamba", "channel", 0.5),
    ("mamba", "dt_rank", 0.5),
    ("mamba", "layer", 0.5),
    ("falcon_mamba", "channel", 0.75),
    ("mamba2", "state", 0.5),
    ("mamba2", "head", 0.5),
    ("mamba2", "layer", 0.5),
    ("mamba2-grouped", "head", 0.5),
    ("mamba2-grouped", "head_channel", 0.5),
    ("mamba", "width", 0.75),
    ("falcon_mamba", "width", 0.5),
    ("mamba2", "width", 0.5),
]
WORDS = torch.arange(1, 33)[None] * 7


@pytest.mark.parametrize(("name", "axis", "keep"), CUTS)
def test_what_is_written_is_the_dense_model_with_those_units_silent(models, small, tmp_path, name, axis, keep):
    out = tmp_path / "out"
    result = ssmcompress.prune(models[name], out=out, axis=axis, keep=keep, correct="none", **small)
    dense = load(models[name], dtype=torch.float32)
    mask(dense.model, dense.arch, [edit for edit in result.edits if isinstance(edit, Keep)])
    ours = load(str(out), dtype=torch.float32).model
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        wanted = dense.model(WORDS).logits
        for model in (ours, theirs):
            assert (model(WORDS).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    told = manifest.read(out)
    planned = ssmcompress.plan(models[name], axis=axis, keep=keep)
    assert told.shape.after.params == planned.after.params == sum(p.numel() for p in ours.parameters())
    assert told.shape.before.params == planned.before.params == sum(p.numel() for p in dense.model.parameters())
    assert told.shape.after.state_bytes == planned.after.state_bytes == load(str(out)).arch.state_bytes()
    assert {record.name: record.shape for record in told.tensors} == {
        record.name: record.shape for record in planned.tensors
    }
    assert told.shape.after.weight_bytes == planned.after.weight_bytes < planned.before.weight_bytes
    assert 0 < (out / "model.safetensors").stat().st_size - told.shape.after.weight_bytes < 4096  # the header
    card = (out / "README.md").read_text()
    assert f"| {axis}s |" in card and f"{planned.after.params:,}" in card


@pytest.mark.parametrize(("name", "axis", "keep"), CUTS[:8] + CUTS[-3:])
def test_the_edits_give_the_same_bytes_again(models, small, tmp_path, name, axis, keep):
    ssmcompress.prune(models[name], out=tmp_path / "first", axis=axis, keep=keep, **small)
    again = ssmcompress.apply(tmp_path / "first" / "edits.safetensors", models[name], out=tmp_path / "again")
    assert lasting(again) == lasting(tmp_path / "first")
    ssmcompress.prune(models[name], out=tmp_path / "second", axis=axis, keep=keep, **small)
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


@pytest.mark.parametrize(("name", "axis", "keep"), [cut for cut in CUTS if cut[0] in ("mamba", "mamba2-grouped")])
def test_units_may_be_chosen_in_the_narrow_dtype_that_is_stored(models, small, tmp_path, name, axis, keep):
    folder = ssmcompress.prune(
        models[name], out=tmp_path / "out", axis=axis, keep=keep, dtype="bfloat16", **small
    ).folder
    check = manifest.read(folder).verification
    assert check.transformers <= check.tolerance and check.ssmcompress <= check.tolerance


@pytest.mark.parametrize(
    ("name", "axis", "correct"),
    [("mamba", "channel", "refit"), ("mamba2", "head", "rescale"), ("mamba", "width", "rescale")],
)
def test_corrections_replay_too(models, small, tmp_path, name, axis, correct):
    out = tmp_path / "first"
    ssmcompress.prune(models[name], out=out, axis=axis, keep=0.5, correct=correct, **small)
    again = ssmcompress.apply(out / "edits.safetensors", models[name], out=tmp_path / "again")
    assert lasting(again) == lasting(out)
    with pytest.raises(InputError, match="new values made for other weights"):
        ssmcompress.apply(out / "edits.safetensors", str(other(models[name], tmp_path)), out=tmp_path / "wrong")


@pytest.mark.parametrize(
    ("name", "axis", "correct"),
    [
        ("falcon_mamba", "channel", "refit"),
        ("mamba", "channel", "bias"),
        ("mamba", "width", "rescale"),
        ("mamba2-grouped", "group", None),
        ("mamba2", "layer", None),
    ],
)
def test_where_everything_stays_nothing_changes(models, small, tmp_path, name, axis, correct):
    how = {"axis": axis, "keep": 1, "correct": correct}
    out = ssmcompress.prune(models[name], out=tmp_path / "out", **how, **small).folder
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (models[name], out))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not (out / "modeling_ssmcompress.py").exists()
    assert {record.status for record in manifest.read(out).tensors} == {"kept"}
    planned = ssmcompress.plan(models[name], **how)
    assert planned.stock and planned.after == planned.before


@pytest.mark.parametrize(
    ("much", "left"), [({"keep": 2}, 2), ({"target": "params=70%"}, 3), ({"target": "params=65%"}, 3)]
)
def test_blocks_go_from_a_model_of_which_tokens_leave(small, tmp_path, much, left):
    ssmcompress.reduce_tokens("ref:mamba", out=tmp_path / "reduced", no_eval=True)
    how = {"axis": "layer", "method": "random"} | much
    planned = ssmcompress.plan(str(tmp_path / "reduced"), **how)
    assert planned.sizes[0].after == left and planned.tokens.policy.layers
    for seed in range(3):
        out = ssmcompress.prune(str(tmp_path / "reduced"), out=tmp_path / f"{seed}", seed=seed, **how, **small).folder
        told = manifest.read(out)
        assert len(told.shape.layers) == left and told.tokens.policy.layers


def other(model, tmp_path):
    """A copy of a model with another final norm."""
    shutil.copytree(model, tmp_path / "other")
    state = load_file(tmp_path / "other" / "model.safetensors")
    state["backbone.norm_f.weight"] *= 2
    save_file(state, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "other"


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_steps_follow_one_another_on_what_is_left(models, text, tmp_path, name):
    steps = [
        {"step": "prune", "axis": "state", "keep": 0.5},
        {"step": "prune", "axis": "layer", "keep": 1, "method": "random"},
        {"step": "prune", "method": "wanda", "sparsity": 0.25},
        {"step": "prune", "axis": "head" if name == "mamba2" else "channel", "keep": 0.5},
    ]
    steps[1]["keep"] = 0.5
    made = recipe(model=models[name], steps=steps, calibrate={"text": text, "windows": 4, "length": 32})
    result = ssmcompress.run(made, out=tmp_path / "out", no_eval=True)
    kinds = [type(edit) for edit in result.edits]
    assert Keep in kinds and Mask in kinds
    again = ssmcompress.apply(tmp_path / "out" / "edits.safetensors", models[name], out=tmp_path / "again")
    assert lasting(again) == lasting(tmp_path / "out")
    told, planned = manifest.read(tmp_path / "out"), ssmcompress.plan(made)
    statuses = {record.name.split(".")[-2]: record for record in told.tensors}
    assert statuses["in_proj"].status == "pruned" and statuses["in_proj"].reason.startswith("cut from")
    assert 0.15 < 1 - statuses["in_proj"].nonzero < 0.35  # the last step takes some of the zeros with it
    assert told.shape.changes().keys() == {"state", "layer", "head" if name == "mamba2" else "channel"}
    assert told.shape.after.params == planned.after.params
    one = ssmcompress.prune(str(tmp_path / "again"), out=tmp_path / "last", axis="state", keep=2, calib=text, windows=4)
    assert manifest.read(one.folder).shape.after.axes["state"] == (2,)
    assert [run.verb for run in manifest.read(one.folder).earlier] == ["apply"]


@pytest.mark.parametrize(("axis", "moment"), [("state", 1), ("layer", 0)])
def test_a_run_that_was_stopped_goes_on(run, models, text, tmp_path, monkeypatch, axis, moment):
    options = ("--axis", axis, "--keep", 0.5, "--calib", text, "--windows", 3, "--length", 32, "--no-eval", "--out")
    assert run("prune", models["mamba"], *options, tmp_path / "whole")[0] == 0
    module = sys.modules["ssmcompress.prune.units" if axis == "state" else "ssmcompress.run"]
    name = "best" if axis == "state" else "verify"
    true, calls = getattr(module, name), []

    def stopping(*arguments, **named):
        calls.append(None)
        if len(calls) > moment:
            raise KeyboardInterrupt
        return true(*arguments, **named)

    monkeypatch.setattr(module, name, stopping)
    assert run("prune", models["mamba"], *options, tmp_path / "out")[0] == 130
    monkeypatch.undo()
    code, out, err = run("prune", models["mamba"], *options, tmp_path / "out", "--json")
    assert code == 0, err
    assert "Going on from an earlier run: 1 of 2" in out
    assert lasting(tmp_path / "out") == lasting(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ("mamba", "--axis", "head", "--keep", 0.5),
            3,
            ("no axis 'head'", "channel, state, dt_rank, width, ssm, layer"),
        ),
        (("mamba2", "--axis", "state", "--keep", 0.75), 3, ("12 of 16 states", "8 (--keep 0.5)")),
        (("mamba", "--axis", "state", "--keep", 7), 3, ("there are 6",)),
        (("mamba", "--axis", "state", "--keep", 0), 3, ("at least one must",)),
        (("mamba2-grouped", "--axis", "head", "--keep", 3), 3, ("every group", "2 (--keep 0.5)")),
        (("mamba", "--axis", "channel", "--target", "params=1%"), 3, ("out of reach", "The least is params=")),
        (("mamba", "--axis", "state"), 2, ("needs either keep or target",)),
        (("mamba", "--axis", "state", "--keep", 0.5, "--sparsity", 0.5), 2, ("sparsity has no meaning with an axis",)),
        (("mamba", "--keep", 0.5), 2, ("keep needs an axis",)),
        (("mamba", "--axis", "state", "--keep", 0.5, "--method", "shedder"), 2, ("has no method 'shedder'", "joint")),
        (("mamba", "--axis", "state", "--target", "size=1"), 2, ("params=, state= or memory=",)),
        (("mamba", "--axis", "state", "--keep", "nan"), 2, ("keep",)),
        (
            ("mamba", "--axis", "state", "--keep", 0.5, "--correct", "rescale"),
            2,
            ("those of the axis state have none",),
        ),
        (("mamba", "--axis", "layer", "--keep", 0.5, "--correct", "refit"), 2, ("the axis layer has no form",)),
        (("mamba", "--axis", "width", "--keep", 20), 3, ("read dimensions by 8", "24 (--keep 0.75)")),
        (("falcon_mamba", "--axis", "ssm", "--keep", 0.5), 3, ("a scan in every block", "2 (--keep 1)")),
        (("mamba", "--axis", "sate", "--keep", 0.5), 2, ("Did you mean 'state'?",)),
        (("mamba", "--axis", "state", "--keep", 0.5, "--scope", "row"), 2, ("--scope", "'layer' or 'model'")),
        (("mamba", "--scope", "model"), 2, ("--scope", "row or tensor")),
        (("mamba", "--axis", "layer", "--keep", 0.5, "--scope", "model"), 2, ("scope has no meaning",)),
        (
            ("mamba", "--axis", "state", "--keep", 1.5, "--scope", "model"),
            3,
            ("every layer keeps some", "2 (--keep 2)"),
        ),
        (("mamba", "--axis", "state", "--keep", 0.5, "--scope", "model", "--stock-only"), 3, ("no config of transf",)),
        (
            ("falcon_mamba", "--axis", "state", "--keep", 0.5, "--scope", "model"),
            3,
            ("none of its own for falcon_mam",),
        ),
    ],
)
def test_what_cannot_be_is_refused_by_plan_and_by_prune(run, models, tmp_path, arguments, code, words):
    for verb, more in (("plan", ()), ("prune", ("--out", tmp_path / "out"))):
        found, _, err = run(verb, models[arguments[0]], *arguments[1:], *more)
        assert found == code, err
        told = " ".join(err.split())
        assert all(word in told for word in words) and "Traceback" not in told, told
    assert not list(tmp_path.iterdir())


def test_units_may_go_by_a_recipe_with_overrides(run, models, small, tmp_path):
    text = {"model": models["mamba"], "steps": [{"step": "prune", "axis": "state", "keep": 0.5, "method": "last"}]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(text))
    code, _, err = run("run", tmp_path / "mine.yaml", "keep=2", "--no-eval", "--out", tmp_path / "out")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["state_size"] == 2
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["steps"] == [
        {
            "step": "prune",
            "axis": "state",
            "method": "last",
            "keep": 2.0,
            "target": None,
            "correct": "none",
            "scope": "layer",
            "any_size": False,
            "stock_only": False,
        }
    ]
    code, _, err = run("run", tmp_path / "mine.yaml", "kep=2", "--out", tmp_path / "other")
    assert code == 2 and "Did you mean 'keep'?" in err

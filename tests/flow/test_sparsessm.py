"""Entries of A_log made memoryless, end to end: what is written, told, replayed, resumed, and done before and after."""

import sys

import pytest
import torch

import ssmcompress
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.checkpoint.source import resolve
from ssmcompress.edits import Forget
from ssmcompress.recipe import recipe
from tests.flow.conftest import FAMILIES, SHIPPED
from tests.flow.test_bytes import contents, lasting

WAYS = {
    "votes": {"method": "sparsessm"},
    "weighted": {"method": "sparsessm_v2", "sparsity": 0.3},
    "2:4": {"method": "sparsessm", "pattern": "2:4"},
    "magnitude": {"method": "magnitude", "include": ("A_log",)},
}
CASES = [(name, way) for name in FAMILIES for way in WAYS if way != "2:4" or "mamba2" not in name]


def decays(folder):
    """The A_log of every layer as stored."""
    weights = Shards(resolve(str(folder)).folder)
    return {name: weights[name] for name in weights if name.endswith("A_log")}


@pytest.mark.parametrize(("name", "way"), [*CASES, *((name, "weighted") for name in SHIPPED)])
def test_the_entries_are_20_where_the_edits_say_and_nothing_else_changes(models, small, tmp_path, name, way):
    result = ssmcompress.prune(models[name], out=tmp_path / "first", **WAYS[way], **small)
    before, after = (Shards(resolve(str(place)).folder) for place in (models[name], result.folder))
    forgets = {edit.tensor: edit.keep for edit in result.edits}
    assert {type(edit) for edit in result.edits} == {Forget} and forgets.keys() == decays(result.folder).keys()
    for key in before:
        wanted = torch.where(forgets[key], before[key], 20.0) if key in forgets else before[key]
        assert after.dtype(key) == before.dtype(key) and torch.equal(after[key], wanted), key
    again = ssmcompress.apply(result.folder / "edits.safetensors", models[name], out=tmp_path / "again")
    assert lasting(again) == lasting(result.folder)
    planned = {record.name: record for record in ssmcompress.plan(models[name], **WAYS[way]).tensors}
    for record in manifest.read(result.folder).tensors:
        assert (record.status, record.reason) == (planned[record.name].status, planned[record.name].reason)
        assert record.kept == pytest.approx(planned[record.name].kept)
        assert record.status == ("memoryless" if record.name in forgets else record.status)
        assert record.zeros == int((after[record.name] == 0).sum())
    assert manifest.read(result.folder).sparsity == 0
    card = (result.folder / "README.md").read_text()
    assert "were made memoryless" in card and "stored as 20" in card and "to zero" not in card


STEPS = {
    "states afterwards": [{"method": "sparsessm"}, {"axis": "state", "keep": 4, "method": "sparsessm"}],
    "states before": [{"axis": "state", "keep": 4}, {"method": "sparsessm_v2"}],
    "layers and channels between": [
        {"method": "sparsessm", "sparsity": 0.25},
        {"axis": "layer", "keep": 0.5, "method": "random"},
        {"sparsity": 0.5},
        {"axis": "channel", "keep": 0.5},
        {"method": "sparsessm_v2", "sparsity": 0.5},
    ],
    "twice": [{"method": "sparsessm", "sparsity": 0.25}, {"method": "sparsessm_v2", "sparsity": 0.25}],
}


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
@pytest.mark.parametrize("case", STEPS)
def test_other_steps_may_come_before_and_after(models, text, tmp_path, name, case):
    steps = [{"step": "prune"} | step for step in STEPS[case]]
    made = recipe(model=models[name], steps=steps, calibrate={"text": text, "windows": 4, "length": 32})
    result = ssmcompress.run(made, out=tmp_path / "out", no_eval=True)
    again = ssmcompress.apply(tmp_path / "out" / "edits.safetensors", models[name], out=tmp_path / "again")
    assert lasting(again) == lasting(tmp_path / "out")
    told = {record.name: record for record in manifest.read(tmp_path / "out").tensors}
    for key, A_log in decays(result.folder).items():
        assert told[key].status == "memoryless" and told[key].shape == A_log.shape
        assert told[key].kept == pytest.approx(float((A_log != 20).double().mean()))
        if case != "states afterwards":  # there as many as happen to be among the states that stay
            assert told[key].kept == {"twice": 0.75}.get(case, 0.5)
    share = 1 - sum(each.kept for each in told.values() if each.status == "memoryless") / len(decays(result.folder))
    assert f"{share:.1%} of the entries of A_log" in (tmp_path / "out" / "README.md").read_text()
    assert ssmcompress.plan(made).after.params == sum(
        tensor.numel() for tensor in map(Shards(tmp_path / "out").__getitem__, told)
    )


@pytest.mark.parametrize("method", ["sparsessm", "sparsessm_v2"])
def test_a_run_that_was_stopped_goes_on(run, models, text, tmp_path, monkeypatch, method):
    options = ("--method", method, "--calib", text, "--windows", 3, "--length", 32, "--no-eval", "--out")
    assert run("prune", models["mamba"], *options, tmp_path / "whole")[0] == 0
    module = sys.modules["ssmcompress.prune.apply"]
    true, calls = module.remembering, []

    def stopping(*arguments):
        calls.append(None)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return true(*arguments)

    monkeypatch.setattr(module, "remembering", stopping)
    assert run("prune", models["mamba"], *options, tmp_path / "out")[0] == 130
    monkeypatch.undo()
    code, out, err = run("prune", models["mamba"], *options, tmp_path / "out", "--json")
    assert code == 0, err
    assert "Going on from an earlier run: 1 of 2" in out
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_sparsity_zero_writes_the_bits_of_the_source(models, small, tmp_path):
    out = ssmcompress.prune(models["mamba"], out=tmp_path / "out", method="sparsessm", sparsity=0.0, **small).folder
    assert all(torch.equal(A_log, decays(models["mamba"])[key]) for key, A_log in decays(out).items())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("mamba", "--method", "sparsessm", "--include", "in_proj"), 3, ("no form for in_proj", "entries of A_log")),
        (("mamba", "--method", "sparsessm_v2", "--include", "embeddings"), 3, ("no form for embeddings",)),
        (("mamba", "--method", "wanda", "--include", "A_log"), 3, ("no form for A_log", "--method sparsessm")),
        (("mamba2", "--method", "sparsessm", "--pattern", "2:4"), 3, ("one entry of A_log a head", "--sparsity")),
        (("mamba", "--method", "sparsessm", "--scope", "row"), 2, ("scope has no meaning with sparsessm",)),
        (("mamba", "--method", "sparsessm", "--exclude", "A_log"), 2, ("Nothing is left",)),
        (("mamba", "--axis", "channel", "--keep", 0.5, "--method", "sparsessm"), 2, ("has no method 'sparsessm'",)),
    ],
)
def test_what_cannot_be_is_refused_by_plan_and_by_prune(run, models, tmp_path, arguments, code, words):
    for verb, more in (("plan", ()), ("prune", ("--out", tmp_path / "out"))):
        found, _, err = run(verb, models[arguments[0]], *arguments[1:], *more)
        assert found == code, err
        told = " ".join(err.split())
        assert all(word in told for word in words) and "Traceback" not in told, told
    assert not list(tmp_path.iterdir())

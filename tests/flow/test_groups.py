"""Groups of B and C merged, end to end: planned, written, loaded anywhere, replayed, resumed, among other steps."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config

import ssmcompress
from ssmcompress import edits as editing
from ssmcompress.arch.masked import mask
from ssmcompress.arch.registry import arch_for
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.source import load
from ssmcompress.edits import Keep, Replace
from ssmcompress.recipe import recipe
from tests.flow.conftest import SHARED, save_tokenizer
from tests.flow.test_axes import WORDS
from tests.flow.test_bytes import contents, lasting

CONFIG = Mamba2Config(
    **SHARED | {"num_hidden_layers": 3}, num_heads=8, head_dim=8, n_groups=4, state_size=8, chunk_size=16
)
GROUP, HEAD = {"axis": "group", "keep": 0.5}, {"axis": "head", "keep": 0.5}
TAYLOR = {"axis": "group", "method": "taylor", "scope": "model", "keep": 7}
COMPOSED = {
    "head after group": [GROUP, HEAD],
    "group after head": [HEAD, GROUP],
    "group, state, channel, width": [
        GROUP,
        {"axis": "state", "keep": 0.5},
        {"axis": "head_channel", "keep": 4, "any_size": True},
        {"axis": "width", "keep": 24},
    ],
    "group after state and layer": [
        {"axis": "state", "keep": 4},
        {"axis": "layer", "keep": 2, "method": "random"},
        GROUP,
    ],
    "scans go after": [GROUP, {"axis": "ssm", "keep": 2, "method": "random"}],
    "scans go before": [{"axis": "ssm", "keep": 2, "method": "random"}, GROUP, GROUP],
    "rotated after": [GROUP, {"axis": "state", "method": "rotate", "keep": 4}],
    "rotated before": [{"axis": "state", "method": "rotate", "keep": 4}, GROUP | {"method": "magnitude"}],
    "zeros before": [{"method": "wanda", "sparsity": 0.5, "include": ["in_proj", "conv1d"]}, GROUP],
    "zeros after": [GROUP, {"method": "sparsegpt", "sparsity": 0.5}, {"method": "sparsessm", "sparsity": 0.25}],
    "refitted, twice": [GROUP | {"correct": "refit"}, GROUP | {"correct": "refit"}],
    "over the model, then the same share of each": [TAYLOR, GROUP],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model of four groups in three layers."""
    folder = tmp_path_factory.mktemp("groups") / "model"
    torch.manual_seed(7)
    made = arch_for(CONFIG).build("cpu")
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "in_proj" in key or key.endswith(("dt_bias", "D", "conv1d.bias")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    made.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def stock(folder):
    """The model that transformers loads, by the code in the folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)


def close(found, wanted):
    return (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["own", "mamba2-grouped"])
@pytest.mark.parametrize("method", ["merge", "taylor", "magnitude", "random"])
def test_what_is_written_is_the_model_whose_heads_read_the_group_of_their_run(
    models, model, small, tmp_path, name, method
):
    source, out = model if name == "own" else models[name], tmp_path / "out"
    options = {"axis": "group", "keep": 0.5, "method": method}
    planned = ssmcompress.plan(source, **options)
    result = ssmcompress.prune(source, out=out, **options, **small)
    dense = load(source, dtype=torch.float32)
    editing.apply(result.edits, dict(dense.model.named_parameters()))
    assert any(isinstance(edit, Replace) for edit in result.edits) == (method == "merge")
    if method != "merge":  # there the means are in every group already
        mask(dense.model, dense.arch, [edit for edit in result.edits if isinstance(edit, Keep)])
    ours, wanted = load(str(out), dtype=torch.float32), dense.model(WORDS).logits
    assert close(ours.model(WORDS).logits, wanted) and close(stock(out)(WORDS).logits, wanted)
    told, config = manifest.read(out), json.loads((out / "config.json").read_text())
    before = dense.arch.config.n_groups
    assert config["n_groups"] == before and all(block["group"] == before // 2 for block in config["block_sizes"])
    assert told.shape.changes().keys() == {"group"} and told.verification.trust_remote_code
    assert not planned.stock and planned.after.params == told.shape.after.params < planned.before.params
    assert told.shape.after.params == sum(p.numel() for p in ours.model.parameters())
    assert told.shape.after.state_bytes == planned.after.state_bytes == ours.arch.state_bytes()
    assert {record.name: (record.shape, record.status) for record in told.tensors} == {
        record.name: (record.shape, record.status) for record in planned.tensors
    }
    assert f"| groups | {before} | {before // 2} |" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("options", [{}, {"method": "taylor"}, {"correct": "refit"}, TAYLOR])
def test_the_edits_give_the_same_bytes_again(model, small, tmp_path, options):
    options = GROUP | options | small
    ssmcompress.prune(model, out=tmp_path / "first", **options)
    again = ssmcompress.apply(tmp_path / "first" / "edits.safetensors", model, out=tmp_path / "again")
    assert lasting(again) == lasting(tmp_path / "first")
    ssmcompress.prune(model, out=tmp_path / "second", **options)
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


@torch.no_grad()
@pytest.mark.parametrize("order", COMPOSED)
def test_groups_go_before_and_after_other_steps(model, text, tmp_path, order):
    steps = [{"step": "prune"} | step for step in COMPOSED[order]]
    made = recipe(model=model, steps=steps, calibrate={"text": text, "windows": 4, "length": 32})
    planned = ssmcompress.plan(made)
    ssmcompress.run(made, out=tmp_path / "out", no_eval=True)
    ssmcompress.apply(tmp_path / "out/edits.safetensors", model, out=tmp_path / "again")
    assert lasting(tmp_path / "again") == lasting(tmp_path / "out")
    ours, told = load(str(tmp_path / "out"), dtype=torch.float32), manifest.read(tmp_path / "out")
    assert close(stock(tmp_path / "out")(WORDS).logits, ours.model(WORDS).logits)
    assert told.shape.after.params == planned.after.params or "over the model" in order
    groups = [sizes["group"] for sizes in ours.arch.sizes if sizes["group"]]
    merges = sum(step.get("axis") == "group" for step in steps)
    assert max(groups) == (2 if "over the model" in order else 4 // 2**merges)
    assert sum(record.zeros for record in told.tensors) >= planned.zeros
    cache, pieces = None, []
    for token in WORDS.split(1, dim=1):
        step = ours.model(token, cache_params=cache, use_cache=True)
        cache, _ = step.cache_params, pieces.append(step.logits)
    assert close(torch.cat(pieces, 1), ours.model(WORDS).logits)


def test_zeros_that_means_fill_are_not_promised(model, text, tmp_path):
    """Every second weight was zero; those of B and C are no longer, and neither plan nor card says they are."""
    steps = [{"step": "prune"} | step for step in COMPOSED["zeros before"]]
    made = recipe(model=model, steps=steps, calibrate={"text": text, "windows": 4, "length": 32})
    planned = ssmcompress.plan(made)
    told = manifest.read(ssmcompress.run(made, out=tmp_path / "out", no_eval=True).folder)
    for record in told.tensors:
        if record.name.endswith(("in_proj.weight", "conv1d.weight")):
            assert record.status == "cut" and 0.2 < record.zeros / record.size < 0.5
    assert planned.zeros == 0


@torch.no_grad()
def test_a_folder_of_merged_groups_is_merged_again_measured_and_reported(model, small, text, tmp_path):
    one = ssmcompress.prune(model, out=tmp_path / "one", **GROUP, **small).folder
    two = ssmcompress.prune(str(one), out=tmp_path / "two", **GROUP, **small).folder
    at_once = ssmcompress.prune(model, out=tmp_path / "three", axis="group", keep=0.25, **small).folder
    found, wanted = (load(str(each), dtype=torch.float32) for each in (two, at_once))
    assert found.arch.sizes == wanted.arch.sizes and {sizes["group"] for sizes in found.arch.sizes} == {1}
    assert close(found.model(WORDS).logits, wanted.model(WORDS).logits)
    summary = ssmcompress.evaluate(str(two), perplexity=text, limit=1, out=tmp_path / "two" / "eval")
    shape = manifest.read(two).shape.after
    assert (summary.params, summary.state_bytes) == (shape.params, shape.state_bytes)
    ssmcompress.generate(str(two), prompt="bak dek", max_new_tokens=4)
    page = ssmcompress.report(two, out=tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Of the groups of B and C, " in page and "each of them the mean of its run." in page


@pytest.mark.parametrize("moment", [1, 2])
def test_a_run_that_was_stopped_goes_on(run, model, text, tmp_path, monkeypatch, moment):
    options = ("--axis", "group", "--keep", 0.5, "--calib", text, "--windows", 3, "--length", 32, "--no-eval", "--out")
    assert run("prune", model, *options, tmp_path / "whole")[0] == 0
    module, calls = sys.modules["ssmcompress.prune.units"], []
    true = module.best

    def stopping(*arguments, **named):
        calls.append(None)
        if len(calls) > moment:
            raise KeyboardInterrupt
        return true(*arguments, **named)

    monkeypatch.setattr(module, "best", stopping)
    assert run("prune", model, *options, tmp_path / "out")[0] == 130
    monkeypatch.undo()
    code, out, err = run("prune", model, *options, tmp_path / "out", "--json")
    assert code == 0, err
    assert f"Going on from an earlier run: {moment} of 3" in out
    assert lasting(tmp_path / "out") == lasting(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "arguments", "code", "words"),
    [
        ("mamba", ("--keep", 0.5), 3, ("mamba has no axis 'group'", "Its axes are channel, state")),
        ("mamba2", ("--keep", 0.5), 3, ("All heads read one group of B and C", "shrink along the axis state")),
        ("own", ("--keep", 3), 3, ("3 of 4 groups cannot stay", "possible: 2 (--keep 0.5) or 4 (--keep 1).")),
        ("own", ("--keep", 0), 3, ("0 of 4 groups cannot stay: at least one must", "1 (--keep 0.25)")),
        ("own", ("--keep", 5), 3, ("there are 4",)),
        ("own", ("--keep", 0.5, "--stock-only"), 3, ("as many groups of B and C as of the norm", "4 (--keep 1)")),
        ("own", ("--target", "state=1%"), 3, ("out of reach of the axis group", "The least is state=")),
        ("own", ("--keep", 0.5, "--scope", "model"), 2, ("merge has no scores", "name taylor")),
        ("own", ("--keep", 0.5, "--method", "ghost"), 2, ("no method 'ghost'", "merge, taylor, magnitude, random")),
        ("own", ("--keep", 0.5, "--correct", "rescale"), 2, ("those of the axis group have none",)),
        ("own", ("--keep", 0.5, "--correct", "bias"), 2, ("the axis group leaves them all",)),
    ],
)
def test_what_cannot_be_is_refused_by_plan_and_by_prune(run, models, model, tmp_path, name, arguments, code, words):
    for verb, more in (("plan", ()), ("prune", ("--out", tmp_path / "out"))):
        found, _, err = run(verb, model if name == "own" else models[name], "--axis", "group", *arguments, *more)
        assert found == code, err
        told = " ".join(err.split())
        assert all(word in told for word in words) and "Traceback" not in told, told
    assert not list(tmp_path.iterdir())


def test_merge_needs_its_axis(run, model, tmp_path):
    code, _, err = run("prune", model, "--method", "merge", "--out", tmp_path / "out")
    assert code == 2 and "needs an axis" in err and "group" in err


def test_rotated_groups_are_not_merged(run, model, small, tmp_path):
    ssmcompress.prune(model, out=tmp_path / "turned", axis="state", method="rotate", keep=4, **small)
    code, _, err = run("plan", tmp_path / "turned", "--axis", "group", "--keep", 0.5)
    assert code == 3 and "each group has a basis of its own" in " ".join(err.split())
    assert run("plan", tmp_path / "turned", "--axis", "group", "--keep", 0.5, "--method", "taylor")[0] == 0


def test_mamba_ssm_has_no_layout_for_merged_groups(run, model, small, tmp_path):
    ssmcompress.prune(model, out=tmp_path / "merged", **GROUP, **small)
    code, _, err = run("convert", tmp_path / "merged", "--to", "mamba-ssm", "--out", tmp_path / "original")
    assert code == 3 and "no layout for the model type" in err

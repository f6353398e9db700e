"""A model is pruned into a folder: what is in it, who loads it, and which entries are zero."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ssmcompress
from ssmcompress import edits
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.checkpoint.source import resolve
from ssmcompress.measure import text
from tests.flow.conftest import FAMILIES, MODELS
from tests.unit.checkpoint.folders import edit_json

WRITTEN = {
    "README.md",
    "config.json",
    "edits.safetensors",
    "events.jsonl",
    "generation_config.json",
    "model.safetensors",
    "recipe.yaml",
    "ssmcompress.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
EVERYWHERE = {
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.4},
    "2:4": {"method": "wanda", "pattern": "2:4"},
}
SOMEWHERE = {
    "magnitude": {"method": "magnitude", "sparsity": 0.37},
    "magnitude by row": {"method": "magnitude", "sparsity": 0.37, "scope": "row"},
    "wanda by row": {"method": "wanda", "sparsity": 0.29, "scope": "row"},
    "sparsegpt 4:8": {"method": "sparsegpt", "pattern": "4:8"},
    "1:3, ragged": {"method": "magnitude", "pattern": "1:3"},
    "everything": {"method": "wanda", "include": ("in_proj", "conv1d", "out_proj")},
    "all but one": {"method": "wanda", "exclude": ("out_proj",)},
    "head": {"method": "wanda", "include": ("lm_head", "out_proj")},
    "embeddings": {"method": "magnitude", "sparsity": 0.3, "include": ("embeddings",)},
    "ratios": {"method": "wanda", "sparsity": 0.25, "modules": {"out_proj": 0.75, "conv1d": 0.1}},
}
CASES = [(name, case) for case in EVERYWHERE for name in MODELS] + [
    (name, case) for i, case in enumerate(SOMEWHERE) for name in (FAMILIES[i % 4], FAMILIES[(i + 2) % 4])
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def pruned(request, models, small, tmp_path_factory):
    """The source, the options and the result of one run."""
    name, case = request.param
    options = (EVERYWHERE | SOMEWHERE)[case]
    out = tmp_path_factory.mktemp("out") / "pruned"
    return resolve(models[name]), options, ssmcompress.prune(models[name], out=out, **options, **small)


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_the_folder_is_whole_and_loads_to_the_same_logits(pruned):
    source, _, result = pruned
    found = {path.name for path in result.folder.iterdir()}
    assert found >= WRITTEN
    assert found - WRITTEN <= {path.name for path in source.folder.iterdir()}  # a licence travels too
    assert manifest.changed(result.folder) == []
    verified = manifest.read(result.folder).verification
    assert verified.transformers <= 1e-4 and verified.ssmcompress <= 1e-4
    ids = torch.randint(1, 500, (2, 40), generator=torch.Generator().manual_seed(5))
    stock = logits(AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32), ids)
    ours = logits(ssmcompress.load(str(result.folder), dtype=torch.float32).model, ids)
    dense = logits(ssmcompress.load(source, dtype=torch.float32).model, ids)
    assert float((stock - ours).abs().max() / ours.abs().max()) <= 1e-4
    assert float((dense - ours).abs().max() / ours.abs().max()) > 1e-3
    words = "bak dek, lon.\n"
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    assert tokenizer(words).input_ids == source.tokenizer()(words).input_ids


def test_zeros_are_exactly_where_the_edits_say(pruned):
    source, options, result = pruned
    dense, sparse = Shards(source.folder), Shards(result.folder)
    found = edits.load(result.folder / "edits.safetensors").items
    masks = {edit.tensor: edit.keep for edit in found if isinstance(edit, edits.Mask)}
    moved = {edit.tensor: edit.values for edit in found if isinstance(edit, edits.Replace)}
    assert masks and set(sparse) == set(dense)
    assert set(moved) == (set(masks) if options["method"] == "sparsegpt" else set())
    for name in dense:
        before, after = dense[name], sparse[name]
        assert after.dtype == before.dtype
        if name not in masks:
            assert torch.equal(after, before), name
            continue
        keep = masks[name]
        assert torch.equal(after, torch.where(keep, moved.get(name, before), 0)), name
        assert not after[~keep].any() and not after[~keep].signbit().any()
        assert int((after == 0).sum()) == int((~keep).sum()) + int((after[keep] == 0).sum())
        assert after[keep].count_nonzero() >= 0.99 * int(keep.sum())


def test_what_is_kept_is_what_was_planned(pruned):
    source, options, result = pruned
    planned = {record.name: record for record in ssmcompress.plan(source.name, **options).tensors}
    written = {record.name: record for record in manifest.read(result.folder).tensors}
    assert planned.keys() == written.keys()
    for name, record in written.items():
        assert record.status == planned[name].status
        assert record.kept == pytest.approx(planned[name].kept, abs=1e-9), name


def test_only_the_chosen_modules_are_touched(pruned):
    source, options, result = pruned
    arch = ssmcompress.load(source).arch
    chosen = set(options.get("include") or (*arch.projections, *options.get("modules", ())))
    chosen -= set(options.get("exclude", ()))
    expected = {arch.weight(layer, module) for layer in range(arch.layers) for module in chosen - set(arch.outer)}
    expected |= {arch.outer_weight(module) for module in chosen & set(arch.outer)}
    assert {edit.tensor for edit in result.edits} == expected


def test_every_group_has_exactly_its_zeros(pruned):
    _, options, result = pruned
    by_row = options.get("scope") == "row"
    for edit in result.edits:
        if not isinstance(edit, edits.Mask):
            continue
        rows = edit.keep.flatten(1)
        module = edit.tensor.split(".")[-2]
        if "pattern" in options:
            n, m = map(int, options["pattern"].split(":"))
            groups = rows.split(m, dim=1)
            wanted = [-(-group.shape[1] * n // m) for group in groups]
        elif by_row and module != "conv1d":
            ratio = options.get("modules", {}).get(module, options.get("sparsity", 0.5))
            groups, wanted = (rows,), [rows.shape[1] - int(rows.shape[1] * ratio)]
        elif options["method"] != "sparsegpt":  # which counts within its blocks of columns
            ratio = options.get("modules", {}).get(module, options.get("sparsity", 0.5))
            whole = edit.keep.reshape(1, -1)
            groups, wanted = (whole,), [whole.shape[1] - int(whole.shape[1] * ratio)]
            if edit.tensor.endswith("embeddings.weight") and options["method"] == "wanda":  # the tied head, by row
                groups, wanted = (rows,), [rows.shape[1] - int(rows.shape[1] * ratio)]
        else:
            groups, wanted = (), []
        for group, kept in zip(groups, wanted, strict=True):
            assert (group.sum(1) == kept).all(), edit.tensor


def test_the_journal_tells_every_layer_and_ends_before_the_rename(pruned):
    source, _, result = pruned
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    layers = [event["layer"] for event in events if event["event"] == "layer_done"]
    assert layers == list(range(source.config().num_hidden_layers))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_config_that_makes_stock_rescale_changes_nothing(models, small, tmp_path, name):
    """Stock transformers divides every out_proj it loads where the config says so; what is written says it no more."""
    marked = tmp_path / "marked"
    shutil.copytree(models[name], marked)
    edit_json(marked / "config.json", rescale_prenorm_residual=True)
    plain = ssmcompress.prune(models[name], out=tmp_path / "plain", **small).folder
    found = ssmcompress.prune(str(marked), out=tmp_path / "found", **small).folder
    assert (found / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert (found / "config.json").read_bytes() == (plain / "config.json").read_bytes()


def test_measuring_prints_and_keeps_both_figures(models, small, tmp_path, run, monkeypatch):
    few = text.documents("default", 5)
    monkeypatch.setattr(text, "documents", lambda *_: few)
    code, out, err = run("prune", models["mamba2"], "--calib", small["calib"], "--windows", 4, "--length", 32,
                         "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, err
    kept = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert "before and after" in out and f"{kept['before']['bits_per_byte']:.4f}" in out
    assert f"{kept['after']['bits_per_byte']:.4f}" in out
    assert kept["change"] == pytest.approx(kept["after"]["bits_per_byte"] - kept["before"]["bits_per_byte"])
    assert kept["interval"][0] <= kept["change"] <= kept["interval"][1]
    assert len(kept["before"]["documents"]) == 5


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_a_tokenizer_is_pruned_by_magnitude_only(models, tmp_path, name, run):
    bare = tmp_path / "bare"
    shutil.copytree(resolve(models[name]).folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    code, _, err = run("prune", bare, "--out", tmp_path / "wanda")
    assert code == 2 and "no tokenizer" in err
    code, _, err = run("prune", bare, "--method", "magnitude", "--out", tmp_path / "magnitude")
    assert code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {"bare", "magnitude"}

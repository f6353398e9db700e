"""What is measured on disk, shown side by side, listed, planned and converted."""

import json
from pathlib import Path

import pytest
import torch

import ssmcompress
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.checkpoint.source import resolve
from ssmcompress.evaluate.results import Summary
from ssmcompress.events import number
from ssmcompress.measure import recall as probes
from tests.flow.conftest import FAMILIES, MODELS, SHIPPED, prose


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Six documents of different sizes."""
    path = tmp_path_factory.mktemp("documents") / "held-out.jsonl"
    texts = [prose(30 + 17 * i, 20 + i) for i in range(6)]
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return str(path)


@pytest.fixture
def few(monkeypatch):
    """Memory probes of few items."""
    everything = probes.recall
    monkeypatch.setattr(probes, "recall", lambda *args, **kwargs: everything(*args, items=32, **kwargs))


@pytest.mark.parametrize("name", MODELS)
def test_eval_writes_a_summary(run, models, documents, few, tmp_path, name):
    out = tmp_path / "results"
    arguments = ("eval", models[name], "--perplexity", documents, "--recall", "--length", 64, "--out", out)
    code, printed, err = run(*arguments)
    assert code == 0, err
    summary = Summary.model_validate_json((out / "summary.json").read_text())
    weights = Shards(resolve(models[name]).folder)
    assert summary.schema_version == 1
    assert summary.params == sum(weights.shape(key).numel() for key in weights)
    assert summary.weight_bytes == sum(weights.shape(key).numel() * weights.dtype(key).itemsize for key in weights)
    assert summary.text == "held-out.jsonl" and summary.length == 64
    low, high = summary.bits_per_byte_interval
    assert low <= summary.bits_per_byte <= high
    assert summary.perplexity_interval[0] <= summary.perplexity <= summary.perplexity_interval[1]
    assert [(probe["probe"], probe["load"]) for probe in summary.recall] == [
        *(("copy", length) for length in (8, 12, 16, 20)),
        *(("key-value", pairs) for pairs in (2, 4, 8)),
    ]
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["measure"] == "text/bits_per_byte"]
    texts = [json.loads(line)["text"] for line in Path(documents).read_text().splitlines()]
    assert [row["weight"] for row in rows] == [len(each.encode()) for each in texts]
    assert "bits per byte" in printed and number(summary.bits_per_byte) in printed
    code, _, err = run(*arguments)
    assert code == 2 and "exists already" in err
    assert run(*arguments, "--overwrite")[0] == 0


def test_results_and_checkpoints_do_not_replace_one_another(run, models, documents, tmp_path):
    pruned, results = tmp_path / "pruned", tmp_path / "results"
    prune = ("prune", models["mamba"], "--method", "magnitude", "--no-eval", "--out")
    measure = ("eval", models["mamba"], "--perplexity", documents, "--out")
    assert run(*prune, pruned)[0] == run(*measure, results)[0] == 0
    both = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for command in ((*measure, pruned), (*prune, results), ("compare", results, results, "--out", pruned)):
        code, _, err = run(*command, "--overwrite")
        assert code == 2 and "is not replaced by" in " ".join(err.split())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == both


def test_eval_without_a_folder_only_prints(run, models, documents, tmp_path):
    code, printed, _ = run("eval", models["mamba"], "--perplexity", documents)
    assert code == 0 and "token perplexity" in printed and not list(tmp_path.iterdir())


def test_eval_says_the_same_whatever_the_batch(models, documents):
    found = [ssmcompress.evaluate(models["mamba2"], perplexity=documents, length=40, batch_size=b) for b in (1, 8)]
    assert found[0].bits_per_byte == pytest.approx(found[1].bits_per_byte, rel=1e-6)
    assert found[0].text_sha256 == found[1].text_sha256


def test_events_as_lines(run, models, documents):
    code, printed, _ = run("eval", models["mamba"], "--perplexity", documents, "--json")
    events = [json.loads(line) for line in printed.splitlines()]
    assert code == 0
    names = [event["name"] for event in events if event["event"] == "metric"]
    assert names == ["bits per byte", "token perplexity"]


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_shows_dense_beside_compressed(run, models, small, tmp_path, name):
    out = tmp_path / "out"
    ssmcompress.prune(models[name], out=out, sparsity=0.8, **small)
    arguments = ("--prompt", "bak dek", "--max-new-tokens", 12)
    code, printed, err = run("generate", out, "--against", models[name], *arguments)
    assert code == 0, err
    assert "continuation" in printed
    pruned, dense = ssmcompress.generate(str(out), prompt="bak dek", against=models[name], max_new_tokens=12)
    assert (pruned.model, dense.model) == (str(out), models[name])
    checkpoint = ssmcompress.load(models[name], dtype=torch.float32)
    ids = checkpoint.tokenizer("bak dek", return_tensors="pt").input_ids
    for _ in range(12):  # greedy, without a cache
        following = checkpoint.model(ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], dim=1)
        if following.item() == checkpoint.tokenizer.eos_token_id:
            break
    prompt = checkpoint.tokenizer("bak dek").input_ids
    assert dense.text == checkpoint.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


def test_sampling_depends_on_the_seed_alone(models):
    options = {"prompt": "bak", "temperature": 1.5, "max_new_tokens": 16}
    texts = [ssmcompress.generate(models["mamba2"], seed=seed, **options)[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_is_refused(run, models):
    code, _, err = run("generate", models["mamba"], "--prompt", "")
    assert code == 2 and "The prompt is empty" in err


def test_models_lists_families_and_shipped_checkpoints(run):
    code, printed, _ = run("models")
    assert code == 0
    for word in ("mamba", "falcon_mamba", "mamba2", "in_proj", "dt_rank", "head_channel", "conv1d", *SHIPPED):
        assert word in printed
    found = {family.model_type: family for family in ssmcompress.models()}
    assert found["mamba2"].axes == ("head", "head_channel", "state", "group", "width", "ssm", "layer")
    assert "dt_proj" in found["mamba"].hookless and "dt_bias" in found["mamba2"].hookless


@pytest.mark.parametrize("name", MODELS)
def test_plan_says_what_prune_then_does(run, models, small, tmp_path, name):
    planned = ssmcompress.plan(models[name], sparsity=0.3)
    code, printed, err = run("plan", models[name], "--sparsity", 0.3)
    assert code == 0, err
    for words in (f"{planned.after.params:,}", f"{planned.zeros:,}", f"{planned.after.weight_bytes:,}", "transformers"):
        assert words in printed + err
    result = ssmcompress.prune(models[name], out=tmp_path / "out", sparsity=0.3, **small)
    assert planned.zeros == sum(int((~edit.keep).sum()) for edit in result.edits)
    summary = ssmcompress.evaluate(str(result.folder), perplexity=small["calib"], limit=1)
    assert planned.after.weight_bytes == summary.weight_bytes
    assert planned.after.params == summary.params and planned.after.state_bytes == summary.state_bytes


@pytest.mark.parametrize("name", [name for name in MODELS if name != "falcon_mamba"])
def test_convert_and_back_gives_the_same_bits(run, models, tmp_path, name):
    code, _, err = run("convert", models[name], "--to", "mamba-ssm", "--out", tmp_path / "original")
    assert code == 0, err
    assert (tmp_path / "original" / "pytorch_model.bin").exists()
    code, _, err = run("convert", tmp_path / "original", "--to", "hf", "--out", tmp_path / "back")
    assert code == 0, err
    before, after = Shards(resolve(models[name]).folder), Shards(tmp_path / "back")
    assert set(before) == set(after)
    for key in before:
        assert before.dtype(key) == after.dtype(key) and torch.equal(before[key], after[key]), key
    ids = torch.randint(1, 500, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = [
            ssmcompress.load(str(model), dtype=torch.float32).model(ids, use_cache=False).logits
            for model in (models[name], tmp_path / "original", tmp_path / "back")
        ]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_the_original_layout_is_pruned_to_the_same_weights(run, models, small, tmp_path):
    assert run("convert", models["mamba"], "--to", "mamba-ssm", "--out", tmp_path / "original")[0] == 0
    for source, out in ((models["mamba"], "from-hf"), (str(tmp_path / "original"), "from-original")):
        ssmcompress.prune(source, out=tmp_path / out, **small)
    before, after = Shards(tmp_path / "from-hf"), Shards(tmp_path / "from-original")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_falcon_mamba_has_no_original_layout(run, models, tmp_path):
    code, _, err = run("convert", models["falcon_mamba"], "--to", "mamba-ssm", "--out", tmp_path / "original")
    assert code == 3 and "Traceback" not in err
    assert not list(tmp_path.iterdir())

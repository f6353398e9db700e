"""A recipe with an evaluation and a gate: compressed, measured from disk, compared, and gone on with."""

import json

import pytest
import yaml

import ssmcompress
from ssmcompress.checkpoint import manifest
from ssmcompress.errors import InputError
from ssmcompress.events import Note
from ssmcompress.recipes import shipped


@pytest.fixture(scope="module")
def mine(models, text, tmp_path_factory):
    """A recipe of one's own for a small random model."""
    path = tmp_path_factory.mktemp("recipes") / "mine.yaml"
    steps = [{"step": "prune", "sparsity": 0.9}, {"step": "prune", "method": "sparsegpt", "include": ["out_proj"]}]
    calibrate = {"text": text, "windows": 8, "length": 32}
    fields = {"model": models["mamba2"], "calibrate": calibrate, "steps": steps}
    path.write_text(yaml.safe_dump(fields | {"eval": {"perplexity": text, "length": 64, "limit": 6}}))
    return str(path)


def interrupt(moment):
    def emit(event):
        if type(event).__name__ == moment:
            raise KeyboardInterrupt

    return emit


def test_a_recipe_is_run_measured_and_compared(run, mine, tmp_path):
    code, out, err = run("run", mine, "--out", tmp_path / "out")
    assert code == 0, err
    results = tmp_path / "out" / "eval"
    dense, compressed = (json.loads((results / name / "summary.json").read_text()) for name in ("dense", "compressed"))
    made = manifest.read(tmp_path / "out")
    assert made.source.sha256 == dense["model_sha256"] and compressed["recipe_sha256"] == made.recipe_sha256
    assert dense["bits_per_byte"] != compressed["bits_per_byte"]
    told = json.loads((results / "comparison" / "comparison.json").read_text())
    assert told["candidates"][0]["measures"][0]["measure"] == "text/bits_per_byte"
    assert "text/bits_per_byte" in out and manifest.changed(tmp_path / "out") == []
    again, _, err = run("run", mine, "--out", tmp_path / "out")
    assert again == 2 and "exists already" in err


def test_a_gate_fails_when_all_is_written(run, tmp_path):
    overrides = ("sparsity=0.9", "perplexity=novels", "limit=12", "max_drop=0.01")
    code, _, err = run("run", "smoke/magnitude-50", *overrides, "recall=false", "tasks=[]", "--out", tmp_path / "out")
    assert code == 5 and "text/bits_per_byte lost more than allowed" in err
    assert (tmp_path / "out" / "eval" / "comparison" / "comparison.json").exists()
    assert manifest.changed(tmp_path / "out") == []


@pytest.mark.parametrize("moment", ["LayerDone", "Table", "Metric"])
def test_a_run_goes_on_where_it_was_interrupted(mine, tmp_path, moment):
    whole = ssmcompress.run(mine, out=tmp_path / "whole").folder
    with pytest.raises(KeyboardInterrupt):
        ssmcompress.run(mine, out=tmp_path / "out", emit=interrupt(moment))
    assert (tmp_path / "out").exists() == (moment == "Metric")
    events = []
    ssmcompress.run(mine, out=tmp_path / "out", emit=events.append)
    assert any(isinstance(event, Note) and ("Going on" in event.text or "left of" in event.text) for event in events)
    assert manifest.hashes(tmp_path / "out") == manifest.hashes(whole)
    for name in ("dense/samples.jsonl", "compressed/samples.jsonl"):
        assert (tmp_path / "out" / "eval" / name).read_bytes() == (whole / "eval" / name).read_bytes()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("gate.max_drop={text/bits_per_bite: 0.1}", "text/bits_per_bite"),
        ("gate.max_drop={arc_easy_local: 0.1}", "arc_easy_local"),
        ("eval.tasks=[arc_eazy_local]", "arc_eazy_local"),
        ("eval.suite=smok", "smok"),
        ("eval.perplexity=nowhere.txt", "nowhere.txt"),
        ("eval.perplexity=null", "measures nothing"),
    ],
)
def test_what_a_recipe_cannot_measure_is_told_before_anything_is_done(mine, tmp_path, override, said):
    with pytest.raises(InputError, match=said):
        ssmcompress.run(mine, [override], out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_planned(run, name):
    code, out, err = run("plan", name)
    assert code == 0, err
    assert "of them zero" in out

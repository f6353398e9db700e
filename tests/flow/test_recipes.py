"""A recipe with an evaluation and a gate: compressed, measured from disk, compared, and gone on with."""

import json
import shutil
import sys

import pytest
import yaml
from safetensors.torch import load_file, save_file

import ssmcompress
from ssmcompress.checkpoint import manifest
from ssmcompress.errors import InputError
from ssmcompress.evaluate.results import read
from ssmcompress.events import Note
from ssmcompress.recipe import recipe
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


def test_a_gate_fails_when_all_is_written_and_says_so_again(run, nothing_again, tmp_path):
    out = tmp_path / "out"
    overrides = ("sparsity=0.9", "perplexity=novels", "limit=12", "suite=null")
    given = ("run", "smoke/magnitude-50", *overrides)
    code, printed, err = run(*given, "max_drop=0.01", "--out", out)
    assert code == 5 and "text/bits_per_byte lost more than allowed" in err
    assert (out / "eval" / "comparison" / "comparison.json").exists()
    assert manifest.changed(out) == []
    nothing_again()
    again, told, said = run(*given, "max_drop=0.01", "--out", out)
    assert (
        again == 5
        and "holds this model already" in " ".join(said.split())
        and said.splitlines()[-2:] == err.splitlines()[-2:]
    )
    assert told in printed and "worse" in told
    assert run(*given, "max_drop=9", "--out", out)[0] == run(*given, "--out", out)[0] == 0
    code, _, err = run(*given, "sparsity=0.8", "max_drop=0.01", "--out", out)
    assert code == 2 and "exists already" in err


@pytest.fixture
def nothing_again(monkeypatch):
    """From then on nothing may be pruned or measured."""

    def forbid():
        for name in ("ssmcompress.making.find_edits", "ssmcompress.evaluate.evaluation.load"):
            monkeypatch.setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], no)

    def no(*_, **__):
        pytest.fail("done again")

    return forbid


def test_what_is_measured_otherwise_is_measured_anew_on_the_model_that_is_there(mine, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    ssmcompress.run(mine, out=out)
    made, first = manifest.hashes(out), read(out / "eval" / "compressed").summary
    monkeypatch.setattr(sys.modules["ssmcompress.making"], "find_edits", lambda *_, **__: pytest.fail("pruned again"))
    ssmcompress.run(mine, ["eval.length=48", "max_drop=9"], out=out)
    second = read(out / "eval" / "compressed").summary
    assert (first.length, second.length) == (64, 48) and first.bits_per_byte != second.bits_per_byte
    assert read(out / "eval" / "dense").summary.length == 48
    assert json.loads((out / "eval" / "comparison" / "comparison.json").read_text())["max_drop"] == {"all": 9}
    assert manifest.hashes(out) == made and manifest.changed(out) == []


def test_an_interrupted_pruning_is_gone_on_with_whatever_is_to_be_measured(mine, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ssmcompress.run(mine, out=tmp_path / "out", emit=interrupt("LayerDone"))
    events = []
    ssmcompress.run(mine, ["eval.length=48"], out=tmp_path / "out", emit=events.append)
    assert any(isinstance(event, Note) and "Going on" in event.text for event in events)


def test_a_folder_made_of_another_model_of_the_same_name_is_left_alone(models, tmp_path):
    shutil.copytree(models["mamba"], tmp_path / "in")
    steps = [{"step": "prune", "method": "magnitude"}]
    given = recipe(model=str(tmp_path / "in"), steps=steps, eval={"perplexity": "novels", "limit": 1})
    ssmcompress.run(given, out=tmp_path / "out")
    path = tmp_path / "in" / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(InputError, match="exists already"):
        ssmcompress.run(given, out=tmp_path / "out")


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

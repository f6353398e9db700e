"""The run itself: several steps, what it refuses before it costs anything, and what it records."""

import json
from pathlib import Path

import pytest
import torch

import ssmcompress
from ssmcompress import run as runner
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.edits import Mask
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.events import Finished, Note, Table
from ssmcompress.recipe import recipe
from tests.unit.checkpoint import folders

MAGNITUDE = {"step": "prune", "method": "magnitude"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mamba")
    folders.save("mamba", path, tokenizer=True)
    return path


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    path = tmp_path.parent / f"{tmp_path.name}.txt"
    path.write_text(" ".join(f"w{i * i % 59}" for i in range(900)))
    return str(path)


def test_steps_follow_one_another_and_compose(folder, tmp_path):
    steps = [MAGNITUDE | {"include": ["in_proj"], "sparsity": 0.5}, MAGNITUDE | {"include": ["in_proj", "out_proj"]}]
    steps[1]["sparsity"] = 0.75
    result = runner.run(recipe(model=str(folder), steps=steps), tmp_path / "out", measure=False)
    once = [{"include": ["in_proj", "out_proj"], "sparsity": 0.75} | MAGNITUDE]
    other = runner.run(recipe(model=str(folder), steps=once), tmp_path / "once", measure=False)
    assert sorted(edit.tensor for edit in result.edits) == sorted(edit.tensor for edit in other.edits)
    weights = [Shards(found.folder) for found in (result, other)]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


@pytest.mark.parametrize(
    ("options", "error"),
    [({"include": ("zzz",)}, InputError), ({"method": "sparsegpt", "include": ("conv1d",)}, UnsupportedError)],
)
def test_a_module_that_cannot_be_pruned_is_refused_before_the_model_is_read(
    folder, tmp_path, monkeypatch, options, error
):
    monkeypatch.setattr(runner, "load", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(error):
        ssmcompress.prune(str(folder), out=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_calibration_that_cannot_be_used_is_refused_before_anything_is_measured(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "perplexity", lambda *_, **__: pytest.fail("the model was measured"))
    with pytest.raises(InputError, match="nowhere"):
        ssmcompress.prune(str(folder), out=tmp_path / "out", calib="./nowhere.txt")
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused_before_the_model_is_read(folder, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(runner, "load", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(InputError, match="exists already"):
        ssmcompress.prune(str(folder), out=tmp_path)


def test_the_manifest_records_source_calibration_kernels_and_check(folder, text, tmp_path):
    ssmcompress.prune(str(folder), out=tmp_path / "out", calib=text, windows=6, length=16, no_eval=True)
    record = manifest.read(tmp_path / "out")
    assert record.verb == "prune" and record.source.name == folder.name
    assert record.source.sha256 == {"model.safetensors": manifest.sha256(folder / "model.safetensors")}
    assert (record.calibration.windows, record.calibration.length) == (6, 16)
    assert len(record.calibration.sha256) == 64
    assert set(record.backend) == {"conv", "selective_scan", "selective_step", "ssd", "ssd_step"}
    assert record.versions["torch"] == torch.__version__
    assert 0 <= record.verification.transformers <= 1e-4 and 0 <= record.verification.ssmcompress <= 1e-4
    assert record.sparsity == pytest.approx(0.5)
    assert record.calibration.source == Path(text).name
    written = (tmp_path / "out" / "ssmcompress.json").read_text()
    assert str(tmp_path.parent) not in written and str(folder.parent) not in written


def test_magnitude_needs_no_calibration(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runner.data, "windows", lambda *_, **__: pytest.fail("text was read"))
    result = ssmcompress.prune(str(folder), out=tmp_path / "out", method="magnitude", no_eval=True)
    assert manifest.read(result.folder).calibration is None
    assert (result.before, result.after) == (None, None)
    assert all(isinstance(edit, Mask) for edit in result.edits)


def test_what_is_told(folder, text, tmp_path):
    events = []
    ssmcompress.prune(
        str(folder), out=tmp_path / "out", calib=text, windows=4, length=16, no_eval=True, emit=events.append
    )
    assert events[-1] == Finished(str(tmp_path / "out"))
    assert any(isinstance(event, Note) and event.text.startswith("Kernels: ") for event in events)
    assert any(isinstance(event, Table) and event.title == "coverage" for event in events)
    kept = [json.loads(line)["event"] for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert kept.count("layer_done") == 2


def test_a_second_listener_may_fail_and_nothing_stays(folder, text, tmp_path):
    def listener(event):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ssmcompress.prune(str(folder), out=tmp_path / "out", method="magnitude", no_eval=True, emit=listener)
    assert not list(tmp_path.iterdir())


def test_computing_in_less_than_is_stored_still_verifies(folder, text, tmp_path):
    for method in ("wanda", "sparsegpt"):
        out = tmp_path / method
        options = {"calib": text, "windows": 4, "length": 16, "no_eval": True, "dtype": "bfloat16"}
        ssmcompress.prune(str(folder), out=out, method=method, **options)
        assert Shards(out).dtype("backbone.embeddings.weight") == torch.float32
        assert manifest.read(out).verification.transformers <= 1e-4


def test_apply_keeps_recipe_and_calibration_of_the_run(folder, text, tmp_path):
    ssmcompress.prune(str(folder), out=tmp_path / "first", calib=text, windows=4, length=16, no_eval=True)
    ssmcompress.apply(tmp_path / "first" / "edits.safetensors", str(folder), out=tmp_path / "second")
    first, second = (manifest.read(tmp_path / name) for name in ("first", "second"))
    assert second.verb == "apply" and second.calibration == first.calibration
    assert second.tensors == first.tensors
    assert (tmp_path / "second" / "recipe.yaml").read_bytes() == (tmp_path / "first" / "recipe.yaml").read_bytes()


def test_edits_that_do_not_fit_change_nothing(folder, text, tmp_path):
    ssmcompress.prune(str(folder), out=tmp_path / "first", method="magnitude", no_eval=True)
    folders.save("mamba2", tmp_path / "other", tokenizer=True)
    with pytest.raises(InputError):
        ssmcompress.apply(tmp_path / "first" / "edits.safetensors", str(tmp_path / "other"), out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"first", "other"}

"""The run itself: several steps, what it refuses before it costs anything, and what it records."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ssmcompress
import ssmcompress.making
import ssmcompress.run
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.edits import Mask
from ssmcompress.errors import InputError, ResourceError, UnsupportedError
from ssmcompress.events import Finished, LayerDone, Note, Table
from ssmcompress.recipe import recipe
from ssmcompress.recipes import parse
from tests.unit.checkpoint import folders

runner = sys.modules["ssmcompress.run"]  # the name in the package is the verb
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
    result = ssmcompress.run(recipe(model=str(folder), steps=steps), out=tmp_path / "out", no_eval=True)
    once = [{"include": ["in_proj", "out_proj"], "sparsity": 0.75} | MAGNITUDE]
    other = ssmcompress.run(recipe(model=str(folder), steps=once), out=tmp_path / "once", no_eval=True)
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
    monkeypatch.setattr(runner, "glance", lambda *_, **__: pytest.fail("the model was measured"))
    with pytest.raises(InputError, match="nowhere"):
        ssmcompress.prune(str(folder), out=tmp_path / "out", calib="./nowhere.txt")
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_told_before_the_model_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _, found=shutil.disk_usage(tmp_path): found._replace(free=2000))
    monkeypatch.setattr(runner, "load", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(ResourceError, match=r"\d kB of weights do not fit .*: 2\.00 kB are free"):
        ssmcompress.prune(str(folder), out=tmp_path / "out")
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
    monkeypatch.setattr(ssmcompress.making.data, "windows", lambda *_, **__: pytest.fail("text was read"))
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
    options = {"calib": text, "windows": 4, "length": 16, "no_eval": True, "dtype": "bfloat16"}
    ssmcompress.prune(str(folder), out=tmp_path / "out", **options)
    assert Shards(tmp_path / "out").dtype("backbone.embeddings.weight") == torch.float32
    assert manifest.read(tmp_path / "out").verification.transformers <= 1e-4


def test_new_values_are_not_computed_in_less_than_is_stored(folder, text, tmp_path):
    with pytest.raises(UnsupportedError, match="coarser than the stored"):
        ssmcompress.prune(str(folder), out=tmp_path / "out", calib=text, method="sparsegpt", dtype="bfloat16")
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_where_it_was_stopped(folder, text, tmp_path, monkeypatch):
    options = {"calib": text, "windows": 4, "length": 16, "no_eval": True}
    for method in ("wanda", "sparsegpt", "magnitude"):
        ssmcompress.prune(str(folder), out=tmp_path / f"{method}-whole", method=method, **options)
        out = tmp_path / method

        def stop(event):
            if isinstance(event, LayerDone):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ssmcompress.prune(str(folder), out=out, method=method, emit=stop, **options)
        assert not out.exists() and out.with_name(f"{method}.partial").exists()
        events = []
        ssmcompress.prune(str(folder), out=out, method=method, emit=events.append, **options)
        assert Note("Going on from an earlier run: 1 of 2 layers are done.") in events
        assert manifest.hashes(out) == manifest.hashes(tmp_path / f"{method}-whole")
        assert not out.with_name(f"{method}.partial").exists()


def test_a_run_does_not_go_on_with_another_text_of_the_same_name(folder, text, tmp_path):
    options = {"calib": text, "windows": 4, "length": 16, "no_eval": True}

    def stop(event):
        if isinstance(event, LayerDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ssmcompress.prune(str(folder), out=tmp_path / "out", emit=stop, **options)
    Path(text).write_text(" ".join(f"w{i * i % 7}" for i in range(900)))
    events = []
    ssmcompress.prune(str(folder), out=tmp_path / "out", emit=events.append, **options)
    told = [event.text for event in events if isinstance(event, Note)]
    assert any("not those of the earlier run: the layers it finished (1)" in each for each in told)
    assert not any("Going on" in each for each in told)
    ssmcompress.prune(str(folder), out=tmp_path / "fresh", **options)
    assert manifest.hashes(tmp_path / "out") == manifest.hashes(tmp_path / "fresh")


def test_a_run_of_another_recipe_starts_over(folder, text, tmp_path):
    def stop(event):
        if isinstance(event, LayerDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ssmcompress.prune(str(folder), out=tmp_path / "out", method="magnitude", no_eval=True, emit=stop)
    events = []
    ssmcompress.prune(
        str(folder), out=tmp_path / "out", method="magnitude", sparsity=0.25, no_eval=True, emit=events.append
    )
    assert not any(isinstance(event, Note) and "Going on" in event.text for event in events)
    assert manifest.read(tmp_path / "out").sparsity == pytest.approx(0.25, abs=0.01)


def test_a_pruned_model_pruned_again_tells_all_its_zeros_and_its_history(folder, tmp_path):
    ssmcompress.prune(str(folder), out=tmp_path / "a", method="magnitude", include="in_proj", no_eval=True)
    ssmcompress.prune(str(tmp_path / "a"), out=tmp_path / "b", method="magnitude", include="out_proj", no_eval=True)
    first, second = (manifest.read(tmp_path / name) for name in "ab")
    assert [run.source.name for run in second.earlier] == [folder.name] and second.source.name == "a"
    rows = {tensor.name.split("mixer.")[-1]: tensor for tensor in second.tensors}
    assert rows["in_proj.weight"].status == "kept" and rows["in_proj.weight"].nonzero == pytest.approx(0.5)
    assert rows["out_proj.weight"].nonzero == pytest.approx(0.5)
    assert ssmcompress.plan(str(tmp_path / "b")).zeros_before == sum(tensor.zeros for tensor in second.tensors)
    assert first.earlier == ()


def test_zeros_that_were_there_are_not_claimed(folder, text, tmp_path):
    options = {"calib": text, "windows": 4, "length": 16, "no_eval": True, "include": "in_proj"}
    ssmcompress.prune(str(folder), out=tmp_path / "a", sparsity=0.5, **options)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "50.0% of the entries of 2 weight tensors were set to zero by ssmcompress.\n" in card
    steps = ({"sparsity": 0.75}, {"sparsity": 0.25}, {"method": "sparsegpt", "pattern": "3:4"})
    for step in steps:
        events = []
        ssmcompress.prune(
            str(tmp_path / "a"), out=tmp_path / "b", overwrite=True, emit=events.append, **options, **step
        )
        old, new = (
            torch.cat([Shards(tmp_path / at)[f"backbone.layers.{i}.mixer.in_proj.weight"] for i in (0, 1)]) == 0
            for at in "ab"
        )
        told = f"{float((new & ~old).double().mean()):.1%} of the entries of 2 weight tensors were set to zero"
        total = f"with those that were zero before, {float(new.double().mean()):.1%} are.\n"
        card = (tmp_path / "b" / "README.md").read_text()
        assert f"{told} by ssmcompress; {total}" in card
        layers = [event.kept for event in events if isinstance(event, LayerDone)]
        assert layers == pytest.approx([float((~half).double().mean()) for half in new.chunk(2)])
        ssmcompress.apply(tmp_path / "b" / "edits.safetensors", str(tmp_path / "a"), out=tmp_path / "c", overwrite=True)
        assert (tmp_path / "c" / "README.md").read_text() == card


def test_a_plan_for_a_pruned_model_counts_the_zeros_it_has(folder, text, tmp_path):
    options = {"calib": text, "windows": 4, "length": 16, "no_eval": True}
    ssmcompress.prune(str(folder), out=tmp_path / "a", sparsity=0.6, include="in_proj", **options)
    counted = sum(tensor.zeros for tensor in manifest.read(tmp_path / "a").tensors)
    for step in ({"sparsity": 0.3}, {"sparsity": 0.3, "include": "out_proj"}, {"method": "sparsegpt", "sparsity": 0.3}):
        events = []
        told = ssmcompress.plan(str(tmp_path / "a"), emit=events.append, **step)
        ssmcompress.prune(str(tmp_path / "a"), out=tmp_path / "b", overwrite=True, **options, **step)
        made = {tensor.name: tensor for tensor in manifest.read(tmp_path / "b").tensors}
        assert all(each.zeros <= made[each.name].zeros for each in told.tensors)
        assert told.zeros == sum(each.zeros for each in told.tensors) <= sum(each.zeros for each in made.values())
        assert (told.zeros > counted) == ("method" not in step)
        tables = {event.title: event for event in events if isinstance(event, Table)}
        rows = {row[0]: row for row in tables["plan"].rows}
        assert rows["of them zero"][1:] == (f"{counted:,}", f"at least {told.zeros:,}")
        share = {row[0]: row[-1] for row in tables["coverage"].rows}["mixer.in_proj.weight"]
        assert tables["coverage"].columns[-1] == "not zero, at most"
        assert share == ("70.0%" if "method" in step else "40.0%")


def test_new_values_go_only_to_the_weights_they_were_made_from(folder, text, tmp_path):
    folders.save("mamba", tmp_path / "other", tokenizer=True)
    path = tmp_path / "other" / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    options = {"calib": text, "windows": 4, "length": 16, "no_eval": True}
    for method in ("sparsegpt", "wanda"):
        ssmcompress.prune(str(folder), out=tmp_path / method, method=method, **options)
    edits = tmp_path / "sparsegpt" / "edits.safetensors"
    with pytest.raises(InputError, match="made for other weights"):
        ssmcompress.apply(edits, str(tmp_path / "other"), out=tmp_path / "out")
    events = []
    ssmcompress.apply(
        tmp_path / "wanda" / "edits.safetensors", str(tmp_path / "other"), out=tmp_path / "out", emit=events.append
    )
    assert any(isinstance(event, Note) and event.level == "warning" for event in events)


def test_a_text_with_fewer_windows_is_told(folder, text, tmp_path):
    events = []
    options = {"calib": text, "windows": 4000, "length": 16, "no_eval": True}
    ssmcompress.prune(str(folder), out=tmp_path / "out", emit=events.append, **options)
    assert any(isinstance(event, Note) and "not 4000" in event.text for event in events)


def test_apply_keeps_recipe_and_calibration_of_the_run(folder, text, tmp_path):
    ssmcompress.prune(str(folder), out=tmp_path / "first", calib=text, windows=4, length=16, no_eval=True)
    ssmcompress.apply(tmp_path / "first" / "edits.safetensors", str(folder), out=tmp_path / "second")
    first, second = (manifest.read(tmp_path / name) for name in ("first", "second"))
    assert second.verb == "apply" and second.calibration == first.calibration
    assert second.tensors == first.tensors
    said = [(tmp_path / name / "recipe.yaml").read_bytes() for name in ("first", "second")]
    assert said[0] == said[1] and parse(said[0].decode()).model == folder.name


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_recipe_of_an_output_says_every_default_and_gives_the_same_bytes(folder, text, tmp_path, method):
    given = {"include": ["in_proj", "lm_head"], "windows": 4, "length": 16, "calib": text}
    first = ssmcompress.prune(str(folder), out=tmp_path / "first", method=method, no_eval=True, **given).folder
    told = parse((first / "recipe.yaml").read_text())
    assert told.steps[0].scope == (None if method == "sparsegpt" else {"in_proj": "tensor", "lm_head": "row"})
    assert told.sha256() == manifest.read(first).recipe_sha256
    again = ["model=" + str(folder), "text=" + text]
    ssmcompress.run(str(first / "recipe.yaml"), again, out=tmp_path / "again", no_eval=True)
    ssmcompress.apply(first / "edits.safetensors", str(folder), out=tmp_path / "applied")
    assert manifest.hashes(first) == manifest.hashes(tmp_path / "again") == manifest.hashes(tmp_path / "applied")


def test_a_tokenizer_without_an_end_of_text_token_is_no_reason_to_stop(folder, text, tmp_path):
    shutil.copytree(folder, tmp_path / "in")
    folders.edit_json(tmp_path / "in" / "tokenizer_config.json", eos_token=None, bos_token=None)
    events = []
    options = {"calib": text, "windows": 4, "length": 16, "emit": events.append}
    result = ssmcompress.prune(str(tmp_path / "in"), out=tmp_path / "out", **options)
    assert (result.before, result.after) == (None, None) and manifest.changed(result.folder) == []
    lacking = Note("Without an end-of-text token in the tokenizer nothing is measured.", "warning")
    assert events.count(lacking) == 1


def test_edits_that_do_not_fit_change_nothing(folder, text, tmp_path):
    ssmcompress.prune(str(folder), out=tmp_path / "first", method="magnitude", no_eval=True)
    folders.save("mamba2", tmp_path / "other", tokenizer=True)
    with pytest.raises(InputError):
        ssmcompress.apply(tmp_path / "first" / "edits.safetensors", str(tmp_path / "other"), out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"first", "other"}


def test_shards_are_as_large_as_the_recipe_says(folder, tmp_path):
    steps = [MAGNITUDE]
    made = ssmcompress.run(recipe(model=str(folder), steps=steps, save={"shard_size": "20KB"}), out=tmp_path / "out")
    assert (made.folder / "model.safetensors.index.json").exists() and len(Shards(made.folder).weight_files) > 1
    ssmcompress.apply(made.folder / "edits.safetensors", str(folder), out=tmp_path / "again")
    assert manifest.hashes(made.folder) == manifest.hashes(tmp_path / "again")

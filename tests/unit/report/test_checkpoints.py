"""Which folders make up which model, and what is refused."""

import json
import math
import shutil

import pytest

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.report.checkpoints import read
from tests.unit.report import outputs


def test_evaluations_join_the_models_whose_weights_they_measured(models, tmp_path):
    magnitude, wanda = models.values()
    dense = outputs.evaluation(tmp_path / "r0", outputs.source_of(wanda), "source")
    other = outputs.evaluation(tmp_path / "r1", outputs.weights_of(wanda), "another name")
    found = {each.label: each for each in read([other, wanda, magnitude, dense])}
    assert list(found) == ["source", "wanda", "magnitude"]
    assert [len(each.evaluations) for each in found.values()] == [1, 1, 0]
    assert found["wanda"].source is not None and found["wanda"].source.label == "source"
    assert found["wanda"].made.errors.keys() == {0, 1} and found["magnitude"].made.errors == {}


def test_the_dense_model_is_there_without_an_evaluation(models):
    dense, found = read([models["wanda"]])
    assert dense.made is None and dense.params == found.params and dense.weight_bytes == found.weight_bytes
    assert found.nonzero < found.params


def test_the_dense_model_of_a_cut_one_is_larger(models, tmp_path):
    source = read([models["wanda"]])[1]
    out = tmp_path / "cut"
    ssmcompress.prune(str(models["wanda"]), axis="layer", keep=0.5, method="random", out=out, no_eval=True)
    dense, found = read([out])
    assert (dense.params, dense.weight_bytes) == (source.params, source.weight_bytes)
    assert found.params < dense.params and found.weight_bytes < dense.weight_bytes


def test_a_source_that_is_not_given_may_be_compressed_itself(models, tmp_path):
    wanda = models["wanda"]
    assert read([wanda])[0].dense
    again = tmp_path / "again"
    ssmcompress.prune(str(wanda), method="magnitude", sparsity=0.6, out=again, no_eval=True)
    source, found = read([again])
    assert (source.label, source.dense, found.dense) == ("wanda", False, False)
    assert [each.label for each in read([again, wanda])] == ["source", "wanda", "again"]


def test_a_layout_that_stores_a_weight_twice_has_no_more_parameters(models, tmp_path):
    ssmcompress.convert(str(models["wanda"]), to="mamba-ssm", out=tmp_path / "other")
    _, source, found = read([tmp_path / "other", models["wanda"]])
    assert found.params == source.params and found.nonzero == source.nonzero


def test_zeros_are_those_of_the_manifest(models):
    told = json.loads((models["wanda"] / "ssmcompress.json").read_text())["tensors"]
    sizes = {tensor["name"]: math.prod(tensor["shape"]) for tensor in told}
    zeros = sum(tensor["zeros"] for tensor in told)
    assert read([models["wanda"]])[1].nonzero == sum(sizes.values()) - zeros and zeros > 0


def test_an_evaluation_alone_is_a_model_of_its_own(tmp_path):
    folder = outputs.evaluation(tmp_path / "r", {"model.safetensors": "1f" * 32}, "hub/model")
    (found,) = read([folder])
    assert found.label == "hub/model" and found.made is None and found.params == outputs.LEAST["params"]
    assert found.nonzero is None


def test_a_compressed_model_known_by_its_evaluation_finds_its_source_by_name(tmp_path):
    dense = outputs.evaluation(tmp_path / "a", {"model.safetensors": "1f" * 32}, "hub/model")
    other = outputs.evaluation(tmp_path / "b", {"model.safetensors": "2f" * 32}, "pruned", source="hub/model")
    first, second = read([other, dense])
    assert (first.label, second.label) == ("hub/model", "pruned") and second.source.label == "hub/model"


def test_models_named_like_their_source_are_all_there(tmp_path):
    given = [
        outputs.evaluation(tmp_path / f"r{i}", {"model.safetensors": f"{i}f" * 32}, "m", source="m") for i in range(2)
    ]
    assert [(each.label, each.dense) for each in read(given)] == [("m", False), ("m", False)]


def test_evaluations_inside_a_model_folder_are_found(models):
    wanda = models["wanda"]
    outputs.evaluation(wanda / "eval" / "dense", outputs.source_of(wanda), "source")
    outputs.evaluation(wanda / "eval" / "compressed", outputs.weights_of(wanda), "out")
    assert [len(each.evaluations) for each in read([wanda])] == [1, 1]


def test_a_folder_given_twice_counts_once(models, tmp_path):
    folder = outputs.evaluation(tmp_path / "r", outputs.weights_of(models["wanda"]), "x")
    *_, found = read([folder, models["wanda"], tmp_path / "wanda" / ".." / "r", folder])
    assert len(found.evaluations) == 1


def test_models_of_one_name_are_told_apart_by_their_parents(models, tmp_path):
    for name, folder in list(models.items()):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.move(folder, tmp_path / "runs" / name / "out")
    names = [each.label for each in read(sorted((tmp_path / "runs").glob("*/out")))]
    assert names[1:] == ["magnitude/out", "wanda/out"]


def test_two_folders_with_the_same_weights_are_one_model(models, tmp_path):
    shutil.copytree(models["wanda"], tmp_path / "again")
    assert [each.label for each in read([models["wanda"], tmp_path / "again"])][1:] == ["wanda = again"]


def test_what_is_not_there_is_not_needed(models, tmp_path):
    for name in ("measured.json", "events.jsonl", "recipe.yaml"):
        (models["wanda"] / name).unlink(missing_ok=True)
    folder = outputs.evaluation(tmp_path / "r", outputs.weights_of(models["wanda"]), "x")
    (folder / "samples.jsonl").unlink()
    _, found = read([models["wanda"], folder])
    assert found.made.recipe is None and found.made.errors == {} and found.made.looks is None
    assert found.evaluations[0].summary.bits_per_byte is not None


@pytest.mark.parametrize("name", ["empty", "stock", "nowhere", "file"])
def test_other_folders_are_refused(tmp_path, name):
    if name == "file":
        (tmp_path / name).write_text("{}")
    elif name != "nowhere":
        (tmp_path / name).mkdir()
    if name == "stock":
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(InputError, match=name) as raised:
        read([tmp_path / name])
    assert "ssmcompress prune" in raised.value.hint


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("measured.json", '{"before": 1}', "measured.json"),
        ("events.jsonl", "{half a li", "events.jsonl"),
        ("recipe.yaml", "model: 7: 8", "recipe.yaml"),
        ("ssmcompress.json", "{}", "ssmcompress.json"),
    ],
)
def test_a_damaged_file_is_named(models, file, text, said):
    (models["wanda"] / file).write_text(text)
    with pytest.raises(InputError, match=said):
        read([models["wanda"]])


@pytest.mark.parametrize("damage", [{"recall": [{"probe": "copy"}]}, {"params": "many"}])
def test_a_damaged_summary_is_named(tmp_path, damage):
    folder = outputs.evaluation(tmp_path / "r", {"model.safetensors": "1f" * 32}, "m")
    told = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(told | damage))
    with pytest.raises(InputError, match=str(folder)):
        read([folder])

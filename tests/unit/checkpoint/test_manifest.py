"""Manifest and card: what they say is true of the folder, and nothing in them changes from run to run."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ssmcompress.checkpoint import card, manifest
from ssmcompress.checkpoint.card import Measure
from ssmcompress.checkpoint.manifest import CalibrationRecord, ShapeRecord, SizeRecord, SourceRecord, TensorRecord
from ssmcompress.checkpoint.source import Source, load
from ssmcompress.checkpoint.verify import Verification
from ssmcompress.errors import InputError
from tests.unit.checkpoint.folders import save

TENSORS = (
    TensorRecord(name="backbone.embeddings.weight", shape=(61, 32), status="kept", reason="on purpose"),
    TensorRecord(name="backbone.layers.0.mixer.in_proj.weight", shape=(128, 32), status="pruned", kept=0.5),
    TensorRecord(name="backbone.layers.0.mixer.A_log", shape=(64, 5), status="unsupported"),
    TensorRecord(name="backbone.layers.1.mixer.in_proj.weight", shape=(128, 32), status="pruned", kept=0.25),
    TensorRecord(name="backbone.layers.1.mixer.A_log", shape=(64, 5), status="unsupported"),
)
HUB = SourceRecord(name="somebody/model", revision="a" * 40, layout="hf", sha256={"model.safetensors": "b" * 64})
VERIFIED = Verification(96, 1e-4, 2e-7, 0.0)


def written(folder: Path, **fields: object) -> manifest.Manifest:
    source = load(str(folder)).source
    return manifest.write(folder, verb="prune", source=source, seed=0, tensors=TENSORS, verification=VERIFIED, **fields)


def test_written_and_read_again(tmp_path: Path) -> None:
    save("mamba", tmp_path, tokenizer=True)
    (tmp_path / "events.jsonl").write_text('{"time": 1}')
    record = written(
        tmp_path,
        recipe_sha256="c" * 64,
        backend={"selective_scan": "cpu"},
        calibration=CalibrationRecord(source="shipped", sha256="d" * 64, windows=8, length=64),
    )
    assert manifest.read(tmp_path) == record
    assert record.files["model.safetensors"] == record.source.sha256["model.safetensors"]
    assert record.files.keys() == {p.name for p in tmp_path.iterdir()} - {"ssmcompress.json", "events.jsonl"}
    assert record.source.name == tmp_path.name and str(tmp_path) not in (tmp_path / "ssmcompress.json").read_text()
    assert record.sparsity == pytest.approx(0.625)


def test_same_folder_same_bytes(tmp_path: Path) -> None:
    save("mamba", tmp_path / "1" / "model")
    shutil.copytree(tmp_path / "1" / "model", tmp_path / "2" / "model")
    for copy in ("1", "2"):
        record = written(tmp_path / copy / "model")
        card.write(tmp_path / copy / "model", title="T", summary="S.", manifest=record)
    for name in ("ssmcompress.json", "README.md"):
        assert (tmp_path / "1" / "model" / name).read_bytes() == (tmp_path / "2" / "model" / name).read_bytes()


def test_changed_files_are_found(tmp_path: Path) -> None:
    save("mamba", tmp_path)
    card.write(tmp_path, title="T", summary="S.", manifest=written(tmp_path))
    assert manifest.changed(tmp_path) == []
    (tmp_path / "measured.json").write_text("{}")
    assert manifest.changed(tmp_path) == []
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "added.txt").write_text("")
    assert manifest.changed(tmp_path) == ["added.txt", "config.json", "generation_config.json"]


@pytest.mark.parametrize("content", ["{", "{}", '{"schema_version": 2}', '{"schema_version": 1, "verb": 3}'])
def test_a_manifest_that_is_not_one(content: str, tmp_path: Path) -> None:
    (tmp_path / "ssmcompress.json").write_text(content)
    with pytest.raises(InputError, match=r"ssmcompress\.json"):
        manifest.read(tmp_path)


def test_card_says_what_was_done(tmp_path: Path) -> None:
    record = manifest.write(tmp_path, verb="prune", source=HUB, seed=3, tensors=TENSORS, verification=VERIFIED)
    card.write(
        tmp_path,
        title="Half a model",
        summary="Half of every projection was set to zero.",
        manifest=record,
        recipe="step: prune\nmethod: wanda\n",
        measures=[Measure("bits per byte", 1.5, 1.625, "[1.61, 1.64]"), Measure("recall", 1.0, 0.0)],
        measured_on="the shipped text",
        license="apache-2.0",
    )
    text = (tmp_path / "README.md").read_text()
    front = ModelCard(text).data.to_dict()
    assert front["base_model"] == "somebody/model" and front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers" and "pruned" in front["tags"]
    for line in (
        "| bits per byte | 1.500 | 1.625 | [1.61, 1.64] |",
        "| mixer.in_proj.weight | 2 | pruned | 37.5% |",
        "| embeddings.weight | 1 | kept: on purpose | 100.0% |",
        "| mixer.A_log | 2 | unsupported | 100.0% |",
        "Of the pruned tensors, 62.5% of the entries are zero.",
        "a mask alone changes neither the bytes this model takes in memory nor its speed",
        "Loads in transformers and ssmcompress",
        "method: wanda",
        "at commit `" + "a" * 40 + "`",
        "Seed: 3",
    ):
        assert line in text, line


def test_card_without_masks_claims_nothing_of_them(tmp_path: Path) -> None:
    source = HUB.model_copy(update={"revision": None, "name": "ref:mamba"})
    record = manifest.write(tmp_path, verb="convert", source=source, verification=Verification(96, 1e-4, None, 0.0))
    card.write(tmp_path, title="T", summary="S.", manifest=record)
    text = (tmp_path / "README.md").read_text()
    front = ModelCard(text).data.to_dict()
    assert "base_model" not in front and "license" not in front and front["library_name"] == "ssmcompress"
    assert "mask" not in text and "AutoModel" not in text and "Loads in ssmcompress" in text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\n---\n# T", "mit"),
        ("# T", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        (None, None),
    ],
)
def test_license_of_the_source(text: str | None, found: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert card.license_of(Source("x", tmp_path, "hf")) == found


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    save("mamba", tmp_path)
    written(tmp_path)
    content = json.loads((tmp_path / "ssmcompress.json").read_text())
    assert content["schema_version"] == 1 and content["versions"].keys() == {
        "ssmcompress",
        "torch",
        "transformers",
        "python",
    }


def test_kinds_of_which_layers_differ_take_one_line() -> None:
    cuts = [("0", 8, 24), ("1", 8, 16), ("2", 4, 16)]
    tensors = [
        TensorRecord(name=f"backbone.layers.{i}.mixer.D", shape=(to,), status="cut", reason=f"from {of} to {to}")
        for i, to, of in cuts
    ]
    tensors.append(TensorRecord(name="backbone.layers.3.mixer.D", shape=(16,), status="kept", reason="on purpose"))
    assert card.coverage(tensors) == [
        ("mixer.D", "3", "cut: from 16–24 to 4–8", "100.0%"),
        ("mixer.D", "1", "kept: on purpose", "100.0%"),
    ]


def test_sizes_of_layers_that_differ_are_told_as_a_range_and_layer_by_layer(tmp_path: Path) -> None:
    save("mamba", tmp_path, tokenizer=True)
    sizes = {"params": 9, "weight_bytes": 18, "state_bytes": 7}
    before = SizeRecord(**sizes, axes={"state": (16, 16), "channel": (8, 4)})
    after = SizeRecord(**sizes, axes={"state": (4, 11), "channel": (8, 4)})
    shape = ShapeRecord(before=before, after=after, layers=(0, 1))
    assert shape.changes() == {"state": ("16", "4 to 11 (on average 7.5)")}
    card.write(tmp_path, title="a", summary="b", manifest=written(tmp_path, shape=shape))
    told = (tmp_path / "README.md").read_text()
    assert "| states | 16 | 4 to 11 (on average 7.5) |" in told
    assert "Layer by layer: states 4, 11; channels 8, 4." in told
